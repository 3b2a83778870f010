"""report.html: one self-contained page from what lies under results/<tier>/."""

import base64
import inspect
import json
import re
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jinja2
import pandas as pd

from skipfold.errors import ConfigError, DataError, StoreError
from skipfold.files import written
from skipfold.replication import claims, figures, statistics
from skipfold.replication.config import files, published_folder, root
from skipfold.replication.experiments import ACCURACY_VS_T, TRAINED, rule
from skipfold.replication.provenance import STAMP, checksums, commit, relative, sha256
from skipfold.replication.store import read_archive
from skipfold.replication.tables import made_again, read_table, read_tables

TEMPLATES = Path(__file__).with_name("templates")
MEASURED = ("timing", "roofline", "sensitivity")
"""Figures that come after those of the experiments that train networks."""

TIERS = {
    "smoke": "A trial run of every part on scikit-learn's small digits; its numbers say nothing about the paper.",
    "quick": "What is cheap ran with the published protocol and is judged; the ResNets are in small and shown only.",
    "long": "The published protocol on a CPU, with t in steps of 0.1. Small networks were given 15 trials after five "
    "left checks open, which their intervals do not know.",
    "paper": "The published protocol in full.",
}


class Look(NamedTuple):
    """A verdict on the page: a sign beside the colour, for grey print and for readers who see no colour."""

    sign: str
    text: str
    style: str


DATA = {"mnist": "MNIST", "digits": "scikit-learn's digits"}
PRECISIONS = {"float32": "float32", "tf32": "TF32", "bf16": "bf16"}
LOOKS = {
    claims.REPRODUCED: Look("✓", "reproduced", "good"),
    claims.NOT_REPRODUCED: Look("✗", "not reproduced", "bad"),
    claims.INCONCLUSIVE: Look("±", "inconclusive", "unsure"),
    claims.NOT_TESTABLE: Look("?", "not testable", "none"),
    claims.NOT_JUDGED: Look("–", "not judged at this tier", "none"),
}
INTERVALS = {claims.BOOTSTRAP: "95 % interval", claims.OF_MEDIAN: "95 % interval of the median"}
FITTED = {"value": "fitted", "setting": "depends on fitted choices"}

TITLES = {
    "linear_comparison": "Linear networks",
    "schedule_comparison": "Static and scheduled skip strength",
    "timing": "Prediction time",
    "roofline": "Arithmetic reached in prediction",
    "sensitivity": "How the guesses fit",
}

INFERRED, ASSUMED = "inferred", "assumed"
ASSUMPTIONS = (
    ("Meaning of t", "a block gives (1 − t) F(x) + t skip(x)", INFERRED,
     "Published accuracy of ResNet34 collapses at t = 1 and is unstable near t = 0; the formula on the authors' slide, "
     "read literally, has the weights the other way round."),
    ("Optimizer of the linear networks", "{linear}", INFERRED,
     "Matches the perceptron's published curve at noise level (rms 0.0005); learning rate 0.001 with momentum 0.9 fits "
     "as well (scored below)."),
    ("Batch size, inputs, perceptron", "batch {batch_size}, pixels in [0, 1], no bias", INFERRED,
     "From the same fit. Batch 64 also fits the published time of 104.91 µs an image."),
    ("Last batch of an epoch, of 32 images", "{last_batch}", ASSUMED,
     "One step on it can undo a ResNet34 just before it is validated; the published means fall less from one epoch to "
     "the next than ours do with it, or without it (docs/fit.md). The perceptron fits either way."),
    ("Optimizer of the ResNets", "{resnet}", INFERRED,
     "By the fit to the published curves of ResNet34: momentum 0.9 is the best for its usual first layers, none with "
     "a max-pool of stride 3 (docs/fit.md); neither fits at noise level."),
    ("ResNets for 28 × 28", "ResNet18 and 34, first convolution for one channel, no resizing; {resnet_options}",
     INFERRED,
     "The usual network learns too well near t = 0. With a max-pool of stride 3 (imagenet_pool3) and the framework's "
     "initial values it is near the published curves of both ResNets, except at t = 1: there only strided 1 × 1 "
     "projections are left, which see one corner of the image; made 16 × 16 first, images give t = 1, and miss "
     "elsewhere (docs/fit.md)."),
    ("Linearized ResNet34", "ReLUs removed, max-pool kept", INFERRED,
     "Affine networks stay far below the published 0.98682; with its max-pool the network comes near."),
    ("t of the linear networks over epochs", "{t_linear}", INFERRED,
     "By the published curve of the linearized ResNet34 (docs/fit.md)."),
    ("Static t beside the schedules", "{t_static}", INFERRED,
     "By the published curve: validated by batch, t = 0.995 is on it; t = 0.5 ends higher, and is shown beside it "
     "(docs/fit.md)."),
    ("Shape of the schedules", "{schedule}", ASSUMED, "Published are the start (0.9, 0.5) and the end (0)."),
    ("Width, kernel, padding and skips of the shallow networks", "{shallow}", INFERRED,
     "Not published. Fitted to the published curves; of the shallow networks none was found that fits at noise level."),
    ("Validation", "in eval mode; with BatchNorm also by the statistics of each batch", ASSUMED,
     "Published validation accuracies at small t, and with static t, look like those of networks left in training mode "
     "(docs/fit.md). Verdicts are on eval mode."),
    ("First and last epoch of the figures over t", "epochs 1 and 2", INFERRED, "The paper trains 2 epochs there."),
)  # fmt: skip


def build(results: str | Path) -> Path:
    """Write report.html and provenance.json under `results` (results/<tier>); gives the page's path.

    Needs only tables and verdicts.csv, so a tier without some experiments or without a GPU gets its page too. Raises
    ConfigError where nothing ran, and where the verdicts are not those of config/claims.yaml; DataError or StoreError
    where a table, a figure or the packed records are damaged, or the page cannot be written.
    """
    results = Path(results)
    tables = read_tables(results)
    if not tables:
        raise ConfigError(f"results: {results} has no tables; run `snakemake reproduce` first")
    held = claims.load()
    verdicts = _verdicts(results, held)
    provenance = _provenance(results, tables)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html").render(
        css=(TEMPLATES / "report.css").read_text(),
        **_page(results, tables, held, verdicts, provenance),
    )
    texts = {"provenance.json": json.dumps(provenance, indent=1, ensure_ascii=False) + "\n", "report.html": page}
    for name, text in texts.items():
        with written(results / name, StoreError) as part:
            part.write_text(text, encoding="utf-8")
    return results / "report.html"


def _verdicts(results: Path, held: list[dict[str, Any]]) -> pd.DataFrame:
    """verdicts.csv; raises ConfigError unless it has the checks of the claims `held`, and every column."""
    path, again = results / "verdicts.csv", f"run `python -m skipfold.replication judge {results}`"
    if not path.is_file():
        raise ConfigError(f"{path} is not there; {again}")
    verdicts = read_table(path)
    if list(verdicts) != list(claims.COLUMNS):
        differing = sorted(set(verdicts) ^ set(claims.COLUMNS)) or ["their order"]
        raise ConfigError(f"{path}: its columns are not those of a verdict ({', '.join(differing)}); {again}")
    if unknown := sorted(set(verdicts["verdict"].fillna("nothing")) - set(claims.VERDICTS)):
        raise ConfigError(f"{path}: {unknown[0]!r} is no verdict; {again}")
    wanted = [check["id"] for claim in held for check in claim["checks"]]
    if list(verdicts["id"]) != wanted:
        differing = sorted(set(verdicts["id"]) ^ set(wanted)) or ["their order"]
        raise ConfigError(f"{path}: its checks are not those of config/claims.yaml ({', '.join(differing)}); {again}")
    return verdicts


def _page(
    results: Path,
    tables: dict[str, pd.DataFrame],
    held: list[dict[str, Any]],
    verdicts: pd.DataFrame,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    tier = provenance["tier"]
    there = [path.stem for path in sorted((results / "figures").glob("*.svg"))]
    more = [name for name in there if name not in (*TRAINED, *MEASURED)]
    shown = [name for name in (*TRAINED, *more, *MEASURED) if name in there]
    absent = [_title(name) for name in (*TRAINED, *MEASURED) if name not in shown]
    shown_claims = [_claim(claim, verdicts, results) for claim in held]
    return {
        "tier": tier,
        "about_tier": TIERS.get(tier, ""),
        "stamp": statistics.stamp(pd.concat(tables.values())),
        "trials": provenance["trials"],
        "trained": provenance["date"],
        "sections": [
            ("verdicts", "Does the paper reproduce?"),
            *([("paradox", "Accurate or collapsible")] if "linear_comparison" in tables else []),
            ("figures", "Figures"),
            ("checks", "Every check"),
            ("timing", "Prediction time"),
            ("certificates", "Certificates"),
            ("assumptions", "Assumptions"),
            ("provenance", "Provenance"),
        ],
        "claims_file": relative(root() / "config" / "claims.yaml", results),
        "claims": shown_claims,
        "judged": sum(claim["head"]["judged"] for claim in shown_claims),
        "tally": [{"look": LOOKS[name], "count": count} for name, count in _counts(verdicts)],
        "standing": _standing(verdicts),
        "paradox": _paradox(tables, results) if "linear_comparison" in tables else None,
        "figures": [_figure(name, tables, results) for name in shown],
        "absent": ", ".join(absent),
        "timing": _timing(tables["timing"], tables.get("runtimes"), results) if "timing" in tables else None,
        "roofline": _roofline(tables["roofline"], results) if "roofline" in tables else None,
        "certificates": _certificates(tables["certificates"], results) if "certificates" in tables else None,
        "assumptions": _assumptions(tables),
        "sensitivity": _sensitivity(tables["sensitivity"], results) if len(tables.get("sensitivity", ())) else None,
        "provenance": list(_flat(provenance)),
        "provenance_links": _links(results, {"provenance.json": "provenance.json", "records": "trials.jsonl.gz"}),
        "files": [{"href": href, "sha256": digest} for href, digest in checksums(results).items()],
    }


def _counts(verdicts: pd.DataFrame) -> list[tuple[str, int]]:
    """How many checks have each verdict, in the order of claims.VERDICTS."""
    return [(name, int((verdicts["verdict"] == name).sum())) for name in claims.VERDICTS]


def _standing(verdicts: pd.DataFrame) -> dict[str, int]:
    """How many checks there are, how many of them are judged, and what those that passed owe to a fit."""
    fitted = verdicts.loc[verdicts["verdict"] == claims.REPRODUCED, "fitted"]
    return {
        "checks": len(verdicts),
        "judged": int(verdicts["verdict"].isin(claims.JUDGED).sum()),
        "reproduced": len(fitted),
        **{kind: int((fitted == kind).sum()) for kind in FITTED},
        "unfitted": int(fitted.isna().sum()),
    }


# What every part needs: numbers, links, checksums.


def number(value: Any, decimals: int = 4) -> str:
    """A share or a small number: that many decimals, or 2 digits with an exponent below 0.001."""
    if value is None or pd.isna(value):
        return "–"
    if abs(value) < 0.001:
        return f"{value:.1e}" if value else "0"
    return f"{value:.{decimals}f}" if value % 1 or abs(value) < 2 else f"{value:g}"


def extent(values: pd.Series) -> str:
    """The smallest and the largest of `values` as one text."""
    ends = [number(values.min()), number(values.max())]
    return " to ".join(dict.fromkeys(ends))


def microseconds(value: float) -> str:
    """A time to about 3 digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def percent(share: float) -> str:
    """A share in %, with enough digits just below 1."""
    return f"{100 * share:.{2 if 0.99 < share < 1 else 1}f} %".replace("-", "−")


def _links(results: Path, wanted: dict[str, str]) -> list[dict[str, str]]:
    """Links, relative to the page, to those files that are there."""
    return [{"text": text, "href": href} for text, href in wanted.items() if (results / href).is_file()]


def _experiment_links(results: Path, name: str) -> list[dict[str, str]]:
    trained = (results / "tables" / f"{name}_trials.csv").is_file()
    return _links(
        results,
        {
            "means (CSV)" if trained else "table (CSV)": f"tables/{name}.csv",
            "every trial (CSV)": f"tables/{name}_trials.csv",
            "executed notebook": f"notebooks/{name}.ipynb",
            "PNG": f"figures/{name}.png",
            "published points": relative(published_folder() / f"{name}.csv", results),
        },
    )


# The parts of the page.


def _claim(claim: dict[str, Any], verdicts: pd.DataFrame, results: Path) -> dict[str, Any]:
    """A claim with its checks; its verdict, `head`, is that of the central one."""
    own = verdicts[verdicts["claim"] == claim["id"]]
    checks = [_check(row, results) for row in own.to_dict("records")]
    head = next(shown for check, shown in zip(claim["checks"], checks, strict=True) if check.get("central"))
    return {"comment": "", **claim, "checks": checks, "head": head, "detail": detail(list(own["verdict"]))}


def detail(verdicts: list[str]) -> str:
    """How the checks of a claim were judged, in words."""
    judged = [verdict for verdict in verdicts if verdict in claims.JUDGED]
    if not judged:
        return ""
    parts = [f"{judged.count(claims.REPRODUCED)} of {len(judged)} check{'s' if len(judged) > 1 else ''} reproduced"]
    if unsure := judged.count(claims.INCONCLUSIVE):
        parts.append(f"{unsure} inconclusive")
    if left := len(verdicts) - len(judged):
        parts.append(f"{left} more not judged")
    return ", ".join(parts)


def _check(row: dict[str, Any], results: Path) -> dict[str, Any]:
    between = "" if pd.isna(row["low"]) else f"{number(row['low'])} to {number(row['high'])}"
    wanted = {"table": row["table"], "notebook": row["notebook"]}
    return {
        "id": row["id"],
        "quantity": row["quantity"],
        "source": row["source"],
        "published": "–" if pd.isna(row["published"]) else row["published"],
        "limit": "–" if pd.isna(row["limit"]) else row["limit"],
        "ours": number(row["ours"], decimals=5),  # as many as published
        "between": between,
        "n": "–" if pd.isna(row["n"]) else int(row["n"]),
        "look": LOOKS[row["verdict"]],
        "judged": row["verdict"] in claims.JUDGED,
        "interval": INTERVALS.get(row["interval"], ""),
        "fitted": FITTED.get(row["fitted"], ""),
        "remark": "" if pd.isna(row["remark"]) else row["remark"],
        "links": _links(results, {text: href for text, href in wanted.items() if isinstance(href, str)}),
    }


def _paradox(tables: dict[str, pd.DataFrame], results: Path) -> dict[str, Any]:
    """The networks side by side: published accuracy, ours, affine residual, whether they collapse."""
    means, published = tables["linear_comparison"], statistics.published("linear_comparison")
    certificates = tables.get("certificates", pd.DataFrame(columns=["arm", "residual", "affine"]))
    best = number(tables["ceiling"]["val_accuracy"].max()) if "ceiling" in tables else None
    rows = []
    for arm in ("resnet34_linear_maxpool", "resnet34_linear_avgpool", "cnn3", "perceptron"):
        ours = means[(means["arm"] == arm) & (means["split"] == "val")]
        if ours.empty:
            continue
        last = ours.loc[ours["epoch"].idxmax()]
        theirs = published[(published["arm"] == arm) & (published["epoch"] == published["epoch"].max())]["mean"]
        shown = certificates[certificates["arm"] == arm]
        rows.append(
            (
                figures.LOOKS[arm].label,
                number(theirs.iloc[0]) if len(theirs) else "–",
                f"{number(last['mean'])} (epoch {last['epoch']})",
                int(last["n"]),
                extent(shown["residual"]) if len(shown) else "–",
                ("yes" if shown["affine"].all() else "no") if len(shown) else "–",
            )
        )
    if best:
        rows.append(("Best affine classifier found", "–", best, "–", "0", "is one layer"))
    theirs = published[published["arm"] == "resnet34_linear_maxpool"]
    wanted = ("linear_comparison", "certificates", "ceiling")
    return {
        "published": number(theirs.loc[theirs["epoch"].idxmax(), "mean"]),
        "ceiling": best,
        "data": _data(tables["ceiling"]) if best else "",
        "rows": rows,
        "caption": f"Validation accuracy after the last epoch; tier {means['tier'].iloc[0]}, {_protocol(tables)}",
        "links": _links(results, {f"{name}.csv": f"tables/{name}.csv" for name in wanted}),
    }


def _protocol(tables: dict[str, pd.DataFrame]) -> str:
    """On how many training images the linear networks learned, where these were not all."""
    trials = tables.get("linear_comparison_trials")
    if trials is None:
        return "see its trials"
    counts = trials.groupby("arm")["train_images"].first().dropna()
    if counts.empty:
        return f"{_data(trials)}, all training images"
    fewer = ", ".join(f"{figures.TITLES.get(arm, arm)}: {int(count)}" for arm, count in counts.items())
    return f"{_data(trials)}; only so many training images for {fewer}"


def _data(table: pd.DataFrame) -> str:
    """The names of the data sets of a table, as a reader knows them."""
    return ", ".join(DATA.get(name, name) for name in sorted(table["data"].unique()))


def _figure(name: str, tables: dict[str, pd.DataFrame], results: Path) -> dict[str, Any]:
    path = results / "figures" / f"{name}.svg"
    svg = path.read_bytes()
    size = re.search(rb'width="([\d.]+)pt" height="([\d.]+)pt"', svg)
    if not size or not svg.rstrip().endswith(b"</svg>"):
        raise DataError(f"{path}: no whole figure; {made_again(path)}")
    width, height = (round(float(x) * 4 / 3) for x in size.groups())
    return {
        "name": name,
        "title": _title(name),
        "caption": caption(name),
        "alt": _alt(name, tables.get(name)),
        "source": "data:image/svg+xml;base64," + base64.b64encode(svg).decode(),
        "width": width,
        "height": height,
        "links": _experiment_links(results, name),
    }


def _title(name: str) -> str:
    """The heading of a figure."""
    if name.startswith(ACCURACY_VS_T):
        network = name.removeprefix(ACCURACY_VS_T)
        return f"Accuracy against t, {figures.TITLES.get(network, network)}"
    return TITLES.get(name, name)


def caption(name: str) -> str:
    """The caption of an experiment's figure, the same as in Snakemake's report."""
    path = root() / "workflow" / "report" / f"{rule(name)}.rst"
    model = name.removeprefix(ACCURACY_VS_T)
    wildcards = SimpleNamespace(model=figures.TITLES.get(model, model))
    return jinja2.Template(path.read_text()).render(snakemake=SimpleNamespace(wildcards=wildcards)).strip()


def _alt(name: str, table: pd.DataFrame | None) -> str:
    """What the figure shows, for those who do not see it."""
    if table is None or "mean" not in table:
        shown = caption(name).split(". ")[0].rstrip(".")
        return f"{_title(name)}. {shown}. The numbers are in the tables of this page."
    last = table[(table["split"] == "val") & (table["epoch"] == table["epoch"].max())]
    if name.startswith(ACCURACY_VS_T):
        best, worst = last.loc[last["mean"].idxmax()], last.loc[last["mean"].idxmin()]
        return (
            f"{_title(name)}. After the last epoch the validation accuracy is highest at t = {best['t']:g} "
            f"({best['mean']:.4f}) and lowest at t = {worst['t']:g} ({worst['mean']:.4f})."
        )
    ends = ", ".join(f"{row.arm} {row.mean:.4f}" for row in last.itertuples(index=False))
    return f"{_title(name)}: validation accuracy per epoch. After epoch {last['epoch'].max()}: {ends}."


def _timing(table: pd.DataFrame, runtimes: pd.DataFrame | None, results: Path) -> dict[str, Any]:
    batches = sorted(table["batch"].unique(), key=lambda batch: (batch != 64, batch))
    parts = [(batch, measure) for batch in batches for measure in table["measure"].unique()]
    difference = table.get("max_difference", pd.Series(dtype=float)).max()
    return {
        "on_cpu": table["device"].str.startswith("CPU").all(),
        "device": table["device"].iloc[0],
        "difference": None if pd.isna(difference) else number(difference),
        "savings": _savings(statistics.savings(table)),
        "tables": [
            _timing_table(table[(table["batch"] == batch) & (table["measure"] == measure)], batch, measure)
            for batch, measure in parts
        ],
        "runtimes": [] if runtimes is None else _runtimes(runtimes),
        "links": _experiment_links(results, "timing"),
    }


def _savings(table: pd.DataFrame) -> list[tuple]:
    return [
        (
            figures.timing_label(row.network, row.variant),
            row.batch,
            PRECISIONS.get(row.precision, row.precision),
            "–" if pd.isna(row.eager_saved) else _saved(row.eager_saved, row.eager_saved_low, row.eager_saved_high),
            "–" if pd.isna(row.before_us) else _fastest(row.before_variant, row.before_runtime, row.before_us),
            _fastest(row.variant, row.after_runtime, row.after_us),
            "–" if pd.isna(row.before_us) else _saved(row.fastest_saved, row.fastest_saved_low, row.fastest_saved_high),
        )
        for row in table.itertuples(index=False)
    ]


def _fastest(variant: str, runtime: str, median: float) -> list[str]:
    return [microseconds(median), f"{figures.VARIANTS.get(variant, variant)}; {runtime}"]


def _saved(share: float, low: float, high: float) -> list[str]:
    return [percent(share)] if pd.isna(low) else [percent(share), f"{percent(low)} to {percent(high)}"]


def _timing_table(table: pd.DataFrame, batch: int, measure: str) -> dict[str, Any]:
    runtimes = list(dict.fromkeys(table["runtime"]))
    rows = []
    for (network, variant), group in statistics.against_skips(table).groupby(["network", "variant"], sort=False):
        cells = [figures.timing_label(network, variant)]
        for runtime in runtimes:
            ours = group[group["runtime"] == runtime]
            if ours.empty:
                cells.append("–")
                continue
            time = ours.iloc[0]
            cell = [microseconds(time["median_us"]), f"{microseconds(time['q1_us'])}–{microseconds(time['q3_us'])}"]
            if not pd.isna(time["saved"]):
                cell.append(f"saves {percent(time['saved'])}")
            cells.append(cell)
        rows.append(cells)
    text = f"Batch {batch}, {figures.UNITS.get(measure, measure)} time" + (", as published" if batch == 64 else "")
    return {"caption": text, "heads": ["Network", *runtimes], "rows": rows}


def _runtimes(table: pd.DataFrame) -> list[tuple]:
    told = table.dropna(subset="remark").replace({"precision": PRECISIONS})
    return list(told[["runtime", "precision", "remark"]].itertuples(index=False, name=None))


def _roofline(table: pd.DataFrame, results: Path) -> dict[str, Any]:
    pixels = table["variant"].str.startswith("collapsed_pixels")
    timed = table[~pixels]
    batch = 64 if (timed["batch"] == 64).any() else timed["batch"].max()
    first = table.iloc[0]
    convolution = first.get("convolution_flops_per_s")
    rows = [
        (
            figures.timing_label(row.network, row.variant),
            row.runtime,
            row.operators,
            "–" if pd.isna(row.kernels) else row.kernels,
            f"{row.flops / 1e6:,.2f}",
            f"{row.bytes / 1e3:,.1f}",
            f"{row.intensity:.1f}",
            f"{row.flops_per_s / 1e9:,.1f}",
            percent(row.roof_share),
        )
        for row in timed[timed["batch"] == batch].itertuples()
    ]
    from_pixels = [
        (
            f"{row.batch:,}",
            f"{row.runtime}, one kernel" if row.variant.endswith("fused") else row.runtime,
            microseconds(row.median_us * row.batch),
            "–" if pd.isna(row.launch_us) else microseconds(row.launch_us),
            percent(row.input_share),
        )
        for row in table[pixels].itertuples()
    ]
    return {
        "side": first.get("matrix_side"),  # which older tables lack, as the convolution
        "peak": f"{first['peak_flops_per_s'] / 1e9:,.0f}",
        "convolution": convolution and f"{convolution / 1e9:,.0f}",
        "bandwidth": f"{first['copy_bytes_per_s'] / 1e9:,.0f}",
        "state": None if pd.isna(first["gpu_state"]) else first["gpu_state"],
        "removal": _removal(timed.drop_duplicates(["network", "variant"]).set_index(["network", "variant"])),
        "batch": batch,
        "rows": rows,
        "pixels": from_pixels,
        "links": _links(results, {"roofline.csv": "tables/roofline.csv", "notebook": "notebooks/timing.ipynb"}),
    }


def _removal(work: pd.DataFrame) -> list[str]:
    """What skip removal takes away of the work of each network, by the index (network, variant) of `work`."""
    texts = []
    for network in ("resnet18", "resnet34"):
        if not {(network, "skips"), (network, "skips_removed")} <= set(work.index):
            continue
        before, after = work.loc[(network, "skips")], work.loc[(network, "skips_removed")]
        counted = "operators" if pd.isna(before["kernels"]) else "kernels"
        text = f"of {figures.TITLES[network]} {percent(1 - after[counted] / before[counted])} of the {counted}"
        if (network, "skips_literal") in work.index:
            written_out = work.loc[(network, "skips_literal")][counted]
            text += f" ({percent(1 - after[counted] / written_out)} where the weighted sum is written out)"
        texts.append(f"{text} and {percent(1 - after['flops'] / before['flops'])} of the FLOPs")
    return texts


def _certificates(table: pd.DataFrame, results: Path) -> dict[str, Any]:
    rows = []
    for arm, group in table.groupby("arm", sort=False):
        rows.append(
            (
                figures.TITLES.get(arm, arm),
                len(group),
                "yes" if group["affine"].all() else "refused",
                extent(group["residual"]),
                number(group["max_error"].max()),
                number(group["max_error_float32"].max()),
                number(group["equal_argmax"].min()),
            )
        )
    refused = table.dropna(subset=["refused"]).drop_duplicates("arm")
    return {
        "rows": rows,
        "refusals": [
            f"{figures.TITLES.get(row.arm, row.arm)}: collapse refuses it, {row.refused}"
            for row in refused.itertuples()
        ],
        "links": _links(
            results,
            {"certificates.csv": "tables/certificates.csv", "notebook": "notebooks/linear_comparison.ipynb"},
        ),
    }


def _sensitivity(table: pd.DataFrame, results: Path) -> dict[str, Any]:
    groups = []
    for (assumption, name), options in table.groupby(["assumption", "figure"]):
        rows = [
            (
                f"{figures.option_label(assumption, row.alternative)}{' (in use)' if row.chosen else ''}",
                "none" if pd.isna(row.verdicts_flipped) or not row.verdicts_flipped else row.verdicts_flipped,
                number(row.rmse),
                number(row.rmse_by_batch),
                row.trials if pd.isna(row.images) else (row.trials, f"on {row.images:.0f} images"),
            )
            for row in options.sort_values("rmse", kind="stable").itertuples()
        ]
        words = figures.ASSUMPTIONS.get(assumption, assumption)
        groups.append({"assumption": words, "figure": _title(name), "rows": rows})
    text = "rms distance of accuracies from the published points; of each assumption the best in eval mode comes first"
    return {"groups": groups, "caption": text, "links": _experiment_links(results, "sensitivity")}


def _assumptions(tables: dict[str, pd.DataFrame]) -> list[dict[str, str]]:
    """ASSUMPTIONS with what the trials of these results really used."""
    trials = [table for name, table in tables.items() if name.endswith("_trials")]
    rows = pd.concat(trials) if trials else pd.DataFrame(columns=["experiment", "network", "optimizer", "arm"])
    resnet = rows["network"].astype(str).str.startswith("resnet")
    shallow = rows["network"].isin(["cnn3", "shallow_linear", "shallow_leaky_relu"])
    linear = rows[(rows["experiment"] == "linear_comparison") & (rows["network"] != "perceptron")]
    used = {
        "linear": _distinct(rows[~resnet], "optimizer"),
        "resnet": _distinct(rows[resnet], "optimizer"),
        "resnet_options": _distinct(rows[resnet], "options") or "usual first layers",
        "batch_size": _distinct(rows, "batch_size"),
        "last_batch": {"True": "left out", "False": "kept"}.get(_distinct(rows, "drop_last")),
        "t_linear": _distinct(linear, "t_start"),
        "t_static": _distinct(rows[rows["arm"] == "static"], "t_start"),
        "schedule": _distinct(rows[rows.get("schedule") != "static"], "schedule") if trials else "–",
        "shallow": "; otherwise ".join(filter(None, [_distinct(rows[shallow], "options"), _shallow_defaults()])),
    }
    return [
        {"open": open_, "used": text.format(**{k: v or "–" for k, v in used.items()}), "standing": standing, "why": why}
        for open_, text, standing, why in ASSUMPTIONS
    ]


def _shallow_defaults() -> str:
    """What the shallow networks are where the configuration says nothing."""
    from skipfold import networks  # takes seconds to import

    own = ("width", "kernel", "padding", "stride", "hidden", "skips", "bias")
    defaults = inspect.signature(networks.skip_cnn).parameters
    return " ".join(f"{name}={defaults[name].default}" for name in own)


def _distinct(rows: pd.DataFrame, column: str) -> str:
    if column not in rows:
        return ""
    return "; ".join(
        f"{value:g}" if isinstance(value, float) else str(value) for value in rows[column].dropna().unique()
    )


# Where it all came from.


def _provenance(results: Path, tables: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """What the page, its tables and its records came from, as plain JSON values."""
    stamps = statistics.stamp(pd.concat(tables.values()))
    found: dict[str, Any] = {"tier": stamps["tier"] or results.name, "trials": 0, "seconds_of_training": 0.0}
    records = _records(results / "trials.jsonl.gz")
    found["trials"] = len(records) or len(set().union(*_digests(tables)))
    found["seconds_of_training"] = round(sum(epoch["seconds"] for record in records for epoch in record["epochs"]), 1)
    found["precision"] = statistics.join(map(_precision, records))
    for key in dict.fromkeys(key for record in records for key in record["provenance"]):
        values = [record["provenance"].get(key) for record in records]
        if key == "data_md5":
            found[key] = {name: md5 for value in values for name, md5 in (value or {}).items()}
        else:
            found[key] = statistics.join(values)
    for key in STAMP:
        found.setdefault(key, stamps[key])
    if "timing" in tables:
        found["timed_on"] = statistics.join(tables["timing"]["device"])
    found["report_built_at_commit"] = commit()
    for name in ("requirements/lock.txt", *files(found["tier"])):
        path = root() / name
        found[f"sha256 of {name}"] = sha256(path) if path.is_file() else "no such file"
    return found


def _records(archive: Path) -> list[dict[str, Any]]:
    """The packed records; raises StoreError on what is none."""
    records = read_archive(archive) if archive.is_file() else []
    if not all(isinstance(record, dict) and {"trial", "epochs", "provenance"} <= set(record) for record in records):
        raise StoreError(f"{archive}: a line is not the record of a trial; delete it, and pack it again")
    return records


def _precision(record: dict[str, Any]) -> str:
    """In which a trial was trained: TF32 is a GPU's, a CPU has float32 then."""
    asked = record["trial"]["precision"]
    return "float32" if asked == "tf32" and not record["provenance"].get("cuda") else asked


def _digests(tables: dict[str, pd.DataFrame]) -> Iterable[set[str]]:
    return (set(table["digest"]) for name, table in tables.items() if name.endswith("_trials"))


def _flat(provenance: dict[str, Any]) -> Iterable[tuple[str, str]]:
    for key, value in provenance.items():
        if isinstance(value, dict):
            yield from (
                (f"md5 of {name}" if key == "data_md5" else f"{key} {name}", text) for name, text in value.items()
            )
        elif value not in ("", None):
            yield key.replace("_", " "), str(value)

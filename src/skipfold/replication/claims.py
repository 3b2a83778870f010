"""The paper's claims (config/claims.yaml) judged against the tables of a tier."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import numpy as np
import pandas as pd
import yaml

from skipfold.errors import ConfigError
from skipfold.replication import config, statistics
from skipfold.replication.provenance import STAMP
from skipfold.replication.tables import read_tables

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
INCONCLUSIVE = "inconclusive"
NOT_TESTABLE = "not testable"
NOT_JUDGED = "not judged at this tier"
JUDGED = (REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE)
VERDICTS = (*JUDGED, NOT_TESTABLE, NOT_JUDGED)

ROUNDING = 1e-12
"""Of a mean of accuracies and of a limit, which are both multiples of the share of one image."""

BOOTSTRAP = "95 % bootstrap"
OF_MEDIAN = "95 % of the median"

COLUMNS = (
    "claim",
    "id",
    "quantity",
    "published",
    "relation",
    "tolerance",
    "limit",
    "ours",
    "low",
    "high",
    "interval",
    "n",
    "verdict",
    "fitted",
    "remark",
    "experiment",
    "table",
    "notebook",
    "source",
    *STAMP,
)


Tables = Mapping[str, pd.DataFrame]
"""A tier's tables by name, as `tables.read_tables` reads them."""


class Finding(NamedTuple):
    """Our value with its interval (what kind `interval` says), the number of trials, and the rows it came from.

    `published` is the published value at our points, where it hangs on how many there are.
    """

    value: float
    low: float
    high: float
    interval: str
    n: int | None
    rows: pd.DataFrame
    remark: str = ""
    published: float | None = None


class NotRun(Exception):
    """The published protocol did not run here; the text says what is missing. Never leaves this module."""


def load(path: str | Path = "config/claims.yaml") -> list[dict[str, Any]]:
    """The claims in `path`, from the repository's root, checked against workflow/schemas/claims.schema.yaml.

    Raises ConfigError on what is no YAML, on a claim that does not fit the schema, on an id that is given twice, and
    unless one check of each claim is `central`.
    """
    content = config.read_file(path)
    config.check(content, _validator(), path)
    claims = content["claims"]
    for kind, entries in (("claim", claims), ("check", [check for claim in claims for check in claim["checks"]])):
        ids = [entry["id"] for entry in entries]
        if twice := sorted({name for name in ids if ids.count(name) > 1}):
            raise ConfigError(f"{path}: {kind} {', '.join(twice)} given twice; each {kind} needs an id of its own")
    for claim in claims:
        if (count := sum("central" in check for check in claim["checks"])) != 1:
            raise ConfigError(f"{path}: claim {claim['id']} has {count} checks with central: true; give it to one")
    return claims


def _validator() -> jsonschema.Draft202012Validator:
    """That of the claims' schema, with the names that the configuration's schema has."""
    schema = yaml.safe_load((config.root() / "workflow" / "schemas" / "claims.schema.yaml").read_text())
    named = schema["$defs"]
    named["config"] = config.schema()
    # All that a tier may have, whether one of ours has it or not.
    named["trained"]["enum"] = list(named["config"]["properties"]["experiments"]["properties"])
    networks = named["config"]["$defs"]["network"]["enum"]
    named["arm"]["examples"] = [*networks, *named["arm"]["examples"]]
    named["arm"]["pattern"] += f"|^({'|'.join(networks)})$"
    return config.validator(schema)


def judge(results: str | Path) -> pd.DataFrame:
    """A verdict for every check of `load`, from the tables under `results` (results/<tier>); see `judge_tables`."""
    return judge_tables(read_tables(results), load())


def judge_tables(tables: Tables, claims: list[dict[str, Any]]) -> pd.DataFrame:
    """A verdict for every check of `claims`, from the tables of a tier.

    Columns: claim, id, quantity, published (text), relation, tolerance, limit (what ours has to be, in words), ours,
    low, high, interval (what low and high are), n (trials, of times rounds), verdict (one of VERDICTS), fitted (as the
    check says), remark, experiment, table and notebook (paths under results/<tier>), source, STAMP. A value is empty
    where there is none.
    """
    rows = [{"claim": claim["id"], **_row(check, tables)} for claim in claims for check in claim["checks"]]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _row(check: dict[str, Any], tables: Tables) -> dict[str, Any]:
    row = {key: check[key] for key in ("id", "quantity", "relation", "tolerance", "experiment", "source")}
    row["fitted"] = check.get("fitted")
    value = check["published"]
    row["published"] = " to ".join(f"{x:g}" for x in value) if isinstance(value, list) else f"{value:g}"
    if reason := check.get("not_testable"):
        return row | {"verdict": NOT_TESTABLE, "remark": reason}
    row["limit"] = limit(check)
    kind = check["measure"]["kind"]
    if kind == "rmse":  # from what is published, which has none itself
        row["published"] = None
    table = {"certificate": "certificates", "final": f"{check['experiment']}_trials"}.get(kind, check["experiment"])
    row |= {"table": f"tables/{table}.csv", "notebook": f"notebooks/{check['experiment']}.ipynb"}
    try:
        found = MEASURES[kind](check, tables)
    except NotRun as reason:
        return row | {"verdict": NOT_JUDGED, "remark": str(reason)}
    if found.published is not None:
        check = check | {"published": found.published}
        row |= {"published": f"{found.published:.5g}", "limit": limit(check)}
    lowest, highest = accepted(check)
    verdict, remark = _verdict(found, lowest, highest)
    remarks = [found.remark, remark]
    if check["relation"] == "at_least" and found.low > value:
        remarks.append(f"published {value:g}, ours {found.value:.5g}: larger than published")
    for split, how in OTHERWISE.items():
        if (otherwise := _otherwise(check, split, tables)) is not None:
            between = f"{otherwise.low:.5f} to {otherwise.high:.5f}"
            would, _ = _verdict(otherwise, lowest, highest)
            remarks.append(f"{how} {otherwise.value:.5f} ({between}): {would}")
    numbers = {"ours": found.value, "low": found.low, "high": found.high, "interval": found.interval, "n": found.n}
    row |= {"verdict": verdict, "remark": "; ".join(filter(None, remarks))}
    return row | numbers | statistics.stamp(found.rows)


def _verdict(found: Finding, lowest: float, highest: float) -> tuple[str, str]:
    """The verdict by the values that are accepted, and what has to be said of it."""
    holds = lowest <= found.value <= highest
    within, apart = lowest <= found.low and found.high <= highest, found.high < lowest or highest < found.low
    if math.isfinite(found.low) and not (within if holds else apart):
        return INCONCLUSIVE, f"our value lies {'within' if holds else 'outside'} the limit"
    return (REPRODUCED if holds else NOT_REPRODUCED), ""


OTHERWISE = {
    "val_batch": "with the statistics of each batch",
    "val_reestimated": "with running statistics estimated anew",
}
"""Splits that a check in eval mode is told of as well, and how they are measured."""


def _otherwise(check: dict[str, Any], split: str, tables: Tables) -> Finding | None:
    """What `check` finds with validation measured as `split` has it; None where that was not measured."""
    measure = check["measure"]
    selections = {key: measure[key] for key in ("of", "minus") if key in measure}
    if measure["kind"] not in OF_TRAINED or any("split" in selection for selection in selections.values()):
        return None
    moved = {key: selection | {"split": split} for key, selection in selections.items()}
    try:
        return MEASURES[measure["kind"]](check | {"measure": measure | moved}, tables)
    except NotRun:
        return None


def accepted(check: dict[str, Any]) -> tuple[float, float]:
    """The least and the largest value that counts as reproduced: a value on the limit does, however it is rounded."""
    published, tolerance = check["published"], check["tolerance"] + ROUNDING
    low, high = published if isinstance(published, list) else (published, published)
    least = -math.inf if check["relation"] == "at_most" else low - tolerance
    return least, math.inf if check["relation"] == "at_least" else high + tolerance


def limit(check: dict[str, Any]) -> str:
    """What the check asks of a value, in words."""
    least, largest = accepted(check)
    if math.isinf(largest):
        return f"at least {least:.5g}"
    if math.isinf(least):
        return f"at most {largest:.5g}"
    return f"{least:.5g} to {largest:.5g}"


# Accuracies of trained networks: matrices [trials, points], so that every interval resamples an arm's whole trials.


class Points(NamedTuple):
    """Accuracies [trials, points] with the rows they came from, and (arm, t, epoch) of each point.

    Where an arm has fewer trials than another, its values end in not a number.
    """

    values: np.ndarray
    rows: pd.DataFrame
    keys: pd.DataFrame


def _points(check: dict[str, Any], selection: dict[str, Any], tables: Tables) -> Points:
    """The selected points of an experiment; raises NotRun where they did not run with the published protocol."""
    rows = _table(tables, f"{check['experiment']}_trials")
    if "arm" in selection:
        rows = rows[rows["arm"] == selection["arm"]]
    else:
        start, end = selection["t"]
        rows = rows[rows["t_start"].between(start - 1e-9, end + 1e-9)]
    name = selection.get("arm") or "t from {:g} to {:g}".format(*selection["t"])
    _check_protocol(rows, check["protocol"], name)
    if "t" in selection and "t_step" in check["protocol"]:
        _check_grid(rows["t_start"].unique(), selection["t"], check["protocol"]["t_step"], name)
    epoch = selection["epoch"]
    if epoch != "all":
        rows = rows[rows["epoch"] == (rows["epochs"] if epoch == "last" else epoch)]
    column = statistics.SPLITS[selection.get("split", "val")]
    if rows.empty or column not in rows or rows[column].isna().any():
        raise NotRun(f"{name}: {column} was not measured")
    table = rows.pivot_table(index="index", columns=["arm", "t_start", "epoch"], values=column).dropna()
    if len(table) < (needed := check["protocol"].get("trials", 1)):
        raise NotRun(f"{name}: {_trials(len(table))} hold every point, {needed} are needed")
    return Points(table.to_numpy(float), rows, table.columns.to_frame(index=False))


def _check_protocol(rows: pd.DataFrame, protocol: dict[str, Any], name: str) -> None:
    """Raise NotRun unless all `rows` ran on all images, and with what else `protocol` gives."""
    if rows.empty:
        raise NotRun(f"{name}: did not run")
    wrong = []
    for key, unit in (("data", ""), ("network", ""), ("epochs", " epochs")):
        if key in protocol and (others := sorted(set(rows[key]) - {protocol[key]})):
            wrong.append(f"{', '.join(map(str, others))} instead of {protocol[key]}{unit}")
    if rows.reindex(columns=["train_images", "val_images"]).notna().any(axis=None):
        wrong.append("not all images")
    if "trials" in protocol and (trials := rows.groupby("arm")["digest"].nunique().min()) < protocol["trials"]:
        wrong.append(f"{_trials(trials)} instead of {protocol['trials']}")
    if wrong:
        raise NotRun(f"{name}: {', '.join(wrong)}")


def _check_grid(ran: np.ndarray, between: list[float], step: float, name: str) -> None:
    """Raise NotRun unless `ran` holds every multiple of `step` in the range."""
    start, end = between
    needed = step * np.arange(math.ceil(start / step - 1e-6), math.floor(end / step + 1e-6) + 1)
    missing = [f"{t:g}" for t in needed if not np.isclose(ran, t).any()]
    if missing:
        raise NotRun(f"{name}: t = {', '.join(missing)} did not run")


def _trials(count: int) -> str:
    return f"{count} trial{'' if count == 1 else 's'}"


def _table(tables: Tables, name: str) -> pd.DataFrame:
    if name not in tables:
        raise NotRun(f"{name.removesuffix('_trials')} did not run")
    return tables[name]


def _finding(
    points: Points, statistic: Callable[[np.ndarray], np.ndarray], theirs: np.ndarray | None = None
) -> Finding:
    """`statistic` of our means, and in the remark of the published points `theirs` where all of them are."""

    def of_means(trials: np.ndarray) -> np.ndarray:
        return statistic(np.nanmean(trials, axis=-2))

    low, high = statistics.interval(points.values, of_means, points.keys["arm"])
    remark = "" if theirs is None or np.isnan(theirs).any() else f"published at the same t {statistic(theirs):.5f}"
    fewest = int(np.isfinite(points.values).sum(axis=0).min())
    return Finding(float(of_means(points.values)), low, high, BOOTSTRAP, fewest, points.rows, remark)


def _theirs(check: dict[str, Any], points: Points) -> np.ndarray:
    """The published value of each of our `points`, not a number where there is none."""
    if not config.published(check["experiment"]).is_file():
        return np.full(len(points.keys), np.nan)
    theirs = statistics.published(check["experiment"])
    theirs = theirs[theirs["split"] == ("train" if check["measure"]["of"].get("split") == "train" else "val")]
    known = {_key(row.arm, row.t, row.epoch): row.mean for row in theirs.itertuples(index=False)}
    by_t = "t" in check["measure"]["of"]
    keys = (_key(row.arm, row.t_start if by_t else math.nan, row.epoch) for row in points.keys.itertuples())
    return np.array([known.get(key, math.nan) for key in keys])


def _key(arm: str, t: float, epoch: int) -> tuple:
    """Of a point in both tables: by t and epoch where the curve is over t, else by arm and epoch."""
    return (arm, int(epoch)) if math.isnan(t) else (round(float(t), 6), int(epoch))


def _over_t(check: dict[str, Any], points: Points) -> np.ndarray | None:
    """The published values at our t, which are fewer than the paper's; None where `points` are not over t."""
    several = "t" in check["measure"]["of"] and len(points.keys) > 1
    return _theirs(check, points) if several else None


def _mean(check: dict[str, Any], tables: Tables) -> Finding:
    points = _points(check, check["measure"]["of"], tables)
    return _finding(points, lambda means: means.mean(axis=-1), _over_t(check, points))


def _range(check: dict[str, Any], tables: Tables) -> Finding:
    """Largest less smallest of the mean accuracies; it grows with the number of t, so the published one is at ours."""
    points = _points(check, check["measure"]["of"], tables)
    theirs = _theirs(check, points)
    found = statistics.spread(points.values, points.keys["arm"])
    at_ours = None if np.isnan(theirs).any() else float(np.ptp(theirs))
    return Finding(*found, BOOTSTRAP, len(points.values), points.rows, published=at_ours)


def _difference(check: dict[str, Any], tables: Tables) -> Finding:
    """Mean of one selection less that of another."""
    of, minus = (_points(check, check["measure"][key], tables) for key in ("of", "minus"))
    # Fills up the one with fewer trials.
    both = pd.concat([pd.DataFrame(of.values), pd.DataFrame(minus.values)], axis=1)
    width = of.values.shape[1]
    points = Points(both.to_numpy(), pd.concat([of.rows, minus.rows]), pd.concat([of.keys, minus.keys]))

    def difference(means: np.ndarray) -> np.ndarray:
        return means[..., :width].mean(axis=-1) - means[..., width:].mean(axis=-1)

    return _finding(points, difference, _over_t(check, points))


def _rmse(check: dict[str, Any], tables: Tables) -> Finding:
    """Root mean square distance of our accuracies from the published points that we ran as well."""
    points = _points(check, check["measure"]["of"], tables)
    target = _theirs(check, points)
    shared = ~np.isnan(target)
    if not shared.any():
        raise NotRun("no published point was run")
    values, target = points.values[:, shared], target[shared]
    found = statistics.distance(values, target, points.keys["arm"][shared])
    remark = f"{shared.sum()} published points; {statistics.rms(values, target):.5f} with the noise of our means"
    return Finding(*found, BOOTSTRAP, len(values), points.rows, remark)


def _certificate(check: dict[str, Any], tables: Tables) -> Finding:
    """The worst of a column of the certificates."""
    table = _table(tables, "certificates")
    return _worst(check, table[table["experiment"] == check["experiment"]])


def _final(check: dict[str, Any], tables: Tables) -> Finding:
    """The worst of what was measured on the trained networks, one of `statistics.FINAL`."""
    table = _table(tables, f"{check['experiment']}_trials")
    return _worst(check, table[table["epoch"] == table["epochs"]])


def _worst(check: dict[str, Any], table: pd.DataFrame) -> Finding:
    """The worst of a column of `table`, a row a network, over the arms that ran with the published protocol."""
    measure = check["measure"]
    good, reasons = [], []
    for arm in measure["arms"]:
        rows = table[table["arm"] == arm]
        try:
            _check_protocol(rows, check["protocol"], arm)
        except NotRun as reason:
            reasons.append(str(reason))
            continue
        good.append(rows)
    if not good:
        raise NotRun("; ".join(reasons))
    rows = pd.concat(good)
    if measure["column"] not in rows or rows[measure["column"]].isna().any():
        raise NotRun(f"{measure['column']} was not measured")
    values = rows[measure["column"]]
    value = values.max() if measure["worst"] == "largest" else values.min()
    refused = sorted(rows["refused"].dropna().unique())
    remarks = [", ".join(dict.fromkeys(rows["arm"]))] if len(measure["arms"]) > 1 else []
    remarks += [f"collapse refuses it: {refused[0]}"] if refused else []
    remarks += [f"not counted: {'; '.join(reasons)}"] if reasons else []
    return Finding(float(value), math.nan, math.nan, "", len(rows), rows, "; ".join(remarks))


def _saving(check: dict[str, Any], tables: Tables) -> Finding:
    """Share of wall-clock prediction time that one variant saves against another, see `statistics.saving`."""
    measure = check["measure"]
    table = _table(tables, "timing")
    table = table[
        (table["runtime"] == measure["runtime"]) & (table["batch"] == measure["batch"]) & (table["measure"] == "host")
    ]
    rows = []
    for which in ("of", "against"):
        wanted = measure[which]
        row = table[(table["network"] == wanted["network"]) & (table["variant"] == wanted["variant"])]
        if row.empty:
            raise NotRun(f"{wanted['network']} {wanted['variant']}, batch {measure['batch']}: was not timed")
        rows.append(row.iloc[:1])
    both = pd.concat(rows)
    if check["protocol"].get("device") == "cuda" and both["device"].str.startswith("CPU").any():
        raise NotRun("timed on a CPU; the published times are a GPU's")
    (_, of), (_, against) = both.iterrows()
    saved = statistics.saving(of["samples_us"], against["samples_us"])
    remark = f"{against['median_us']:.2f} to {of['median_us']:.2f} µs an image"
    return Finding(*saved, OF_MEDIAN, int(both["repeats"].min()), both, remark)


OF_TRAINED: dict[str, Callable[[dict[str, Any], Tables], Finding]] = {
    "mean": _mean,
    "range": _range,
    "difference": _difference,
    "rmse": _rmse,
}
"""Measures of accuracies, in one split or another."""

MEASURES: dict[str, Callable[[dict[str, Any], Tables], Finding]] = {
    **OF_TRAINED,
    "certificate": _certificate,
    "final": _final,
    "saving": _saving,
}

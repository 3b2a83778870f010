"""What a notebook does: parameters to configuration, trials, records, tables, figure."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml
from matplotlib.figure import Figure

from skipfold import files
from skipfold.errors import ConfigError, SkipfoldError
from skipfold.keys import UNREADABLE, merge, nested, parse
from skipfold.replication import ceiling, claims, config, experiments, figures, sensitivity, statistics
from skipfold.replication.progress import in_notebook
from skipfold.replication.provenance import STAMP
from skipfold.replication.records import dataset, prepare, records
from skipfold.replication.tables import read_table, write_table

COMMON = ("tier", "device", "trials", "epochs", "results", "overrides")
"""Parameters of a notebook that shows an experiment."""

TIMES = ("timing", "runtimes", "roofline")
"""The tables that are measured, not computed from others; a second measurement differs."""

SCHEDULED = "resnet34"
"""The network that the paper trains with scheduled t."""


@dataclass
class Study:
    """An experiment's tables by name and its figure."""

    name: str
    config: config.Config
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    figure: Figure | None = None
    more: dict[str, Figure] = field(default_factory=dict)
    """Figures beside the one of its own name."""
    measured: Path | None = None
    """Folder with TIMES of an earlier run, which are shown and not written; None measures."""

    @property
    def table(self) -> pd.DataFrame:
        """The table that the figure shows."""
        return self.tables[self.name]

    def save(self, folder: Path) -> None:
        """Write tables/*.csv, figures/*.svg and figures/*.png under `folder`."""
        files.writable(folder)
        (folder / "tables").mkdir(parents=True, exist_ok=True)
        for name, table in self.tables.items():
            if self.measured is None or name not in TIMES:
                write_table(table, folder / "tables" / f"{name}.csv")
        (folder / "figures").mkdir(exist_ok=True)
        for name, figure in {self.name: self.figure, **self.more}.items():
            figures.save(figure, folder / "figures" / name)


def run(notebook: str, namespace: Mapping[str, Any]) -> Study:
    """The study of `notebook` with the parameters that stand in its `namespace`; saved where `results` names a folder.

    Raises ConfigError on a parameter that does not exist or has a bad value; in a notebook, as one line.
    """
    one_line_errors()
    if notebook not in STUDIES:
        raise ConfigError(f"notebook: {notebook!r} given; allowed are those of skipfold.replication.study.STUDIES")
    asked = parameters(notebook, namespace)
    name, settings = configure(notebook, asked)
    study = Study(name, settings, measured=_folder("measured", asked))
    results = _folder("results", asked)
    if results:
        files.writable(results)
    STUDIES[notebook].make(study)
    if results:
        study.save(results)
    return study


def _folder(name: str, asked: Mapping[str, Any]) -> Path | None:
    given = asked.get(name)
    if not isinstance(given, str | Path | None):
        raise ConfigError(f"{name}: {given!r} given; the name of a folder is allowed, or None")
    return Path(given) if given else None


def parameters(notebook: str, namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters in `namespace`; raises ConfigError on another public name there that holds a plain value."""
    allowed = STUDIES[notebook].parameters
    plain = (str, int, float, list, tuple, dict, type(None))
    found = {
        name: value
        for name, value in namespace.items()
        # In and Out are IPython's own; a parameter of another type is not to be ignored.
        if name in allowed or (isinstance(value, plain) and name not in ("In", "Out") and not name.startswith("_"))
    }
    for name in found:
        if name not in allowed:
            raise ConfigError(
                f"parameter: {name!r} is not one of notebook {notebook}; allowed are {', '.join(allowed)}"
            )
    return found


def configure(notebook: str, asked: Mapping[str, Any]) -> tuple[str, config.Config]:
    """The name of the experiment that `notebook` shows with the parameters `asked`, and its configuration."""
    overrides = _overrides(asked.get("overrides"))
    if asked.get("device") is not None:
        overrides = merge(overrides, {"device": asked["device"]})
    settings = config.load(asked.get("tier"), overrides)
    overrides.pop("tier", None)  # which may be auto, and is settings' now
    name = notebook
    if notebook == "accuracy_vs_t":
        name = f"accuracy_vs_t_{asked.get('model')}"
        allowed = [key.removeprefix("accuracy_vs_t_") for key in settings["experiments"] if key.startswith("accuracy")]
        if asked.get("model") not in allowed:
            raise ConfigError(f"model: {asked.get('model')!r} given; allowed is one of {', '.join(allowed)}")
    own = {"trials": asked.get("trials"), "epochs": asked.get("epochs"), "t": t_list(asked.get("t_values"))}
    for key, value in own.items():
        if value is not None:
            overrides = merge(overrides, nested(f"experiments.{name}.{key}", value))
    return name, config.load(settings["tier"], overrides)


def t_list(given: Any) -> list[Any] | None:
    """A list of t from a list, one value, or a text such as "0, 0.5, 1", which is how papermill -p gives it."""
    if isinstance(given, str):
        given = _from_yaml("t_values", given if given.strip().startswith("[") else f"[{given}]")
    if given is None or isinstance(given, list | tuple):
        return given if given is None else list(given)
    return [given]


def _overrides(given: Any) -> dict[str, Any]:
    """From a mapping, or a text such as "{trials: 2}" or "trials=2 epochs=1", which is how papermill -p gives it."""
    if isinstance(given, str):
        given = _from_yaml("overrides", given) if given.strip().startswith("{") else parse(given.split())
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"overrides: {given!r} given; a mapping of configuration keys is allowed")
    return dict(given or {})


def _from_yaml(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except UNREADABLE as error:
        raise ConfigError(f"{name}: {text!r} given, which is no YAML; close its brackets and quotes") from error


def show(found: Figure | pd.DataFrame) -> Any:
    """A figure, or a table in short, as a notebook's cell shows it.

    Columns that say the same in each row go to the caption, those of the stamp, which the figure has, are left out.
    """
    from IPython.display import HTML, Image

    if isinstance(found, pd.DataFrame):
        table = found.drop(columns=list(STAMP), errors="ignore").dropna(axis=1, how="all")
        same = [name for name in table if len(table) > 1 and table[name].nunique(dropna=False) == 1]
        caption = ", ".join(f"{name} {_cell(table[name].iloc[0])}" for name in same)
        shown = table.drop(columns=same).style.format(_cell, escape="html").hide().set_caption(caption)
        # The id is fixed, and no object's address is shown, so that a notebook that is run again is the same.
        return HTML(shown.to_html(table_uuid="table"))
    buffer = io.BytesIO()
    found.savefig(buffer, format="png", dpi=110)
    return Image(buffer.getvalue())


def _cell(value: Any) -> str:
    """Four digits of a number, with an exponent where it is tiny; all before the point; nothing of what is missing."""
    if pd.isna(value):
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.4g}"


def one_line_errors() -> None:
    """In a notebook, show a SkipfoldError as its one line; the cell fails all the same."""
    if not in_notebook():
        return
    from IPython import get_ipython

    def one_line(shell, kind, error, trace, tb_offset=None):
        line = [f"{kind.__name__}: {error}"]
        shell._showtraceback(kind, error, line)
        return line

    get_ipython().set_custom_exc((SkipfoldError,), one_line)


def published(study: Study) -> pd.DataFrame | None:
    """The paper's points; None of an experiment, or a network, that is not the paper's."""
    wanted = study.config["experiments"][study.name]
    if wanted.get("network", SCHEDULED) != SCHEDULED or not config.published(study.name).is_file():
        return None
    return statistics.published(study.name)


def _trained(study: Study) -> None:
    """The tables that every experiment has: <name>_trials and <name>."""
    found = records(study.config, study.name)
    trials = statistics.tidy(found.values(), study.config["tier"])
    study.tables[f"{study.name}_trials"] = trials
    study.tables[study.name] = statistics.aggregate(trials)


def _accuracy_vs_t(study: Study) -> None:
    _trained(study)
    study.figure = figures.accuracy_vs_t(study.table, published(study))


def _schedule_comparison(study: Study) -> None:
    _trained(study)
    study.figure = figures.schedule_comparison(study.table, study.tables[f"{study.name}_trials"], published(study))


def _linear_comparison(study: Study) -> None:
    _trained(study)
    study.tables["certificates"] = statistics.certificates(study.tables[f"{study.name}_trials"])
    study.tables["ceiling"] = _ceiling(study.config)
    best = float(study.tables["ceiling"]["val_accuracy"].max())
    study.figure = figures.linear_comparison(study.table, published(study), ceiling=best)


def _ceiling(settings: config.Config) -> pd.DataFrame:
    device, _ = prepare(settings)
    used = {key: settings[key] for key in ("train_images", "val_images")}
    found = ceiling.best_affine(dataset(settings, settings["data"]).first(*used.values()).to(device))
    return found.assign(**used, tier=settings["tier"]).astype(dict.fromkeys(used, "Int64"))


def times(settings: config.Config) -> dict[str, pd.DataFrame]:
    """TIMES by name, measured now."""
    # Here, because nothing else needs the runtimes.
    from skipfold.replication import roofline, timing

    device, _ = prepare(settings)
    measured, runtimes = timing.measure(settings, device)
    return {"timing": measured, "runtimes": runtimes, "roofline": roofline.measure(measured, device)}


def _measured(folder: Path) -> dict[str, pd.DataFrame]:
    paths = {name: folder / f"{name}.csv" for name in TIMES}
    if missing := [path for path in paths.values() if not path.is_file()]:
        raise ConfigError(
            f"measured: {missing[0]} is not there; give the folder with the tables of a run, or None to measure now"
        )
    return {name: read_table(path) for name, path in paths.items()}


def _timing(study: Study) -> None:
    study.tables |= times(study.config) if study.measured is None else _measured(study.measured)
    study.tables["savings"] = statistics.savings(study.table)
    study.figure = figures.timing(study.table, _published_saving())
    study.more["roofline"] = figures.roofline(study.tables["roofline"])


def _published_saving() -> tuple[float, float] | None:
    """The shares of time that skip removal is said to save; the paper does not say which network has which."""
    published = {check["id"]: check["published"] for claim in claims.load() for check in claim["checks"]}
    return published.get("skip_removal_saves_resnet34")


def _sensitivity(study: Study) -> None:
    found = records(study.config, study.name)
    tier = study.config["tier"]
    options = experiments.options(study.config)
    results = config.folder(study.config) / tier
    table = sensitivity.table(options, found, results, tier)
    study.tables["sensitivity"] = table
    study.figure = figures.sensitivity(table)


class Kind(NamedTuple):
    """What a notebook shows: `make` gives a study its tables and its figure, `parameters` are those of the notebook."""

    make: Callable[[Study], None]
    parameters: tuple[str, ...] = COMMON


STUDIES = {
    "linear_comparison": Kind(_linear_comparison),
    "schedule_comparison": Kind(_schedule_comparison),
    "accuracy_vs_t": Kind(_accuracy_vs_t, ("model", "t_values", *COMMON)),
    "timing": Kind(_timing, ("tier", "device", "measured", "results", "overrides")),
    "sensitivity": Kind(_sensitivity, ("tier", "device", "results", "overrides")),
}
"""By the name of the notebook."""

"""How far each option of each unpublished choice is from the published curves, and which verdicts hang on it."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from skipfold.errors import ConfigError
from skipfold.replication import claims, statistics
from skipfold.replication.experiments import Option
from skipfold.replication.provenance import STAMP
from skipfold.replication.store import Record
from skipfold.replication.tables import read_table
from skipfold.replication.trial import Trial

COLUMNS = [
    "assumption",
    "alternative",
    "chosen",
    "figure",
    "rmse",
    "rmse_by_batch",
    "n",
    "trials",
    "images",
    "verdicts_flipped",
    *STAMP,
]
POINT = ["arm", "split", "epoch"]
"""What a point of ours and a published one have in common."""


def check(options: Iterable[Option]) -> None:
    """Raise ConfigError if one of `options` has no point that is published."""
    for option in options:
        if not {trial.arm for trial in option.trials} & set(statistics.published(option.figure)["arm"]):
            raise ConfigError(
                f"sensitivity: {option.assumption}: no arm, or value of t, that scores it is among the published "
                f"points of {option.figure}; add one that is"
            )


def table(options: Iterable[Option], records: dict[Trial, Record], results: Path, tier: str = "") -> pd.DataFrame:
    """One row an option: its misfit to the published points of its figure.

    `results` is the tier's folder with the tables of the figures. Columns: assumption (a key of the configuration),
    alternative (the option's value, as text), chosen, figure, rmse (of accuracies in [0, 1]), rmse_by_batch (the same
    where networks with BatchNorm are validated by the statistics of each batch; empty without such), n (points
    compared), trials (a point), images (trained on; empty where on all), verdicts_flipped (ids of checks, see
    `flipped`), STAMP.
    """
    rows = []
    for option in options:
        ours = statistics.aggregate(statistics.tidy([records[trial] for trial in option.trials], tier))
        if option.chosen:
            chosen = ours
        theirs = statistics.published(option.figure)
        distances = _distances(ours, theirs)
        rows.append(
            {
                "assumption": option.assumption,
                "alternative": text(option.value),
                "chosen": option.chosen,
                "figure": option.figure,
                "rmse": _rms(distances),
                "rmse_by_batch": _rms(_distances(_by_batch(ours), theirs)) if _has_batchnorm(ours) else math.nan,
                "n": len(distances),
                "trials": int(ours["n"].min()),
                "images": ours["images"].min(),
                "verdicts_flipped": "; ".join(flipped(option.figure, chosen, ours, results)),
                **statistics.stamp(ours),
            }
        )
    return pd.DataFrame(rows, columns=COLUMNS).astype({"images": "Int64"})


def _distances(ours: pd.DataFrame, theirs: pd.DataFrame) -> pd.Series:
    both = ours.merge(theirs, on=POINT, suffixes=("", "_published"))
    return both["mean"] - both["mean_published"]


def _rms(distances: pd.Series) -> float:
    return (distances**2).mean() ** 0.5


def _has_batchnorm(ours: pd.DataFrame) -> bool:
    return (ours["split"] == "val_batch").any()


def _by_batch(ours: pd.DataFrame) -> pd.DataFrame:
    """Validation by batch in the place of that in eval mode, for the arms that have both."""
    by_batch = ours[ours["split"] == "val_batch"]
    in_eval = (ours["split"] == "val") & ours["arm"].isin(by_batch["arm"])
    return pd.concat([ours[~in_eval], by_batch.assign(split="val")])


def text(value: Any) -> str:
    """An option's value, short."""
    if isinstance(value, dict):
        return " ".join(f"{key}={held}" for key, held in value.items()) or "defaults"
    return str(value)


def flipped(figure: str, chosen: pd.DataFrame, other: pd.DataFrame, results: Path) -> list[str]:
    """Ids of the checks on `figure` that would be judged otherwise with the option `other` instead of `chosen`.

    Both are aggregated points of the same trials; the tier's table is moved by their difference, which is
    interpolated over t where the table has more values of it. None where the tier has no table of the figure yet.
    A verdict that becomes, or was, inconclusive is another one too.
    """
    path = results / "tables" / f"{figure}_trials.csv"
    checks = _checks(figure)
    if not path.is_file() or not checks or chosen is other:
        return []
    trials = read_table(path)
    before, after = (
        claims.judge_tables({path.stem: table}, checks) for table in (trials, _moved(trials, chosen, other))
    )
    judged = (before["verdict"] != claims.NOT_JUDGED) & (after["verdict"] != claims.NOT_JUDGED)
    return list(before["id"][judged & (before["verdict"] != after["verdict"])])


def _checks(figure: str) -> list[dict[str, Any]]:
    """The claims, with only those of their checks that read accuracies of `figure`."""
    kept = []
    for claim in claims.load():
        checks = [
            check
            for check in claim["checks"]
            if check["experiment"] == figure and check.get("measure", {}).get("kind") in claims.OF_TRAINED
        ]
        if checks:
            kept.append({**claim, "checks": checks})
    return kept


def _moved(trials: pd.DataFrame, chosen: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """The tidy table `trials` with every accuracy moved by `other` less `chosen`."""
    change = chosen.merge(other, on=POINT, suffixes=("_chosen", "_other"))
    change["by"] = change["mean_other"] - change["mean_chosen"]
    over_t = _over_t(trials)
    trials = trials.copy()
    for (split, epoch), part in change.groupby(["split", "epoch"]):
        column, rows = statistics.SPLITS[split], trials["epoch"] == epoch
        if over_t:
            part = part.sort_values("t_chosen")
            by = np.interp(trials.loc[rows, "t_start"], part["t_chosen"], part["by"])
        else:
            by = trials.loc[rows, "arm"].map(dict(zip(part["arm"], part["by"], strict=True))).fillna(0)
        trials.loc[rows, column] += by
    return trials


def _over_t(trials: pd.DataFrame) -> bool:
    """Whether the arms of a tidy table are values of t."""
    return bool(trials["arm"].str.startswith("t=").all())

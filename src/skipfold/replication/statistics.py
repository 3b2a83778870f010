"""Records of trials as tables: one row a trial and epoch, then means with bootstrap intervals."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from skipfold.errors import StoreError
from skipfold.replication.config import published_folder
from skipfold.replication.provenance import STAMP
from skipfold.replication.tables import read_table

CONFIDENCE = 0.95
RESAMPLES = 9999
SEED = 0
"""Of the bootstrap; fixed, so that a table can be computed again digit for digit."""

DESCRIPTION = (
    "data",
    "train_images",
    "val_images",
    "epochs",
    "batch_size",
    "drop_last",
    "precision",
    "optimizer",
    "options",
)
MEASURED = (
    "epoch",
    "t",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "val_batch_loss",
    "val_batch_accuracy",
    "seconds",
)
WITH_BATCHNORM = ("val_batch_loss", "val_batch_accuracy")
"""Of networks with BatchNorm: validation images normalized by the statistics of their own batch, as in training."""

FINAL = (
    "skips_removed_val_accuracy",
    "skips_removed_max_difference",
    "reestimated_val_accuracy",
    "collapsed_val_accuracy",
    "collapsed_equal_argmax",
    "collapsed_max_difference",
    "certificate_residual",
    "certificate_max_error",
    "certificate_max_error_float32",
    "affine_residual",
    "refused",
)
"""Measures of the trained network; they stand in the row of a trial's last epoch and are empty in the others."""

KEYS = ("experiment", "arm", "network", "t", "split", "epoch")
SPLITS = {
    "train": "train_accuracy",
    "val": "val_accuracy",
    "val_batch": "val_batch_accuracy",
    "val_skips_removed": "skips_removed_val_accuracy",
    "val_reestimated": "reestimated_val_accuracy",
    "val_collapsed": "collapsed_val_accuracy",
}
"""What `split` means in an aggregated table, by the column of the tidy one."""

PUBLISHED_ARMS = {
    "linearized_resnet34": "resnet34_linear_maxpool",
    "linear_cnn3": "cnn3",
}
"""Names in the published table of the linear networks, where ours differ."""


def tidy(records: Iterable[dict[str, Any]], tier: str = "") -> pd.DataFrame:
    """One row a trial and epoch, sorted by experiment, starting t, arm, index and epoch.

    Columns: experiment, arm, network, index, schedule, t_start, digest; DESCRIPTION (train_images and val_images
    are empty where all were used); MEASURED (t is the skip strength of that epoch, losses are mean cross-entropy
    in nats, accuracies shares in [0, 1], seconds wall-clock); FINAL; STAMP. Raises StoreError on a record that
    lacks a part.
    """
    rows = []
    for record in records:
        try:
            shared = _shared(record, tier)
            final = _final(record)
            for epoch in record["epochs"]:
                row = {**shared, **{key: epoch[key] for key in MEASURED if key not in WITH_BATCHNORM or key in epoch}}
                rows.append(row | (final if epoch is record["epochs"][-1] else {}))
        except (KeyError, TypeError) as error:
            raise StoreError(
                f"record {record.get('digest', '(without digest)')}: part {error} is missing; "
                "remove the record, the trial runs again"
            ) from error
    names = ("experiment", "arm", "network", "index", "schedule", "t_start")
    columns = [*names, *MEASURED, *FINAL, *DESCRIPTION, "digest", *STAMP]
    frame = pd.DataFrame(rows, columns=columns)
    frame = frame.astype({"train_images": "Int64", "val_images": "Int64"})
    return frame.sort_values(["experiment", "t_start", "arm", "index", "epoch"], ignore_index=True)


def _shared(record: dict[str, Any], tier: str) -> dict[str, Any]:
    trial, provenance = record["trial"], record["provenance"]
    optimizer = trial["optimizer"]
    return {
        **{key: trial[key] for key in ("experiment", "arm", "network", "index", "schedule")},
        **{key: trial[key] for key in DESCRIPTION if key not in ("drop_last", "optimizer", "options")},
        "drop_last": trial.get("drop_last", False),
        "optimizer": " ".join([optimizer["name"], *(f"{k}={v:g}" for k, v in optimizer.items() if k != "name")]),
        "options": " ".join(f"{k}={v}" for k, v in sorted(trial["options"].items())),
        "t_start": trial["t"],
        "digest": record["digest"],
        "tier": tier,
        **{key: provenance[key] for key in STAMP if key != "tier"},
    }


def _final(record: dict[str, Any]) -> dict[str, Any]:
    final = record.get("final") or {}
    certificate = {f"certificate_{key}": value for key, value in (final.get("certificate") or {}).items()}
    return {key: value for key, value in {**final, **certificate}.items() if key in FINAL}


def aggregate(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean accuracy over trials with its 95 % bootstrap interval, from a tidy frame.

    Columns: KEYS (split is one of SPLITS), mean, low, high (shares in [0, 1]; low and high are empty where n is 1),
    n (trials), images (trained on; empty where on all), STAMP. Rows keep the order of `frame`.
    """
    parts = []
    for split, column in SPLITS.items():
        part = frame[frame[column].notna()]
        parts.append(part.assign(split=split, value=part[column].astype(float)))
    long = pd.concat(parts)
    rows = []
    for key, group in long.groupby(list(KEYS), sort=False):
        values = group["value"].to_numpy()
        low, high = interval(values[:, None])
        found = {
            "mean": values.mean(),
            "low": low,
            "high": high,
            "n": len(values),
            "images": group["train_images"].iloc[0],
        }
        rows.append(dict(zip(KEYS, key, strict=True)) | found | stamp(group))
    table = pd.DataFrame(rows, columns=[*KEYS, "mean", "low", "high", "n", "images", *STAMP])
    return table.astype({"images": "Int64"})


def interval(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray] = lambda trials: trials.mean(axis=-2)[..., 0],
    arms: Sequence[Any] | None = None,
) -> tuple[float, float]:
    """95 % bootstrap interval, over trials, of a statistic; not a number where there is one trial.

    `values` is [trials, points], an arm with fewer trials filled up with not a number; `statistic` maps resampled ones
    [..., trials, points] to [...]. `arms` names the arm of each point (None: one for all): an arm's trials are
    resampled whole, and each arm by itself, as its trials are its own. The seed is fixed. Percentiles are those of the
    expanded percentile bootstrap (Hesterberg, The American Statistician 69, 2015), which makes up for the spread that
    few trials lack: five give tails of 0.1 % instead of 2.5 %. Of five normal values the mean is in the interval 92
    times in 100, with plain percentiles 83 times. Of arms with unequally many trials the fewest give the tails.
    """
    codes = np.unique([0] * values.shape[1] if arms is None else arms, return_inverse=True)[1]
    points_of = [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]
    trials_of = [np.flatnonzero(np.isfinite(values[:, points]).all(axis=1)) for points in points_of]
    if (count := min(map(len, trials_of))) < 2:
        return np.nan, np.nan

    def of_trials(*trials: np.ndarray, axis: int) -> np.ndarray:
        trials = [np.moveaxis(own, axis, -1) for own in trials]
        again = np.full((*trials[0].shape[:-1], *values.shape), np.nan)
        for own, points in zip(trials, points_of, strict=True):
            again[..., : own.shape[-1], points] = values[:, points][own]
        return statistic(again)

    found = stats.bootstrap(
        trials_of,
        of_trials,
        n_resamples=RESAMPLES,
        batch=1000,
        confidence_level=1 - 2 * tail(count),
        method="percentile",
        rng=np.random.default_rng(SEED),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def rms(values: np.ndarray, target: np.ndarray) -> float:
    """Root mean square distance of the means of `values` [trials, points] from `target` [points], noise included."""
    return float(np.sqrt(((values.mean(axis=0) - target) ** 2).mean()))


def distance(values: np.ndarray, target: np.ndarray, arms: Sequence[Any] | None = None) -> tuple[float, float, float]:
    """Root mean square distance of the true means of `values` from `target` [points], with an `interval`.

    The `rms` of the means of a few trials is larger, by their noise: their variances are taken off. In a resample the
    noise is there a second time, so its errors are told from the distance as it is, and the larger one is taken to both
    sides. Of normal trials the interval then holds the true distance at least 94 times in 100; each error taken off its
    own side, as few as 71 times where the points of a trial err together. A failure that no trial shows it cannot tell.
    """

    def squared(trials: np.ndarray) -> np.ndarray:
        noise = trials.var(axis=-2, ddof=1) / len(values)
        return ((trials.mean(axis=-2) - target) ** 2 - noise).mean(axis=-1)

    if len(values) < 2:
        return rms(values, target), np.nan, np.nan
    low, high = interval(values, squared, arms)
    found, as_it_is = squared(values), rms(values, target) ** 2
    error = max(as_it_is - low, high - as_it_is)
    return tuple(map(float, np.sqrt(np.clip([found, found - error, found + error], 0, None))))


def spread(values: np.ndarray, arms: Sequence[Any] | None = None) -> tuple[float, float, float]:
    """Largest less smallest mean of `values` [trials, points], and between what the true means have it.

    Noise makes it larger, and by at most the spread of the noise, whose 95 % bound is taken to both sides: where true
    means are nearly equal the interval is wide.
    """

    def of_means(trials: np.ndarray) -> np.ndarray:
        return np.ptp(trials.mean(axis=-2), axis=-1)

    found = float(of_means(values))
    _, noise = interval(values - values.mean(axis=0), of_means, arms)
    return found, float(np.maximum(found - noise, 0)), found + noise


def tail(count: int) -> float:
    """Share of the resamples on each side of an `interval` over `count` trials."""
    return float(stats.norm.cdf(np.sqrt(count / (count - 1)) * stats.t.ppf((1 - CONFIDENCE) / 2, count - 1)))


def certificates(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a trained network that is affine, or is published as such, from a tidy frame.

    Columns: experiment, arm, network, index, t, affine (whether it collapsed), residual, max_error and
    max_error_float32 (of logits, see `collapse.Certificate`), equal_argmax (share of validation images),
    max_difference (of validation logits), refused (why it did not collapse), val_accuracy, collapsed_val_accuracy,
    data, epochs, train_images, val_images, digest, STAMP.
    """
    rows = frame[frame["certificate_residual"].notna() | frame["affine_residual"].notna()]
    out = rows[["experiment", "arm", "network", "index", "t"]].copy()
    out["affine"] = rows["certificate_residual"].notna()
    out["residual"] = rows["certificate_residual"].astype(float).fillna(rows["affine_residual"].astype(float))
    out["max_error"] = rows["certificate_max_error"]
    out["max_error_float32"] = rows["certificate_max_error_float32"]
    out["equal_argmax"] = rows["collapsed_equal_argmax"]
    out["max_difference"] = rows["collapsed_max_difference"]
    # Its text names the residual at other points than the column has.
    out["refused"] = rows["refused"].map(lambda text: re.sub(r" \(residual [^)]*\)", "", text), na_action="ignore")
    kept = ["val_accuracy", "collapsed_val_accuracy", "data", "epochs", "train_images", "val_images"]
    return out.join(rows[[*kept, "digest", *STAMP]]).reset_index(drop=True)


WITH_SKIPS = {
    "collapsed": ("skips",),
    "skips_removed": ("skips", "skips_literal", "add"),
    "folded": ("skips_folded", "add_folded"),
    "cropped": ("skips_cropped", "add_cropped"),
}
"""Forms with skips, by the variant without that has had the same other optimizations. `add` is among them because
runtimes differ in how well they run a weighted sum, which is no more work than a plain one."""


SAVED = ("saved", "saved_low", "saved_high")
"""A share of time that is saved, with its 95 % interval."""


def savings(frame: pd.DataFrame) -> pd.DataFrame:
    """What collapse and skip removal save, from a table of timings: as published, and like with like.

    Only runtimes of the same precision are compared. Columns: network, variant, batch, precision, eager_saved (share
    of wall-clock time saved against the variant `skips`, both eager, which is what the paper measured; folding and
    cropping count too), before_variant, before_runtime, before_us (the fastest form and runtime of the network with
    skips and the same other optimizations, see WITH_SKIPS; empty where none was timed), after_runtime, after_us (the
    fastest runtime of the variant), fastest_saved (between these two), both with _low and _high (see `saving`), STAMP.
    """
    host = against_skips(frame[frame["measure"] == "host"])
    rows = []
    for variant, forms in WITH_SKIPS.items():
        for network in host["network"].unique():
            of_network = host[host["network"] == network]
            for (batch, precision), part in of_network.groupby(["batch", "precision"], sort=False):
                after, before = part[part["variant"] == variant], part[part["variant"].isin(forms)]
                if len(after):
                    shared = {"network": network, "variant": variant, "batch": batch, "precision": precision}
                    rows.append(shared | _saved(after, before))
    return pd.DataFrame(rows)


def _saved(after: pd.DataFrame, before: pd.DataFrame) -> dict[str, Any]:
    """The columns of `savings` but its first four, from the rows of a variant and of the forms to compare it with."""
    eager = after.loc[after["runtime"] == "eager", list(SAVED)].to_dict("records") or [dict.fromkeys(SAVED)]
    fastest = after.loc[after["median_us"].idxmin()]
    slower = before.loc[before["median_us"].idxmin()] if len(before) else {}
    saved = saving(fastest["samples_us"], slower["samples_us"]) if len(before) else (None,) * len(SAVED)
    return {
        **{f"eager_{key}": value for key, value in eager[0].items()},
        "before_variant": slower.get("variant"),
        "before_runtime": slower.get("runtime"),
        "before_us": slower.get("median_us"),
        "after_runtime": fastest["runtime"],
        "after_us": fastest["median_us"],
        **{f"fastest_{key}": value for key, value in zip(SAVED, saved, strict=True)},
        **{key: fastest.get(key) for key in STAMP},
    }


def against_skips(frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` of timings with the columns SAVED, see `saving`: against the variant `skips`, timed the same way.

    They are empty where a network has no such variant, and for that variant itself.
    """
    key = ["network", "runtime", "batch", "measure"]
    skips = frame.loc[frame["variant"] == "skips", [*key, "samples_us"]]
    found = frame.merge(skips, "left", key, suffixes=("", "_of_skips"), validate="many_to_one")
    others = (found["variant"] != "skips") & found["samples_us_of_skips"].notna()
    pairs = found.loc[others, ["samples_us", "samples_us_of_skips"]].itertuples(index=False)
    found.loc[others, list(SAVED)] = np.array([saving(*pair) for pair in pairs]).reshape(-1, 3)
    return found.drop(columns="samples_us_of_skips")


def saving(of: str, against: str) -> tuple[float, float, float]:
    """Share of the time of a prediction that another saves, from their `samples_us` (see `timing.measure`).

    1 less the median ratio of two samples of one round, since a drift of the machine meets both; then its 95 % interval
    by order statistics, not a number below six rounds.
    """
    samples = [np.array(text.split(), dtype=float) for text in (of, against)]
    rounds = min(map(len, samples))
    ratios = samples[0][:rounds] / samples[1][:rounds]
    between = stats.quantile_test(ratios, p=0.5).confidence_interval(CONFIDENCE)
    return 1 - float(np.median(ratios)), 1 - float(between.high), 1 - float(between.low)


def stamp(frame: pd.DataFrame) -> dict[str, str]:
    """The STAMP of all rows of `frame` as one: distinct values joined by "; ", the latest date."""
    joined = {key: join(frame.get(key, ())) for key in STAMP}
    joined["date"] = joined["date"].split("; ")[-1]
    return joined


def join(values: Iterable[Any]) -> str:
    """Distinct values that are there, sorted, as one text; of joined ones each part once."""
    return "; ".join(sorted({part for value in values if not pd.isna(value) for part in str(value).split("; ")}))


def published(experiment: str) -> pd.DataFrame:
    """The published points of `experiment` in the columns of `aggregate`: arm, t, split, epoch, mean.

    Epochs "first" and "last" of the published tables are 1 and 2, as that protocol has two. t is empty where the
    paper gives none.
    """
    frame = read_table(published_folder() / f"{experiment}.csv").rename(
        columns={"model": "arm", "val_accuracy": "mean", "accuracy": "mean"}
    )
    if "arm" in frame:
        return frame.assign(arm=frame["arm"].replace(PUBLISHED_ARMS), t=np.nan, split="val")
    return frame.assign(
        arm="t=" + frame["t"].astype(str), epoch=frame["epoch"].map({"first": 1, "last": 2}).astype(int)
    )

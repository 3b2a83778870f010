"""Tables as CSV files: written whole, and what is wrong with one that was damaged since, or lacks a column."""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from skipfold.errors import DataError, StoreError, first_line
from skipfold.files import written
from skipfold.replication.experiments import rule
from skipfold.replication.provenance import STAMP

TEXTS = frozenset(
    "experiment arm network schedule precision optimizer options data digest refused split classifier stop variant "
    "runtime measure samples_us gpu_state remark assumption alternative figure verdicts_flipped claim id quantity "
    "published relation limit interval verdict fitted table notebook source".split()
).union(STAMP)
"""Columns of texts; all others of the tables that are NEEDED hold numbers, or true and false."""

NEEDED = {
    "trials": "experiment arm network index t_start epoch val_accuracy refused* data epochs digest",
    "means": "experiment arm network t* split epoch mean low* high* n tier*",
    "certificates": "experiment arm affine residual max_error* max_error_float32* equal_argmax* refused* data epochs "
    "digest",
    "ceiling": "data val_accuracy",
    "timing": "network variant runtime precision batch measure median_us q1_us q3_us samples_us device",
    "runtimes": "runtime precision remark*",
    "roofline": "network variant runtime batch median_us operators kernels* flops bytes intensity flops_per_s "
    "peak_flops_per_s copy_bytes_per_s launch_us* roof_share input_share gpu_state*",
    "verdicts": "id verdict",
    "sensitivity": "assumption alternative chosen figure rmse rmse_by_batch* n trials images* verdicts_flipped*",
}
"""The columns that a kind of table must have; cells of the starred may be empty. Older tables may lack others."""

NUMBERS = re.compile(r"(\d+(\.\d+)?(e[-+]?\d+)?( |$))+")
"""The samples of a timing."""

RULES = {
    "certificates.csv": "linear_comparison",
    "ceiling.csv": "linear_comparison",
    "timing.csv": "time_prediction",
    "runtimes.csv": "time_prediction",
    "roofline.csv": "time_prediction",
    "roofline.svg": "timing",
    "savings.csv": "timing",
    "verdicts.csv": "judge_claims",
}
"""The rule that makes a file, where it is not the one that is named like it."""


def write_table(frame: pd.DataFrame, path: str | Path) -> None:
    """Write a table as CSV, without an index; raises StoreError where it cannot be written."""
    with written(path, StoreError) as part:
        frame.to_csv(part, index=False)


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a table as `write_table` wrote it, to the last digit.

    Raises DataError, which names the rule that makes it again, where it is damaged or lacks what is NEEDED of it.
    """
    path = Path(path)
    try:
        held = path.read_bytes()
        # An empty cell alone is none: a text may be None, such as the alternative of all images.
        frame = pd.read_csv(io.BytesIO(held), dtype=dict.fromkeys(TEXTS, str), keep_default_na=False, na_values=[""])
        wrong = next(_wrong(frame, _kind(path)), None) if held.endswith(b"\n") else "its last line is cut off"
    except (OSError, ValueError) as error:
        wrong = f"cannot be read ({first_line(error)})"
    if wrong:
        raise DataError(f"{path}: {wrong}; {made_again(path)}")
    return frame


def _wrong(frame: pd.DataFrame, kind: str) -> Iterator[str]:
    """What keeps `frame` from being a table of its `kind`."""
    needed = NEEDED[kind].split() if kind in NEEDED else []
    if missing := [name for name in needed if name.strip("*") not in frame]:
        yield f"column {', '.join(missing).replace('*', '')} is missing"
    if needed and frame.empty and kind not in ("certificates", "sensitivity"):
        yield "no rows"
    for name in [name for name in needed if name in frame and frame[name].isna().any()]:
        yield f"column {name} has an empty cell"
    for name in frame.columns.difference(TEXTS) if needed else ():
        numbers = pd.to_numeric(frame[name], errors="coerce")  # true and false are, too
        for value in frame[name][numbers.isna()].dropna():
            yield f"column {name} holds {value!r}, which is no number"
    for value in frame["samples_us"] if kind == "timing" else ():
        if not NUMBERS.fullmatch(value):
            yield f"column samples_us holds {value[:40]!r}, which is no line of numbers"


def _kind(path: Path) -> str:
    """What the table at `path` is, by its name; no key of NEEDED where nothing is asked of it."""
    if path.parent.name != "published" and path.stem.startswith(("linear_", "schedule_", "accuracy_")):
        return "trials" if path.stem.endswith("_trials") else "means"
    return path.stem


def made_again(path: Path) -> str:
    """How the table, or the figure, at `path` is had again."""
    if path.parent.name == "published":
        return f"`git checkout -- {path}` brings it back"
    by = RULES.get(path.name) or rule(path.stem.removesuffix("_trials"))
    return f"delete it; `snakemake reproduce` makes it again (rule {by})"


def read_tables(results: str | Path) -> dict[str, pd.DataFrame]:
    """Every table under `results` (results/<tier>), by its name."""
    return {path.stem: read_table(path) for path in sorted((Path(results) / "tables").glob("*.csv"))}

"""What a tier still costs, before anything is spent: trials, time and disk on the device found."""

import datetime
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from skipfold import experiments, sweep
from skipfold.config import Config
from skipfold.data import load
from skipfold.provenance import device_name
from skipfold.records import prepare
from skipfold.store import Store
from skipfold.trial import Trial

STEPS = 3
"""Training steps of the measurement; with the validation images, of as many batches."""

VALIDATION_SHARE = 1 / 3
"""Cost of a validation image in those of a training image: a forward pass without a backward one."""

IMAGES = {"mnist": (60000, 10000), "digits": (1497, 300)}
"""Training and validation images of each data set; known without a download."""

NOTEBOOK_SECONDS = 10
"""Starting a notebook and drawing its figure."""

NOTEBOOK_BYTES = 500_000
"""A notebook with its figure in three files and its tables."""


@dataclass(frozen=True)
class Row:
    """What one experiment still costs, on one core or one GPU."""

    experiment: str
    trials: int
    stored: int
    seconds: float
    disk: int


@dataclass(frozen=True)
class Cost:
    """Measured: seconds a training image, bytes of a record and of each of its epochs."""

    image: float
    record: int
    epoch: int


def quote(settings: Config) -> str:
    """The quote for the tier of `settings` as text; measures a few training steps of each network, some seconds."""
    device, store = prepare(settings)
    rows = estimate(settings, device, store)
    jobs = 1 if device.type == "cuda" else max(1, (os.cpu_count() or 1) // settings["threads"])
    seconds = sum(row.seconds for row in rows) / jobs
    trials = sum(row.trials for row in rows)
    lines = [f"{'experiment':32} {'to run':>7} {'stored':>7} {'time':>10} {'disk':>9}"]
    lines += [
        f"{row.experiment:32} {row.trials:7} {row.stored:7} {_time(row.seconds):>10} {_size(row.disk):>9}"
        for row in rows
    ]
    at_once = f", {jobs} jobs at once" if jobs > 1 else ""
    lines.append(
        f"tier {settings['tier']} on {device_name(device)}{at_once}: {trials} trials to run, "
        f"about {_time(seconds)} and {_size(sum(row.disk for row in rows))}; timing and report come on top"
    )
    return "\n".join(lines)


def estimate(settings: Config, device: torch.device, store: Store) -> list[Row]:
    """A row for each experiment; a trial that several need is counted with the first."""
    missing: dict[str, list[Trial]] = {}
    seen: set[Trial] = set()
    rows = []
    wanted = {name: dict.fromkeys(experiments.trials(settings, name)) for name in experiments.names(settings)}
    for name, trials in wanted.items():
        missing[name] = [trial for trial in trials if trial not in store and trial not in seen]
        seen.update(missing[name])
    costs = measure(seen, device, settings["side_by_side"])
    for name, trials in missing.items():
        seconds, disk = float(NOTEBOOK_SECONDS), NOTEBOOK_BYTES
        for trial in trials:
            cost = costs[_kind(trial)]
            train, val = IMAGES[trial.data]
            images = (trial.train_images or train) + VALIDATION_SHARE * (trial.val_images or val)
            seconds += cost.image * trial.epochs * images
            disk += cost.record + trial.epochs * cost.epoch
        rows.append(Row(name, len(trials), len(wanted[name]) - len(trials), seconds, disk))
    return rows


def measure(trials: Iterable[Trial], device: torch.device, side_by_side: int | None) -> dict[str, Cost]:
    """The cost of each kind of trial, from two short epochs on a few images, the first of which warms up."""
    kinds: dict[str, list[Trial]] = {}
    for trial in trials:
        kinds.setdefault(_kind(trial), []).append(trial)
    digits = load("digits")
    costs = {}
    for kind, alike in kinds.items():
        train, val = (min(STEPS * alike[0].batch_size, held) for held in IMAGES["digits"])
        count = min(len(alike), side_by_side or sweep.SIDE_BY_SIDE) if device.type == "cuda" else 1
        short = [
            replace(
                alike[0],
                index=index,
                schedule="static",
                epochs=2,
                data="digits",
                train_images=train,
                val_images=val,
            )
            for index in range(count)
        ]
        with tempfile.TemporaryDirectory() as folder:
            record = sweep.run(
                short, Store(folder), lambda trial: digits.first(trial.train_images, trial.val_images), device,
                side_by_side=side_by_side,
            )[0]  # fmt: skip
        epoch = record["epochs"][1]
        size = len(json.dumps(epoch, indent=1))
        costs[kind] = Cost(
            epoch["seconds"] / (train + VALIDATION_SHARE * val), len(json.dumps(record, indent=1)) - 2 * size, size
        )
    return costs


def _kind(trial: Trial) -> str:
    return json.dumps([trial.network, trial.options, trial.batch_size, trial.optimizer.name], sort_keys=True)


def _time(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB"

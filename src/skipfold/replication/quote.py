"""What a tier still costs, before anything is spent: trials, time and disk on the device found."""

import datetime
import json
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from skipfold.replication import experiments, sweep
from skipfold.replication.config import Config
from skipfold.replication.data import load
from skipfold.replication.provenance import device_name
from skipfold.replication.records import check_networks, prepare
from skipfold.replication.store import Store
from skipfold.replication.trial import Trial

STEPS = {"cpu": 3, "cuda": 60}
"""Training steps of the measurement, by device; a GPU's are so short that what an epoch costs beside them has to be
spread over many. Validation images are of as many batches, or as many as there are."""

VALIDATION_SHARE = 1 / 3
"""Cost of a pass of a validation image in those of a training image: forward without backward."""

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
    """Measured: seconds of setting up a bench, of a trial apart from its epochs, and of a training image; passes over
    the validation images an epoch, two with BatchNorm; bytes of a record and of each of its epochs."""

    setup: float
    trial: float
    image: float
    passes: int
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
        check_networks(name, missing[name])
    benches = {name: _benches(missing[name], device, settings) for name in wanted}
    costs = measure((bench for found in benches.values() for bench in found), device)
    for name, trials in missing.items():
        seconds, disk = float(NOTEBOOK_SECONDS), NOTEBOOK_BYTES
        for bench in benches[name]:
            cost, trial = costs[bench.key], bench.trial
            train, val = IMAGES[trial.data]
            images = (trial.train_images or train) + cost.passes * VALIDATION_SHARE * (trial.val_images or val)
            seconds += cost.setup + bench.trials * (cost.trial + cost.image * trial.epochs * images)
            disk += bench.trials * (cost.record + trial.epochs * cost.epoch)
        rows.append(Row(name, len(trials), len(wanted[name]) - len(trials), seconds, disk))
    return rows


@dataclass(frozen=True)
class Bench:
    """How an experiment trains those of its trials that are alike: so many, `size` of them side by side, or of them and
    others as long, of which `stacked` are one network, None: as `sweep.run` takes it."""

    trial: Trial
    trials: int
    size: int
    stacked: int | None = None

    @property
    def steps(self) -> int:
        """Of all trials together."""
        train, _ = IMAGES[self.trial.data]
        return self.trials * self.trial.epochs * (self.trial.train_images or train) // self.trial.batch_size

    @property
    def key(self) -> str:
        """Benches of one key cost the same, whatever their images and epochs."""
        trial = self.trial
        parts = [trial.network, trial.options, trial.batch_size, trial.optimizer.name, self.size]
        return json.dumps(parts, sort_keys=True)


def _benches(trials: Sequence[Trial], device: torch.device, settings: Config) -> list[Bench]:
    found = []
    for together in sweep.rounds(trials, device):
        size, alike = sweep.expected_size(together, device, settings["side_by_side"]), sweep.kinds(together)
        stacked = settings["stacked"] if len(alike) == 1 else 1
        found += [Bench(kind[0], len(kind), size, stacked) for kind in alike]
    return found


def measure(benches: Iterable[Bench], device: torch.device) -> dict[str, Cost]:
    """The cost of each bench by its key, from two groups of trials of two short epochs on a few images.

    A group's first epoch warms up, and the first group also sets up the bench.
    """
    digits = load("digits")
    costs = {}
    for key, bench in {bench.key: bench for bench in benches}.items():
        wanted = STEPS[device.type] * bench.trial.batch_size
        train, val = wanted, min(wanted, IMAGES["digits"][1])
        short = replace(
            bench.trial, schedule="static", epochs=2, data="digits", train_images=train, val_images=val
        )  # fmt: skip
        again = torch.arange(train) % IMAGES["digits"][0]
        few = replace(
            digits.first(None, val), train_images=digits.train_images[again], train_labels=digits.train_labels[again]
        )
        stacked = sweep.choose_stacked(short, few.to(device), bench.size, bench.steps, bench.stacked)
        clock = _Clock()
        with tempfile.TemporaryDirectory() as folder:
            records = sweep.run(
                [replace(short, index=index) for index in range(2 * bench.size)],
                Store(folder),
                lambda trial, few=few: few,
                device,
                clock,
                bench.size,
                stacked,
            )
        first, second = clock.ends[bench.size - 1], clock.ends[-1]
        trained = sum(epoch["seconds"] for record in records[bench.size :] for epoch in record["epochs"])
        epoch = records[-1]["epochs"][1]
        passes = 2 if "val_batch_accuracy" in epoch else 1
        size = len(json.dumps(epoch, indent=1))
        costs[key] = Cost(
            setup=max(0.0, first - (second - first)),
            trial=max(0.0, second - first - trained) / bench.size,
            image=epoch["seconds"] / (train + passes * VALIDATION_SHARE * val),
            passes=passes,
            record=len(json.dumps(records[-1], indent=1)) - 2 * size,
            epoch=size,
        )
    return costs


class _Clock:
    """Progress that notes when each trial has ended, in seconds since the beginning."""

    def begin(self, trials: int, stored: int, epochs: int) -> None:
        self.start, self.ends = time.perf_counter(), []

    def epoch(self, trial: Trial, epoch: dict) -> None:
        pass

    def trial(self, trial: Trial, record: dict) -> None:
        self.ends.append(time.perf_counter() - self.start)

    def end(self) -> None:
        pass


def _time(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB"

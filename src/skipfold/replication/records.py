"""The records of an experiment: read from the store, or trained now and stored."""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from skipfold import files
from skipfold.replication import config, data, experiments, sweep
from skipfold.replication.progress import Progress
from skipfold.replication.store import Record, Store
from skipfold.replication.training import resolve_device, use_device
from skipfold.replication.trial import Trial


def prepare(settings: config.Config) -> tuple[torch.device, Store]:
    """The device and the store, ready for use; raises DeviceError or StoreError."""
    torch.set_num_threads(settings["threads"])
    return use_device(settings["device"]), Store(config.folder(settings, "store"))


def records(settings: config.Config, name: str, shard: tuple[int, int] = (1, 1)) -> dict[Trial, Record]:
    """The records of experiment `name`, or of its i-th of n parts where `shard` is (i, n): stored or trained now."""
    device, store = prepare(settings)
    wanted = part(experiments.trials(settings, name), shard, device, settings["side_by_side"])
    check_images(settings, [trial for trial in wanted if trial not in store])
    found = sweep.run(
        wanted,
        store,
        lambda trial: images(settings, trial),
        device,
        Progress(name),
        settings["side_by_side"],
        settings["stacked"],
    )
    return dict(zip(wanted, found, strict=True))


def part(
    trials: Sequence[Trial], shard: tuple[int, int], device: torch.device, side_by_side: int | None = None
) -> list[Trial]:
    """The i-th of n parts of `trials`, where `shard` is (i, n); what trains together stays together.

    Every n-th group, of at most `side_by_side` trials (None: of the measured best), so that each part has its share of
    the costly arms.
    """
    first, parts = shard
    groups = []
    for together in sweep.rounds(trials, device):
        size = sweep.expected_size(together, device, side_by_side)
        groups += [together[start : start + size] for start in range(0, len(together), size)]
    return [trial for group in groups[first - 1 :: parts] for trial in group]


def images(settings: config.Config, trial: Trial) -> data.Dataset:
    """The images of `trial`, on the CPU; raises DataError or ConfigError where they are not there."""
    return dataset(settings, trial.data).first(trial.train_images, trial.val_images)


def dataset(settings: config.Config, name: str) -> data.Dataset:
    """All images of the data set `name`, on the CPU, read once a process; raises as `images` does."""
    folder = settings["data_folder"]
    return _load(name, folder and config.root() / folder)


@functools.lru_cache(maxsize=1)
def _load(name: str, folder: Path | None) -> data.Dataset:
    return data.load(name, folder)


def check(settings: config.Config, device: bool = True) -> None:
    """Raise a SkipfoldError if something is known to be missing before anything is run: folders, data, device.

    `device` False leaves the device to the machine that the jobs run on.
    """
    if device:
        resolve_device(settings["device"])
    Store(config.folder(settings, "store"))
    files.writable(config.folder(settings) / settings["tier"])
    names = experiments.names(settings)
    check_images(settings, [trial for name in names for trial in experiments.trials(settings, name)])


def check_images(settings: config.Config, trials: Sequence[Trial]) -> None:
    """Raise DataError or ConfigError if the images of any of `trials` are not there."""
    for trial in {(trial.data, trial.train_images, trial.val_images): trial for trial in trials}.values():
        images(settings, trial)

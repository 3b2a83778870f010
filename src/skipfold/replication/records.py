"""The records of an experiment: read from the store, or trained now and stored."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from skipfold import files, networks
from skipfold.errors import ConfigError, SkipfoldError, first_line, is_too_large
from skipfold.homotopy import skips
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
    missing = [trial for trial in wanted if trial not in store]
    check_images(settings, missing)
    check_networks(name, missing)
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
    for name in experiments.names(settings):
        wanted = experiments.trials(settings, name)
        check_images(settings, wanted)
        check_networks(name, wanted)


def check_images(settings: config.Config, trials: Sequence[Trial]) -> None:
    """Raise DataError or ConfigError if the images of any of `trials` are not there."""
    for trial in {(trial.data, trial.train_images, trial.val_images): trial for trial in trials}.values():
        images(settings, trial)


def check_networks(name: str, trials: Sequence[Trial]) -> None:
    """Raise ConfigError if a network of `trials`, those of experiment `name`, cannot be trained at every t.

    Each is built, and run on one image, since options, and builders of one's own, may be wrong in any way.
    """
    for network, options in dict.fromkeys((trial.network, json.dumps(trial.options)) for trial in trials):
        # Alternatives of sensitivity may be blocks without t.
        if not _has_t(network, options) and name != experiments.SENSITIVITY:
            raise ConfigError(
                f"network {network}: its builder takes t, but no addition of it has a strength; add with "
                "skipfold.homotopy.Skip"
            )


@functools.cache
def _has_t(network: str, options: str) -> bool:
    """Whether the network with these options, as JSON, can be given t where its builder takes it.

    Raises ConfigError where there is no such network, none that gives logits, or none that this machine could hold.
    """
    given = json.loads(options)
    try:
        model = networks.build(network, given)
        with torch.no_grad():
            shape = tuple(model.eval()(torch.zeros(1, *networks.INPUT_SHAPE)).shape)
    except SkipfoldError:
        raise
    except Exception as error:
        if is_too_large(error):
            said = f"does not fit into memory ({first_line(error)}); smaller sizes are allowed"
        else:
            said = f"cannot be built and run ({type(error).__name__}: {first_line(error)}); see its builder"
        raise ConfigError(f"network {network}: {given} given, which {said}") from error
    if shape != (1, networks.CLASSES):
        raise ConfigError(f"network {network}: gives {shape} for one image; allowed is {(1, networks.CLASSES)}")
    return bool(skips(model)) or "t" not in networks.option_names(network)

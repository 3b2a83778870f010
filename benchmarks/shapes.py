"""How near networks of given shapes come to a published curve over t.

    python benchmarks/shapes.py shallow_linear "{width: 3, kernel: 5, padding: 2, stride: 2, skips: [[0, 2]]}"
    python benchmarks/shapes.py resnet34 "{stem: imagenet_pool3, init: framework}" --near 0 \\
        --optimizer "{name: sgd, lr: 0.01}"

Every shape is trained by the paper tier's protocol, the smaller last batches kept, at the named t and compared with the
published points: validation accuracy after each epoch and, of the ResNets, validation by batch statistics and training
accuracy during the last. Single published points scatter, so a published value is the mean over the published t not
further than `--near`. The rms distance is over t and epochs.

ResNets are trained through the sweep, side by side on a GPU. Small networks are trained as one for all t, and measured
in eval mode on the 60,000 training images too: the published values may be of those (docs/fit.md), and are compared
with both.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml

from skipfold.replication import config, experiments, statistics, sweep
from skipfold.replication.data import Dataset, load
from skipfold.replication.provenance import device_name
from skipfold.replication.store import Store
from skipfold.replication.training import Learner, initial_network, use_device
from skipfold.replication.trial import Optimizer, Trial

SMALL_SPLITS = ("val", "train")
RESNET_SPLITS = ("val", "val_batch", "train")
"""What is compared; `val_batch` is validation with the statistics of each batch, as in training."""


def published(name: str, splits: Sequence[str], t: list[float], near: float) -> np.ndarray:
    """Accuracies [split, epoch, t] of the first and the last epoch; NaN where nothing is published.

    The validation accuracies are there for every split but training, and for that where none is published.
    """
    points = statistics.published(f"accuracy_vs_t_{name}")
    around = [points[(points["t"] - value).abs() <= near + 1e-9] for value in t]

    def mean(split: str, epoch: int) -> list[float]:
        return [part.loc[(part["split"] == split) & (part["epoch"] == epoch), "mean"].mean() for part in around]

    train = "train" if "train" in {*points["split"]} else "val"
    epochs = sorted({*points["epoch"]})
    return np.array([[mean(train if split == "train" else "val", e) for e in epochs] for split in splits])


def together(trials: list[Trial], dataset: Dataset) -> np.ndarray:
    """Validation and training accuracy [split, epoch, t], both in eval mode, of `trials`, trained as one network."""
    learner = Learner(trials[0], dataset, count=len(trials))
    learner.load([initial_network(trial, crop=True) for trial in trials])
    orders = [trial.generator("order") for trial in trials]
    on_training = replace(dataset, val_images=dataset.train_images, val_labels=dataset.train_labels)
    images = len(dataset.train_images)
    found = []
    for _ in range(trials[0].epochs):
        learner.epoch([trial.t for trial in trials], [torch.randperm(images, generator=order) for order in orders])
        learner.model.eval()
        found.append([])
        for measured in (dataset, on_training):
            learner.dataset = measured
            learner.measure()
            found[-1].append([accuracy for _, accuracy in learner.means(len(measured.val_images))])
    return np.array(found).swapaxes(0, 1)


def by_sweep(groups: list[list[Trial]], dataset: Dataset, device: torch.device) -> np.ndarray:
    """Accuracy of RESNET_SPLITS, [group, split, epoch, trial]; training accuracy is that during the epoch."""
    with tempfile.TemporaryDirectory() as folder:
        records = sweep.run([trial for group in groups for trial in group], Store(folder), lambda _: dataset, device)
    found = np.array(
        [[[epoch[f"{split}_accuracy"] for split in RESNET_SPLITS] for epoch in record["epochs"]] for record in records]
    )
    return found.reshape(len(groups), -1, *found.shape[1:]).transpose(0, 3, 2, 1)


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=["shallow_linear", "shallow_leaky_relu", "cnn3", "resnet18", "resnet34"])
    parser.add_argument(
        "shapes", nargs="+", type=yaml.safe_load, help="options of the network, as in config/paper.yaml"
    )
    parser.add_argument("--t", type=float, nargs="+", default=[0, 0.2, 0.4, 0.6, 0.8, 1])
    parser.add_argument("--near", type=float, default=0.08)
    parser.add_argument("--optimizer", type=yaml.safe_load, help="default: the paper tier's")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--data", type=Path, help="folder with the MNIST idx files; default: as in make reproduce")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = use_device(arguments.device)
    torch.set_num_threads(1)
    paper = experiments.as_trained(config.load("paper"), arguments.network)
    if arguments.optimizer:
        paper["optimizer"] = Optimizer(**arguments.optimizer)
    resnet = arguments.network.startswith("resnet")
    splits = RESNET_SPLITS if resnet else SMALL_SPLITS
    wanted = published(arguments.network, splits, arguments.t, arguments.near)
    epochs = wanted.shape[1]
    dataset = load("mnist", arguments.data).to(device)
    print(f"{arguments.network}, {arguments.trials} trials, {device_name(device)}, torch {torch.__version__}")
    print(paper["optimizer"])
    for shape in arguments.shapes:
        described = paper | {"options": shape, "epochs": epochs}
        groups = [
            [Trial("shapes", f"t={t}", i, **described | {"t": t}) for t in arguments.t] for i in range(arguments.trials)
        ]
        if resnet:
            found = by_sweep(groups, dataset, device)
        else:
            found = np.array([together(group, dataset) for group in groups])
        mean = found.mean(0)
        spread = found.std(0, ddof=1) if len(found) > 1 else np.full_like(mean, np.nan)
        distance = np.nanmean((mean - wanted) ** 2, (1, 2)) ** 0.5
        told = ", ".join(f"{value:.4f} ({split})" for split, value in zip(splits, distance, strict=True))
        print(f"\n{shape}: rms distance {told}")
        print("    t  epoch      split  published  ours (sd of a trial)")
        for place, t in enumerate(arguments.t):
            for epoch in range(epochs):
                for split, name in enumerate(splits):
                    at = (split, epoch, place)
                    print(
                        f"{t:5g}  {epoch + 1:5d}  {name:>9}  {wanted[at]:9.4f}  {mean[at]:.4f} ({spread[at]:.4f})",
                        flush=True,
                    )


if __name__ == "__main__":
    main()

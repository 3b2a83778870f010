"""How near networks of given shapes come to a published curve over t, on validation and on training images.

    python benchmarks/shapes.py shallow_linear "{width: 3, kernel: 5, padding: 2, stride: 2, skips: [[0, 2]]}"

Every shape is trained by the paper tier's protocol at the named t, one network stacked for all of them, and measured
in eval mode after each epoch, on the 10,000 validation and on the 60,000 training images. Single published points
scatter, so a published value is the mean over the published t nearer than 0.09. The rms distance is over all t and both
epochs.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml

from skipfold import config, experiments, statistics
from skipfold.data import Dataset, load
from skipfold.provenance import device_name
from skipfold.training import Learner, initial_network, use_device
from skipfold.trial import Trial

NEAR = 0.09


def published(name: str, t: list[float]) -> np.ndarray:
    """Accuracies [epoch, t] of the first and the last epoch."""
    points = statistics.published(f"accuracy_vs_t_{name}", config.root() / "results" / "published")
    points = points[points["split"] == "val"]
    near = [points[(points["t"] - value).abs() < NEAR] for value in t]
    return np.array(
        [[part.loc[part["epoch"] == e, "mean"].mean() for part in near] for e in sorted({*points["epoch"]})]
    )


def accuracies(trials: list[Trial], dataset: Dataset) -> np.ndarray:
    """Validation and training accuracy [split, epoch, t] of `trials`, trained as one network."""
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


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=["shallow_linear", "shallow_leaky_relu", "cnn3"])
    parser.add_argument(
        "shapes", nargs="+", type=yaml.safe_load, help="options of the network, as in config/paper.yaml"
    )
    parser.add_argument("--t", type=float, nargs="+", default=[0, 0.2, 0.4, 0.6, 0.8, 1])
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--data", type=Path, help="folder with the MNIST idx files; default: as in make reproduce")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = use_device(arguments.device)
    torch.set_num_threads(1)
    paper = experiments.as_trained(config.load("paper"), arguments.network)
    wanted = published(arguments.network, arguments.t)
    dataset = load("mnist", arguments.data).to(device)
    print(f"{arguments.network}, {arguments.trials} trials, {device_name(device)}, torch {torch.__version__}")
    for shape in arguments.shapes:
        described = paper | {"options": shape, "epochs": len(wanted)}
        found = np.array(
            [
                accuracies([Trial("shapes", f"t={t}", i, **described | {"t": t}) for t in arguments.t], dataset)
                for i in range(arguments.trials)
            ]
        )
        mean, spread = found.mean(0), found.std(0, ddof=1)
        distance = ((mean - wanted) ** 2).mean((1, 2)) ** 0.5
        print(f"\n{shape}: rms distance {distance[0]:.4f} (validation), {distance[1]:.4f} (training)")
        print("    t  epoch  published  validation (sd of a trial)  training (sd of a trial)")
        for place, t in enumerate(arguments.t):
            for epoch in range(len(wanted)):
                values = "  ".join(f"{mean[s, epoch, place]:.4f} ({spread[s, epoch, place]:.4f})" for s in (0, 1))
                print(f"{t:5g}  {epoch + 1:5d}  {wanted[epoch, place]:9.4f}  {values}", flush=True)


if __name__ == "__main__":
    main()

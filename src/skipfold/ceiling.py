"""The best affine classifier: unregularized logistic regression, run to convergence; no affine network is above it."""

import time

import pandas as pd
import torch
from torch.nn import functional as F

from skipfold import statistics
from skipfold.data import Dataset, to_input
from skipfold.evaluation import accuracy
from skipfold.provenance import stamp

ITERATIONS = 1000
"""Of L-BFGS. On MNIST the training accuracy then changes in the fourth digit only."""

EVERY = 10
"""Iterations between two measurements."""

SMALL_GRADIENT = 1e-5
"""Largest component of the gradient, of the mean loss, at which it counts as converged."""


def best_affine(dataset: Dataset, iterations: int = ITERATIONS) -> pd.DataFrame:
    """What the classifier reaches on `dataset`, on the device of its images: a row at the end, a row at its best stop.

    Columns: classifier, stop (converged, or best: the step with the highest validation accuracy), data, iterations,
    loss (mean cross-entropy in nats), gradient (its largest component), train_accuracy, val_accuracy, seconds,
    and those of statistics.STAMP but the tier.
    """
    start = time.perf_counter()
    train, val = (to_input(images).flatten(1) for images in (dataset.train_images, dataset.val_images))
    weight = torch.zeros(784, 10, device=train.device, requires_grad=True)
    bias = torch.zeros(10, device=train.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=EVERY, history_size=20, line_search_fn="strong_wolfe",
        tolerance_grad=0, tolerance_change=0,
    )  # fmt: skip

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(torch.addmm(bias, train, weight), dataset.train_labels)
        value.backward()
        return value

    def accuracy_of(images: torch.Tensor, labels: torch.Tensor) -> float:
        return accuracy(torch.addmm(bias, images, weight).detach(), labels)

    steps = []
    for done in range(EVERY, iterations + 1, EVERY):
        optimizer.step(loss)
        steps.append(
            {
                "iterations": done,
                "loss": float(loss().detach()),
                "gradient": max(float(parameter.grad.abs().max()) for parameter in (weight, bias)),
                "train_accuracy": accuracy_of(train, dataset.train_labels),
                "val_accuracy": accuracy_of(val, dataset.val_labels),
                "seconds": time.perf_counter() - start,
            }
        )
        if steps[-1]["gradient"] < SMALL_GRADIENT:
            break
    best = max(steps, key=lambda step: step["val_accuracy"])
    shared = {"classifier": "logistic regression", "data": dataset.name, **stamp(train.device, dataset.md5)}
    rows = [{**shared, "stop": stop, **step} for stop, step in (("converged", steps[-1]), ("best", best))]
    measured = ["classifier", "stop", "data", *best]
    return pd.DataFrame(rows, columns=[*measured, *(key for key in statistics.STAMP if key != "tier")])

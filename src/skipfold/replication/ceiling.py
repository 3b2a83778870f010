"""The best affine classifier: unregularized logistic regression, searched in two ways; every step counts."""

import time
from collections.abc import Iterator

import pandas as pd
import torch
from torch.nn import functional as F

from skipfold.replication.data import Dataset, to_input
from skipfold.replication.evaluation import accuracy
from skipfold.replication.provenance import STAMP, stamp

ITERATIONS = 1000
"""Of L-BFGS. On MNIST the training accuracy then changes in the fourth digit only."""

EVERY = 10
"""Iterations of L-BFGS between two measurements."""

SMALL_GRADIENT = 1e-5
"""Largest component of the gradient, of the mean loss, at which L-BFGS stops."""

EPOCHS = 20
"""Of Adam, with a measurement after each."""

BATCH = 64
SEED = 0
"""Of the order of Adam's batches."""


def best_affine(dataset: Dataset, iterations: int = ITERATIONS, epochs: int = EPOCHS) -> pd.DataFrame:
    """What an affine classifier reaches on `dataset`, on the device of its images.

    It learns from all images at once by L-BFGS, and from batches of 64 by Adam with learning rate 0.001, which passes
    other classifiers on its way. Columns: classifier (which of the two), stop (end, or best: the step with the highest
    validation accuracy), data, iterations (of L-BFGS, or epochs), loss (mean cross-entropy in nats, on the training
    images), gradient (its largest component, of the mean loss), train_accuracy, val_accuracy, seconds, and those of
    STAMP but the tier.
    """
    train, val = (to_input(images).flatten(1) for images in (dataset.train_images, dataset.val_images))
    rows = []
    for name, search in (
        ("logistic regression, L-BFGS", _all_at_once(train, dataset.train_labels, iterations)),
        ("logistic regression, Adam", _in_batches(train, dataset.train_labels, epochs)),
    ):
        steps, start = [], time.perf_counter()
        for done, weight, bias in search:
            loss = F.cross_entropy(torch.addmm(bias, train, weight), dataset.train_labels)
            gradient = torch.autograd.grad(loss, [weight, bias])
            reached = {
                f"{split}_accuracy": accuracy(torch.addmm(bias, images, weight).detach(), labels)
                for split, images, labels in (
                    ("train", train, dataset.train_labels),
                    ("val", val, dataset.val_labels),
                )
            }
            largest = max(float(part.abs().max()) for part in gradient)
            steps.append({"iterations": done, "loss": float(loss.detach()), "gradient": largest, **reached})
            steps[-1]["seconds"] = time.perf_counter() - start
            if largest < SMALL_GRADIENT:
                break
        best = max(steps, key=lambda step: step["val_accuracy"])
        shared = {"classifier": name, "data": dataset.name, **stamp(train.device, dataset.md5)}
        rows += [{**shared, "stop": stop, **step} for stop, step in (("end", steps[-1]), ("best", best))]
    columns = ["classifier", "stop", "data", *best, *(key for key in STAMP if key != "tier")]
    return pd.DataFrame(rows, columns=columns)


Step = tuple[int, torch.Tensor, torch.Tensor]
"""How many iterations or epochs are done, weight [784, 10] and bias [10]."""


def _parameters(device: torch.device) -> list[torch.Tensor]:
    return [torch.zeros(shape, device=device, requires_grad=True) for shape in ((784, 10), (10,))]


def _all_at_once(images: torch.Tensor, labels: torch.Tensor, iterations: int) -> Iterator[Step]:
    weight, bias = _parameters(images.device)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=EVERY, history_size=20, line_search_fn="strong_wolfe",
        tolerance_grad=0, tolerance_change=0,
    )  # fmt: skip

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(torch.addmm(bias, images, weight), labels)
        value.backward()
        return value

    for done in range(EVERY, iterations + 1, EVERY):
        optimizer.step(loss)
        yield done, weight, bias


def _in_batches(images: torch.Tensor, labels: torch.Tensor, epochs: int) -> Iterator[Step]:
    weight, bias = _parameters(images.device)
    optimizer = torch.optim.Adam([weight, bias], lr=0.001)
    order = torch.Generator().manual_seed(SEED)
    for done in range(1, epochs + 1):
        for batch in torch.randperm(len(images), generator=order).to(images.device).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(torch.addmm(bias, images[batch], weight), labels[batch]).backward()
            optimizer.step()
        yield done, weight, bias

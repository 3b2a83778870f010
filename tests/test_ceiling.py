"""The affine ceiling against scikit-learn's logistic regression, on labels that no affine classifier can separate."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from skipfold.replication.ceiling import best_affine
from skipfold.replication.data import Dataset


def blurred(count, seed):
    """Images that hold 16 numbers each, and labels that follow them now and then."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(count, 1, 4, 4, generator=generator)
    labels = (small.flatten(1)[:, :10] + torch.rand(count, 10, generator=generator)).argmax(dim=1)
    return (255 * small).round().to(torch.uint8).repeat_interleave(7, 2).repeat_interleave(7, 3), labels


DATASET = Dataset("blurred", *blurred(1500, 0), *blurred(1000, 1), {})


def test_best_affine_ends_where_scikit_learn_ends():
    found = best_affine(DATASET, iterations=200, epochs=2).set_index(["classifier", "stop"])
    end = found.loc[("logistic regression, L-BFGS", "end")]
    assert end["gradient"] < 1e-3
    images, labels = DATASET.train_images.flatten(1).numpy() / 255, DATASET.train_labels.numpy()
    reference = LogisticRegression(C=np.inf, max_iter=10_000, tol=1e-8).fit(images, labels)
    assert end["loss"] == pytest.approx(log_loss(labels, reference.predict_proba(images)), rel=1e-4)
    assert end["train_accuracy"] == pytest.approx(reference.score(images, labels), abs=2 / 1500)
    val = DATASET.val_images.flatten(1).numpy() / 255
    assert end["val_accuracy"] == pytest.approx(reference.score(val, DATASET.val_labels.numpy()), abs=3 / 1000)


def test_every_search_counts_with_its_best_step():
    found = best_affine(DATASET, iterations=50, epochs=30)
    assert list(found["stop"]) == ["end", "best"] * 2 and found["classifier"].nunique() == 2
    for _, (end, best) in found.groupby("classifier")["val_accuracy"]:
        assert best >= end > 0.2
    losses = found.loc[found["stop"] == "end", "loss"]
    assert (losses < np.log(10)).all() and losses.iloc[0] < losses.iloc[1]
    assert (found.loc[found["stop"] == "end", "iterations"] == [50, 30]).all()

"""The sweep engine against the plain loop: same epochs, whatever runs side by side."""

import dataclasses

import pytest
import torch

from skipfold import sweep
from skipfold.data import load
from skipfold.store import Store
from skipfold.training import train
from skipfold.trial import Optimizer, Trial

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
NETWORKS = ["perceptron", "cnn3", "shallow_leaky_relu", "resnet18", "resnet34_linear_avgpool"]


@pytest.fixture(scope="module")
def digits():
    """160 training images (two full batches and a smaller one) and 50 for validation."""
    return load("digits").first(160, 50)


def mixed(network: str, **changes) -> list[Trial]:
    """Three trials that differ in t and schedule."""
    base = Trial("test", network, 0, network, epochs=2, precision="float32", data="digits", **changes)
    return [
        base,
        dataclasses.replace(base, index=1, t=0.2),
        dataclasses.replace(base, index=2, t=0.9, schedule="linear"),
    ]


def run(trials, folder, dataset, device, side_by_side=2, progress=None):
    return sweep.run(trials, Store(folder), lambda trial: dataset, torch.device(device), progress, side_by_side)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("network", NETWORKS)
def test_sweep_equals_plain_loop(network, device, digits, tmp_path):
    """Every epoch of mixed t and schedules equals that of the uncropped network trained alone."""
    trials = mixed(network)
    records = run(trials, tmp_path, digits, device)
    for trial, record in zip(trials, records, strict=True):
        plain, _ = train(trial, digits.to(device))
        first, reference = record["epochs"][0], plain[0]
        assert first["train_loss"] == pytest.approx(reference["train_loss"], rel=2e-3)
        assert [epoch["t"] for epoch in record["epochs"]] == trial.strengths
        if not network.startswith("resnet18"):  # an untrained ResNet amplifies rounding
            assert record["epochs"][-1]["val_loss"] == pytest.approx(plain[-1]["val_loss"], rel=1e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("optimizer", [Optimizer(momentum=0.9, lr=0.001), Optimizer("adam", lr=0.001)])
def test_optimizer_state_starts_anew_for_every_group(optimizer, device, digits, tmp_path):
    """The third trial reuses the first one's tensors; nothing of its momentum may remain."""
    trials = mixed("cnn3", optimizer=optimizer)
    together = run(trials, tmp_path / "together", digits, device)
    alone = run(trials[2:], tmp_path / "alone", digits, device)
    assert together[2]["epochs"][-1]["val_loss"] == pytest.approx(alone[0]["epochs"][-1]["val_loss"], rel=1e-3)


def test_stored_trials_are_read_not_trained(digits, tmp_path):
    """A second run gives the same records and never asks for data."""
    trials = mixed("perceptron")
    first = run(trials, tmp_path, digits, "cpu")

    def no_data(trial):
        raise AssertionError("trained again")

    assert sweep.run(trials, Store(tmp_path), no_data, torch.device("cpu")) == first


@pytest.mark.cuda
def test_out_of_memory_halves_the_group_and_loses_nothing(digits, tmp_path, monkeypatch, capsys):
    """Building three learners side by side is made to fail; all three trials are trained all the same."""
    real = sweep.Bench.__init__

    def small_card(self, trial, dataset, size):
        if size > 1:
            raise torch.OutOfMemoryError("simulated")
        real(self, trial, dataset, size)

    monkeypatch.setattr(sweep.Bench, "__init__", small_card)
    records = run(mixed("cnn3"), tmp_path, digits, "cuda", side_by_side=3)
    assert [len(record["epochs"]) for record in records] == [2, 2, 2]
    assert "out of GPU memory at 3 trials side by side; going on with 1" in capsys.readouterr().out

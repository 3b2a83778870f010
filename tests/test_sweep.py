"""The sweep engine against the plain loop: same epochs, whatever runs side by side."""

import dataclasses

import pytest
import torch
from scipy import stats

from skipfold import sweep
from skipfold.data import load
from skipfold.errors import DeviceError
from skipfold.store import Store
from skipfold.training import Learner, initial_network, resolve_device, train, use_device
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


@pytest.mark.parametrize("network", ["cnn3", "resnet18"])
def test_on_a_cpu_a_group_is_the_plain_loop_to_the_bit(network, digits, tmp_path):
    trials = mixed(network)
    for trial, record in zip(trials, run(trials, tmp_path, digits, "cpu", side_by_side=2), strict=True):
        plain, _ = train(trial, digits, crop=True)
        assert [without_seconds(epoch) for epoch in record["epochs"]] == [without_seconds(epoch) for epoch in plain]


def without_seconds(epoch: dict) -> dict:
    return {key: value for key, value in epoch.items() if key != "seconds"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("network", ["cnn3", "resnet18"])
def test_every_step_is_that_of_the_plain_loop(network, device, digits):
    """Same initial weights, same order, and after each of the first steps the same sum of losses."""
    trials = mixed(network)
    dataset = digits.to(device)
    bench = sweep.Bench(trials[0], dataset, 3)
    alone = [Learner(trial, dataset, crop=False) for trial in trials]
    for trial, learner, reference in zip(trials, bench.learners, alone, strict=True):
        learner.load(trial, initial_network(trial, crop=True))
        order = torch.randperm(160, generator=trial.generator("order"))
        for each in (learner, reference):
            each.begin(trial.strengths[0], order)
    for _ in range(bench.full):
        bench.steps[64]()
        for learner, reference in zip(bench.learners, alone, strict=True):
            reference.step(64)
            assert float(learner.totals[0]) == pytest.approx(float(reference.totals[0]), rel=1e-3)
            assert int(learner.cursor) == int(reference.cursor)


def test_accuracies_over_seeds_are_of_one_distribution(digits, tmp_path):
    """24 seeds, half of them trained in groups, half alone; by the Mann-Whitney test."""
    base = Trial("seeds", "perceptron", 0, "perceptron", epochs=2, precision="float32", data="digits")
    trials = [dataclasses.replace(base, index=index) for index in range(24)]
    together = [record["epochs"][-1]["val_accuracy"] for record in run(trials[:12], tmp_path, digits, "cpu", 4)]
    alone = [train(trial, digits)[0][-1]["val_accuracy"] for trial in trials[12:]]
    assert len({*together, *alone}) > 5
    assert stats.mannwhitneyu(together, alone).pvalue > 0.05


class Small:
    """A card on which a bench of more than `size` does not fit, or that is full at the `at`-th group."""

    def __init__(self, monkeypatch, size=100, at=None):
        build, train_group, self.groups = sweep.Bench.__init__, sweep.Bench.train, 0

        def init(bench, trial, dataset, wanted):
            if wanted > size:
                raise torch.OutOfMemoryError("simulated")
            build(bench, trial, dataset, wanted)

        def group(bench, trials, *rest):
            self.groups += 1
            if self.groups == at:
                raise torch.OutOfMemoryError("simulated")
            return train_group(bench, trials, *rest)

        monkeypatch.setattr(sweep.Bench, "__init__", init)
        monkeypatch.setattr(sweep.Bench, "train", group)


@pytest.mark.parametrize("device", DEVICES)
def test_out_of_memory_halves_the_group_and_loses_nothing(device, digits, tmp_path, monkeypatch, capsys):
    trials = mixed("cnn3")
    expected = run(trials, tmp_path / "expected", digits, device, side_by_side=1)
    Small(monkeypatch, size=1)
    records = run(trials, tmp_path / "small", digits, device, side_by_side=3)
    assert "out of memory at 3 trials side by side; going on with 1" in capsys.readouterr().out
    for record, whole in zip(records, expected, strict=True):
        assert record["epochs"][-1]["val_loss"] == pytest.approx(whole["epochs"][-1]["val_loss"], rel=1e-3)


def test_what_a_finished_group_learned_is_kept_when_the_next_one_does_not_fit(digits, tmp_path, monkeypatch):
    """Of four trials in groups of two, the second group fails: the first is stored by then and not trained again."""
    trials = [dataclasses.replace(mixed("perceptron")[0], index=index) for index in range(4)]
    card = Small(monkeypatch, at=2)
    seen = []

    class Progress:
        begin = end = epoch = lambda self, *_: None

        def trial(self, trial, record):
            seen.append((trial.index, card.groups))

    run(trials, tmp_path, digits, "cpu", side_by_side=2, progress=Progress())
    assert seen == [(0, 1), (1, 1), (2, 3), (3, 4)]


def test_a_trained_network_is_measured_on_the_cpu_where_the_device_is_full(digits, tmp_path, monkeypatch, capsys):
    trials = mixed("cnn3")[:1]
    expected = run(trials, tmp_path / "expected", digits, "cpu")[0]["final"]
    real, calls = sweep.measure_trained, []

    def full_once(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("simulated")
        return real(*arguments)

    monkeypatch.setattr(sweep, "measure_trained", full_once)
    final = run(trials, tmp_path / "full", digits, "cpu")[0]["final"]
    assert "out of memory at the measurement of cnn3" in capsys.readouterr().out and len(calls) == 2
    assert final["collapsed_val_accuracy"] == expected["collapsed_val_accuracy"]


def test_one_trial_that_does_not_fit_is_an_error_in_one_line(digits, tmp_path, monkeypatch):
    Small(monkeypatch, size=0)
    with pytest.raises(DeviceError, match="perceptron: one trial does not fit the free memory"):
        run(mixed("perceptron"), tmp_path, digits, "cpu", side_by_side=2)


def test_a_run_killed_between_groups_goes_on_with_the_rest(digits, tmp_path):
    trials = [dataclasses.replace(mixed("perceptron")[0], index=index) for index in range(4)]
    trained = []

    class Killed:
        begin = end = trial = lambda self, *_: None

        def epoch(self, trial, epoch):
            trained.append(trial.index)
            if trial.index == 2 and len(trained) == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(trials, tmp_path, digits, "cpu", side_by_side=2, progress=Killed())
    assert [trial in Store(tmp_path) for trial in trials] == [True, True, False, False]
    trained.clear()
    whole = run(trials, tmp_path, digits, "cpu", side_by_side=2, progress=Killed())
    assert sorted(set(trained)) == [2, 3]
    again = run(trials, tmp_path / "at once", digits, "cpu", side_by_side=4)
    assert [without_seconds(r["epochs"][-1]) for r in whole] == [without_seconds(r["epochs"][-1]) for r in again]


@pytest.mark.parametrize(
    ("free", "needed", "wanted", "size"),
    [(80e9, 0.5e9, 16, 16), (4e9, 0.5e9, 16, 7), (1e9, 2e9, 16, 1), (80e9, 0.5e9, 3, 3), (1e9, 0, 4, 4)],
)
def test_as_many_as_fit(free, needed, wanted, size):
    assert sweep.fitting(int(free), int(needed), wanted) == size


@pytest.mark.cuda
def test_the_size_of_the_group_is_chosen_from_free_memory_and_said(digits, tmp_path, capsys):
    records = run(mixed("resnet18"), tmp_path, digits, "cuda", side_by_side=None)
    assert len(records) == 3
    assert "sweep: resnet18: 3 of 3 trials side by side, about 0." in capsys.readouterr().out


def test_one_of_several_gpus_is_taken_if_it_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [resolve_device(name).index for name in ("auto", "cuda", "cuda:1", "cpu")] == [None, None, 1, None]
    with pytest.raises(DeviceError, match="'cuda:2' asked for; there are cuda:0 to cuda:1"):
        resolve_device("cuda:2")
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert [str(use_device(name)) for name in ("cuda", "cuda:1", "cpu")] == ["cuda", "cuda:1", "cpu"]
    assert [str(device) for device in taken] == ["cuda:1"]

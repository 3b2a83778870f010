"""The sweep engine against the plain loop: same epochs, whatever runs side by side."""

import copy
import dataclasses
import functools

import pytest
import torch
from samples import DEVICES, STREAMS, Stream
from scipy import stats
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from skipfold.errors import ConfigError, DeviceError
from skipfold.homotopy import set_skip_strength
from skipfold.replication import evaluation, sweep, training
from skipfold.replication.data import load, to_input
from skipfold.replication.store import Store
from skipfold.replication.training import Learner, initial_network, resolve_device, train, use_device
from skipfold.replication.trial import Optimizer, Trial

NETWORKS = ["perceptron", "cnn3", "shallow_leaky_relu", "resnet18"]


@pytest.fixture(scope="module")
def digits():
    """40 training images (two full batches and a smaller one) and 20 for validation."""
    return load("digits").first(40, 20)


@pytest.fixture
def float64(monkeypatch):
    """Networks and images in double: in float32 an untrained ResNet makes 4e-3 of a difference of 1e-7 in 3 steps."""
    for module in (training, evaluation):
        monkeypatch.setattr(module, "to_input", lambda images: to_input(images).double())
    for module in (training, sweep):
        monkeypatch.setattr(module, "initial_network", lambda trial, crop: initial_network(trial, crop).double())
    training._template.cache_clear()
    yield
    training._template.cache_clear()


def mixed(network: str, **changes) -> list[Trial]:
    """Three trials that differ in t and schedule."""
    base = Trial("test", network, 0, network, epochs=2, batch_size=16, precision="float32", data="digits", **changes)
    return [
        base,
        dataclasses.replace(base, index=1, t=0.2),
        dataclasses.replace(base, index=2, t=0.9, schedule="linear"),
    ]


def run(trials, folder, dataset, device, side_by_side=2, progress=None, stacked=None):
    store = Store(folder)
    return sweep.run(trials, store, lambda trial: dataset, torch.device(device), progress, side_by_side, stacked)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("network", "side_by_side", "stacked"),
    [(network, *group) for network in NETWORKS for group in ((2, 1), (3, 2))],
)
def test_sweep_equals_plain_loop(network, side_by_side, stacked, device, digits, tmp_path, float64):
    """Every epoch of mixed t and schedules equals that of the uncropped network trained alone.

    Of two stacks of two networks, one network idles.
    """
    trials = mixed(network)
    if network == "resnet18":
        digits = digits.first(24, 20)  # a full batch and a smaller one
    records = run(trials, tmp_path, digits, device, side_by_side, stacked=stacked)
    for trial, record in zip(trials, records, strict=True):
        plain, _ = train(trial, digits.to(device))
        assert [epoch["t"] for epoch in record["epochs"]] == trial.strengths
        for epoch, reference in zip(record["epochs"], plain, strict=True):
            assert without_seconds(epoch) == pytest.approx(without_seconds(reference), rel=1e-7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("most", [7, 3])
def test_kinds_of_few_trials_train_side_by_side(most, device, digits, tmp_path, float64, monkeypatch):
    """Networks, options and optimizers differ; of 7 trials on a card where 3 fit, groups are of several kinds too."""
    adam, wide = Optimizer("adam", lr=0.001), {"width": 3}
    trials = [*mixed("cnn3")[:2], *mixed("perceptron", optimizer=adam)[:2], *mixed("resnet18")[:2]]
    trials = [*trials, mixed("cnn3", options=wide)[2]]
    monkeypatch.setattr(sweep, "rounds", lambda trials, device: [list(trials)])
    Small(monkeypatch, size=most)
    digits = digits.first(24, 20)
    records = run(trials, tmp_path, digits, device, side_by_side=7)
    for trial, record in zip(trials, records, strict=True):
        plain, _ = train(trial, digits.to(device))
        for epoch, reference in zip(record["epochs"], plain, strict=True):
            assert without_seconds(epoch) == pytest.approx(without_seconds(reference), rel=1e-7)


class Recorded(TorchDispatchMode):
    """Instead of a CUDA graph, on a CPU: the operators, with their arguments as they were, in the same tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((functools.partial(func, *args, **(kwargs or {})), tree_leaves(out)))
        return out

    @torch.no_grad()
    def replay(self):
        for call, held in self.calls:
            for tensor, again in zip(held, tree_leaves(call()), strict=True):
                if isinstance(tensor, torch.Tensor) and tensor.data_ptr() != again.data_ptr():
                    tensor.copy_(again)


@pytest.fixture
def captured(monkeypatch):
    """Benches on a CPU capture as on CUDA, and update by the same kernels' twins."""
    monkeypatch.setattr(sweep.Bench, "on_cuda", property(lambda _: True, lambda *_: None), raising=False)
    stand_ins = {
        "CUDAGraph": Recorded,
        "graph": lambda graph, pool, stream: graph,
    }
    for name, stand_in in (STREAMS | stand_ins).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for name in ("SGD", "Adam"):
        real = getattr(torch.optim, name)
        fused = lambda *given, real=real, **options: real(*given, **options | {"fused": True})  # noqa: E731
        monkeypatch.setattr(torch.optim, name, fused)


def normalized(trial, crop):
    """A small network with a BatchNorm in the place of each ResNet."""
    if trial.network != "resnet18":
        return initial_network(trial, crop).double()
    torch.manual_seed(trial.index)
    layers = [nn.Conv2d(1, 4, 5, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 10)]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize(
    "optimizer", [Optimizer(momentum=0.9), Optimizer("adam", lr=0.001)], ids=lambda value: value.name
)
@pytest.mark.parametrize(
    ("networks", "side_by_side", "stacked"),
    [(("resnet18", "cnn3"), 6, 1), (("resnet18",), 2, 2)],
    ids=["kinds", "groups"],
)
def test_what_is_captured_once_is_every_step(
    networks, side_by_side, stacked, optimizer, digits, tmp_path, float64, captured, monkeypatch
):
    """Two kinds in one graph; or two groups of a kind in turn, in the second of which one of two networks idles."""
    for module in (training, sweep):
        monkeypatch.setattr(module, "initial_network", normalized)
    monkeypatch.setattr(sweep, "rounds", lambda trials, device: [list(trials)])
    trials = [trial for network in networks for trial in mixed(network, optimizer=optimizer)]
    records = run(trials, tmp_path, digits, "cpu", side_by_side, stacked=stacked)
    for trial, record in zip(trials, records, strict=True):
        plain, _ = train(trial, digits)
        for epoch, reference in zip(record["epochs"], plain, strict=True):
            assert without_seconds(epoch) == pytest.approx(without_seconds(reference), rel=1e-7)


def test_a_capture_that_is_broken_off_is_joined_first(digits, captured, monkeypatch):
    """CUDA ends no capture whose branches are left open, and what then fails would hide that memory ran out."""
    waits = []
    monkeypatch.setattr(Stream, "wait_stream", lambda stream, other: waits.append((stream, other)))

    class Greedy(Learner):
        def step(self, size):
            super().step(size)
            if _get_current_dispatch_mode():
                raise torch.OutOfMemoryError("simulated")

    with pytest.raises(torch.OutOfMemoryError, match="simulated"):
        sweep.Bench(mixed("cnn3"), digits, learner=Greedy)
    *_, (branch, root), (again, joined) = waits
    assert (again, joined) == (root, branch) and branch is not root


def test_on_cuda_kinds_of_few_trials_of_one_protocol_are_one_round():
    few = [dataclasses.replace(trial, epochs=epochs) for epochs in (2, 10) for trial in mixed("cnn3")]
    wide = mixed("cnn3", options={"width": 3})
    many = [dataclasses.replace(mixed("perceptron")[0], index=index) for index in range(sweep.FEW + 1)]
    trials = [*few, *many, *wide]
    rounds = [[*few[:3], *wide], few[3:], many]
    assert sweep.rounds(trials, torch.device("cuda")) == rounds
    assert sweep.rounds(trials, torch.device("cpu")) == sweep.kinds(trials) == [few[:3], few[3:], many, wide]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stacked", [1, 2])
@pytest.mark.parametrize("optimizer", [Optimizer(momentum=0.9, lr=0.001), Optimizer("adam", lr=0.001)])
def test_optimizer_state_starts_anew_for_every_group(optimizer, stacked, device, digits, tmp_path):
    """The third trial reuses the first one's tensors; nothing of its momentum may remain."""
    trials = mixed("cnn3", optimizer=optimizer)
    together = run(trials, tmp_path / "together", digits, device, stacked=stacked)
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
def test_on_a_cpu_a_group_that_is_not_stacked_is_the_plain_loop_to_the_bit(network, digits, tmp_path):
    trials = mixed(network)
    for trial, record in zip(trials, run(trials, tmp_path, digits, "cpu", side_by_side=2, stacked=1), strict=True):
        plain, _ = train(trial, digits, fast=True)
        assert [without_seconds(epoch) for epoch in record["epochs"]] == [without_seconds(epoch) for epoch in plain]


def without_seconds(epoch: dict) -> dict:
    return {key: value for key, value in epoch.items() if key != "seconds"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stacked", [1, 3])
@pytest.mark.parametrize("network", ["cnn3", "resnet18"])
def test_every_step_is_that_of_the_plain_loop(network, stacked, device, digits, float64):
    """Same initial weights, same order, and after each of the first steps the same sum of losses."""
    trials = mixed(network)
    dataset = digits.to(device)
    bench = sweep.Bench(trials, dataset, stacked)
    alone = [Learner(trial, dataset, fast=False) for trial in trials]
    strengths = [trial.strengths[0] for trial in trials]
    orders = [torch.randperm(40, generator=trial.generator("order")) for trial in trials]
    for i, learner in enumerate(bench.learners):
        mine = slice(i * stacked, (i + 1) * stacked)
        learner.load([training.initial_network(trial, crop=True) for trial in trials[mine]])
        learner.begin(strengths[mine], orders[mine])
    for reference, t, order in zip(alone, strengths, orders, strict=True):
        reference.begin([t], [order])
    for _ in range(bench.full):
        bench.steps[16]()
        sums = torch.cat([learner.totals[0] for learner in bench.learners])
        for total, reference in zip(sums, alone, strict=True):
            reference.step(16)
            assert float(total) == pytest.approx(float(reference.totals[0]), rel=1e-9)
        assert all(int(learner.cursor) == int(alone[0].cursor) for learner in bench.learners)


@pytest.mark.parametrize(
    ("device", "count"),
    [("cpu", 1), *(pytest.param("cuda", count, marks=pytest.mark.cuda) for count in (1, 3))],
)
@pytest.mark.parametrize(
    ("network", "options"),
    [
        ("cnn3", {}),
        ("shallow_leaky_relu", {"stride": 2}),
        ("resnet18", {"stem": "imagenet_pool3"}),
        ("resnet18", {"size": 16}),
        ("resnet34_linear_avgpool", {}),
    ],
)
def test_a_step_in_the_arithmetic_of_training_is_that_of_float64(network, options, count, device):
    """On CUDA TF32 and channels last. Losses are alike, and every layer goes the way that float64 sends it."""
    digits = load("digits").first(64, 1)
    base = Trial("test", network, 0, network, options=options, t=0.9, epochs=1, batch_size=64, data="digits")
    trials = [dataclasses.replace(base, index=index) for index in range(count)]
    initials = [initial_network(trial, crop=True) for trial in trials]
    with training.arithmetic("tf32"):
        learner = Learner(base, digits.to(device), count=count)
        learner.load(initials)
        learner.begin([0.9] * count, [torch.arange(64)] * count)
        learner.step(64)
    for index, (initial, (loss, _)) in enumerate(zip(initials, learner.means(64), strict=True)):
        model = copy.deepcopy(initial).double().train()
        set_skip_strength(model, 0.9)
        expected = F.cross_entropy(model(to_input(digits.train_images).double()), digits.train_labels)
        assert loss == pytest.approx(expected.item(), rel=1e-2)
        expected.backward()
        trained = dict(learner.network(index).named_parameters())
        layers = {path: weight for path, weight in model.named_parameters() if weight.dim() > 1}
        for path, weight in layers.items():
            step = initial.get_parameter(path).double() - trained[path].detach().cpu().double()
            assert F.cosine_similarity(step.flatten(), weight.grad.flatten(), dim=0) > 0.95, path


def test_accuracies_over_seeds_are_of_one_distribution(tmp_path):
    """24 seeds, half of them trained in groups, half alone; by the Mann-Whitney test."""
    digits = load("digits").first(160, 50)
    base = Trial("seeds", "perceptron", 0, "perceptron", epochs=2, precision="float32", data="digits")
    trials = [dataclasses.replace(base, index=index) for index in range(24)]
    together = [record["epochs"][-1]["val_accuracy"] for record in run(trials[:12], tmp_path, digits, "cpu", 4)]
    alone = [train(trial, digits)[0][-1]["val_accuracy"] for trial in trials[12:]]
    assert len({*together, *alone}) > 5
    assert stats.mannwhitneyu(together, alone).pvalue > 0.05


@pytest.mark.parametrize("device", DEVICES)
def test_validation_by_batch_is_a_pass_in_training_mode_that_leaves_no_trace(device, digits, float64):
    dataset = digits.to(device)
    learner = Learner(mixed("resnet18")[0], dataset)
    learner.epoch([0.2], [torch.randperm(40)])
    before = copy.deepcopy(learner.network(0))
    learner.begin_batches()
    assert learner.val_batches() == [10, 10]
    for size in learner.val_batches():
        learner.measure_batch(size)
    ((loss, accuracy),) = learner.means(20)
    kept = before.state_dict()
    assert all(torch.equal(value, kept[key]) for key, value in learner.network(0).state_dict().items())
    with torch.no_grad():
        logits = torch.cat([before.train()(to_input(images).double()) for images in dataset.val_images.split(10)])
    assert loss == pytest.approx(float(F.cross_entropy(logits, dataset.val_labels)), rel=1e-7)
    assert accuracy == pytest.approx(float((logits.argmax(1) == dataset.val_labels).double().mean()))
    learner.model.eval()
    learner.measure()
    assert learner.means(20)[0][0] != pytest.approx(loss, rel=1e-3)


class Small:
    """A card on which a bench of more than `size` does not fit, or that is full at the `at`-th group."""

    def __init__(self, monkeypatch, size=100, at=None):
        build, train_group, self.groups = sweep.Bench.__init__, sweep.Bench.train, 0

        def init(bench, trials, *rest):
            if len(trials) > size:
                raise torch.OutOfMemoryError("simulated")
            build(bench, trials, *rest)

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


@pytest.mark.cuda
def test_memory_that_runs_out_in_a_capture_can_be_used_again(digits):
    trials, dataset = mixed("cnn3"), digits.to("cuda")

    class Greedy(Learner):
        def step(self, batch):
            super().step(batch)
            if torch.cuda.is_current_stream_capturing():
                torch.empty(2**44, dtype=torch.uint8, device="cuda")

    sweep.Bench(trials, dataset)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            sweep.Bench(trials, dataset, learner=Greedy)
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() <= before
    assert sweep.Bench(trials, dataset).seconds_a_step() > 0


@pytest.mark.parametrize(
    ("free", "needed", "wanted", "size"),
    [(80e9, 0.5e9, 16, 16), (4e9, 0.5e9, 16, 7), (1e9, 2e9, 16, 1), (80e9, 0.5e9, 3, 3), (1e9, 0, 4, 4)],
)
def test_as_many_as_fit(free, needed, wanted, size):
    assert sweep.fitting(int(free), int(needed), wanted) == size


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_what_is_measured_fastest_and_runs_is_stacked_and_said(error, digits, monkeypatch, capsys):
    """Of 5 networks 1, 3 or all in one; all do not fit, or have no kernel."""
    seconds = {1: 3.0, 3: 1.0}

    def timed(bench):
        if bench.stacked not in seconds:
            raise error("simulated")
        return seconds[bench.stacked]

    monkeypatch.setattr(sweep.Bench, "seconds_a_step", timed)
    assert sweep.fastest_stacked(mixed("cnn3")[0], digits, 5) == 3
    said = capsys.readouterr().out
    assert "cnn3: a step and trial takes with 1 stacked 600000 us, 3 stacked 200000 us; going on with 3" in said
    assert "cnn3: 5 stacked is left out: simulated" in said


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("stacked", "learners"), [(1, 3), (2, 2), (3, 1)])
def test_the_steps_that_are_timed_are_those_of_an_epoch(stacked, learners, device, digits):
    bench = sweep.Bench(mixed("perceptron"), digits.to(device), stacked)
    assert bench.seconds_a_step() > 0
    assert [int(learner.cursor) for learner in bench.learners] == [2 * 16] * learners


@pytest.mark.parametrize(("network", "stacked"), [("resnet18", 1), ("cnn3", 8), ("perceptron", 8)])
def test_on_a_cpu_small_networks_are_stacked(network, stacked, digits, monkeypatch):
    monkeypatch.setattr(sweep, "fastest_stacked", None)
    assert sweep.choose_stacked(mixed(network)[0], digits, 16, 10**6) == stacked


@pytest.mark.cuda
def test_on_cuda_it_is_measured_what_to_stack(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "WORTH_MEASURING", 0)
    run(mixed("cnn3"), tmp_path, digits, "cuda", side_by_side=3)
    assert "cnn3: a step and trial takes with 1 stacked" in capsys.readouterr().out


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


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_smaller_last_batch_can_be_left_out(drop_last, digits, tmp_path):
    """The perceptron's epochs, plain and swept, against steps written out; 40 images are batches of 16, 16 and 8."""
    (trial, *_) = mixed("perceptron", drop_last=drop_last)
    weight = initial_network(trial, crop=False)[1].weight.detach().double().requires_grad_()
    order, images = trial.generator("order"), to_input(digits.train_images).flatten(1).double()
    expected = []
    for _ in range(trial.epochs):
        batches = torch.randperm(40, generator=order).split(16)[: 2 if drop_last else 3]
        losses = []
        for batch in batches:
            loss = F.cross_entropy(images[batch] @ weight.T, digits.train_labels[batch], reduction="sum")
            (gradient,) = torch.autograd.grad(loss / len(batch), weight)
            with torch.no_grad():
                weight -= trial.optimizer.lr * gradient
            losses.append(loss.item())
        expected.append(sum(losses) / sum(map(len, batches)))
    (record,) = run([trial], tmp_path, digits, "cpu")
    plain, _ = train(trial, digits)
    for epochs in (record["epochs"], plain):
        assert [epoch["train_loss"] for epoch in epochs] == pytest.approx(expected, rel=1e-5)


def test_a_batch_of_one_image_is_refused_before_the_first_step(tmp_path):
    (trial, *_) = mixed("resnet18")
    one_over = load("digits").first(33, 20)
    with pytest.raises(ConfigError, match="batch_size: 16 given for 33 images, which makes a batch of 1 image"):
        run([trial], tmp_path, one_over, "cpu")
    with pytest.raises(ConfigError, match="batch_size: 1 given"):
        train(dataclasses.replace(trial, batch_size=1), one_over)
    for fits in (dataclasses.replace(trial, drop_last=True), mixed("perceptron")[0]):
        assert Learner(fits, one_over).full == 2

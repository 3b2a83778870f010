"""That what runs on CUDA keeps its tensors there and knows the operators it meets, seen without a GPU.

PyTorch's fake tensors have a device and no values, and are dispatched as on that device: on `cuda` a BatchNorm is
cudnn's, and an operator that mixes devices is refused. What comes out as numbers is for the tests marked `cuda`.
"""

import contextlib
import types

import pandas as pd
import pytest
import torch
import torchvision
from samples import STREAMS
from test_collapse import AFFINE, CHAINS, FUNCTIONS, Residual
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import DeviceType
from torch.utils._pytree import tree_leaves

from skipfold import structure
from skipfold.chains import collapse_convolution
from skipfold.collapse import Collapsed, collapse, fold_preprocessing
from skipfold.errors import DeviceError, NotAffineError
from skipfold.folding import fold_affine
from skipfold.homotopy import Skip, set_skip_strength, skips, to_homotopy
from skipfold.networks import INPUT_SHAPE, NETWORKS, build
from skipfold.removal import remove_skips
from skipfold.replication import provenance, roofline, runtimes, sweep, timing
from skipfold.replication.data import Dataset
from skipfold.replication.evaluation import measure_trained
from skipfold.replication.products import TwoByTwoConv2d, with_products
from skipfold.replication.store import Store
from skipfold.replication.timing import build_in, contenders
from skipfold.replication.training import Learner, initial_network
from skipfold.replication.trial import Optimizer, Trial

CUDA = torch.device("cuda")


class FakeTensors(FakeTensorMode):
    """Tensors made in it have no values; what Python reads of them is 0, or True, or 1 of a whole number."""

    captures = False

    @contextlib.contextmanager
    def capture(self):
        """As a CUDA graph is captured: what waits for the device, or copies from or to the host, is refused."""
        self.captures = True
        try:
            yield
        finally:
            self.captures = False

    def dispatch(self, func, types, args=(), kwargs=None):
        if self.captures and torch.Tag.data_dependent_output in func.tags:
            raise AssertionError(f"{func} waits for the device")
        if self.captures and torch.Tag.dynamic_output_shape in func.tags:
            raise AssertionError(f"{func} has a shape by values, and waits for the device")
        if func is torch.ops.aten._local_scalar_dense.default:
            return {torch.bool: True, torch.int64: 1}.get(args[0].dtype, 0.0)
        if func is torch.ops.aten._fused_sgd_.default:  # not written for fake tensors; changes its arguments
            assert all(tensor.is_cuda for held in args[:3] for tensor in held)
            return None
        out = super().dispatch(func, types, args, kwargs)
        if self.captures:
            tensors = [value for value in tree_leaves((args, kwargs, out)) if isinstance(value, torch.Tensor)]
            assert len({tensor.device.type for tensor in tensors}) < 2, f"{func} copies from or to the host"
        return out


@pytest.fixture(autouse=True)
def fake_tensors(monkeypatch):
    monkeypatch.setattr(nn.Module, "_apply", _convert)
    monkeypatch.setattr(FakeTensor, "__deepcopy__", _copy, raising=False)
    monkeypatch.setattr(torch.autograd, "grad", _gradient)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", _give_gradients)
    # By this operator fake tensors ask for their device.
    monkeypatch.setattr(structure, "CONSTANT", structure.CONSTANT | {"device"})
    with FakeTensors(allow_non_fake_inputs=True) as mode:
        yield mode


def _convert(module, function, recurse=True):
    """nn.Module's own exchanges tensors in place, which fake ones do not take."""
    for child in module.children():
        child._apply(function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(function(parameter.data), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def _copy(tensor, memo):
    """torch.Tensor's own copies the storage, which fake tensors lack."""
    if id(tensor) not in memo:
        copied = tensor.detach().clone()
        held = nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
        memo[id(tensor)] = held
    return memo[id(tensor)]


def _gradient(y, x, unit, **_):
    """Autograd's threads want a driver."""
    assert y.device == x.device == unit.device
    return (x.new_zeros(len(unit), *x.shape),)


def _give_gradients(optimizer, set_to_none):
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)


def all_on_cuda(module):
    return all(tensor.is_cuda for tensor in module.state_dict().values())


@pytest.mark.parametrize("name", AFFINE)
def test_every_affine_operator_of_cuda_is_known(name):
    build_module, shape = AFFINE[name]
    layer, certificate = collapse(build_module().eval().cuda(), shape)
    assert certificate.structure == "affine" and all_on_cuda(layer) and all_on_cuda(fold_preprocessing(layer))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_other_operator_of_cuda_is_named(name):
    function, reason = FUNCTIONS[name]
    model = nn.Sequential(nn.Linear(4, 4), Residual(function)).eval().cuda()
    with pytest.raises(NotAffineError, match="1: ") as caught:
        collapse(model, (4,))
    assert reason in caught.value.offenders["1"]


@pytest.mark.parametrize("name", CHAINS)
def test_chains_stay_on_their_device(name):
    whole, _ = collapse_convolution(CHAINS[name]().eval().cuda())
    assert all_on_cuda(whole)


@pytest.mark.parametrize(("name", "export"), [("resnet18", True), ("resnet50", False)])
def test_rewritten_networks_stay_on_their_device(name, export):
    model = torchvision.models.get_model(name).eval().cuda()
    shape = (3, 64, 64)
    with_strength, _ = to_homotopy(model, shape, export=export)
    set_skip_strength(with_strength, 0)
    plain, _ = remove_skips(with_strength, shape, crop=True, export=export)
    folded, _ = fold_affine(model, shape, export=export)
    assert all(map(all_on_cuda, (with_strength, plain, folded)))


def test_weighted_skips_fold_on_their_device(monkeypatch):
    # Two weights that are 0, as all fake values are, would leave nothing.
    monkeypatch.setattr(Skip, "pair", lambda self, dtype: (0.7, 0.3))
    folded, _ = fold_affine(build("resnet34_linear_avgpool").eval().cuda(), INPUT_SHAPE, export=False)
    assert all_on_cuda(folded)


def dataset(device=CUDA):
    images, labels = torch.zeros(100, 1, 28, 28, dtype=torch.uint8), torch.zeros(100, dtype=torch.int64)
    return Dataset("none", images, labels, images, labels, {}).to(device)


TRAINED = pytest.mark.parametrize(
    ("network", "optimizer"),
    # ResNet34 is ResNet18, deeper.
    [
        *((network, Optimizer("sgd", momentum=0.9)) for network in NETWORKS if network != "resnet34"),
        ("cnn3", Optimizer("adam")),
    ],
    ids=lambda value: getattr(value, "name", value),
)


@TRAINED
@pytest.mark.parametrize("count", [1, 2])
def test_a_trial_stays_on_its_device(network, optimizer, count):
    trial = Trial("schedule_comparison", "any", 1, network, schedule="linear", t=0.5, optimizer=optimizer)
    learner = Learner(trial, dataset(), count=count)
    learner.begin([0.5], [torch.randperm(100)])
    for size in (64, 36):
        learner.step(size)
    learner.begin_batches()
    learner.measure_batch(size)
    learner.model.eval()
    learner.measure()
    learner.load([initial_network(trial, crop=True)] * count)
    assert all_on_cuda(learner.model) and learner.totals.is_cuda
    network = learner.network(count - 1)
    if skips(network):
        set_skip_strength(network, 0)
    measure_trained(trial, network, learner.dataset)


@TRAINED
@pytest.mark.parametrize("count", [1, 2])
def test_a_step_and_a_validation_pass_can_be_captured(network, optimizer, count, fake_tensors):
    learner = Learner(Trial("devices", "any", 1, network, t=0.5, optimizer=optimizer), dataset(), count=count)
    learner.begin([0.5] * count, [torch.randperm(100)] * count)
    learner.step(64)  # makes the optimizer's state
    with fake_tensors.capture():
        for size in (64, 36):
            learner.step(size)
            learner.measure_batch(size)
        learner.model.eval()
        learner.measure()


def test_what_cannot_be_captured_is_refused(fake_tensors):
    x = torch.ones(3).to(CUDA)
    for action in (x.sum().item, x.nonzero, x.cpu, lambda: x + torch.ones(3).to(CUDA), lambda: x[x > 0]):
        with fake_tensors.capture(), pytest.raises(AssertionError, match=r"waits for the device|copies from or to"):
            action()


def test_products_of_stacked_networks_stay_on_their_device():
    trial = Trial("devices", "any", 1, "resnet18", t=0.5)
    learner = Learner(trial, dataset(), count=2)
    learner.model = with_products(learner.model, (2, *INPUT_SHAPE[1:]))
    assert any(isinstance(module, TwoByTwoConv2d) for module in learner.model.modules())
    learner.begin([0.5, 0.5], [torch.randperm(100)] * 2)
    learner.step(64)
    assert all_on_cuda(learner.model) and learner.totals.is_cuda


def test_timed_networks_stay_on_their_device(fake_tensors, monkeypatch):
    # As above: fake weights are all 0.
    monkeypatch.setattr(Skip, "pair", lambda self, dtype: (0.7, 0.3))
    # ResNet34's forms are those of ResNet18, deeper.
    timed = [each for each in contenders.__wrapped__(CUDA) if each.network != "resnet34"]
    x = torch.rand(64, *INPUT_SHAPE).to(CUDA)
    with torch.inference_mode():
        for contender in timed:
            assert all_on_cuda(contender.module) and all_on_cuda(contender.reference)
            for runtime in ("eager", "channels_last", "channels_last_bf16"):
                assert build_in(contender, runtime, CUDA).bind(x)().is_cuda
            with fake_tensors.capture():
                contender.module(x)


class Graph:
    def replay(self):
        pass

    def pool(self):
        return (0, 1)


class Event:
    """Ten milliseconds apart."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    synchronize = record

    def elapsed_time(self, end):
        return 10.0


@pytest.fixture
def card(fake_tensors, monkeypatch):
    """What PyTorch asks of the card itself: 80 GiB, of which a learner takes 10, without the time of anything."""

    @contextlib.contextmanager
    def graph(graph, pool, stream):
        with fake_tensors.capture():
            yield

    stand_ins = {
        "CUDAGraph": Graph,
        "graph": graph,
        "Event": Event,
        "device_of": contextlib.nullcontext,
        "memory_allocated": lambda: 2**30,
        "max_memory_allocated": lambda: 11 * 2**30,
        "reset_peak_memory_stats": lambda: None,
        "mem_get_info": lambda: (60 * 2**30, 80 * 2**30),
        "get_device_name": lambda device: "a card",
        "get_device_properties": lambda device: types.SimpleNamespace(uuid="1-2"),
    }
    for name, stand_in in (STREAMS | stand_ins).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: [[0.0] * tensor.shape[1]] * tensor.shape[0])
    runtimes._capture_stream.cache_clear()
    yield
    runtimes._capture_stream.cache_clear()


def test_a_sweep_stays_on_its_device(card, tmp_path, monkeypatch, capsys):
    """From free memory, and what to stack, to the records; of 6 trials five fit, so they are two groups of three."""
    monkeypatch.setattr(sweep, "WORTH_MEASURING", 0)
    monkeypatch.setattr(sweep, "measure_trained", lambda *_: {})  # see above
    trials = [Trial("devices", "any", index, "cnn3", epochs=2, t=0.5) for index in range(6)]
    records = sweep.run(trials, Store(tmp_path), lambda trial: dataset("cpu"), CUDA)
    assert [record["provenance"]["device"] for record in records] == ["a card"] * 6
    said = capsys.readouterr().out
    assert "cnn3: 5 of 6 trials side by side, about 10.00 GiB each, 60.0 GiB free" in said
    assert "with 1 stacked" in said and ", 3 stacked" in said


def test_a_card_on_which_one_trial_does_not_fit_is_too_small(card, tmp_path, monkeypatch):
    def full(learner):
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(Learner, "measure", full)
    with pytest.raises(DeviceError, match="cnn3: one trial does not fit the free memory"):
        sweep.run([Trial("devices", "any", 0, "cnn3")], Store(tmp_path), lambda trial: dataset("cpu"), CUDA)


def one_layer():
    made = [Collapsed(torch.rand(10, 784), torch.rand(10), INPUT_SHAPE, (10,)).to(CUDA) for _ in range(2)]
    return timing.Contender(*roofline.COLLAPSED, made[0], made[1].double())


def test_calls_are_timed_by_both_clocks(card):
    with torch.inference_mode():
        x = torch.rand(2, *INPUT_SHAPE).to(CUDA)
        calls = [timing.predict(build_in(one_layer(), name, CUDA), x).call for name in ("eager", "cuda_graph")]
    found = timing._interleaved(calls, {"repeats": 3, "cell_seconds": 1}, CUDA)
    assert {way: len(samples) for way, samples in found.items()} == {"host": 2, "device": 2}
    assert timing._between_events(calls[1], 5) == pytest.approx(0.002)


@pytest.mark.parametrize(("compiles", "variants"), [(True, [6, 6, 2]), (False, [6, 2])])
def test_the_roofline_stays_on_its_device(compiles, variants, card, monkeypatch):
    """With three kernels of which one copies, and, in the place of Triton's, one that is told its grid, or fails."""
    kernel = pytest.importorskip("skipfold.kernel")
    events = [types.SimpleNamespace(name=name, device_type=DeviceType.CUDA) for name in ("Memcpy HtoD", "gemm", "add")]
    found, grids = types.SimpleNamespace(events=lambda: events), []
    monkeypatch.setattr(roofline, "profile", lambda activities: contextlib.nullcontext(found))
    monkeypatch.setattr(roofline, "_seconds", lambda call: call() is None or 0.5)
    monkeypatch.setattr(roofline, "contenders", lambda device: [one_layer()])
    # In inference mode fake tensors look for a card.
    monkeypatch.setattr(roofline, "arithmetic", lambda precision: torch.inference_mode(False))
    monkeypatch.setattr(kernel, "tuned", Launches(grids) if compiles else None)
    stamped = dict.fromkeys(provenance.STAMP, "any")
    timings = [
        dict(zip(("network", "variant"), roofline.COLLAPSED, strict=True), runtime=name, batch=64, measure="device")
        for name in roofline.AS_COUNTED
    ]
    table = roofline.measure(pd.DataFrame(timings).assign(median_us=1.0, **stamped), CUDA)
    assert set(table["kernels"]) == {2} and (table["launch_us"] == 5e5).all()
    assert list(table["variant"].value_counts()) == variants
    assert set(grids) == ({(1,), (4,), (2**15,)} if compiles else set())


class Launches:
    """As Triton's kernel is called; it writes nothing."""

    def __init__(self, grids):
        self.grids = grids

    def __getitem__(self, grid):
        self.grids.append(grid({"ROWS": 16}))
        return lambda *tensors, **sizes: None


def test_the_state_of_the_card_is_read_by_its_own_name(card, monkeypatch):
    said = {"--id=GPU-1-2": "P0, 1980 MHz, 1980 MHz, 2619 MHz, 120.50 W, 35"}
    monkeypatch.setattr(provenance, "output", lambda program, which, *_: said.get(which))
    assert provenance.gpu_state(CUDA).startswith("pstate P0, clocks.sm 1980 MHz, ")
    said.clear()
    assert provenance.gpu_state(CUDA) is None

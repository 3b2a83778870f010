"""That what runs on CUDA keeps its tensors there and knows the operators it meets, seen without a GPU.

PyTorch's fake tensors have a device and no values, and are dispatched as on that device: on `cuda` a BatchNorm is
cudnn's, and an operator that mixes devices is refused. What comes out as numbers is for the tests marked `cuda`.
"""

import contextlib

import pytest
import torch
import torchvision
from test_collapse import AFFINE, CHAINS, FUNCTIONS, Residual
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from skipfold import structure
from skipfold.chains import collapse_convolution
from skipfold.collapse import collapse, fold_preprocessing
from skipfold.errors import NotAffineError
from skipfold.folding import fold_affine
from skipfold.homotopy import Skip, set_skip_strength, skips, to_homotopy
from skipfold.networks import INPUT_SHAPE, NETWORKS, build
from skipfold.removal import remove_skips
from skipfold.replication.data import Dataset
from skipfold.replication.evaluation import measure_trained
from skipfold.replication.products import TwoByTwoConv2d, with_products
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


def dataset():
    images, labels = torch.zeros(100, 1, 28, 28, dtype=torch.uint8), torch.zeros(100, dtype=torch.int64)
    return Dataset("none", images, labels, images, labels, {}).to(CUDA)


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

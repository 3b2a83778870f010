"""subject: what is asked of a module before anything is done with it, and how far a result is from it."""

import functools
import math

import numpy as np
import pytest
import torch
from torch import nn

from skipfold.collapse import collapse
from skipfold.errors import ConfigError, InputShapeError, ModuleError, NotAffineError, WeightsError
from skipfold.folding import fold_affine
from skipfold.homotopy import to_homotopy
from skipfold.inspection import connections
from skipfold.removal import remove_skips
from skipfold.subject import ON_FLOAT32, copied, relative_error

OPERATIONS = pytest.mark.parametrize("operation", [collapse, to_homotopy, remove_skips, fold_affine])


@OPERATIONS
def test_weights_that_are_not_initialised_are_named(operation):
    with pytest.raises(WeightsError, match=r"^0\.weight: not initialised yet"):
        operation(nn.Sequential(nn.LazyLinear(2)), (3,))


@OPERATIONS
@pytest.mark.parametrize("given", [None, torch.relu, nn.Linear])
def test_what_is_no_module_is_refused(operation, given):
    with pytest.raises(ModuleError, match=r"^\w+ given; a torch\.nn\.Module is allowed"):
        operation(given, (2,))
    with pytest.raises(ModuleError):
        connections(given)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@OPERATIONS
def test_torchscript_is_refused_by_its_path(operation):
    model = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(ModuleError, match=r"^1: a TorchScript module given"):
        operation(model, (2,))


@OPERATIONS
def test_weights_without_values_are_refused_by_their_path(operation):
    with pytest.raises(WeightsError, match=r"^0\.weight: on the meta device"):
        operation(nn.Sequential(nn.Linear(2, 2, device="meta")), (2,))


@OPERATIONS
def test_what_cannot_be_copied_is_refused(operation):
    model = nn.Linear(2, 2)
    model.cache = model.weight * 2  # as torch.nn.utils.weight_norm holds its weight
    with pytest.raises(ModuleError, match="Linear cannot be copied"):
        operation(model, (2,))


class Float32(nn.Module):
    """Residual, and says float32 in every way: a cast, new tensors, an attribute that is no buffer."""

    def __init__(self, name="float"):
        super().__init__()
        self.linear, self.last, self.name = nn.Linear(4, 4), nn.Linear(3, 2), name
        self.kernel = torch.full((3, 1, 2, 2), 0.1)

    def forward(self, x):
        casts = {"float": x.float, "to": lambda: x.to(torch.float32), "dtype": lambda: x.to(dtype=torch.float32)}
        x = casts[self.name]()
        x = x + self.linear(torch.lerp(x, torch.full((4,), 0.1), torch.tensor(0.3)))
        return self.last(nn.functional.conv2d(x.view(-1, 1, 2, 2), self.kernel).flatten(1))


@pytest.mark.parametrize("name", ["float", "to", "dtype"])
def test_a_network_that_says_float32_is_certified_in_float64(name):
    model = Float32(name).eval()
    layer, certificate = collapse(model, (4,))
    assert certificate.max_error < 1e-12 and certificate.residual < 1e-12
    homotopy, certificate = to_homotopy(model, (4,), t=0.0, export=False)
    assert certificate.max_error < 1e-12
    plain, certificate = remove_skips(homotopy, (4,), export=False)
    assert certificate.max_error < 1e-12
    folded, certificate = fold_affine(homotopy, (4,), export=False)
    assert certificate.max_error < 1e-12
    x = torch.rand(5, 4)
    torch.testing.assert_close(layer(x), model(x))
    torch.testing.assert_close(plain(x), homotopy(x))
    torch.testing.assert_close(folded(x), homotopy(x))
    assert model.kernel.dtype == layer(x).dtype == plain(x).dtype == folded(x).dtype == torch.float32


SOBEL = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]).expand(1, 1, 3, 3)


@functools.lru_cache
def cached_ramp(size):
    return torch.linspace(0, 1, size)


@functools.lru_cache
def cached_for(many):
    return torch.ones(3)


class Outside(nn.Module):
    """Reads float32 tensors of which a copy of it has no other."""

    def __init__(self, ramp):
        super().__init__()
        self.linear, self.ramp = nn.Linear(9, 3), ramp
        self.kernels = {"first": [torch.rand(1, 1, 3, 3)]}

    def forward(self, x):
        x = nn.functional.conv2d(nn.functional.conv2d(x, SOBEL), self.kernels["first"][0])
        return torch.nn.functional.linear(self.linear(x.flatten(1)), torch.diag(self.ramp(x)))


def test_float32_tensors_that_the_module_does_not_own_are_read_in_float64():
    model, x = Outside(lambda x: cached_ramp(3)), torch.rand(2, 1, 7, 7)
    layer, certificate = collapse(model, (1, 7, 7))
    assert certificate.max_error < 1e-12 and certificate.structure == "affine"
    torch.testing.assert_close(layer(x), model(x))
    assert model.kernels["first"][0].dtype == cached_ramp(3).dtype == torch.float32


def test_a_cache_that_float64_runs_spoil_is_told():
    with pytest.raises(ModuleError, match=r"after float64 runs of a copy the module fails in torch\.float32 .*cache"):
        collapse(Outside(lambda x: cached_for(len(x) > 1)), (1, 7, 7))


def test_a_write_into_a_float32_tensor_outside_is_rounding():
    held = torch.zeros(1, 2)
    model = nn.Sequential(nn.Linear(2, 2), Writes(held))
    with pytest.raises(NotAffineError, match=r"1: aten\.copy rounds to torch\.float32"):
        collapse(model, (2,))


class Writes(nn.Module):
    def __init__(self, held):
        super().__init__()
        self.held = lambda: held

    def forward(self, x):
        return self.held().copy_(x) + x


def test_a_data_parallel_wrapper_is_refused():
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = nn.Linear(2, 2)
    with pytest.raises(ModuleError, match=r"a DistributedDataParallel given; give the \.module"):
        collapse(wrapper, (2,))


def test_a_weight_that_another_module_holds_as_well_stays_a_weight():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    vars(model[1])["borrowed"] = model[0].weight
    copy = copied(model, torch.float64)
    assert isinstance(copy[0].weight, nn.Parameter) and copy[1].borrowed is copy[0].weight


def test_a_float64_network_that_says_float32_means_it():
    with pytest.raises(NotAffineError, match=r"aten\._to_copy rounds to torch\.float32"):
        collapse(nn.Sequential(nn.Linear(2, 2), Rounds()).double(), (2,))


class Rounds(nn.Module):
    def forward(self, x):
        return x.float().to(x)


@OPERATIONS
@pytest.mark.parametrize("shape", [None, 4, "28", (), (2, 0), (2, -1), (2.0,)])
def test_shapes_that_are_none_are_refused(operation, shape):
    with pytest.raises(InputShapeError, match="of one sample given; sizes of at least 1"):
        operation(nn.Linear(2, 2), shape)


@pytest.mark.parametrize("shape", [[2], torch.Size([2]), tuple(np.array([2]))])
def test_any_sequence_of_whole_numbers_is_a_shape(shape):
    layer, _ = collapse(nn.Linear(2, 3), shape)
    assert layer.input_shape == (2,) and type(layer.input_shape[0]) is int


@pytest.mark.parametrize("operation", [to_homotopy, remove_skips, fold_affine])
def test_a_module_of_two_dtypes_that_does_not_run_is_refused(operation):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(InputShapeError, match="does not take an input"):
        operation(model, (2,))


def test_no_probes_are_refused():
    with pytest.raises(ConfigError, match="probes: 0 given"):
        collapse(nn.Linear(2, 2), (2,), probes=0)


@pytest.mark.parametrize(
    ("found", "expected", "error"),
    [
        ([1.0, -3.0], [1.0, -4.0], 0.25),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 1e-30], [0.0, 0.0], math.inf),
        ([[1.0, 2.0]], [1.0, 2.0], math.inf),
        ([1.0, math.inf], [1.0, 2.0], math.inf),
        ([0.0, math.nan], [0.0, 0.0], math.inf),
    ],
)
def test_an_error_is_relative_to_the_largest_value(found, expected, error):
    assert relative_error(torch.tensor(found), torch.tensor(expected)) == error


@pytest.mark.parametrize(("found", "expected"), [(math.nan, 1.0), (1.0, math.nan), (1.0, math.inf), (math.inf,) * 2])
def test_what_is_not_finite_is_within_no_tolerance(found, expected):
    assert not relative_error(torch.tensor([found]), torch.tensor([expected])) <= 1e300


@pytest.fixture
def precisions():
    """Puts back how precisely torch computes on float32."""
    yield
    torch.backends.fp32_precision = torch.backends.cudnn.fp32_precision = "none"
    for operators in ON_FLOAT32:
        operators.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


@pytest.mark.parametrize(
    "coarsen",
    [
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
        lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        lambda: setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee"),
        lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
        lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    ],
    ids=["medium", "allow_tf32", "cuda matmul", "cudnn rnn apart", "mkldnn matmul", "all"],
)
def test_certificates_are_in_full_precision_whatever_the_caller_has_set(coarsen, precisions):
    def told():
        return [operators.fp32_precision for operators in ON_FLOAT32]

    class Watched(nn.Linear):
        def forward(self, x):
            seen.append([*told(), torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32])
            return super().forward(x)

    coarsen()
    seen, before = [], told()
    _, certificate = collapse(Watched(512, 8), (512,))
    assert certificate.affine and certificate.module_error_float32 < 1e-5
    assert all(each == ["ieee"] * len(ON_FLOAT32) + ["highest", False] for each in seen) and seen
    assert told() == before and ("bf16" in before or "tf32" in before)


def test_the_older_switches_are_put_back(precisions):
    torch.set_float32_matmul_precision("medium")
    collapse(nn.Linear(2, 1), (2,))
    assert torch.get_float32_matmul_precision() == "medium" and torch.backends.cudnn.allow_tf32

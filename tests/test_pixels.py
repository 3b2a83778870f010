"""Prediction from pixels in one kernel: against float64, on the CPU by Triton's interpreter, on CUDA for real."""

import copy
import importlib
import pickle
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from skipfold.collapse import Collapsed, fold_preprocessing
from skipfold.errors import InputShapeError, ModuleError, WeightsError
from skipfold.pixels import MAX_OUTPUTS, PixelLayer, split

CPU = torch.device("cpu")
SHAPE = (1, 28, 28)


def collapsed(outputs=10, size=1.0, shape=SHAPE, device=CPU):
    weight = size * torch.randn(outputs, torch.Size(shape).numel())
    return fold_preprocessing(Collapsed(weight, torch.randn(outputs), shape, (outputs,))).to(device)


def pixels(batch, shape=SHAPE, device=CPU):
    return torch.randint(0, 256, (batch, *shape), dtype=torch.uint8, device=device)


def in_float64(layer, x):
    return (x.flatten(1).double() @ layer.linear.weight.double().T + layer.linear.bias.double()).detach()


def error(found, expected):
    return float((found.detach() - expected).abs().max() / expected.abs().max())


@pytest.fixture
def kernel(request, monkeypatch):
    """The module, made anew: for Triton's interpreter, which takes tensors on the CPU, where the test asks for it."""
    triton = pytest.importorskip("triton")
    if getattr(request, "param", None) == "interpreted":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        # Put back afterwards: the interpreter of Triton 3.5 leaves its own, with which nothing compiles.
        monkeypatch.setattr(triton.language.dtype, "to_ir", triton.language.dtype.to_ir)
    monkeypatch.delitem(sys.modules, "skipfold.kernel", raising=False)
    return importlib.import_module("skipfold.kernel")


@given(
    outputs=st.integers(1, 40),
    inputs=st.integers(1, 300),
    size=st.sampled_from([1e-30, 1e-6, 1.0, 1e6]),
    seed=st.integers(0, 9),
)
def test_two_halves_are_as_precise_as_float32(outputs, inputs, size, seed):
    weight = size * torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    halves, scale = split(weight)
    again = scale.double() * halves.double().sum(0)[:, :outputs]
    largest = weight.abs().amax(1).double()
    assert ((again.T - weight.double()).abs() <= 2**-22 * largest[:, None]).all()
    assert not halves[:, :, outputs:].any()


def test_an_output_without_weights_is_its_bias():
    halves, scale = split(torch.zeros(2, 5))
    assert not halves.any() and scale.isfinite().all()


@pytest.mark.parametrize(("batch", "rows", "depth"), [(1, 16, 128), (37, 16, 64), (70, 64, 128)])
@pytest.mark.parametrize(("outputs", "shape"), [(10, SHAPE), (17, (3, 5, 7))], ids=["mnist", "odd"])
@pytest.mark.parametrize("kernel", ["interpreted"], indirect=True)
def test_the_kernel_computes_the_layer(kernel, batch, rows, depth, outputs, shape):
    layer, x = collapsed(outputs, shape=shape), pixels(batch, shape)
    halves, scale = split(layer.linear.weight.detach())
    logits = torch.full((batch, outputs), torch.nan)
    kernel.affine[(-(-batch // rows),)](
        x.flatten(1), *halves, scale, layer.linear.bias.detach(), logits, batch, 1,
        INPUTS=x[0].numel(), OUTPUTS=outputs, COLUMNS=halves.shape[-1], ROWS=rows, DEPTH=depth,
    )  # fmt: skip
    expected = in_float64(layer, x)
    assert error(logits, expected) < 1e-6
    assert error(logits, expected) < 2 * error(layer(x), expected) + 1e-7


def test_every_tile_shape_compiles_for_an_h100(kernel):
    """No GPU is needed for that; a shape that needs more shared memory than a block has is found too."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    types = dict(zip(kernel.affine.arg_names, ["*u8", "*fp16", "*fp16", "*fp32", "*fp32", "*fp32", "i32", "i32"]
                     + ["constexpr"] * 5, strict=True))  # fmt: skip
    aligned = {(index,): [["tt.divisibility", 16]] for index in range(6)}
    for shape in kernel.SHAPES:
        sizes = {"INPUTS": 784, "OUTPUTS": 10, "COLUMNS": 16, **shape.kwargs}
        sizes = {(kernel.affine.arg_names.index(name),): value for name, value in sizes.items()}
        options = {"num_warps": shape.num_warps, "num_stages": shape.num_stages}
        made = compile(ASTSource(kernel.affine, types, sizes, aligned), GPUTarget("cuda", 90, 32), options)
        assert made.asm["cubin"] and made.metadata.shared <= 227 * 1024


def test_without_cuda_the_layer_is_the_collapsed_network():
    layer, x = collapsed(), pixels(5)
    assert torch.equal(PixelLayer(layer)(x), layer(x))
    with pytest.raises(InputShapeError, match=r"\[5, 1, 27, 28\] given"):
        PixelLayer(layer)(x[:, :, 1:])


def test_weights_that_are_loaded_are_those_of_the_kernel():
    source, loaded = PixelLayer(collapsed()), PixelLayer(collapsed())
    for made in (loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        nn.Sequential(made).load_state_dict(nn.Sequential(source).state_dict())
        assert torch.equal(made.halves, source.halves) and torch.equal(made.scale, source.scale)


def test_what_the_kernel_cannot_hold_is_refused():
    with pytest.raises(ModuleError, match="Linear given; a Collapsed is allowed"):
        PixelLayer(nn.Linear(4, 3))
    with pytest.raises(WeightsError, match=r"torch\.float64 given; float32 is allowed"):
        PixelLayer(collapsed().double())
    with pytest.raises(WeightsError, match=f"257 outputs given; at most {MAX_OUTPUTS}"):
        PixelLayer(collapsed(MAX_OUTPUTS + 1))


@pytest.mark.cuda
@pytest.mark.parametrize("batch", [1, 2, 15, 64, 1000, 70000])
def test_on_cuda_one_kernel_computes_the_layer(batch):
    device = torch.device("cuda")
    for outputs, shape in ((10, SHAPE), (17, (3, 5, 7))):
        layer, x = collapsed(outputs, shape=shape, device=device), pixels(batch, shape, device)
        assert error(PixelLayer(layer).to(device)(x), in_float64(layer, x)) < 1e-5


@pytest.mark.cuda
def test_on_cuda_the_layer_can_be_captured():
    device = torch.device("cuda")
    layer, x = collapsed(device=device), pixels(64, device=device)
    module = PixelLayer(layer).to(device)
    module(x)  # tunes and compiles
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        logits = module(x)
    x.copy_(pixels(64, device=device))
    graph.replay()
    assert error(logits, in_float64(layer, x)) < 1e-5

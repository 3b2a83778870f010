"""Stacked networks against each of them alone: outputs, gradients, BatchNorm statistics, and nothing shared."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import DEVICES, unsettled
from test_recursion import property_test, skip_cnns
from torch import nn
from torch.nn import functional as F

from skipfold.cropping import crop_dead_taps
from skipfold.homotopy import Skip, set_skip_strength, skips
from skipfold.networks import INPUT_SHAPE, build
from skipfold.replication.stacking import StackedConv2d, StackedSkip, put, set_strengths, stack, take

STRENGTHS = (0.125, 0.5, 0.875)


def several(model: nn.Module, count: int) -> list[nn.Module]:
    """Networks of the kind of `model` with other values."""
    models = [copy.deepcopy(model) for _ in range(count)]
    generator = torch.Generator().manual_seed(0)
    for one in models:
        for parameter in one.parameters():
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator) / 8
    return models


def together(models: list[nn.Module]) -> nn.Module:
    stacked = stack(models[0], len(models))
    for index, model in enumerate(models):
        put(stacked, index, len(models), model)
    return stacked


def compare(models: list[nn.Module], stacked: nn.Module, x: torch.Tensor) -> None:
    """One forward and backward pass over x, [N, T, C, H, W]; then every value and gradient at its place."""
    logits = stacked(x.flatten(1, 2))
    logits.square().sum().backward()
    gradients = copy.deepcopy(stacked)
    for parameter, source in zip(gradients.parameters(), stacked.parameters(), strict=True):
        parameter.data = source.grad
    for index, model in enumerate(models):
        alone = model(x[:, index])
        alone.square().sum().backward()
        torch.testing.assert_close(logits.unflatten(1, (len(models), -1))[:, index], alone, rtol=1e-9, atol=1e-9)
        after = take(stacked, index, len(models), copy.deepcopy(model))
        torch.testing.assert_close(after.state_dict(), model.state_dict(), rtol=1e-9, atol=1e-9)
        mine = take(gradients, index, len(models), copy.deepcopy(model))
        for (name, found), parameter in zip(mine.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(found, parameter.grad, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("network", "options"),
    [
        ("perceptron", {}),
        ("cnn3", {}),
        ("shallow_leaky_relu", {"width": 3, "kernel": 5, "padding": 2, "stride": 2, "skips": ((0, 2),)}),
        ("resnet18", {}),
        ("resnet18", {"linear": "avgpool", "stem": "small"}),
        ("resnet18", {"stem": "unpadded_pool3"}),
        ("resnet18", {"size": 16}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_each_network_is_what_it_is_alone(network, options, training):
    model = unsettled(crop_dead_taps(build(network, options), INPUT_SHAPE)).train(training)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = None
    models = several(model, 3)
    for one, t in zip(models, STRENGTHS, strict=True):
        if skips(one):
            set_skip_strength(one, t)
    stacked = together(models)
    generator = torch.Generator().manual_seed(1)
    compare(models, stacked, torch.rand(4, 3, *INPUT_SHAPE, dtype=torch.float64, generator=generator))


@property_test(50)
@given(skip_cnns(affine=False), st.integers(1, 4))
def test_any_recursion_is_what_it_is_alone(model, count):
    """Skips that resample channels included: they keep to their own network."""
    models = several(model, count)
    compare(models, together(models), torch.randn(2, count, *model.input_shape, dtype=torch.float64))


@pytest.mark.parametrize(
    ("one", "shape"),
    [
        (nn.Conv2d(1, 6, (3, 5), (2, 1), (1, 0)), (9, 11)),  # spreads
        (nn.Conv2d(3, 4, (5, 4), bias=False), (5, 4)),  # covers its input
        (nn.Conv2d(3, 4, 3, 2, 1), (7, 6)),
        (nn.Conv2d(1, 1, 3), (6, 6)),
        (nn.Conv2d(4, 2, 1), (1, 1)),
    ],
    ids=["spreads", "covers", "grouped", "depthwise", "pointwise"],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_way_to_convolve_is_a_convolution(one, shape, layout):
    models = several(one.double(), 3)
    stacked = StackedConv2d(one, 3).to(memory_format=layout)
    for index, model in enumerate(models):
        put(stacked, index, 3, model)
    x = torch.randn(2, 3 * one.in_channels, *shape, dtype=torch.float64).to(memory_format=layout)
    parts = zip(x.chunk(3, 1), models, strict=True)
    expected = torch.cat([F.conv2d(part, m.weight, m.bias, m.stride, m.padding) for part, m in parts], 1)
    torch.testing.assert_close(stacked(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weights", ["convex", "variance"])
@pytest.mark.parametrize("normalize", [False, True])
def test_every_network_has_its_own_skip_strength(weights, normalize):
    one = Skip(0.3, weights, normalize)
    stacked = StackedSkip(one, 3)
    assert stacked.t.flatten().tolist() == [pytest.approx(0.3)] * 3
    set_strengths(stacked, STRENGTHS)
    branch, skip = torch.randn(2, 2, 12, 5, 5, dtype=torch.float64)
    found = stacked(branch, skip)
    for index, t in enumerate(STRENGTHS):
        alone = Skip(t, weights, normalize)
        mine = slice(4 * index, 4 * index + 4)
        torch.testing.assert_close(found[:, mine], alone(branch[:, mine], skip[:, mine]), rtol=0, atol=1e-15)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [1, 4])
def test_a_network_that_has_diverged_spoils_no_other(width, device):
    """In float32, for which a GPU has kernels that fill groups up with zeros."""
    models = several(unsettled(build("cnn3", {"width": width})), 2)
    models[1].convolutions[0].weight.data.fill_(float("nan"))
    stacked = together(models).to(device, torch.float32, memory_format=torch.channels_last)
    logits = stacked(torch.rand(3, 2, 28, 28, device=device)).unflatten(1, (2, -1))
    assert logits[:, 0].isfinite().all() and logits[:, 1].isnan().all()

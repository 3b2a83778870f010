"""Convolutions computed as matrix products are the same function, with the same gradients and the same parameters."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import ReadsTwoSizes, images, unsettled
from test_recursion import property_test
from torch import nn

from skipfold.cropping import crop_dead_taps
from skipfold.networks import INPUT_SHAPE, build
from skipfold.replication.products import CoveringConv2d, TwoByTwoConv2d, with_products


def kinds(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules() if isinstance(module, nn.Conv2d)]


def compare(one: nn.Conv2d, product: nn.Conv2d, x: torch.Tensor) -> None:
    """Outputs and the gradients of input, weight and bias."""
    found = []
    for convolution in (one, product):
        given = x.clone().requires_grad_()
        out = convolution(given)
        gradients = torch.autograd.grad(out.square().sum(), [given, *one.parameters()])
        found.append([out, *gradients])
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)


@property_test(150)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.integers(0, 2),
    st.integers(1, 2),
    st.booleans(),
)
def test_any_convolution_is_the_same(size, kernel, stride, padding, groups, bias):
    if any(side + 2 * padding < tap for side, tap in zip(size, kernel, strict=True)):
        return
    one = nn.Conv2d(2, 4, kernel, stride, padding, groups=groups, bias=bias).double()
    product = with_products(nn.Sequential(one), (2, *size))[0]
    x = torch.randn(3, 2, *size, dtype=torch.float64)
    compare(one, product, x)
    covering = padding == 0 and one(x).shape[2:] == (1, 1)
    assert (type(product) is CoveringConv2d) is covering


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_two_by_two_pixels_are_nine_products(bias, groups, layout):
    one = nn.Conv2d(6, 9, 3, padding=1, groups=groups, bias=bias).double().to(memory_format=layout)
    product = with_products(nn.Sequential(one), (6, 2, 2))[0]
    assert type(product) is TwoByTwoConv2d and product.weight is one.weight
    compare(one, product, torch.randn(4, 6, 2, 2, dtype=torch.float64).to(memory_format=layout))


@pytest.mark.parametrize("training", [True, False])
def test_resnet34_at_28_is_the_same_network(training):
    """18 of its 36 convolutions; the values and running statistics are those of the network given."""
    model = crop_dead_taps(unsettled(build("resnet34", {"t": 0.3})), INPUT_SHAPE).train(training)
    product = with_products(model, INPUT_SHAPE)
    assert kinds(product).count(TwoByTwoConv2d) == 11 and kinds(product).count(CoveringConv2d) == 7
    assert product.training is training and not {TwoByTwoConv2d, CoveringConv2d} & set(kinds(model))
    held = model.state_dict(keep_vars=True)
    assert all(value is held[key] for key, value in product.state_dict(keep_vars=True).items()) and len(held) > 200
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(images())
    model.load_state_dict(before)
    torch.testing.assert_close(product(images()), expected, rtol=1e-9, atol=1e-9)


def test_a_convolution_that_reads_two_sizes_is_left_alone():
    assert type(with_products(ReadsTwoSizes(2), (1, 4, 4)).conv) is nn.Conv2d

"""Convolutions without dead taps are the same function of inputs of their size, and refuse others."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import ReadsTwoSizes, images, unsettled
from test_recursion import property_test
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from skipfold.cropping import CroppedConv2d, LiveTaps, _cropped, crop_dead_taps
from skipfold.errors import InputShapeError, ModuleError, SkipError, WeightsError
from skipfold.networks import INPUT_SHAPE
from skipfold.resnet import resnet


def convolution_weights(model: nn.Module) -> int:
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))


def test_52_percent_of_resnet34s_convolution_weights_are_dead_at_28():
    with torch.device("meta"):
        model = resnet("resnet34")
    cropped = crop_dead_taps(model, INPUT_SHAPE)
    dead = 1 - convolution_weights(cropped) / convolution_weights(model)
    assert dead == pytest.approx(0.52, abs=0.005)
    last = cropped.layer4[1].conv1
    assert last.kernel_size == (1, 1) and last.weight.is_contiguous()


def test_cropped_network_has_the_same_outputs_and_gradients():
    model = unsettled(resnet("resnet18", t=0.3))
    cropped = crop_dead_taps(model, INPUT_SHAPE)
    x, y = images().requires_grad_(), images().requires_grad_()
    expected, output = model(x), cropped(y)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    expected.square().sum().backward()
    output.square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-9, atol=1e-9)
    for whole, kept in zip(model.parameters(), cropped.parameters(), strict=True):
        # Dead taps have no gradient, and cropping keeps the order of the others.
        torch.testing.assert_close(kept.grad[kept.grad != 0], whole.grad[whole.grad != 0], rtol=1e-8, atol=1e-8)


def test_cropped_network_refuses_other_input_sizes():
    cropped = crop_dead_taps(unsettled(resnet("resnet18")), INPUT_SHAPE)
    with pytest.raises(SkipError, match="crop the network again"):
        cropped(images(side=64))


@pytest.mark.parametrize("training", [False, True])
def test_cropping_leaves_its_argument_alone(training):
    model = resnet("resnet18").train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cropped = crop_dead_taps(model, INPUT_SHAPE)
    assert model.training is training and cropped.training is training
    assert all(m.training is training for m in cropped.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not model.conv1._forward_pre_hooks
    assert all(torch.equal(cropped.state_dict()[key], before[key]) for key in before if "bn" in key)


@property_test(150)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 4), st.integers(0, 4)),
    st.booleans(),
)
def test_any_cropped_convolution_is_the_same(size, kernel, stride, padding, bias):
    fits = all(s + 2 * p >= k for s, k, p in zip(size, kernel, padding, strict=True))
    if not fits:
        return
    whole = nn.Conv2d(2, 4, kernel, stride, padding, groups=2, bias=bias).double()
    cropped = _cropped(whole, size)
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    if cropped is not None:
        assert isinstance(cropped, CroppedConv2d)
        assert cropped.weight.numel() < whole.weight.numel()
        torch.testing.assert_close(cropped(x), whole(x), rtol=0, atol=1e-12)
    expected = whole(x)
    with LiveTaps():
        torch.testing.assert_close(whole(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padding", [1, (1, 1), "same"])
def test_live_taps_alone_are_computed_with(padding):
    x, weight = torch.rand(1, 2, 1, 1), torch.rand(4, 2, 3, 3)
    expected = nn.functional.conv2d(x, weight, padding=padding)
    with FlopCounterMode(display=False) as counter, LiveTaps():
        found = nn.functional.conv2d(x, weight, padding=padding)
    torch.testing.assert_close(found, expected)
    assert counter.get_total_flops() == 2 * 2 * 4 * (9 if padding == "same" else 1)


def test_a_convolution_that_reads_two_sizes_is_left_alone():
    assert type(crop_dead_taps(ReadsTwoSizes(1), (1, 4, 4)).conv) is nn.Conv2d


def test_a_module_without_weights_is_refused():
    with pytest.raises(WeightsError, match="ReLU has no weights"):
        crop_dead_taps(nn.ReLU(), INPUT_SHAPE)


def test_an_input_that_does_not_fit_is_refused():
    with pytest.raises(InputShapeError, match="input of shape"):
        crop_dead_taps(resnet("resnet18"), (3, 28, 28))


class Transposing(nn.Module):
    """Uses the weight of its convolution once more."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x):
        return nn.functional.conv_transpose2d(self.conv(x), self.conv.weight, padding=1)


def test_a_convolution_that_does_more_is_left_alone():
    x, seen = torch.rand(2, 1, 1, 1), []
    hooked = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1))
    hooked[0].register_forward_hook(lambda *_: seen.append(1))
    for model in (hooked, Transposing()):
        cropped = crop_dead_taps(model, x)
        assert not [m for m in cropped.modules() if isinstance(m, CroppedConv2d)]
        torch.testing.assert_close(cropped(x), model(x))


@pytest.mark.parametrize(
    ("model", "example", "error"),
    [(nn.Conv2d(1, 1, 3), "abc", InputShapeError), ("resnet18", (1, 4, 4), ModuleError)],
)
def test_what_is_no_network_or_no_input_is_refused(model, example, error):
    with pytest.raises(error, match="given"):
        crop_dead_taps(model, example)

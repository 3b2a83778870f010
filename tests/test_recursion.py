"""The recursion against its definition, written once more with torch's own padding, resampling and convolution."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from skipfold.errors import ConfigError
from skipfold.recursion import Layer, SkipCNN, resample


def property_test(examples):
    """The same examples in every run, so that a failure can be seen again."""
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


@st.composite
def skip_cnns(draw, largest_side=7, widest=3, deepest=4, affine=True):
    """Small SkipCNNs in float64: random depth, shapes, strides, paddings, biases, skips, t and shares."""
    sides = st.integers(2, largest_side)
    input_shape = (draw(st.integers(1, widest)), draw(sides), draw(sides))
    smallest = min(input_shape[1:])
    layers = []
    for _ in range(draw(st.integers(1, deepest))):
        layer = Layer(
            channels=draw(st.integers(1, widest)),
            kernel=draw(st.integers(1, 3)),
            stride=draw(st.integers(1, 2)),
            padding=draw(st.integers(0, 2)),
            bias=draw(st.booleans()),
        )
        smallest = (smallest + 2 * layer.padding - layer.kernel) // layer.stride + 1
        assume(smallest >= 1)
        layers.append(layer)
    pairs = [(k, i) for i in range(2, len(layers) + 1) for k in range(i - 1)]
    skips = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    parts = {skip: draw(st.integers(1, 5)) for skip in skips}
    totals = {i: sum(part for (_, to), part in parts.items() if to == i) for _, i in skips}
    shares = draw(st.sampled_from([None, {skip: part / totals[skip[1]] for skip, part in parts.items()}]))
    t = draw(st.floats(0, 1, width=32))
    activation = None if affine or draw(st.booleans()) else nn.LeakyReLU()
    torch.manual_seed(draw(st.integers(0, 2**31)))
    return SkipCNN(input_shape, layers, skips, t, shares, activation).double()


def by_definition(model: SkipCNN, x: torch.Tensor) -> torch.Tensor:
    """f^(n)(x) from the formula: resample, weigh, sum, pad, convolve."""
    outputs = [x]
    for i, (layer, module) in enumerate(zip(model.layers, model.convolutions, strict=True), start=1):
        sources = model.sources(i)
        t = float(model.skip.t) if sources else 0.0
        mixed = outputs[-1] * ((1 - t) if sources else 1)
        for k, share in sources.items():
            enlarged = F.interpolate(outputs[k].unsqueeze(1), size=mixed.shape[1:], mode="nearest").squeeze(1)
            mixed = mixed + t * share * enlarged
        padded = F.pad(mixed, [layer.padding] * 4)
        output = F.conv2d(padded, module.weight, module.bias, stride=layer.stride)
        last = i == len(model.layers)
        outputs.append(output if last else model.activation(output))
    return outputs[-1].flatten(1)


@property_test(100)
@given(skip_cnns(affine=False))
def test_module_is_the_recursion(model):
    x = torch.randn(2, *model.input_shape, dtype=torch.float64)
    torch.testing.assert_close(model(x), by_definition(model, x), rtol=0, atol=1e-12)


@given(st.tuples(*[st.integers(1, 40)] * 3), st.tuples(*[st.integers(1, 40)] * 3))
@property_test(100)
def test_resample_takes_floor_of_j_old_over_new(old, new):
    x = torch.arange(old[0] * old[1] * old[2]).reshape(1, *old).float()
    c, h, w = ([j * o // n for j in range(n)] for o, n in zip(old, new, strict=True))
    expected = x[:, c][:, :, h][:, :, :, w]
    assert torch.equal(resample(x, new), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resample_is_right_where_interpolate_rounds(dtype):
    x = torch.arange(26, dtype=dtype).reshape(1, 1, 26, 1)
    assert resample(x, (1, 22, 1)).flatten()[11] == 13  # F.interpolate takes pixel 12 in float32


def test_gradients_flow_through_every_skip():
    model = SkipCNN((1, 6, 6), [Layer(2, 3), Layer(3, 1), Layer(2, 2)], [(0, 2), (1, 3)], t=0.4).double()
    x = torch.randn(1, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, (x,))


def test_shares_default_to_equal_and_weights_sum_to_one():
    model = SkipCNN((1, 4, 4), [Layer(1, 1)] * 3, [(0, 2), (0, 3), (1, 3)])
    assert model.sources(1) == {}
    assert model.sources(2) == {0: 1.0}
    assert model.sources(3) == {0: 0.5, 1: 0.5}


def test_t_is_part_of_the_state_and_0_dim():
    model = SkipCNN((1, 4, 4), [Layer(1, 1)] * 2, [(0, 2)], t=0.25)
    assert model.skip.t.shape == () and float(model.skip.t) == 0.25
    assert float(model.state_dict()["skip.t"]) == 0.25
    assert SkipCNN((1, 4, 4), [Layer(1, 1)] * 2).skip is None


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_extreme_strengths(t):
    model = SkipCNN((1, 5, 5), [Layer(2, 3), Layer(2, 3)], [(0, 2)], t=t).double()
    x = torch.randn(3, 1, 5, 5, dtype=torch.float64)
    first = model.convolutions[0](x) if t == 0 else resample(x, (2, 3, 3))
    assert torch.equal(model(x), model.convolutions[1](first).flatten(1))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"layers": []}, "no layers"),
        ({"skips": [(0, 1)]}, r"skip \(0, 1\)"),
        ({"skips": [(0, 4)]}, r"skip \(0, 4\)"),
        ({"skips": [(-1, 2)]}, r"skip \(-1, 2\)"),
        ({"skips": [(0, 2), (0, 2)]}, "twice"),
        ({"skips": [(0, 2)], "t": 1.5}, "t: 1.5"),
        ({"skips": [(0, 2)], "t": float("nan")}, "t: nan"),
        ({"skips": [(0, 2)], "t": "half"}, "t: 'half'"),
        ({"skips": [(0, 2)], "shares": {(0, 3): 1.0}}, "shares given"),
        ({"skips": [(0, 2)], "shares": {(0, 2): 0.5}}, "sum to 0.5"),
        ({"skips": "0,2"}, r"skips '0,2' given; pairs"),
        ({"skips": [(0, 1.5)]}, r"skips \[\(0, 1.5\)\] given; pairs"),
        ({"layers": [Layer(1, 9)]}, "kernel of 9"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, part):
    with pytest.raises(ConfigError, match=part):
        SkipCNN(**{"input_shape": (1, 6, 6), "layers": [Layer(2, 1)] * 3, **arguments})


@pytest.mark.parametrize(
    ("numbers", "part"),
    [
        ({"channels": 0}, "channels of a layer: 0 given; a whole number of at least 1"),
        ({"kernel": 1.5}, "kernel of a layer: 1.5 given"),
        ({"stride": 0}, "stride of a layer: 0 given"),
        ({"padding": -1}, "padding of a layer: -1 given; a whole number of at least 0"),
    ],
)
def test_no_convolution_has_such_numbers(numbers, part):
    with pytest.raises(ConfigError, match=part):
        Layer(**{"channels": 1, "kernel": 1, **numbers})

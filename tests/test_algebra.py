"""W, P and R against torch's operators and autograd; f_W(1) X + f(0) in float64 and in exact arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sympy import QQ
from sympy.polys.matrices import DomainMatrix
from test_recursion import property_test, skip_cnns
from torch import nn
from torch.nn import functional as F

from skipfold import algebra
from skipfold.errors import ExactnessError, NotAffineError
from skipfold.networks import build
from skipfold.recursion import Layer, SkipCNN

sizes = st.integers(1, 6)
shapes = st.tuples(sizes, sizes, sizes)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def applied(matrix, x):
    """The matrix on one sample [C, H, W], flat."""
    return torch.from_numpy(matrix @ x.numpy().ravel())


@given(shapes, sizes, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
@property_test(60)
def test_w_is_conv2d(shape, out, kernel, stride, seed):
    torch.manual_seed(seed)
    shape = (shape[0], shape[1] + kernel - 1, shape[2] + kernel - 1)
    weight, x = random(out, shape[0], kernel, kernel), random(*shape)
    expected = F.conv2d(x[None], weight, stride=stride).flatten()
    matrix = algebra.convolution(weight.numpy(), shape, stride)
    torch.testing.assert_close(applied(matrix, x), expected, rtol=0, atol=1e-12)


@given(shapes, st.integers(0, 3))
@property_test(30)
def test_p_is_pad(shape, pixels):
    x = random(*shape)
    assert torch.equal(applied(algebra.padding(shape, pixels), x), F.pad(x, [pixels] * 4).flatten())


@given(shapes, shapes)
@property_test(60)
def test_r_is_interpolate(old, new):
    x = random(*old)
    expected = F.interpolate(x[None, None], size=new, mode="nearest").flatten()  # float64 has the right pixels
    matrix = algebra.resampling(old, new)
    assert torch.equal(applied(matrix, x), expected)
    assert set(matrix.sum(axis=1)) == {1}


@given(skip_cnns())
@property_test(60)
def test_strengths_of_a_layer_sum_to_exactly_one(model):
    for layer in algebra.matrices(model):
        assert sum(layer.strengths.values()) == 1


@given(skip_cnns())
@property_test(60)
def test_float64_collapse_is_the_module_and_its_jacobian(model):
    weight, bias = (torch.from_numpy(a) for a in algebra.collapse_matrices(model))
    x = random(3, *model.input_shape)
    torch.testing.assert_close(x.flatten(1) @ weight.T + bias, model(x), rtol=0, atol=1e-10)
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x[None])[0], x[0])
    torch.testing.assert_close(weight, jacobian.flatten(1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["cnn3", "shallow_linear"])
def test_networks_of_the_paper(name):
    model = build(name).double()
    weight, bias = (torch.from_numpy(a) for a in algebra.collapse_matrices(model))
    x = torch.rand(4, 1, 28, 28, dtype=torch.float64)
    torch.testing.assert_close(x.flatten(1) @ weight.T + bias, model(x), rtol=0, atol=1e-10)


@given(skip_cnns(largest_side=4, widest=2, deepest=3))
@property_test(25)
def test_exact_collapse_is_proved_and_float64_is_its_rounding(model):
    weight, bias = algebra.prove(model)
    rounded = (np.array([[float(v) for v in row] for row in part.to_list()]) for part in (weight, bias))
    for exact, part in zip(rounded, algebra.collapse_matrices(model), strict=True):
        np.testing.assert_allclose(exact.reshape(part.shape), part, rtol=0, atol=1e-12)


def dyadic_network(seed):
    """A network whose float64 arithmetic is exact: small whole weights, t and shares powers of 1/2."""
    torch.manual_seed(seed)
    layers = [Layer(2, 3, 1, 1), Layer(3, 3, 2, 1), Layer(2, 2)]
    model = SkipCNN((1, 5, 4), layers, [(0, 2), (0, 3), (1, 3)], 0.25, {(0, 2): 1, (0, 3): 0.25, (1, 3): 0.75})
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -9, 9).data.round_()
    return model.double()


@pytest.mark.parametrize("seed", range(5))
def test_torch_itself_gives_exactly_the_rational_result(seed):
    model = dyadic_network(seed)
    weight, bias = algebra.collapse_exact(model)
    x = torch.randint(-9, 10, (1, *model.input_shape))
    column = DomainMatrix([[QQ(v)] for v in x.flatten().tolist()], (x.numel(), 1), QQ)
    exact = [Fraction(v.numerator, v.denominator) for v in (weight.matmul(column) + bias).to_list_flat()]
    assert exact == [Fraction(v) for v in model(x.double())[0].tolist()]


def test_evaluate_by_definition_is_the_module():
    model = dyadic_network(7)
    x = torch.randint(-9, 10, (1, *model.input_shape))
    pixels = np.array([QQ(v) for v in x.flatten().tolist()], dtype=object).reshape(model.input_shape)
    assert [float(v) for v in algebra.evaluate(model, pixels)] == model(x.double())[0].tolist()


def test_three_equal_shares_are_exact_thirds():
    model = SkipCNN((1, 2, 2), [Layer(1, 1)] * 4, [(0, 4), (1, 4), (2, 4)], t=0.5)
    strengths = algebra.matrices(model)[3].strengths
    assert strengths == {3: Fraction(1, 2)} | dict.fromkeys((0, 1, 2), Fraction(1, 6))


def test_a_wrong_collapse_is_not_proved(monkeypatch):
    model = dyadic_network(0)
    right = algebra.collapse_exact

    def altered(model):
        weight, bias = right(model)
        return weight, bias + bias.ones(bias.shape, QQ).scalarmul(QQ(1, 10**30))

    monkeypatch.setattr(algebra, "collapse_exact", altered)
    with pytest.raises(ExactnessError, match="output 0"):
        algebra.prove(model)


def test_too_large_for_a_proof():
    with pytest.raises(ExactnessError, match="use a smaller input"):
        algebra.prove(build("cnn3"))


def test_activation_is_refused():
    with pytest.raises(NotAffineError, match="activation: LeakyReLU") as caught:
        algebra.matrices(build("shallow_leaky_relu"))
    assert caught.value.offenders == {"activation": "LeakyReLU is not affine"}

"""W, P and R of the paper's recursion as explicit sparse matrices, and its collapse in float64 or exact arithmetic.

Every array of shape (C, H, W) stands as a column in row-major order. scipy's CSR matrices hold float64; sympy's
DomainMatrix over QQ holds exact rationals, where a float counts as the binary fraction that it is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from scipy import sparse
from sympy import QQ, ring
from sympy.polys.matrices import DomainMatrix
from torch import nn

from skipfold.errors import ExactnessError, NotAffineError
from skipfold.recursion import Shape, SkipCNN

MOST_EXACT_TERMS = 20_000_000
"""Largest number of products of rationals, counted before the start, that an exact proof may take (minutes)."""

Matrix = sparse.csr_array | DomainMatrix


@dataclass(frozen=True)
class LayerMatrices:
    """One layer: f^(i)(X) = W P sum_k t_k R_k f^(k)(X) + B.

    `weight` is W^(i), `padding` P^(i), `resampling` R^(k,i-1) by k, `strengths` t^(k,i-1) by k (they sum to 1, and
    k = i - 1 is among them with R = 1), `bias` B^(i) as one column.
    """

    weight: Matrix
    padding: Matrix
    resampling: dict[int, Matrix]
    strengths: dict[int, Fraction]
    bias: Matrix


def convolution(kernel: np.ndarray, shape: Shape, stride: int = 1) -> sparse.csr_array:
    """W: the convolution of an input of `shape`, without padding, by `kernel` [out, in, height, width]."""
    _, height, width = shape
    out_height = (height - kernel.shape[2]) // stride + 1
    out_width = (width - kernel.shape[3]) // stride + 1
    o, c, dy, dx, y, x = (axis.ravel() for axis in np.indices((*kernel.shape, out_height, out_width)))
    rows = (o * out_height + y) * out_width + x
    columns = (c * height + y * stride + dy) * width + x * stride + dx
    size = (kernel.shape[0] * out_height * out_width, math.prod(shape))
    return sparse.csr_array((kernel[o, c, dy, dx].astype(np.float64), (rows, columns)), shape=size)


def padding(shape: Shape, pixels: int) -> sparse.csr_array:
    """P: zero padding of an array of `shape` by `pixels` on each side of height and width."""
    channels, height, width = shape
    axes = (sparse.eye_array(side + 2 * pixels, side, k=-pixels) for side in (height, width))
    return _kronecker(sparse.eye_array(channels), *axes)


def resampling(shape: Shape, target: Shape) -> sparse.csr_array:
    """R: nearest-neighbour choice of channels, rows and columns; index j is taken from floor(j * old / new)."""
    return _kronecker(*(_selection(old, new) for old, new in zip(shape, target, strict=True)))


def matrices(model: SkipCNN) -> list[LayerMatrices]:
    """W, P, R, t and B of every layer of a linear `model`, in float64; float32 weights keep their values.

    Raises NotAffineError where `model` has an activation.
    """
    if not isinstance(model.activation, nn.Identity):
        name = type(model.activation).__name__
        raise NotAffineError(
            f"activation: {name} is not affine; build the SkipCNN without an activation",
            {"activation": f"{name} is not affine"},
        )
    return [_layer(model, i) for i in range(1, len(model.layers) + 1)]


def push(layers: Sequence[LayerMatrices], x: Matrix, bias: bool) -> Matrix:
    """The recursion on the columns of `x`: f_W^(n)(x), all biases left out, or f^(n)(x) with `bias`."""
    outputs = [x]
    for layer in layers:
        terms = [
            _scaled(strength, _product(layer.resampling[k], outputs[k])) for k, strength in layer.strengths.items()
        ]
        output = _product(layer.weight, _product(layer.padding, sum(terms[1:], start=terms[0])))
        outputs.append(output + layer.bias if bias else output)
    return outputs[-1]


def collapse_matrices(model: SkipCNN) -> tuple[np.ndarray, np.ndarray]:
    """f_W(1) [outputs, inputs] and f(0) [outputs] of a linear `model`, float64."""
    layers = matrices(model)
    inputs = math.prod(model.input_shape)
    weight = push(layers, sparse.eye_array(inputs, format="csr"), bias=False)
    bias = push(layers, sparse.csr_array((inputs, 1)), bias=True)
    return weight.toarray(), bias.toarray()[:, 0]


def collapse_exact(model: SkipCNN) -> tuple[DomainMatrix, DomainMatrix]:
    """f_W(1) [outputs, inputs] and f(0) [outputs, 1] of a linear `model` over the rationals, without rounding."""
    layers = [_rational_layer(layer) for layer in matrices(model)]
    inputs = math.prod(model.input_shape)
    weight = push(layers, DomainMatrix.eye(inputs, QQ), bias=False)
    bias = push(layers, DomainMatrix.zeros((inputs, 1), QQ), bias=True)
    return weight.to_dense(), bias.to_dense()


def evaluate(model: SkipCNN, x: np.ndarray) -> np.ndarray:
    """f^(n)(x) [outputs] by its definition, index by index, in the arithmetic of the elements of `x` [C, H, W].

    `x` is an array of Python objects: fractions, or elements of a sympy ring over QQ. Uses none of the matrices.
    """
    outputs = [x]
    for i, (layer, module) in enumerate(zip(model.layers, model.convolutions, strict=True), start=1):
        mixed = sum(
            _rational(strength) * _resampled(outputs[k], model.shapes[i - 1])
            for k, strength in _strengths(model, i).items()
        )
        sides = ((0, 0), (layer.padding, layer.padding), (layer.padding, layer.padding))
        padded = np.pad(mixed, sides, constant_values=QQ(0))
        outputs.append(_convolved(padded, module, model.shapes[i], layer.stride))
    return outputs[-1].ravel()


def prove(model: SkipCNN) -> tuple[DomainMatrix, DomainMatrix]:
    """f_W(1) and f(0) of `collapse_exact`, proved to give f for every input, in rational arithmetic.

    The recursion is evaluated by its definition on a generic X, whose pixels are the variables of a ring over QQ;
    the outputs are compared with f_W(1) X + f(0) as polynomials. Raises ExactnessError where they differ, or where
    the network is too large for it.
    """
    terms = _exact_terms(model)
    if terms > MOST_EXACT_TERMS:
        raise ExactnessError(
            f"an exact proof would take up to {terms:.1e} products of rationals, {MOST_EXACT_TERMS:.0e} are allowed; "
            "use a smaller input or fewer channels, or the float64 certificate (exact=False)"
        )
    weight, bias = collapse_exact(model)
    pixels = math.prod(model.input_shape)
    generic_ring, *variables = ring(f"x:{pixels}", QQ)
    outputs = evaluate(model, np.array(variables, dtype=object).reshape(model.input_shape))
    for row, (output, constant) in enumerate(zip(outputs, bias.to_list_flat(), strict=True)):
        coefficients = weight.extract([row], range(pixels)).to_list_flat()
        claimed = dict(zip((v.leading_expv() for v in variables), coefficients, strict=True))
        claimed[generic_ring.zero_monom] = constant
        if generic_ring(output) != generic_ring.from_dict({m: c for m, c in claimed.items() if c}):
            raise ExactnessError(f"output {row} of the collapse is not that of the network in rational arithmetic")
    return weight, bias


def _layer(model: SkipCNN, i: int) -> LayerMatrices:
    layer, module, shape = model.layers[i - 1], model.convolutions[i - 1], model.shapes[i - 1]
    padded = (shape[0], *(side + 2 * layer.padding for side in shape[1:]))
    strengths = _strengths(model, i)
    kernel, bias = _parameters(module)
    per_pixel = np.repeat(bias, math.prod(model.shapes[i][1:]))[:, None]
    return LayerMatrices(
        convolution(kernel, padded, layer.stride),
        padding(shape, layer.padding),
        {k: resampling(model.shapes[k], shape) for k in strengths},
        strengths,
        sparse.csr_array(per_pixel),
    )


def _parameters(module: nn.Conv2d) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias in float64; a bias that is not there is 0."""
    kernel = module.weight.detach().double().cpu().numpy()
    bias = np.zeros(len(kernel)) if module.bias is None else module.bias.detach().double().cpu().numpy()
    return kernel, bias


def _strengths(model: SkipCNN, i: int) -> dict[int, Fraction]:
    """t^(k,i-1) by k. Shares are divided by their exact sum, since three float thirds do not make 1."""
    shares = {k: Fraction(share) for k, share in model.sources(i).items()}
    if not shares:
        return {i - 1: Fraction(1)}
    t, total = Fraction(float(model.skip.t)), sum(shares.values())
    return {i - 1: 1 - t} | {k: t * share / total for k, share in shares.items()}


def _selection(old: int, new: int) -> sparse.csr_array:
    chosen = np.arange(new) * old // new
    return sparse.csr_array((np.ones(new), (np.arange(new), chosen)), shape=(new, old))


def _kronecker(*factors: sparse.sparray) -> sparse.csr_array:
    channels, rows, columns = factors
    return sparse.csr_array(sparse.kron(channels, sparse.kron(rows, columns)))


def _product(a: Matrix, b: Matrix) -> Matrix:
    return a.matmul(b) if isinstance(a, DomainMatrix) else a @ b


def _scaled(factor: Fraction, a: Matrix) -> Matrix:
    return a.scalarmul(_rational(factor)) if isinstance(a, DomainMatrix) else float(factor) * a


def _rational(value: Fraction | float):
    """An element of QQ, equal to `value`."""
    return QQ(*value.as_integer_ratio())


def _rational_layer(layer: LayerMatrices) -> LayerMatrices:
    return LayerMatrices(
        _rational_matrix(layer.weight),
        _rational_matrix(layer.padding),
        {k: _rational_matrix(matrix) for k, matrix in layer.resampling.items()},
        layer.strengths,
        _rational_matrix(layer.bias),
    )


def _rational_matrix(matrix: sparse.csr_array) -> DomainMatrix:
    entries = matrix.tocoo()
    rows: dict[int, dict[int, object]] = {}
    for row, column, value in zip(*map(np.ndarray.tolist, (*entries.coords, entries.data)), strict=True):
        if value:
            rows.setdefault(row, {})[column] = _rational(value)
    return DomainMatrix(rows, matrix.shape, QQ)


def _resampled(x: np.ndarray, shape: Shape) -> np.ndarray:
    return x[np.ix_(*([j * old // new for j in range(new)] for old, new in zip(x.shape, shape, strict=True)))]


def _convolved(x: np.ndarray, module: nn.Conv2d, shape: Shape, stride: int) -> np.ndarray:
    """The convolution of a padded array of objects [C, H, W], one output pixel after the other."""
    kernel, bias = (np.vectorize(_rational, otypes=[object])(values) for values in _parameters(module))
    side = kernel.shape[2]
    output = np.empty(shape, dtype=object)
    for y, x0 in np.ndindex(shape[1:]):
        window = x[:, y * stride : y * stride + side, x0 * stride : x0 * stride + side]
        for channel in range(shape[0]):
            output[channel, y, x0] = (kernel[channel] * window).sum() + bias[channel]
    return output


def _exact_terms(model: SkipCNN) -> int:
    """Products in `evaluate` on a generic input, each output pixel depending on all of the input at most."""
    macs = sum(
        math.prod(model.shapes[i]) * math.prod(module.weight.shape[1:])
        for i, module in enumerate(model.convolutions, start=1)
    )
    return macs * math.prod(model.input_shape)

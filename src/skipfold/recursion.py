"""The paper's recursion: a convolutional network in which any layer may read any earlier one."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from skipfold.errors import ConfigError, check_count
from skipfold.homotopy import Skip

Shape = tuple[int, int, int]
"""(channels, height, width)."""


@dataclass(frozen=True)
class Layer:
    """One W^(i), P^(i), B^(i): zero padding of `padding` pixels a side, then a convolution.

    Raises ConfigError on numbers that no convolution has.
    """

    channels: int
    kernel: int
    stride: int = 1
    padding: int = 0
    bias: bool = True

    def __post_init__(self) -> None:
        for name, least in (("channels", 1), ("kernel", 1), ("stride", 1), ("padding", 0)):
            check_count(getattr(self, name), f"SkipCNN: {name} of a layer", least)


class SkipCNN(nn.Module):
    """f^(0)(X) = X, f^(i)(X) = W^(i) P^(i) (sum_{k<i} t^(k,i-1) R^(k,i-1) f^(k)(X)) + B^(i).

    `skips` names the pairs (k, i), k < i - 1, by which layer i reads f^(k) beside f^(i-1); layers count from 1.
    f^(i-1) has weight 1 - t and the skips share t, equally or as `shares` says, so the weights of a layer sum
    to 1. R resamples channels, height and width to those of f^(i-1), by nearest neighbour. `activation`, if any,
    follows every layer but the last; without it the network is affine.

    Input [N, C, H, W] of `input_shape`, output [N, features] (the last layer, flattened), float32 or float64.
    Raises ConfigError on a skip, share, t or layer that does not fit.
    """

    def __init__(
        self,
        input_shape: Shape,
        layers: Sequence[Layer],
        skips: Sequence[tuple[int, int]] = (),
        t: float = 0.5,
        shares: Mapping[tuple[int, int], float] | None = None,
        activation: nn.Module | None = None,
    ):
        super().__init__()
        self.input_shape = tuple(input_shape)
        self.layers = tuple(layers)
        self.shapes = _shapes(self.input_shape, self.layers)
        self.shares = _shares(len(self.layers), skips, shares)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(
                self.shapes[i][0],
                layer.channels,
                layer.kernel,
                layer.stride,
                layer.padding,
                bias=layer.bias,
            )
            for i, layer in enumerate(self.layers)
        )
        self.activation = activation or nn.Identity()
        self.skip = Skip(t) if self.shares else None

    def sources(self, i: int) -> dict[int, float]:
        """Share of t with which layer `i` reads each skipped f^(k); empty where it has no skip."""
        return {k: share for (k, to), share in self.shares.items() if to == i}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = [x]
        for i, convolution in enumerate(self.convolutions, start=1):
            mixed = outputs[-1]
            if sources := self.sources(i):
                skipped = sum(share * resample(outputs[k], self.shapes[i - 1]) for k, share in sources.items())
                mixed = self.skip(mixed, skipped)
            output = convolution(mixed)
            outputs.append(self.activation(output) if i < len(self.layers) else output)
        return outputs[-1].flatten(1)


def resample(x: torch.Tensor, shape: Shape) -> torch.Tensor:
    """R: [N, C, H, W] to [N, *shape], each index j of an axis taken from floor(j * old / new).

    In whole numbers: F.interpolate rounds j * old / new in float32 and takes the wrong pixel for some sizes
    (26 to 22, or 2 to 82), in float32 only.
    """
    for axis, (old, new) in enumerate(zip(x.shape[1:], shape, strict=True), start=1):
        if old == new:
            continue
        if old == 1:
            x = x.expand(*x.shape[:axis], new, *x.shape[axis + 1 :])
        else:
            x = x.index_select(axis, torch.arange(new, device=x.device) * old // new)
    return x


def _shapes(input_shape: Shape, layers: Sequence[Layer]) -> list[Shape]:
    """Shapes of f^(0), ..., f^(n)."""
    if not layers:
        raise ConfigError("SkipCNN: no layers given; at least 1 is needed")
    shapes = [input_shape]
    for i, layer in enumerate(layers, start=1):
        sides = [(side + 2 * layer.padding - layer.kernel) // layer.stride + 1 for side in shapes[-1][1:]]
        if min(sides) < 1:
            raise ConfigError(
                f"SkipCNN: layer {i} has a kernel of {layer.kernel} and padding {layer.padding} "
                f"on an input of {shapes[-1][1:]}; the padded input must not be smaller than the kernel"
            )
        shapes.append((layer.channels, *sides))
    return shapes


def _shares(
    depth: int,
    skips: Sequence[tuple[int, int]],
    shares: Mapping[tuple[int, int], float] | None,
) -> dict[tuple[int, int], float]:
    try:
        skips = [(operator.index(k), operator.index(i)) for k, i in skips]
    except (TypeError, ValueError):
        raise ConfigError(f"SkipCNN: skips {skips!r} given; pairs (k, i) of layers are allowed") from None
    for k, i in skips:
        if not (0 <= k < i - 1 and 2 <= i <= depth):
            raise ConfigError(f"SkipCNN: skip {(k, i)} given; (k, i) with 0 <= k < i - 1 and i <= {depth} is allowed")
    if len(set(skips)) < len(skips):
        raise ConfigError(f"SkipCNN: skips {skips} name a pair twice; name each once")
    into = {i: sum(to == i for _, to in skips) for _, i in skips}
    if shares is None:
        return {(k, i): 1 / into[i] for k, i in skips}
    if set(shares) != set(skips):
        raise ConfigError(f"SkipCNN: shares given for {sorted(shares)}, needed for {sorted(skips)}")
    for layer in into:
        total = sum(share for (_, i), share in shares.items() if i == layer)
        if abs(total - 1) > 1e-9:
            raise ConfigError(f"SkipCNN: the shares into layer {layer} sum to {total}; they must sum to 1")
    return dict(shares)

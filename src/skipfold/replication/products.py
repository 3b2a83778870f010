"""Convolutions on maps so small that they are matrix products; many times faster on a CPU."""

import copy
import itertools

import torch
from torch import nn

from skipfold.cropping import convolution_inputs

TAPS, PIXELS, SUMS = (
    torch.kron(along, along)
    for along in (
        torch.tensor([[0.0, 1, 0], [0, -1, 1], [1, -1, 0]]),
        torch.tensor([[1.0, 1], [0, 1], [1, 0]]),
        torch.tensor([[1.0, 1, 0], [1, 0, 1]]),
    )
)
"""Along one axis three taps w over two pixels x, padded by one, give w1 x0 + w2 x1 and w0 x0 + w1 x1: by three products
instead of four, w1 (x0 + x1), (w2 - w1) x1 and (w0 - w1) x0, of which the first is in both sums. Here along two."""


class ProductConv2d(nn.Conv2d):
    """A convolution with the parameters of `one`, not copies of them."""

    def __init__(self, one: nn.Conv2d):
        super().__init__(
            one.in_channels,
            one.out_channels,
            one.kernel_size,
            one.stride,
            one.padding,
            groups=one.groups,
            bias=False,
            device="meta",
        )
        self.weight, self.bias = one.weight, one.bias
        self.train(one.training)


class CoveringConv2d(ProductConv2d):
    """An unpadded convolution that has one output pixel: [N, C, H, W] to [N, O, 1, 1]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = self.kernel_size
        seen = x[:, :, :height, :width].reshape(len(x), self.groups, -1).transpose(0, 1)
        weight = self.weight.reshape(self.groups, -1, seen.shape[2])
        out = torch.bmm(seen, weight.mT).transpose(0, 1).flatten(1)
        return (out if self.bias is None else out + self.bias)[:, :, None, None]


class TwoByTwoConv2d(ProductConv2d):
    """A 3x3 convolution with padding 1 of 2x2 pixels, [N, C, 2, 2] to [N, O, 2, 2], as nine products of [O, C] and
    [C, N], where a direct one takes 36, 20 of them with zeros."""

    def __init__(self, one: nn.Conv2d):
        super().__init__(one)
        for name, matrix in (("taps", TAPS), ("pixels", PIXELS), ("sums", SUMS)):
            self.register_buffer(name, matrix.to(one.weight), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images, channels = len(x), self.in_channels // self.groups
        pixels = (self.pixels @ x.permute(2, 3, 1, 0).reshape(4, -1)).view(9 * self.groups, channels, images)
        weight = (self.taps @ self.weight.reshape(-1, 9).T).view(9 * self.groups, -1, channels)
        out = self.sums @ torch.bmm(weight, pixels).view(9, -1)
        # Statistics of small maps take a CPU many times longer in any other format.
        out = out.view(2, 2, -1, images).permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
        return out if self.bias is None else out + self.bias[:, None, None]


def with_products(model: nn.Module, input_shape: tuple[int, int, int]) -> nn.Module:
    """`model` for inputs of `input_shape` (C, H, W), its convolutions on small maps computed as matrix products.

    Parameters and buffers are those of `model`, not copies. Equal up to rounding, which is some times larger.
    """
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    sizes = convolution_inputs(model, input_shape)
    model = copy.deepcopy(model, shared)
    for path, size in sizes.items():
        one = model.get_submodule(path)
        if kind := _kind(one, size):
            model.set_submodule(path, kind(one))
    return model


def _kind(one: nn.Conv2d, size: tuple[int, int]) -> type[ProductConv2d] | None:
    """What computes `one` on maps of `size` as matrix products; None where only a convolution does."""
    if one.dilation != (1, 1) or one.padding_mode != "zeros" or isinstance(one.padding, str):
        return None
    if one.padding == (0, 0) and all(
        side - kernel < stride for side, kernel, stride in zip(size, one.kernel_size, one.stride, strict=True)
    ):
        return CoveringConv2d
    if (size, one.kernel_size, one.stride, one.padding) == ((2, 2), (3, 3), (1, 1), (1, 1)):
        return TwoByTwoConv2d
    return None

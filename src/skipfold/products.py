"""Convolutions on maps so small that they are matrix products; many times faster on a CPU."""

import copy
import itertools

import torch
from torch import nn
from torch.nn import functional as F

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


class CoveringConv2d(nn.Conv2d):
    """An unpadded convolution that has one output pixel: [N, C, H, W] to [N, O, 1, 1]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = self.kernel_size
        seen = x[:, :, :height, :width].flatten(1)
        return F.linear(seen, self.weight.flatten(1), self.bias)[:, :, None, None]


class TwoByTwoConv2d(nn.Conv2d):
    """A 3x3 convolution with padding 1 of 2x2 pixels, [N, C, 2, 2] to [N, O, 2, 2], as nine products of [N, C] and
    [C, O], where a direct one takes 36, 20 of them with zeros."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images, channels = x.shape[:2]
        pixels = (PIXELS.to(x) @ x.permute(2, 3, 1, 0).reshape(4, -1)).view(9, channels, images)
        weight = (TAPS.to(x) @ self.weight.reshape(-1, 9).T).view(9, -1, channels)
        out = (SUMS.to(x) @ torch.bmm(weight, pixels).view(9, -1)).view(2, 2, -1, images).permute(3, 2, 0, 1)
        # Statistics of small maps take a CPU many times longer in any other format.
        out = out.contiguous(memory_format=torch.channels_last)
        return out if self.bias is None else out + self.bias[:, None, None]


def _kind(one: nn.Conv2d, size: tuple[int, int]) -> type[nn.Conv2d] | None:
    """What computes `one` on maps of `size` as matrix products; None where only a convolution does."""
    if one.groups > 1 or one.dilation != (1, 1) or one.padding_mode != "zeros" or isinstance(one.padding, str):
        return None
    if one.padding == (0, 0) and all(
        side - kernel < stride for side, kernel, stride in zip(size, one.kernel_size, one.stride, strict=True)
    ):
        return CoveringConv2d
    if (size, one.kernel_size, one.stride, one.padding) == ((2, 2), (3, 3), (1, 1), (1, 1)):
        return TwoByTwoConv2d
    return None


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
            product = kind(
                one.in_channels, one.out_channels, one.kernel_size, one.stride, one.padding, bias=False, device="meta"
            )
            product.weight, product.bias = one.weight, one.bias
            model.set_submodule(path, product.train(one.training))
    return model

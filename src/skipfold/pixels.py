"""A collapsed network on uint8 pixels in one kernel, which on CUDA reads each pixel once."""

from importlib.util import find_spec

import torch
from torch import nn

from skipfold.collapse import Collapsed, check_collapsed
from skipfold.errors import WeightsError

COLUMNS = 16
"""The kernel's outputs are padded to a power of two of at least as many."""

TRITON = find_spec("triton") is not None
"""Whether the kernel can be made; builds of torch for some systems come without Triton."""

MAX_OUTPUTS = 256
"""Of more outputs a matrix product is no longer bound by memory."""


class PixelLayer(nn.Module):
    """What a Collapsed computes from uint8 inputs [N, *input_shape], up to rounding in float32.

    `collapsed` takes raw pixels (see `collapse.fold_preprocessing`) and is float32. On CUDA its weights are held as
    the sum of two float16 matrices, scaled by a power of two per output, which together are as precise as float32; a
    pixel is exact in float16, so that tensor cores multiply what is exact and sum in float32, and no float32 copy of
    the pixels is written. Their sums cut digits off, so that logits are to about 1e-5 of the largest. Elsewhere, and
    without Triton, `collapsed` itself computes. Raises ModuleError on what is no Collapsed, WeightsError where the
    weights are not float32, or the outputs too many.
    """

    def __init__(self, collapsed: Collapsed):
        super().__init__()
        check_collapsed(collapsed)
        weight = collapsed.linear.weight.detach()
        if weight.dtype != torch.float32:
            raise WeightsError(f"weights of {weight.dtype} given; float32 is allowed: call .float() on the network")
        if len(weight) > MAX_OUTPUTS:
            raise WeightsError(f"{len(weight)} outputs given; at most {MAX_OUTPUTS} are allowed: use the Collapsed")
        self.collapsed = collapsed
        self.register_buffer("halves", None, persistent=False)
        self.register_buffer("scale", None, persistent=False)
        _split_weights(self)
        self.register_load_state_dict_post_hook(_split_weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fits = x.dtype == torch.uint8 and tuple(x.shape[1:]) == self.collapsed.input_shape and len(x)
        if x.device.type != "cuda" or not fits or not TRITON:
            return self.collapsed(x)
        from skipfold import kernel

        logits = kernel.run(x.flatten(1).contiguous(), self.halves, self.scale, self.collapsed.linear.bias)
        return logits.reshape(-1, *self.collapsed.output_shape)


def _split_weights(layer: PixelLayer, _: object = None) -> None:
    layer.halves, layer.scale = split(layer.collapsed.linear.weight.detach())


def split(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float16 [2, inputs, columns] and float32 scale [outputs], so that scale * halves.sum(0).T is `weight`.

    `weight` is float32 [outputs, inputs]; columns past the outputs are 0.
    """
    outputs, inputs = weight.shape
    _, exponent = torch.frexp(weight.abs().amax(1))
    scale = torch.ldexp(torch.ones_like(weight[:, 0]), exponent)
    scaled = torch.ldexp(weight, -exponent[:, None])
    columns = max(COLUMNS, 1 << (outputs - 1).bit_length())
    halves = weight.new_zeros(2, inputs, columns, dtype=torch.float16)
    halves[0, :, :outputs] = scaled.T
    halves[1, :, :outputs] = scaled.T - halves[0, :, :outputs].float()
    return halves, scale

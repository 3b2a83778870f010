"""A Triton kernel: one affine layer on uint8 pixels, which are read once and never stored in another type."""

import torch
import triton
from triton import language as tl

SHAPES = [
    triton.Config({"ROWS": rows, "DEPTH": depth}, num_warps=warps, num_stages=stages)
    for rows, depth, warps, stages in (
        (16, 128, 2, 3),
        (16, 256, 4, 3),
        (64, 64, 4, 4),
        (128, 64, 4, 4),
        (128, 128, 8, 3),
        (256, 64, 8, 3),
    )
]
"""Tile shapes, tried once for each power of two of the batch."""


@triton.jit
def affine(
    pixels, high, low, scale, bias, logits, batch,
    magnitude,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """logits [batch, OUTPUTS] = scale * ((high + low)^T pixels) + bias, for pixels [batch, INPUTS] of uint8.

    high and low are float16 [INPUTS, COLUMNS], COLUMNS at least 16 and a power of two, padded with 0; scale and bias
    are float32 [OUTPUTS]. A pixel is exact in float16 and products are summed in float32. `magnitude` is there to be
    tuned for.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    total = tl.full((ROWS, COLUMNS), 0.0, tl.float32)  # tl.zeros cannot be interpreted once triton is imported
    for start in range(0, INPUTS, DEPTH):
        k = start + tl.arange(0, DEPTH)
        inside = (row < batch)[:, None] & (k < INPUTS)[None, :]
        x = tl.load(pixels + row[:, None] * INPUTS + k[None, :], mask=inside, other=0).to(tl.float16)
        at = k[:, None] * COLUMNS + column[None, :]
        known = (k < INPUTS)[:, None]
        total = tl.dot(x, tl.load(high + at, mask=known, other=0.0), total)
        total = tl.dot(x, tl.load(low + at, mask=known, other=0.0), total)
    real = column < OUTPUTS
    total = total * tl.load(scale + column, mask=real, other=0.0)[None, :]
    total += tl.load(bias + column, mask=real, other=0.0)[None, :]
    tl.store(logits + row[:, None] * OUTPUTS + column[None, :], total, mask=(row < batch)[:, None] & real[None, :])


tuned = triton.autotune(SHAPES, key=["magnitude"])(affine)


def run(pixels: torch.Tensor, halves: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The logits of `pixels` [N, inputs], contiguous uint8 on CUDA; see `affine`."""
    batch, inputs = pixels.shape
    logits = torch.empty(batch, len(bias), device=pixels.device)
    with torch.cuda.device_of(pixels):  # Triton launches on the current device
        tuned[lambda shape: (triton.cdiv(batch, shape["ROWS"]),)](
            pixels, *halves, scale, bias, logits, batch, batch.bit_length(),
            INPUTS=inputs, OUTPUTS=len(bias), COLUMNS=halves.shape[-1],
        )  # fmt: skip
    return logits

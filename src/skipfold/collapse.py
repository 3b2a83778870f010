"""Any affine network as one layer, with a certificate that it is the same function."""

import copy
import dataclasses
import time
from typing import Any

import torch
from torch import nn

from skipfold.errors import NotAffineError

RESIDUAL_TOLERANCE = 1e-8
"""Largest affine residual, in float64, of a network that counts as affine."""

AFFINE_MODULES = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.Linear,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Flatten,
    nn.Identity,
)


@dataclasses.dataclass(frozen=True)
class Certificate:
    """How well a collapsed layer stands for its network; errors are maxima over `probes` random inputs in [0, 1].

    `residual` is ||f(a+b) - f(a) - f(b) + f(0)|| / ||f(a)|| in float64, `max_error` the largest difference of logits
    between the network and its collapse in float64, `max_error_float32` the same with both in float32.
    """

    affine: bool
    residual: float
    max_error: float
    max_error_float32: float
    probes: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def affine_residual(module: nn.Module, input_shape: tuple[int, ...], probes: int = 16) -> float:
    """||f(a+b) - f(a) - f(b) + f(0)|| / ||f(a)|| in float64, the largest over `probes` pairs in [0, 1]."""
    reference, device = _float64(module)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, probes, *input_shape, generator=generator, dtype=torch.float64).to(device)
    with torch.no_grad():
        f_a, f_b, f_sum, f_0 = (reference(x) for x in (a, b, a + b, torch.zeros_like(a)))
    return float(((f_sum - f_a - f_b + f_0).flatten(1).norm(dim=1) / f_a.flatten(1).norm(dim=1)).max())


def offenders(module: nn.Module) -> dict[str, str]:
    """Submodules that keep `module` from being affine, by path, with the reason."""
    found = {}
    for path, child in module.named_modules():
        if next(child.children(), None) is not None or isinstance(child, AFFINE_MODULES):
            continue
        name = type(child).__name__
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            if child.training:
                found[path] = f"{name} in training mode"
        else:
            found[path] = f"{name} is not affine"
    return found


def collapse(
    module: nn.Module, input_shape: tuple[int, ...], probes: int = 16
) -> tuple[nn.Sequential, Certificate]:
    """One nn.Linear, behind a flatten, that computes what `module` does in eval mode, and its certificate.

    `input_shape` is that of one sample, without the batch. Weight and bias are found in float64 and cast to the
    module's dtype. Raises NotAffineError, naming the submodules, where `module` is not affine.
    """
    start = time.perf_counter()
    found = offenders(copy.deepcopy(module).eval())
    residual = affine_residual(module, input_shape, probes)
    if found or residual > RESIDUAL_TOLERANCE:
        reasons = ", ".join(f"{path}: {reason}" for path, reason in found.items())
        raise NotAffineError(
            f"not affine (residual {residual:.1e}): {reasons or 'the numerical residual alone shows it'}",
            found,
        )
    reference, device = _float64(module)
    weight, bias = _weight_and_bias(reference, input_shape, device)
    dtype = next(module.parameters()).dtype
    layer = nn.Linear(weight.shape[1], weight.shape[0], device=device, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    exact = nn.Sequential(nn.Flatten(), layer)
    collapsed = copy.deepcopy(exact).to(dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(probes, *input_shape, generator=generator, dtype=torch.float64).to(device)
    single = copy.deepcopy(module).eval()
    with torch.no_grad():
        max_error = float((reference(x) - exact(x)).abs().max())
        max_error_single = float((single(x.to(dtype)) - collapsed(x.to(dtype))).abs().max())
    certificate = Certificate(
        True, residual, max_error, max_error_single, probes, time.perf_counter() - start
    )
    return collapsed, certificate


def _float64(module: nn.Module) -> tuple[nn.Module, torch.device]:
    reference = copy.deepcopy(module).double().eval()
    return reference, next(reference.parameters()).device


def _weight_and_bias(
    reference: nn.Module, input_shape: tuple[int, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Jacobian's rows by one batched reverse pass: sample j of the batch gives the gradient of output j."""
    zero = torch.zeros(1, *input_shape, dtype=torch.float64, device=device)
    with torch.no_grad():
        bias = reference(zero)[0].flatten()
    x = zero.repeat(len(bias), *[1] * len(input_shape)).requires_grad_()
    diagonal = reference(x).flatten(1).diagonal().sum()
    (rows,) = torch.autograd.grad(diagonal, x)
    return rows.flatten(1), bias

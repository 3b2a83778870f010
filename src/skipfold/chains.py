"""A chain of convolutions as one larger convolution, where it is one."""

import copy
import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

from skipfold.collapse import MAX_BYTES, Certificate, collapse
from skipfold.errors import NotConvolutionError
from skipfold.subject import BATCHNORM, certifying, check_module, copied

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
POINTWISE = (BATCHNORM, nn.modules.dropout._DropoutNd, nn.Identity)
"""Layers that a chain may hold beside its convolutions."""

PROBES = 2

TOLERANCE = 1e-9
"""Largest difference from the chain, or 8 roundings of the weights, of inputs in [0, 1] and relative to the largest sum
of one output's weights."""


def collapse_convolution(chain: nn.Module, *, max_bytes: int = MAX_BYTES) -> tuple[nn.Module, Certificate]:
    """A chain of convolutions (and BatchNorms in eval mode) as one larger convolution, for inputs of any size.

    `chain` is a convolution, or a nest of nn.Sequential. It is one convolution only if it pads once, in front: zeros
    put between two convolutions are no zeros of the input. The kernel is the chain's response on the smallest input
    that gives one output pixel; strides multiply. The errors in the certificate are measured on larger inputs.
    Raises NotConvolutionError, naming the layer, where the chain is no convolution (`collapse` works there, for one
    input size), and what `collapse` raises.
    """
    check_module(chain)
    own, unpadded = copied(chain), copy.deepcopy(chain)
    convolutions = [layer for path, layer in _checked(unpadded) if isinstance(layer, CONVOLUTIONS)]
    first = convolutions[0]
    padding, first.padding = first.padding, (0,) * len(first.padding)
    kernel, stride = extent(convolutions)
    one_pixel, certificate = collapse(unpadded, (first.in_channels, *kernel), max_bytes=max_bytes)
    weight = one_pixel.linear.weight.detach().reshape(-1, first.in_channels, *kernel)
    whole = type(first)(first.in_channels, len(weight), kernel, stride, padding, device="meta")
    whole.weight = nn.Parameter(weight)
    whole.bias = one_pixel.linear.bias
    certificate = _certified(certificate, own, whole, [size + 2 for size in kernel])
    allowed = max(TOLERANCE, 8 * torch.finfo(weight.dtype).eps) * (1 + float(weight.abs().flatten(1).sum(1).max()))
    if not certificate.max_error <= allowed:
        raise NotConvolutionError(
            f"the one convolution differs from the chain by {certificate.max_error:.1e}; use collapse, for one input "
            "size"
        )
    return whole, certificate


def _checked(chain: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that do something, by path, in order; raises NotConvolutionError."""
    layers: list[tuple[str, nn.Module]] = []
    for path, layer in _flat(chain, ""):
        if type(layer) not in CONVOLUTIONS and not isinstance(layer, POINTWISE):
            raise NotConvolutionError(
                f"{path or 'network'}: {type(layer).__name__} is no convolution; use collapse, for one input size"
            )
        if isinstance(layer, CONVOLUTIONS):
            kinds = {type(each) for _, each in layers if isinstance(each, CONVOLUTIONS)} | {type(layer)}
            if len(kinds) > 1:
                names = " and ".join(sorted(kind.__name__ for kind in kinds))
                raise NotConvolutionError(f"{path}: {names} in one chain given; one kind is allowed")
            _check_padding(path or "network", layer, first=not layers)
        if not isinstance(layer, nn.modules.dropout._DropoutNd | nn.Identity):
            layers.append((path, layer))
    if not any(isinstance(layer, CONVOLUTIONS) for _, layer in layers):
        raise NotConvolutionError("no convolution in the chain; at least 1 is needed")
    return layers


def _flat(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    if type(module).forward is not nn.Sequential.forward:
        yield path, module
        return
    for name, child in module._modules.items():  # one that is there twice, twice
        yield from _flat(child, f"{path}.{name}" if path else name)


def _check_padding(path: str, layer: nn.Module, first: bool) -> None:
    if isinstance(layer.padding, str):
        if layer.padding == "valid":
            layer.padding = (0,) * len(layer.kernel_size)
            return
        raise NotConvolutionError(f"{path}: padding={layer.padding!r} given; numbers are allowed, e.g. padding=1")
    if not any(layer.padding):
        return
    if layer.padding_mode != "zeros":
        raise NotConvolutionError(f"{path}: padding mode {layer.padding_mode!r} given; zeros is allowed")
    if not first:
        raise NotConvolutionError(
            f"{path}: pads after another layer, and zeros put there are no zeros of the input; pad once, in the first "
            "layer, or use collapse, for one input size"
        )


def extent(convolutions: list[nn.Module]) -> tuple[list[int], list[int]]:
    """Kernel size and stride of the whole chain, for each axis."""
    axes = range(len(convolutions[0].kernel_size))
    kernel, stride = [1 for _ in axes], [1 for _ in axes]
    for layer in convolutions:
        kernel = [kernel[i] + (layer.kernel_size[i] - 1) * layer.dilation[i] * stride[i] for i in axes]
        stride = [stride[i] * layer.stride[i] for i in axes]
    return kernel, stride


def _certified(certificate: Certificate, chain: nn.Module, whole: nn.Module, sides: list[int]) -> Certificate:
    """The certificate with the errors of `whole` against `chain`, a copy in eval mode, on inputs of size `sides`."""
    pair = chain, copied(whole)
    x = torch.rand(PROBES, whole.in_channels, *sides, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with certifying(whole.weight.device), torch.no_grad():
        own, found = (module(x.to(whole.weight)) for module in pair)
        if own.shape != found.shape:  # by a hook, or a BatchNorm of another make
            raise NotConvolutionError(
                f"the chain gives {list(own.shape)} where the one convolution gives {list(found.shape)}; use collapse, "
                "for one input size"
            )
        own64, found64 = (module.double()(x.to(whole.weight.device)) for module in pair)
    return dataclasses.replace(
        certificate,
        max_error=float((found64 - own64).abs().max()),
        max_error_float32=float((found - own).abs().max()),
        module_error_float32=float((own - own64).abs().max()),
        probes=PROBES,
    )

"""Convolutions without the taps of their kernels that only ever meet padding."""

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from skipfold.equality import zeros
from skipfold.errors import SkipError, WeightsError
from skipfold.graphs import hooked
from skipfold.structure import paths
from skipfold.subject import check_module, in_mode, input_errors


class CroppedConv2d(nn.Conv2d):
    """A convolution whose kernel was cropped to the taps that meet its input; for one input size only."""

    input_size: tuple[int, int]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if tuple(x.shape[-2:]) != self.input_size:
            raise SkipError(
                f"input of {tuple(x.shape[-2:])} given to a convolution whose dead taps were removed "
                f"for {self.input_size}; crop the network again for this input size"
            )
        return super().forward(x)


def crop_dead_taps(model: nn.Module, example: torch.Tensor | Sequence[int]) -> nn.Module:
    """A copy of `model` whose kernels keep only the taps that meet the input, for the size of `example`.

    `example` is a batch, or the shape (C, H, W) of one sample. On a 1x1 map a 3x3 kernel with padding 1 has one live
    tap. The function and the gradients of what is kept are unchanged; other input sizes are refused with SkipError. A
    convolution that has hooks, or whose weight is used elsewhere too, stays. Raises ModuleError, WeightsError and
    InputShapeError where `model` cannot be run.
    """
    check_module(model)
    model = copy.deepcopy(model)
    sizes = convolution_inputs(model, example)
    shared = _shared(model, example)
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, size in sizes.items():
        convolution = modules[path]
        if hooked(convolution) or path in shared or (cropped := _cropped(convolution, size)) is None:
            continue
        for place in [place for place, module in modules.items() if module is convolution]:
            model.set_submodule(place, cropped)
    return model


def convolution_inputs(model: nn.Module, example: torch.Tensor | Sequence[int]) -> dict[str, tuple[int, int]]:
    """Height and width of what each convolution of `model` reads, where it reads one size only."""
    sizes: dict[str, set[tuple[int, int]]] = {}

    def note(path):
        return lambda _, inputs: sizes.setdefault(path, set()).add(tuple(inputs[0].shape[-2:]))

    with contextlib.ExitStack() as hooks:
        for path, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                hooks.callback(module.register_forward_pre_hook(note(path)).remove)
        _run(model, example)
    return {path: seen.pop() for path, seen in sizes.items() if len(seen) == 1}


def _shared(model: nn.Module, example: torch.Tensor | Sequence[int]) -> set[str]:
    """Paths of the convolutions of `model` whose weights something else computes with too."""
    path = [""]
    own = {path: module.weight for path, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    with paths(model, path), _Weights(own, path) as mode:
        _run(model, example)
    return mode.shared


class _Weights(TorchFunctionMode):
    def __init__(self, own: dict[str, nn.Parameter], path: list[str]):
        super().__init__()
        self.own, self.path, self.shared = own, path, set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {id(value) for value in tree_leaves((args, kwargs)) if isinstance(value, nn.Parameter)}
        if given and isinstance(result, torch.Tensor):  # no shape or dtype
            self.shared |= {path for path, weight in self.own.items() if id(weight) in given and path != self.path[-1]}
        return result


def _run(model: nn.Module, example: torch.Tensor | Sequence[int]) -> Any:
    """What `model` gives in eval mode, for what it is now."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise WeightsError(f"{type(model).__name__} has no weights; a network with convolutions is allowed")
    x = zeros(example, parameter.dtype, parameter.device)[:1]
    with torch.no_grad(), in_mode(model, False), input_errors(x):
        return model(x)


class LiveTaps(TorchFunctionMode):
    """While it is on, 2-d convolutions compute with the taps that meet their input alone: the same values, sooner."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return func(*_with_live_taps(*args, **kwargs)) if func is torch.conv2d else func(*args, **kwargs)


def _with_live_taps(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """The arguments of torch.conv2d, weight and padding cropped where they can be."""
    if not isinstance(padding, str):
        axes = [(value, value) if isinstance(value, int) else value for value in (stride, padding, dilation)]
        live = _live_taps(x.shape[-2:], weight.shape[2:], *axes)
        if live is not None:
            taps, padding = live
            weight = weight[:, :, *taps].contiguous()
    return x, weight, bias, stride, padding, dilation, groups


def _live_taps(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[list[slice], tuple[int, int]] | None:
    """The taps along both axes that ever meet an input of `size`, and the padding that is left.

    None where all taps do, or where a smaller convolution cannot have as many outputs.
    """
    if tuple(dilation) != (1, 1):
        return None
    taps, left = [], []
    for side, width, step, pad in zip(size, kernel, stride, padding, strict=True):
        outputs = (side + 2 * pad - width) // step + 1
        live = [k for k in range(width) if any(0 <= o * step + k - pad < side for o in range(outputs))]
        live = live or range(width)  # every output meets padding only: nothing to gain
        first, last = min(live), max(live) + 1
        taps.append(slice(first, last))
        left.append(pad - first)
        if left[-1] < 0 or (side + 2 * left[-1] - (last - first)) // step + 1 != outputs:
            return None
    if all(live == slice(0, width) for live, width in zip(taps, kernel, strict=True)):
        return None
    return taps, tuple(left)


def _cropped(convolution: nn.Conv2d, size: tuple[int, int]) -> CroppedConv2d | None:
    """The cropped convolution, or None where every tap is live or the crop cannot be written as one."""
    if (
        type(convolution) is not nn.Conv2d
        or convolution.padding_mode != "zeros"
        or isinstance(convolution.padding, str)
    ):
        return None
    live = _live_taps(size, convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation)
    if live is None:
        return None
    taps, padding = live
    cropped = CroppedConv2d(
        convolution.in_channels,
        convolution.out_channels,
        tuple(live.stop - live.start for live in taps),
        convolution.stride,
        padding,
        groups=convolution.groups,
        bias=convolution.bias is not None,
        device="meta",
    )
    weight = convolution.weight.detach()[:, :, *taps].clone(memory_format=torch.contiguous_format)
    cropped.weight = nn.Parameter(weight, requires_grad=convolution.weight.requires_grad)
    if convolution.bias is not None:
        cropped.bias = convolution.bias
    cropped.input_size = size
    return cropped.train(convolution.training)

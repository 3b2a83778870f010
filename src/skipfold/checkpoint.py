"""Networks by name with the weights of a file, of which no code is ever run."""

import inspect
import os
import pickle
import re
import warnings
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision
from torch import nn

from skipfold.errors import CheckpointError, NoSkipsError, first_line
from skipfold.homotopy import MARKS, adding, insert_skips, set_skip_strength, skips
from skipfold.networks import NETWORKS, build
from skipfold.schedules import check_strength

TIMM = "timm:"

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts put the state_dict among other things."""

COMPILED = re.compile(r"(^|\.)_orig_mod\.")
"""What torch.compile puts before the names in a module that it wraps, also in one that is part of another."""

AVERAGED = "n_averaged"
"""What torch's AveragedModel keeps beside the network's weights."""

STRENGTH = re.compile(r"(?:^|\.)skip(?:_\d+)?\.t$")
"""End of the key of a skip strength, after the path of the module that holds the Skip."""

COUNTER = "num_batches_tracked"
"""End of the key of what BatchNorm counts in training; no output depends on it."""

SHOWN = 3
"""Keys that an error names; the others are counted."""


def load_model(
    name: str,
    path: str | Path | None = None,
    *,
    t: float | None = None,
    options: Mapping[str, Any] | None = None,
    example: torch.Tensor | Sequence[int] | None = None,
) -> nn.Module:
    """The network `name` in eval mode with the weights at `path`, or freshly initialised where that is None.

    `name` is one of skipfold's own (skipfold.networks.NETWORKS, with `options`), a name of torchvision, or timm:NAME;
    of the latter two, the numbers of input channels and classes are taken from the file. What torch.compile,
    DataParallel, AveragedModel or a LightningModule put before the names of its parameters is taken off. A file that
    holds t, or `t` given, makes the network one with skip strengths (see `skipfold.homotopy`): the skips that the file
    names, or all; `t` overrides what the file says. With an `example`, a batch or the shape of one sample, only modules
    that add something on it have to be read for that.

    Raises CheckpointError where the name is unknown, the file cannot be read without running code, or does not fit;
    ConfigError on bad options and a t outside [0, 1]; SkipError where skips are to be found and are not.
    """
    state = None if path is None else read_state(path)
    model = _network(name, options or {})
    if state is not None:
        state = _unprefixed(state, model.state_dict())
        model = _fitted(model, name, state, options or {})
    stated = [key for key in state or {} if STRENGTH.search(key)]
    if not skips(model) and stated:
        variance, normalize = (any(key.endswith(f".{mark}") for key in state) for mark in MARKS)
        weights = "variance" if variance else "convex"
        among = {STRENGTH.sub("", key) for key in stated}
        try:
            model = insert_skips(model, weights=weights, normalize=normalize, among=among)
        except NoSkipsError as error:
            raise CheckpointError(
                f"{path}: states the strength of skips ({some(stated)}) that {name} does not have; is it of another "
                "network or other options?"
            ) from error
    elif not skips(model) and t is not None:
        model = insert_skips(model, among=None if example is None else adding(model, example))
    if skips(model) and state is not None and not stated and t is None:
        raise CheckpointError(f"{path}: does not say the skip strength t of {name}; state it, e.g. --t 0")
    if state is not None:
        _fill(model, state, str(path))
    if t is not None:
        set_skip_strength(model, check_strength(t))
    return model.eval()


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
    """The state_dict in a .safetensors file, or in one that torch.save wrote, by weights only, on the CPU.

    A state_dict wrapped by a training script is unwrapped. Raises CheckpointError where the file is missing, damaged,
    holds code, or anything but finite tensors that are `plain`.
    """
    path = Path(path)
    if not os.path.isfile(path):
        found = "a folder" if os.path.isdir(path) else "no such file"
        raise CheckpointError(f"{path}: {found}; give a .safetensors file or a state_dict written by torch.save")
    tensors = path.suffix == ".safetensors"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error says it
            state = safetensors.torch.load_file(path) if tensors else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # of many kinds, from files that are damaged or made to do harm
        # Its advice to let code run, which torch gives for pickles and for programs of TorchScript, is not passed on.
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
            raise CheckpointError(
                f"{path}: holds more than weights, such as a whole or a TorchScript module, or is damaged, and was not "
                "loaded, since that can run code; save model.state_dict() alone, best as .safetensors"
            ) from error
        raise CheckpointError(
            f"{path}: cannot be read as {'safetensors' if tensors else 'what torch.save writes'} "
            f"({type(error).__name__}: {first_line(error)}); is it that, and whole?"
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: holds no state_dict, but {type(state).__name__}; save model.state_dict()")
    state = {str(key): value for key, value in state.items()}
    if other := not_plain(state):
        raise CheckpointError(
            f"{path}: holds no state_dict of ordinary tensors alone, but {some(other)}; save "
            f"model.float().state_dict(), alone or under {', '.join(WRAPPERS)}"
        )
    if bad := not_finite(state):
        raise CheckpointError(f"{path}: NaN or infinity in {some(bad)}; the training diverged")
    return state


def not_plain(state: Mapping[str, object]) -> list[str]:
    """The keys of what is no dense tensor of numbers that torch computes with, each with what it is instead."""
    return [f"{key} ({kind})" for key, value in state.items() if (kind := _not_plain(value))]


def not_finite(state: Mapping[str, torch.Tensor]) -> list[str]:
    """The keys of tensors that hold NaN or infinity."""
    return [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]


def _not_plain(value: object) -> str | None:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    if nn.parameter.is_lazy(value):
        return "not initialised"
    if value.is_meta:
        return "on the meta device, without values"
    if value.is_nested:
        return "nested"
    if value.layout is not torch.strided:
        return str(value.layout)
    # Of the floats of 8 bits and fewer, torch knows neither which are finite nor, of some, how to cast them.
    if value.is_quantized or (value.is_floating_point() and value.dtype.itemsize < 2):
        return str(value.dtype)
    return None


def _unprefixed(state: Mapping[str, torch.Tensor], held: Container[str]) -> dict[str, torch.Tensor]:
    """`state` by the names of its network, some of which are in `held`, without those of what that was wrapped in."""
    state = {COMPILED.sub(r"\1", key): value for key, value in state.items() if key != AVERAGED}
    first = min(state, default="")
    for end in (0, *(dot.end() for dot in re.finditer(r"\.", first))):
        if all(key.startswith(first[:end]) for key in state) and any(key[end:] in held for key in state):
            return {key[end:]: value for key, value in state.items()}
    return state


def _network(name: str, options: Mapping[str, Any]) -> nn.Module:
    if name in NETWORKS:
        return build(name, options)
    try:
        if name.startswith(TIMM):
            import timm

            return timm.create_model(name.removeprefix(TIMM), **options)
        builder = torchvision.models.get_model_builder(name.removeprefix("torchvision:"))
        unread = [key for key in ("weights", "weights_backbone") if key in inspect.signature(builder).parameters]
        return builder(**dict.fromkeys(unread), **options)
    except ImportError as error:
        raise CheckpointError(f"{name}: timm is not installed; pip install timm") from error
    except Exception as error:  # of many kinds, from the libraries
        raise CheckpointError(
            f"network {name!r}: {first_line(error)}; allowed are {', '.join(NETWORKS)}, names of torchvision.models, "
            "and timm:NAME"
        ) from error


def _fitted(model: nn.Module, name: str, state: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> nn.Module:
    """`model`, or the network `name` with the numbers of input channels and classes that `state` has."""
    if name in NETWORKS:
        return model
    first = next((path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)), None)
    held, kernel_at, scores_at = model.state_dict(), f"{first}.weight", f"{_classifier(model)}.weight"
    kernel, scores = state.get(kernel_at), state.get(scores_at)
    fit = {}
    if scores is not None and scores.dim() > 1 and len(scores) != len(held[scores_at]):
        fit["num_classes"] = len(scores)
    channels = kernel.shape[1] if kernel is not None and kernel.dim() == 4 else None
    if channels and channels != held[kernel_at].shape[1] and name.startswith(TIMM):
        fit["in_chans"] = channels
    if fit:
        model = _network(name, fit | dict(options))
    return model if channels is None or name.startswith(TIMM) else _with_channels(model, first, channels)


def _classifier(model: nn.Module) -> str | None:
    """The path of the layer that gives the scores: as timm has it, else the last linear layer."""
    said = getattr(model, "pretrained_cfg", {}).get("classifier")
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    return said if isinstance(said, str) else linear[-1] if linear else None


def _with_channels(model: nn.Module, path: str, channels: int) -> nn.Module:
    """`model` with a first convolution, at `path`, for `channels` channels."""
    first = model.get_submodule(path)
    if first.in_channels != channels and first.groups == 1:
        other = nn.Conv2d(
            channels,
            first.out_channels,
            first.kernel_size,
            first.stride,
            first.padding,
            first.dilation,
            bias=first.bias is not None,
            padding_mode=first.padding_mode,
        )
        model.set_submodule(path, other)
    return model


def _fill(model: nn.Module, state: Mapping[str, torch.Tensor], path: str) -> None:
    held = model.state_dict()
    optional = {key for key in held if STRENGTH.search(key) or key.endswith(COUNTER)}
    problems = {
        "missing": [key for key in held if key not in state and key not in optional],
        "unexpected": [key for key in state if key not in held],
        "of another shape": [
            f"{key} ({list(value.shape)}, the network has {list(held[key].shape)})"
            for key, value in state.items()
            if key in held and value.shape != held[key].shape
        ],
        # load_state_dict would cast it: what is quantized, or the real part of what is complex, is another function.
        "of another kind": [
            f"{key} ({value.dtype}, the network has {held[key].dtype})"
            for key, value in state.items()
            if key in held and _kind(value) != _kind(held[key]) and not key.endswith(COUNTER)
        ],
    }
    if any(problems.values()):
        said = "; ".join(f"{len(keys)} {problem}: {some(keys)}" for problem, keys in problems.items() if keys)
        raise CheckpointError(f"{path}: does not fit the network: {said}; is it of another network or other options?")
    for key, value in state.items():
        if STRENGTH.search(key) and not 0 <= float(value) <= 1:
            raise CheckpointError(f"{path}: {key} is {float(value):g}; a skip strength lies in [0, 1]")
    model.load_state_dict(held | dict(state))


def _kind(tensor: torch.Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def some(keys: list[str]) -> str:
    """`keys` in words: the first few, and how many more."""
    return ", ".join(keys[:SHOWN]) + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")

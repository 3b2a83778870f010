"""The paper's networks by name, with their own reproducible initialisation."""

import inspect
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision.models.resnet import ResNet

from skipfold.errors import ConfigError, check_count
from skipfold.homotopy import Skip, set_skip_strength, skips
from skipfold.recursion import Layer, SkipCNN
from skipfold.resnet import resnet
from skipfold.schedules import check_strength
from skipfold.subject import BATCHNORM

INPUT_SHAPE = (1, 28, 28)
CLASSES = 10


def perceptron(bias: bool = False) -> nn.Sequential:
    """One layer from 784 pixels to 10 logits; bias-free by the fit to the published curve."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, CLASSES, bias=bias))


def skip_cnn(
    t: float = 0.5,
    width: int = 8,
    kernel: int = 3,
    padding: int = 1,
    stride: int = 1,
    hidden: int = 2,
    skips: tuple[tuple[int, int], ...] = ((0, 2), (0, 3), (1, 3)),
    bias: bool = True,
    activation: str | None = None,
) -> SkipCNN:
    """`hidden` convolutions of `width` channels and a fully connected last layer, written as the paper's recursion."""
    check_count(hidden, "hidden", 0)
    layers = [Layer(width, kernel, stride, padding, bias)] * hidden
    side = 28
    for layer in layers:
        side = (side + 2 * layer.padding - layer.kernel) // layer.stride + 1
    layers.append(Layer(CLASSES, max(1, side), bias=bias))  # where no side is left, SkipCNN says of which layer
    if activation not in (None, "leaky_relu"):
        raise ConfigError(f"activation: {activation!r} given; leaky_relu or null is allowed")
    return SkipCNN(INPUT_SHAPE, layers, skips, t, activation=nn.LeakyReLU() if activation else None)


NETWORKS = {
    "perceptron": perceptron,
    "cnn3": skip_cnn,
    "shallow_linear": skip_cnn,
    "shallow_leaky_relu": partial(skip_cnn, activation="leaky_relu"),
    "resnet18": partial(resnet, name="resnet18"),
    "resnet34": partial(resnet, name="resnet34"),
    "resnet34_linear_maxpool": partial(resnet, name="resnet34", linear="maxpool"),
    "resnet34_linear_avgpool": partial(resnet, name="resnet34", linear="avgpool"),
}
"""Builders by name, with keywords for options; every one but the perceptron takes t."""

AFFINE = ("perceptron", "cnn3", "shallow_linear", "resnet34_linear_avgpool")
"""Networks that are affine maps in eval mode, and so collapse to one layer."""

STACKABLE = (perceptron, skip_cnn, resnet)
"""Builders of networks that can be trained as one, see `stacking.stack`."""

PUBLISHED_AS_AFFINE = "resnet34_linear_maxpool"
"""The network that the paper calls linearized; its max-pool keeps it from being affine."""


def option_names(name: str) -> list[str]:
    """What the builder of the network `name` takes; `init` is for all."""
    builder = NETWORKS[name]
    fixed = builder.keywords if isinstance(builder, partial) else {}
    return [key for key in inspect.signature(builder).parameters if key not in fixed]


def can_be_stacked(name: str) -> bool:
    """Whether networks `name` can be trained as one."""
    builder = NETWORKS[name]
    return (builder.func if isinstance(builder, partial) else builder) in STACKABLE


def build(name: str, options: Mapping[str, Any] | None = None, generator: torch.Generator | None = None) -> nn.Module:
    """A network for [N, 1, 28, 28] float32 in [0, 1] that gives logits [N, 10], initialised from `generator`.

    Raises ConfigError on an unknown name, option or value of one, and on a layer that `initialize` does not know.
    """
    if name not in NETWORKS:
        raise ConfigError(f"network: unknown network {name!r}; allowed are {', '.join(NETWORKS)}")
    options = dict(options or {})
    init = options.pop("init", "torchvision")
    if init not in ("torchvision", "framework"):
        raise ConfigError(f"init: {init!r} given; torchvision or framework is allowed")
    allowed = option_names(name)
    if unknown := [str(key) for key in options if key not in allowed]:
        raise ConfigError(
            f"network {name}: unknown option {', '.join(unknown)}; allowed are {', '.join(allowed)}, init"
        )
    for key, parameter in inspect.signature(NETWORKS[name]).parameters.items():
        if parameter.annotation is bool and not isinstance(options.get(key, False), bool):
            raise ConfigError(f"{key}: {options[key]!r} given; true or false is allowed")
    with torch.device("meta"):
        model = NETWORKS[name](**options)
    model = model.to_empty(device="cpu")
    initialize(model, generator or torch.Generator().manual_seed(0), init)
    t = check_strength(options.get("t", 0.5))
    if skips(model):
        set_skip_strength(model, t)
    return model


def initialize(model: nn.Module, generator: torch.Generator, init: str = "torchvision") -> None:
    """Draw default initial values from `generator` instead of the global one.

    With `init` "torchvision" the convolutions of ResNets are normal with fan-out scaling, as torchvision's are;
    everything else, and with "framework" all, is uniform in 1/sqrt(fan-in), the framework's default. Raises ConfigError
    on a layer whose values it does not know how to draw.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and isinstance(model, ResNet) and init == "torchvision":
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)
        elif isinstance(module, BATCHNORM | nn.LayerNorm | nn.GroupNorm):
            module.reset_parameters()
        elif not isinstance(module, Skip) and (module._parameters or module._buffers):
            raise ConfigError(f"{path}: {type(module).__name__} has no initial values; add them to networks.initialize")

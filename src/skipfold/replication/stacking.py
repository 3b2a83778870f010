"""Networks of one kind as one network, side by side along its channels: a kernel then works for all of them."""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from skipfold.homotopy import Skip, skips
from skipfold.recursion import SkipCNN


class StackedConv2d(nn.Conv2d):
    """Convolutions of `groups` networks, one group each: [N, G C, H, W] to [N, G O, H', W']."""

    def __init__(self, one: nn.Conv2d, count: int):
        super().__init__(
            count * one.in_channels,
            count * one.out_channels,
            one.kernel_size,
            one.stride,
            one.padding,
            groups=count,
            bias=one.bias is not None,
            device=one.weight.device,
            dtype=one.weight.dtype,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if tuple(x.shape[-2:]) == self.kernel_size != (1, 1) and self.padding == (0, 0):
            return self._product(x[:, :, None, None])
        if self.in_channels == self.groups < self.out_channels:
            (vertical, horizontal), (down, across) = self.padding, self.stride
            padded = F.pad(x, (horizontal, horizontal, vertical, vertical))
            return self._product(padded.unfold(2, self.kernel_size[0], down).unfold(3, self.kernel_size[1], across))
        return super().forward(x)

    def _product(self, windows: torch.Tensor) -> torch.Tensor:
        """Of windows [N, G C, H', W', height, width] and weights, where grouped convolutions are few values wide."""
        images, _, *sides = windows.shape[:4]
        patches = windows.unflatten(1, (self.groups, -1)).permute(1, 0, 3, 4, 5, 6, 2)
        weight = self.weight.permute(0, 2, 3, 1).reshape(self.groups, self.out_channels // self.groups, -1)
        out = torch.bmm(patches.reshape(self.groups, -1, weight.shape[2]), weight.mT)
        out = out.view(self.groups, images, *sides, -1).permute(1, 2, 3, 0, 4).flatten(3)
        return (out if self.bias is None else out + self.bias).permute(0, 3, 1, 2)


class StackedLinear(nn.Linear):
    """Linear layers of `count` networks: [N, T I] to [N, T O]."""

    def __init__(self, one: nn.Linear, count: int):
        super().__init__(
            one.in_features,
            count * one.out_features,
            one.bias is not None,
            device=one.weight.device,
            dtype=one.weight.dtype,
        )
        self.count = count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.unflatten(0, (self.count, -1))
        out = torch.bmm(x.unflatten(1, (self.count, -1)).transpose(0, 1), weight.mT).transpose(0, 1).flatten(1)
        return out if self.bias is None else out + self.bias


class StackedSkip(Skip):
    """Skips of `count` networks, each with its own t: `t` is [count, 1, 1, 1]."""

    def __init__(self, one: Skip, count: int):
        super().__init__(weights=one.weights, normalize=one.normalize)
        self.t = one.t.repeat(count).view(count, 1, 1, 1)

    def forward(self, branch: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        apart = (len(self.t), -1)
        return super().forward(branch.unflatten(1, apart), skip.unflatten(1, apart)).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"t={self.t.flatten().tolist()}, weights={self.weights!r}, normalize={self.normalize}"


def _batch_norm(one: nn.BatchNorm2d, count: int) -> nn.BatchNorm2d:
    stacked = nn.BatchNorm2d(
        count * one.num_features, one.eps, one.momentum, device=one.weight.device, dtype=one.weight.dtype
    )
    stacked.num_batches_tracked = None
    return stacked


def _relu(one: nn.ReLU, count: int) -> nn.ReLU:
    """Not in place: on a view, as a StackedSkip gives, the backward pass would copy it three times."""
    return nn.ReLU()


STACKED = {
    nn.Conv2d: StackedConv2d,
    nn.Linear: StackedLinear,
    nn.BatchNorm2d: _batch_norm,
    nn.ReLU: _relu,
    Skip: StackedSkip,
}
"""What is put in the place of a layer; every other layer works on stacked channels as it is."""


def stack(model: nn.Module, count: int) -> nn.Module:
    """A network that is `count` of the kind of `model`, one of the paper's: [N, T, 28, 28] to [N, 10 T] for T of them.

    Channel c of network i is channel i C + c, of the input, of every layer and of the logits; a parameter or buffer has
    those of the networks one after the other in its first axis. Its values are whatever: `put` them. Convolutions have
    no groups of their own and zero padding. Nearest-neighbour resampling of the channels of a SkipCNN keeps to the
    networks, since the sizes of both sides are multiplied alike.
    """
    stacked = copy.deepcopy(model)
    for path, module in model.named_modules():
        for kind, replace in STACKED.items():
            if isinstance(module, kind):
                stacked.set_submodule(path, replace(module, count))
    if isinstance(stacked, SkipCNN):
        stacked.shapes = [(count * channels, *sides) for channels, *sides in model.shapes]
    return stacked.train(model.training)


@torch.no_grad()
def put(stacked: nn.Module, index: int, count: int, model: nn.Module) -> None:
    """Copy the values of `model` to the place of network `index` of `count`."""
    for held, value in _places(stacked, index, count, model):
        held.copy_(value)


@torch.no_grad()
def take(stacked: nn.Module, index: int, count: int, model: nn.Module) -> nn.Module:
    """`model` with the values of network `index` of `count`."""
    for held, value in _places(stacked, index, count, model):
        value.copy_(held)
    return model


def _places(stacked: nn.Module, index: int, count: int, model: nn.Module):
    held = stacked.state_dict()
    for key, value in model.state_dict().items():
        if key in held:
            yield held[key].view(count, *value.shape)[index], value


@torch.no_grad()
def set_strengths(stacked: nn.Module, strengths: Sequence[float]) -> None:
    """Set the t of each network, in place."""
    for skip in skips(stacked).values():
        skip.t.copy_(torch.tensor(strengths, dtype=skip.t.dtype).view_as(skip.t))

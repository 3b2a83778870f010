"""Networks and inputs that several tests take."""

import contextlib

import pytest
import torch
from torch import nn

from skipfold.subject import BATCHNORM

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


class Stream:
    def wait_stream(self, other):
        pass


STREAMS = {
    "Stream": Stream,
    "stream": contextlib.nullcontext,
    "current_stream": Stream,
    "graph_pool_handle": tuple,
    "synchronize": lambda: None,
}
"""What captures ask of torch.cuda beside graphs, where no card is: names and stand-ins."""


def unsettled(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` in eval mode and float64, its BatchNorms as after training: statistics, weight and bias off default."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, BATCHNORM):
            for values, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
            ):
                values.uniform_(low, high, generator=generator)
    return model.double().eval()


def images(count=2, side=28):
    return torch.rand(count, 1, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Residual(nn.Module):
    """branch(x) + skip(x), read by torch.fx."""

    def __init__(self, branch, skip=None):
        super().__init__()
        self.branch, self.skipped = branch, skip or nn.Identity()

    def forward(self, x):
        return self.branch(x) + self.skipped(x)


class ReadsTwoSizes(nn.Module):
    """One convolution, of the input and then of the `side` x `side` corner of its own output."""

    def __init__(self, side: int):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.side = side

    def forward(self, x):
        return self.conv(self.conv(x)[:, :, : self.side, : self.side])

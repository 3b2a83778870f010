"""graphs: a forward that depends on self.training is read as such, and one that cannot be is refused."""

import copy
import pickle
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from skipfold.errors import SkipError
from skipfold.homotopy import insert_skips, to_homotopy
from skipfold.removal import remove_skips


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.rest = nn.BatchNorm2d(2)

    def forward(self, x):
        return x + self.residual(self.rest(self.conv(x)))


class Dropping(Block):
    def residual(self, x):
        return F.dropout(x, 0.5, self.training)


class DroppingByRate(Block):
    def residual(self, x):
        return F.dropout(x, p=0.5 if self.training else 0.0)


class Shrinking(Block):
    def residual(self, x):
        return x * (1.0 if self.training else 0.25)


class Weighing(Block):
    def residual(self, x):
        return x * torch.arange(2.0).reshape(2, 1, 1)


class WeighingByMode(Block):
    def residual(self, x):
        return x * torch.full((2, 1, 1), 1.0 if self.training else 0.5)


class Branching(Block):
    def residual(self, x):
        return F.dropout(x, 0.5) if self.training else x


class Reading(Block):
    def residual(self, x):
        return [self.conv(x), self.rest(x)][self.training]


class Calling(Block):
    def residual(self, x):
        return torch.clamp(x, **({"min": -1.0} if self.training else {"max": 1.0}))


class Drawing(Block):
    def residual(self, x):
        return x * float(torch.rand(()))


class DrawingInPython(Block):
    def residual(self, x):
        return x * random.random()


class Freezing(Block):
    def residual(self, x):
        with torch.no_grad():
            return x * 2


class Autocasting(Block):
    def residual(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.conv(x)


class AutocastingElsewhere(Block):
    """On a device that this machine may not have."""

    def residual(self, x):
        with torch.autocast("cuda", enabled=False):
            return self.conv(x)


class Checkpointing(Block):
    def residual(self, x):
        return checkpoint(self.conv, x, use_reentrant=False)


class CheckpointingReentrantly(Block):
    def residual(self, x):
        return checkpoint(self.conv, x, use_reentrant=True)


class Offset(Block):
    def __init__(self):
        super().__init__()
        self.register_buffer("offset", torch.ones(2, 1, 1), persistent=False)
        self.unused = nn.ModuleList([nn.Linear(2, 2)])

    def residual(self, x):
        return x + self.offset


class Counting(Offset):
    def residual(self, x):
        self.offset += 1
        return x


class Waiting(Offset):
    def residual(self, x):
        return x if self.offset.sum() > 2 else -x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [Dropping, DroppingByRate, Shrinking, Weighing])
def test_the_result_follows_its_mode_whatever_the_mode_it_was_read_in(kind, training):
    torch.manual_seed(0)
    model, x = nn.Sequential(kind()).train(training), torch.randn(3, 2, 5, 5)
    result, _ = to_homotopy(model, (2, 5, 5), normalize=True)
    result = pickle.loads(pickle.dumps(result))  # reads the graph again
    assert all(module.training == training for module in (*model.modules(), *result.modules()))
    for mode in (True, False):
        torch.manual_seed(1)
        expected = model.train(mode)(x)
        torch.manual_seed(1)
        torch.testing.assert_close(result.train(mode)(x), expected)


def test_the_mode_is_followed_without_skips_too():
    model, _ = to_homotopy(nn.Sequential(Dropping()), (2, 5, 5), t=0.0)
    plain, _ = remove_skips(model, (2, 5, 5))
    x = torch.randn(3, 2, 5, 5)
    assert torch.equal(plain(x), plain(x))
    torch.testing.assert_close(plain(x), model.eval()(x))


def test_a_state_dict_of_the_source_fits():
    class Holding(Weighing):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(2, 2)
            self.layers = nn.ModuleList([nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 3)])
            self.scale = nn.Parameter(torch.ones(2))
            self.register_buffer("kept", torch.ones(2))
            self.register_buffer("offset", torch.ones(2, 1, 1), persistent=False)

        def residual(self, x):
            return self.layers[0](super().residual(x) + self.offset)

    source = Holding()
    model, _ = to_homotopy(source, (2, 5, 5))
    assert set(model.state_dict()) == {*source.state_dict(), "skip.t"}
    model.load_state_dict(source.state_dict())
    assert isinstance(model.layers, nn.ModuleList)


def test_copies_and_pickles_hold_what_the_result_holds():
    model = insert_skips(Offset())
    pickled = pickle.loads(pickle.dumps(model))
    for made in (copy.deepcopy(model), pickled, copy.deepcopy(pickled), pickle.loads(pickle.dumps(pickled))):
        assert list(made.state_dict()) == list(model.state_dict()) and isinstance(made.unused, nn.ModuleList)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Branching, "other operators in training mode"),
        (WeighingByMode, "other operators in training mode"),
        (Reading, "other values in training mode"),
        (Calling, "otherwise in training mode"),
        (Drawing, "random numbers"),
        (DrawingInPython, "random numbers"),
        (Counting, "it assigns to a buffer"),
        (Waiting, "control flow"),
        (Freezing, "turns gradients off"),
        (Autocasting, "sets autocast"),
        (AutocastingElsewhere, "sets autocast"),
        (Checkpointing, "checkpoints activations"),
        (CheckpointingReentrantly, "checkpoints with use_reentrant"),
    ],
)
def test_what_would_be_fixed_once_or_forgotten_is_refused(kind, reason):
    model = nn.Sequential(nn.Identity(), kind()).eval()
    with pytest.raises(SkipError, match=rf"^1: .*{kind.__name__} .*{reason}"):
        insert_skips(model)
    assert not any(module.training for module in model.modules())

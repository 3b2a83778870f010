"""Timing: what is timed computes the same function, and samples are real."""

import pytest
import torch
from torch import nn

from skipfold import timing
from skipfold.errors import DeviceError

CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.cuda)]


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_every_variant_is_timed_and_equals_its_float64_network(device):
    """The table has the published comparison's rows, in order of quartiles, at both batch sizes."""
    table = timing.measure({"tier": "smoke", "timing": {"batch_sizes": [1, 4], "repeats": 3}}, device)
    eager = table[table["runtime"] == "eager"]
    assert {"skips", "add", "skips_removed", "folded", "cropped", "collapsed"} <= set(eager["variant"])
    assert (eager.groupby("batch")["network"].count() == 14).all()
    assert (table["q1_us"] <= table["median_us"]).all() and (table["median_us"] <= table["q3_us"]).all()
    assert (table["max_difference"] < 1e-4).all()
    collapsed = eager[(eager["variant"] == "collapsed") & (eager["batch"] == 4)]["median_us"].item()
    original = eager[eager["network"] == "resnet34_linear_avgpool"]["median_us"].max()
    assert collapsed < original


def test_another_function_is_refused():
    """A contender whose outputs are not its reference's is named and not timed."""
    flat = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    other = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).double()
    with pytest.raises(DeviceError, match="resnet18 folded differs from its float64 network"):
        timing.difference(timing.Contender("resnet18", "folded", flat, other), CPU)

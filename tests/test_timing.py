"""Timing: what is timed computes the same function, and samples are real."""

import copy

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
    table = timing.measure(
        {"tier": "smoke", "timing": {"batch_sizes": [1, 4], "runtimes": ["eager", "cuda_graph"], "repeats": 3}}, device
    )
    eager = table[table["runtime"] == "eager"]
    assert {"skips", "skips_literal", "add", "skips_removed", "folded", "cropped", "collapsed"} <= set(eager["variant"])
    assert (eager.groupby("batch")["network"].count() == 16 * eager["measure"].nunique()).all()
    assert (table["q1_us"] <= table["median_us"]).all() and (table["median_us"] <= table["q3_us"]).all()
    assert (table["max_difference"] < 1e-4).all()
    on_cuda = device.type == "cuda"
    assert set(table["measure"]) == ({"host", "device"} if on_cuda else {"host"})
    assert set(table["runtime"]) == ({"eager", "cuda_graph"} if on_cuda else {"eager"})
    eager = eager[eager["measure"] == "host"]
    collapsed = eager[(eager["variant"] == "collapsed") & (eager["batch"] == 4)]["median_us"].item()
    original = eager[eager["network"] == "resnet34_linear_avgpool"]["median_us"].max()
    assert collapsed < original


def test_another_function_is_refused():
    """A contender whose outputs are not its reference's is named and not timed."""
    flat = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    other = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).double()
    with pytest.raises(DeviceError, match="resnet18 folded in eager differs from its float64 network"):
        timing.prepare(timing.Contender("resnet18", "folded", flat, other), "eager", CPU)


CUDA_ONLY = [name for name, runtime in timing.RUNTIMES.items() if runtime.on == ("cuda",)]


@pytest.mark.parametrize(
    ("name", "device"),
    [(name, CPU) for name in timing.RUNTIMES if name not in CUDA_ONLY]
    + [
        pytest.param(name, torch.device("cuda"), marks=pytest.mark.cuda)
        for name, runtime in timing.RUNTIMES.items()
        if "cuda" in runtime.on
    ],
    ids=str,
)
def test_every_runtime_predicts_what_the_network_does(name, device):
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 26 * 26, 10)).to(device).eval()
    contender = timing.Contender("any", "any", network, copy.deepcopy(network).double())
    cell = timing.prepare(contender, name, device)
    assert cell.difference < (0.05 if "bf16" in name else 1e-4) and cell.prepare_seconds > 0
    x = torch.rand(3, 1, 28, 28, device=device)
    with torch.inference_mode():
        torch.testing.assert_close(cell.prepared(x)().float(), network(x), rtol=0.05, atol=0.05)


def test_more_networks_than_dynamo_s_limit_are_all_compiled():
    """Past its limit of 8 dynamo would run the others eagerly; fullgraph makes that an error."""
    for _ in range(9):
        network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).eval()
        contender = timing.Contender("any", "any", network, copy.deepcopy(network).double())
        assert timing.prepare(contender, "compile", CPU).difference < 1e-4

"""Timing: what is timed computes the same function, and samples are real."""

import copy

import pandas as pd
import pytest
import torch
from torch import nn

from skipfold.equality import additions
from skipfold.errors import DeviceError
from skipfold.networks import INPUT_SHAPE
from skipfold.replication import timing
from skipfold.replication.statistics import WITH_SKIPS

CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.cuda)]


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_every_variant_is_timed_and_equals_its_float64_network(device):
    """The table has the published comparison's rows, in order of quartiles, at both batch sizes."""
    settings = {"batch_sizes": [1, 4], "runtimes": ["eager", "cuda_graph"], "repeats": 3, "cell_seconds": 1}
    table, runtimes = timing.measure({"tier": "smoke", "timing": settings}, device)
    assert pd.isna(runtimes.set_index("runtime").loc["eager", "remark"])
    eager = table[table["runtime"] == "eager"]
    timed = {variant for before_after in WITH_SKIPS.items() for variant in (before_after[0], *before_after[1])}
    assert set(eager["variant"]) == timed | {"perceptron"}
    assert (eager.groupby("batch")["network"].count() == 24 * eager["measure"].nunique()).all()
    assert (table["q1_us"] <= table["median_us"]).all() and (table["median_us"] <= table["q3_us"]).all()
    samples = table["samples_us"].str.split(expand=True).astype(float)
    assert samples.median(axis=1).tolist() == pytest.approx(table["median_us"].tolist(), rel=1e-4)
    on_cuda = device.type == "cuda"
    assert (table["max_difference"] < (2e-2 if on_cuda else 1e-4)).all()
    assert set(table["precision"]) == {"tf32" if on_cuda else "float32"}
    assert set(table["measure"]) == ({"host", "device"} if on_cuda else {"host"})
    assert set(table["runtime"]) == ({"eager", "cuda_graph"} if on_cuda else {"eager"})
    eager = eager[eager["measure"] == "host"]
    collapsed = eager[(eager["variant"] == "collapsed") & (eager["batch"] == 4)]["median_us"].item()
    original = eager[eager["network"] == "resnet34_linear_avgpool"]["median_us"].max()
    assert collapsed < original


def test_networks_with_skips_are_optimized_as_those_without():
    """They keep their 8 additions and their function; they have no BatchNorms, and kernels as small."""
    found = {each.variant: each for each in timing.contenders(CPU) if each.network == "resnet18"}
    x = torch.rand(2, *INPUT_SHAPE, dtype=torch.float64)
    for form in ("skips", "add"):
        for kind in ("folded", "cropped"):
            optimized, plain = found[f"{form}_{kind}"], found[kind]
            assert torch.equal(optimized.reference(x), found[form].reference(x))
            assert additions(optimized.module, INPUT_SHAPE).total() == 8
            assert not any(isinstance(module, nn.BatchNorm2d) for module in optimized.module.modules())
            sizes = [
                sorted(
                    layer.kernel_size
                    for layer in each.module.modules()
                    if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)  # as projections are
                )
                for each in (optimized, plain)
            ]
            assert sizes[0] == sizes[1]


def test_a_call_that_takes_long_has_three_samples():
    for seconds, count in ((1e-12, 3), (1e3, 5)):
        (samples,) = timing._interleaved([lambda: None], {"repeats": 5, "cell_seconds": seconds}, CPU)["host"]
        assert len(samples) == count and min(samples) > 0


def test_another_function_is_refused():
    """A contender whose outputs are not its reference's is named and not timed."""
    flat = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    other = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).double()
    built = timing.build_in(timing.Contender("resnet18", "folded", flat, other), "eager", CPU)
    with (
        torch.inference_mode(),
        pytest.raises(DeviceError, match="resnet18 folded in eager differs from its float64 network"),
    ):
        timing.predict(built, torch.rand(2, 1, 28, 28))


def test_compiled_are_only_the_variants_and_batches_asked_for():
    settings = {"compiled": {"variants": ["collapsed"], "batch_sizes": [64]}}
    one, other = (timing.Contender("any", variant, nn.Identity(), nn.Identity()) for variant in ("collapsed", "add"))
    asked = [
        (contender.variant, runtime, batch)
        for contender in (one, other)
        for runtime in ("eager", "compile")
        for batch in (1, 64)
        if timing._wanted(settings, contender, runtime, batch)
    ]
    assert [each for each in asked if each[1] == "compile"] == [("collapsed", "compile", 64)]
    assert len(asked) == 5


def test_what_was_not_timed_is_said():
    config = {"tier": "smoke", "timing": {"runtimes": ["eager", "cuda_graph", "compile"], "batch_sizes": [1]}}
    config["timing"]["compiled"] = {"variants": ["skips", "add"], "batch_sizes": [1]}
    found = timing.runtimes(config, CPU).set_index("runtime")
    assert list(found.index) == list(timing.RUNTIMES)
    assert pd.isna(found.loc["eager", "remark"])
    assert found.loc["cuda_graph", "remark"] == "needs CUDA"
    assert found.loc["onnxruntime", "remark"] == "not named in timing.runtimes"
    assert found.loc["compile", "remark"] == "variants skips, add only; batch_sizes 1 only"
    assert set(found["precision"]) == {"float32", "bf16"}


class Large(nn.Module):
    """Asks for more memory than there is from batches of 64 on."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(784, 10)

    def forward(self, x):
        if len(x) >= 64:
            torch.empty(2**50, device=x.device)
        return self.linear(x.flatten(1))


class Unlike(Large):
    """Another function in bfloat16."""

    def forward(self, x):
        return self.linear(x.flatten(1)) * (2 if self.linear.weight.dtype == torch.bfloat16 else 1)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_what_does_not_fit_or_fails_is_left_out_and_said(device, monkeypatch):
    networks = {"large": Large(), "unlike": Unlike()}
    found = [
        timing.Contender("any", name, network.to(device).eval(), copy.deepcopy(network).double().to(device))
        for name, network in networks.items()
    ]
    monkeypatch.setattr(timing, "contenders", lambda device: found)
    names = ["eager", "channels_last_bf16", "cuda_graph"]
    settings = {"batch_sizes": [2, 64], "runtimes": names, "repeats": 3, "cell_seconds": 1}
    table, runtimes = timing.measure({"tier": "smoke", "timing": settings}, device)
    timed = set(table[["variant", "runtime", "batch"]].itertuples(index=False, name=None))
    graph = {("large", "cuda_graph", 2), *(("unlike", "cuda_graph", batch) for batch in (2, 64))}
    eager = {("large", "eager", 2), *(("unlike", "eager", batch) for batch in (2, 64))}
    assert timed == eager | {("large", "channels_last_bf16", 2)} | (graph if device.type == "cuda" else set())
    remarks = runtimes.set_index("runtime")["remark"]
    assert remarks["eager"] == "batch 64: any large: out of memory"
    for part in ("batch 64: any large: out of memory", "batch 2: any unlike: timing: any unlike in channels_last_bf16"):
        assert part in remarks["channels_last_bf16"]


def test_eager_failures_are_raised(monkeypatch):
    broken = nn.Sequential(nn.Flatten(), nn.Linear(783, 10)).eval()
    contender = timing.Contender("any", "any", broken, copy.deepcopy(broken).double())
    monkeypatch.setattr(timing, "contenders", lambda device: [contender])
    settings = {"batch_sizes": [2], "runtimes": ["eager"], "repeats": 3, "cell_seconds": 1}
    with pytest.raises(RuntimeError, match="783x10"):
        timing.measure({"tier": "smoke", "timing": settings}, CPU)

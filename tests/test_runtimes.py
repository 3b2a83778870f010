"""Runtimes: each predicts what the network does, and what a machine lacks is said."""

import copy

import onnxruntime
import pytest
import torch
from torch import nn

from skipfold.replication import runtimes, timing

CPU = torch.device("cpu")


def forms():
    """Each runtime on each device; what a device always lacks is left out."""
    for name, runtime in runtimes.RUNTIMES.items():
        if runtime.missing is not runtimes._without_cuda and name != "compile_reduce_overhead":
            yield name, CPU
        yield pytest.param(name, torch.device("cuda"), marks=pytest.mark.cuda)


@pytest.mark.parametrize(("name", "device"), list(forms()), ids=str)
def test_every_runtime_predicts_what_the_network_does(name, device):
    """On batches of two sizes and, being called again, not on what it saw first."""
    if reason := runtimes.RUNTIMES[name].missing(device):
        pytest.skip(reason)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 26 * 26, 10)).to(device).eval()
    built = timing.build_in(timing.Contender("any", "any", network, copy.deepcopy(network).double()), name, device)
    with torch.inference_mode():
        for batch in (3, 20):
            x = torch.rand(batch, 1, 28, 28, device=device)
            prediction = timing.predict(built, x)
            allowed = runtimes.TOLERANCE[runtimes.RUNTIMES[name].precision(device)]
            assert prediction.difference < allowed and prediction.prepare_seconds > 0
            for _ in range(2):
                found = prediction.call()
                assert found.device.type == device.type
                torch.testing.assert_close(found.float(), network(x), rtol=0.05, atol=0.05)


def test_onnxruntime_predicts_from_and_to_tensors_where_they_lie():
    """As on CUDA, where its package is another one."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).eval()
    x = torch.rand(3, 1, 28, 28)
    call = runtimes._bound(runtimes._session(network, CPU), x)
    for _ in range(2):
        torch.testing.assert_close(call(), network(x).detach(), rtol=1e-4, atol=1e-5)
        x.copy_(torch.rand(3, 1, 28, 28))


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="it may load")
def test_a_provider_that_does_not_load_is_not_taken_for_the_cpu_s(monkeypatch):
    named = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: named)
    reason = runtimes._without_provider(torch.device("cuda"))
    assert reason == "onnxruntime's CUDAExecutionProvider does not load on this machine"


@pytest.mark.cuda
def test_graphs_that_take_turns_keep_their_outputs():
    """torch.compile's own graphs, and ours, of products that need workspaces: each called again after the others."""
    device, x = torch.device("cuda"), torch.rand(64, 1, 28, 28, device="cuda")
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.Linear(width, 10)) for width in (64, 256)]
    predictions = []
    with torch.inference_mode():
        for network in networks:
            contender = timing.Contender("any", "any", network.to(device).eval(), copy.deepcopy(network).double())
            for name in ("cuda_graph", "compile_reduce_overhead", "cuda_graph"):
                predictions.append((network, timing.predict(timing.build_in(contender, name, device), x)))
        for network, prediction in 2 * predictions:
            torch.testing.assert_close(prediction.call(), network(x), rtol=0.01, atol=0.01)


def test_more_networks_than_dynamo_s_limit_are_all_compiled():
    """Past its limit of 8 dynamo would run the others eagerly; fullgraph makes that an error."""
    for _ in range(9):
        network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).eval()
        contender = timing.Contender("any", "any", network, copy.deepcopy(network).double())
        built = timing.build_in(contender, "compile", CPU)
        assert timing.predict(built, torch.rand(2, 1, 28, 28)).difference < 1e-4


def test_a_machine_without_a_compiler_is_told_so(monkeypatch):
    """The reason is the compiler's own first line."""

    def failing(*args, **kwargs):
        raise RuntimeError("no C++ compiler found\nin any place")

    monkeypatch.setattr(torch, "compile", failing)
    reason = runtimes._without_compiler.__wrapped__(CPU)
    assert reason == "torch.compile fails on this machine: no C++ compiler found"

"""Prediction time per image of a network with its skips, without them, and collapsed, in one interleaved run."""

import copy
import functools
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.utils.benchmark.utils.timer import timer as clock

from skipfold.collapse import collapse
from skipfold.cropping import crop_dead_taps
from skipfold.deploy import export_onnx
from skipfold.errors import DeviceError
from skipfold.folding import fold_batchnorm
from skipfold.homotopy import skips
from skipfold.networks import INPUT_SHAPE, build
from skipfold.provenance import stamp
from skipfold.removal import strip
from skipfold.training import arithmetic

SAMPLE_SECONDS = 0.002
"""A sample repeats a prediction until it lasts about this long."""

CELL_SECONDS = 2.0
"""A cell stops early, but not before three samples, when it has taken this long."""

TOLERANCE = 1e-3
"""Largest difference from the float64 network, relative to its largest logit, at which a variant may be timed."""

PROBES = 8
"""Random images on which the outputs are compared."""


@dataclass(frozen=True)
class Contender:
    """A network in the form that is timed, and the float64 network whose outputs it must give."""

    network: str
    variant: str
    module: nn.Module
    reference: nn.Module


@functools.cache
def contenders(device: torch.device) -> list[Contender]:
    """Every network and variant of the published comparison, with random BatchNorm statistics, on `device`.

    `skips` has t-weighted skips at t = 0.5, in one operator; `skips_literal` writes (1 - t) F(x) + t skip(x) out, as a
    reader of the formula would; `add` torchvision's ordinary sum; `skips_removed`, `folded` (BatchNorms
    too) and `cropped` (dead taps too) are what becomes of the network at t = 0.
    """
    found = []
    for name in ("resnet18", "resnet34"):
        found.append(_alone(name, "skips", _network(name, {"t": 0.5})))
        found.append(_alone(name, "skips_literal", _literal(_network(name, {"t": 0.5}))))
        found.append(_alone(name, "add", _network(name, {"block": "add"})))
        at_zero = _network(name, {"t": 0.0})
        removed = strip(at_zero)
        folded = fold_batchnorm(removed)
        cropped = crop_dead_taps(folded, INPUT_SHAPE)
        reference = copy.deepcopy(at_zero).double()
        for variant, module in (("skips_removed", removed), ("folded", folded), ("cropped", cropped)):
            found.append(Contender(name, variant, module, reference))
    found.append(_alone("resnet34_linear_maxpool", "skips", _network("resnet34_linear_maxpool", {"t": 0.5})))
    affine = _alone("resnet34_linear_avgpool", "skips", _network("resnet34_linear_avgpool", {"t": 0.5}))
    one_layer, _ = collapse(affine.module, INPUT_SHAPE)
    found += [affine, Contender(affine.network, "collapsed", one_layer, affine.reference)]
    found.append(_alone("perceptron", "perceptron", _network("perceptron", {})))
    return [Contender(each.network, each.variant, each.module.to(device), each.reference.to(device)) for each in found]


def _literal(model: nn.Module) -> nn.Module:
    """`model` with the weighted sum written out, t a number."""
    for path in skips(model):
        model.set_submodule(path, _Literal(float(model.get_submodule(path).t)))
    return model


class _Literal(nn.Module):
    def __init__(self, t: float):
        super().__init__()
        self.t = t

    def forward(self, residual: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return (1 - self.t) * residual + self.t * skip


def _network(name: str, options: Mapping[str, Any]) -> nn.Module:
    """A network in eval mode with BatchNorm statistics unlike the initial ones, as a trained network has."""
    generator = torch.Generator().manual_seed(0)
    model = build(name, options, generator).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


def _alone(network: str, variant: str, module: nn.Module) -> Contender:
    return Contender(network, variant, module, copy.deepcopy(module).double())


@dataclass(frozen=True)
class Runtime:
    """A way to run a network: `prepare(module, device)` gives a function from a batch to the call that predicts it.

    `tolerance` is the largest difference from the float64 network, relative to its largest logit, at which it may be
    timed; `on` the devices that have it.
    """

    prepare: Callable[[nn.Module, torch.device], Callable[[torch.Tensor], Callable[[], Any]]]
    tolerance: float = TOLERANCE
    on: tuple[str, ...] = ("cpu", "cuda")


def _eager(module: nn.Module, device: torch.device):
    return lambda x: lambda: module(x)


def _channels_last_bf16(module: nn.Module, device: torch.device):
    module = copy.deepcopy(module).to(torch.bfloat16, memory_format=torch.channels_last)

    def prepared(x: torch.Tensor):
        x = x.to(torch.bfloat16, memory_format=torch.channels_last)
        return lambda: module(x)

    return prepared


def _compiled(mode: str):
    def prepare(module: nn.Module, device: torch.device):
        # Past these limits, which count all networks of a class together, dynamo runs eagerly with no more than a
        # warning; fullgraph makes that an error.
        torch._dynamo.config.recompile_limit = 1024
        torch._dynamo.config.accumulated_recompile_limit = 4096
        compiled = torch.compile(copy.deepcopy(module), mode=mode, dynamic=False, fullgraph=True)
        return lambda x: lambda: compiled(x)

    return prepare


def _cuda_graph(module: nn.Module, device: torch.device):
    return lambda x: _captured(module, x)


def _onnxruntime(module: nn.Module, device: torch.device):
    """On the CPU, with as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        export_onnx(module, INPUT_SHAPE, path, tolerance=TOLERANCE)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def prepared(x: torch.Tensor):
        images = {"input": x.numpy()}
        return lambda: torch.from_numpy(session.run(None, images)[0])

    return prepared


RUNTIMES = {
    "eager": Runtime(_eager),
    "channels_last_bf16": Runtime(_channels_last_bf16, tolerance=0.1),
    "compile": Runtime(_compiled("default")),
    "compile_reduce_overhead": Runtime(_compiled("reduce-overhead"), on=("cuda",)),
    "compile_max_autotune": Runtime(_compiled("max-autotune-no-cudagraphs")),
    "cuda_graph": Runtime(_cuda_graph, on=("cuda",)),
    "onnxruntime": Runtime(_onnxruntime, on=("cpu",)),
}


@dataclass
class Cell:
    """A contender in one runtime: its calls by batch, and how far its outputs are from the float64 network's."""

    contender: Contender
    runtime: str
    prepared: Callable[[torch.Tensor], Callable[[], Any]]
    prepare_seconds: float
    difference: float


def prepare(contender: Contender, runtime: str, device: torch.device) -> Cell:
    """`contender` in `runtime`, checked on random images; `prepare_seconds` has the compilation.

    Raises DeviceError where its outputs are not those of the float64 network: what computes something else is not
    timed.
    """
    x = torch.rand(PROBES, *INPUT_SHAPE, generator=torch.Generator().manual_seed(1)).to(device)
    start = time.perf_counter()
    prepared = RUNTIMES[runtime].prepare(contender.module, device)
    with torch.inference_mode(), arithmetic("float32"):
        expected = contender.reference(x.double())
        found = prepared(x)()
        error = float((found - expected).abs().max() / expected.abs().max())
    seconds = time.perf_counter() - start
    if not error <= (allowed := RUNTIMES[runtime].tolerance):
        raise DeviceError(
            f"timing: {contender.network} {contender.variant} in {runtime} differs from its float64 network by "
            f"{error:.1e} of the largest logit, more than {allowed:g}; it is not the same function on this device"
        )
    return Cell(contender, runtime, prepared, seconds, error)


def measure(config: Mapping[str, Any], device: torch.device) -> pd.DataFrame:
    """Time every contender on `device` in every runtime of the configuration that the device has.

    One row a network, variant, runtime, batch and measure. Columns: network, variant, runtime, batch, measure (host:
    wall clock, launches included; device: between CUDA events), median_us, q1_us, q3_us (microseconds an image),
    repeats, max_difference and prepare_seconds (see `prepare`), then the stamp. Contenders take turns, so a drift of
    the clocks meets all of them alike; each is warm, and its batch in the caches where it fits.
    """
    names = [name for name in config["timing"]["runtimes"] if device.type in RUNTIMES[name].on]
    cells = [prepare(contender, name, device) for contender in contenders(device) for name in names]
    rows = []
    with torch.inference_mode(), arithmetic("tf32"):
        for batch in config["timing"]["batch_sizes"]:
            x = torch.rand(batch, *INPUT_SHAPE, device=device)
            calls = [cell.prepared(x) for cell in cells]
            for way, samples in _interleaved(calls, config["timing"]["repeats"], device).items():
                rows += [_row(cell, batch, way, seconds) for cell, seconds in zip(cells, samples, strict=True)]
    made = stamp(device, {})
    keys = ("device", "torch", "cuda", "commit", "date")
    return pd.DataFrame(rows).assign(tier=config["tier"], **{key: made[key] for key in keys})


def _row(cell: Cell, batch: int, way: str, seconds: list[float]) -> dict[str, Any]:
    first, median, third = (1e6 * value / batch for value in statistics.quantiles(seconds, n=4))
    return {
        "network": cell.contender.network,
        "variant": cell.contender.variant,
        "runtime": cell.runtime,
        "batch": batch,
        "measure": way,
        "median_us": median,
        "q1_us": first,
        "q3_us": third,
        "repeats": len(seconds),
        "max_difference": cell.difference,
        "prepare_seconds": cell.prepare_seconds,
    }


def _captured(module: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The whole prediction as one CUDA graph; its output is the same tensor each time."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            module(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        output = module(x)

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay


def _interleaved(calls: list[Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, list[list[float]]]:
    """Seconds a call by way of measuring, `repeats` samples of each call, taken in turns after a warm-up."""
    timers = [timeit.Timer(call, timer=clock) for call in calls]  # the clock waits for the device
    ways = {"host": lambda timer, number, call: timer.timeit(number) / number}
    if device.type == "cuda":
        ways["device"] = lambda timer, number, call: _between_events(call, number)
    numbers = []
    for timer in timers:
        timer.timeit(1)
        numbers.append(max(1, min(1000, int(SAMPLE_SECONDS / timer.timeit(1)))))
    samples = {way: [[] for _ in calls] for way in ways}
    for _ in range(repeats):
        for way, sample in ways.items():
            for timer, number, call, seconds in zip(timers, numbers, calls, samples[way], strict=True):
                if len(seconds) < 3 or sum(seconds) * number < CELL_SECONDS:
                    call()  # what ran before has left the caches to others
                    seconds.append(sample(timer, number, call))
    return samples


def _between_events(call: Callable[[], Any], number: int) -> float:
    """Seconds a call on the GPU's own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(number):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / number

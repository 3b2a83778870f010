"""Prediction time per image of a network with its skips, without them, and collapsed, in one interleaved run."""

import copy
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.utils.benchmark import Timer

from skipfold.collapse import collapse
from skipfold.cropping import crop_dead_taps
from skipfold.errors import DeviceError
from skipfold.folding import fold_batchnorm
from skipfold.networks import INPUT_SHAPE, build
from skipfold.provenance import stamp
from skipfold.removal import strip
from skipfold.training import arithmetic

SAMPLE_SECONDS = 0.002
"""A sample repeats a prediction until it lasts about this long."""

CELL_SECONDS = 6.0
"""A cell stops early, but not before three samples, when it has taken this long."""

TOLERANCE = 1e-3
"""Largest difference from the float64 network, relative to its largest logit, at which a variant may be timed."""


@dataclass(frozen=True)
class Contender:
    """A network in the form that is timed, and the float64 network whose outputs it must give."""

    network: str
    variant: str
    module: nn.Module
    reference: nn.Module


def contenders(device: torch.device) -> list[Contender]:
    """Every network and variant of the published comparison, with random BatchNorm statistics, on `device`.

    `skips` has t-weighted skips at t = 0.5, `add` torchvision's ordinary sum; `skips_removed`, `folded` (BatchNorms
    too) and `cropped` (dead taps too) are what becomes of the network at t = 0.
    """
    found = []
    for name in ("resnet18", "resnet34"):
        found.append(_alone(name, "skips", _network(name, {"t": 0.5})))
        found.append(_alone(name, "add", _network(name, {"block": "add"})))
        at_zero = _network(name, {"t": 0.0})
        removed = strip(at_zero)
        folded = fold_batchnorm(removed)
        cropped = crop_dead_taps(folded, INPUT_SHAPE)
        for variant, module in (("skips_removed", removed), ("folded", folded), ("cropped", cropped)):
            found.append(Contender(name, variant, module, copy.deepcopy(at_zero).double()))
    found.append(_alone("resnet34_linear_maxpool", "skips", _network("resnet34_linear_maxpool", {"t": 0.5})))
    affine = _alone("resnet34_linear_avgpool", "skips", _network("resnet34_linear_avgpool", {"t": 0.5}))
    one_layer, _ = collapse(affine.module, INPUT_SHAPE)
    found += [affine, Contender(affine.network, "collapsed", one_layer, affine.reference)]
    found.append(_alone("perceptron", "perceptron", _network("perceptron", {})))
    return [Contender(each.network, each.variant, each.module.to(device), each.reference.to(device)) for each in found]


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


def difference(contender: Contender, device: torch.device) -> float:
    """Largest difference from the float64 reference on 64 random images, relative to its largest logit.

    Raises DeviceError where it is above TOLERANCE: what computes something else is not timed.
    """
    x = torch.rand(64, *INPUT_SHAPE, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.inference_mode(), arithmetic("float32"):
        expected = contender.reference(x.double())
        found = float((contender.module(x) - expected).abs().max() / expected.abs().max())
    if not found <= TOLERANCE:
        raise DeviceError(
            f"timing: {contender.network} {contender.variant} differs from its float64 network by {found:.1e} of the "
            f"largest logit, more than {TOLERANCE:g}; it is not the same function on this device"
        )
    return found


def measure(config: Mapping[str, Any], device: torch.device) -> pd.DataFrame:
    """Time every contender on `device`; one row a network, variant, runtime, batch and measure.

    Columns: network, variant, runtime (eager; cuda_graph where CUDA is), batch, measure (host: wall clock, the
    launches included), median_us, q1_us, q3_us (microseconds an image), repeats, max_difference (see `difference`),
    then the stamp. Contenders take turns, so a drift of the clocks meets all of them alike.
    """
    everyone = contenders(device)
    differences = [difference(contender, device) for contender in everyone]
    rows = []
    with torch.inference_mode(), arithmetic("tf32"):
        for batch in config["timing"]["batch_sizes"]:
            x = torch.rand(batch, *INPUT_SHAPE, device=device)
            calls = [
                (contender, error, runtime, call)
                for contender, error in zip(everyone, differences, strict=True)
                for runtime, call in _calls(contender.module, x)
            ]
            samples = _interleaved([call for *_, call in calls], config["timing"]["repeats"])
            for (contender, error, runtime, _), seconds in zip(calls, samples, strict=True):
                first, median, third = (1e6 * value / batch for value in statistics.quantiles(seconds, n=4))
                rows.append(
                    {
                        "network": contender.network,
                        "variant": contender.variant,
                        "runtime": runtime,
                        "batch": batch,
                        "measure": "host",
                        "median_us": median,
                        "q1_us": first,
                        "q3_us": third,
                        "repeats": len(seconds),
                        "max_difference": error,
                    }
                )
    made = stamp(device, {})
    keys = ("device", "torch", "cuda", "commit", "date")
    return pd.DataFrame(rows).assign(tier=config["tier"], **{key: made[key] for key in keys})


def _calls(module: nn.Module, x: torch.Tensor) -> list[tuple[str, Callable[[], Any]]]:
    """The runtimes by name, each as a call that predicts `x`."""
    found = [("eager", lambda: module(x))]
    if x.device.type == "cuda":
        found.append(("cuda_graph", _captured(module, x)))
    return found


def _captured(module: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """The whole prediction as one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            module(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        module(x)
    return graph.replay


def _interleaved(calls: list[Callable[[], Any]], repeats: int) -> list[list[float]]:
    """Seconds a call, `repeats` samples of each, taken in turns after a warm-up; the device is waited for."""
    timers = [Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads()) for call in calls]
    numbers = []
    for timer in timers:
        timer.timeit(1)
        numbers.append(max(1, min(1000, int(SAMPLE_SECONDS / timer.timeit(1).mean))))
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for timer, number, seconds in zip(timers, numbers, samples, strict=True):
            if len(seconds) < 3 or sum(seconds) * number < CELL_SECONDS:
                seconds.append(timer.timeit(number).mean)
    return samples

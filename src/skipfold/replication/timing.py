"""Prediction time per image of a network with its skips, without them, and collapsed, in one interleaved run."""

import contextlib
import copy
import functools
import re
import statistics
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.utils.benchmark.utils.timer import timer as clock

from skipfold.collapse import collapse
from skipfold.cropping import crop_dead_taps
from skipfold.errors import DeviceError, first_line
from skipfold.folding import fold, fold_batchnorm
from skipfold.homotopy import skips
from skipfold.networks import INPUT_SHAPE, build
from skipfold.removal import strip
from skipfold.replication.provenance import STAMP, gpu_state, stamp
from skipfold.replication.runtimes import RUNTIMES, TOLERANCE
from skipfold.replication.training import arithmetic
from skipfold.subject import relative_error

SAMPLE_SECONDS = 0.002
"""A sample repeats a prediction until it lasts about this long."""

PROBES = 8
"""Images of each batch whose outputs are compared."""

FULL = re.compile("out of memory|allocate memory", re.IGNORECASE)
"""What torch, CUDA and onnxruntime say where the memory is not enough."""


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
    too) and `cropped` (dead taps too) are what becomes of the network at t = 0. So that these are compared with
    networks as optimized, `skips` and `add` are there with BatchNorms and weights of skips folded, then cropped too.
    """
    found = []
    for name in ("resnet18", "resnet34"):
        found.append(_alone(name, "skips", _network(name, {"t": 0.5})))
        found.append(_alone(name, "skips_literal", _literal(_network(name, {"t": 0.5}))))
        found.append(_alone(name, "add", _network(name, {"block": "add"})))
        for variant, options in (("skips", {"t": 0.5}), ("add", {"block": "add"})):
            network = _network(name, options)
            reference = copy.deepcopy(network).double()
            folded = fold(network)
            found.append(Contender(name, f"{variant}_folded", folded, reference))
            found.append(Contender(name, f"{variant}_cropped", crop_dead_taps(folded, INPUT_SHAPE), reference))
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


@dataclass
class Built:
    """A contender in one runtime, and the seconds that it took to build."""

    contender: Contender
    runtime: str
    device: torch.device
    bind: Callable[[torch.Tensor], Callable[[], Any]]
    seconds: float


@dataclass
class Prediction:
    """A contender in one runtime for one batch: the call, the seconds until its first output, compilation and capture
    included, and how far its outputs are from the float64 network's."""

    built: Built
    call: Callable[[], Any]
    prepare_seconds: float
    difference: float


def build_in(contender: Contender, runtime: str, device: torch.device) -> Built:
    """`contender` in `runtime`, for batches of any size."""
    start = clock()
    bind = RUNTIMES[runtime].build(contender.module, device)
    return Built(contender, runtime, device, bind, clock() - start)


def predict(built: Built, x: torch.Tensor) -> Prediction:
    """The prediction of `x`, checked in the arithmetic in which it is called.

    Raises DeviceError where its outputs are not those of the float64 network: what computes something else is not
    timed.
    """
    contender, runtime = built.contender, RUNTIMES[built.runtime]
    start = clock()  # which waits for the device
    call = built.bind(x)
    found = call()[:PROBES].detach().double()
    seconds = built.seconds + clock() - start
    expected = contender.reference(x[:PROBES].double()).detach()
    error = relative_error(found, expected)
    if not error <= (allowed := TOLERANCE[runtime.precision(built.device)]):
        raise DeviceError(
            f"timing: {contender.network} {contender.variant} in {built.runtime} differs from its float64 network by "
            f"{error:.1e} of the largest logit, more than {allowed:g}; it is not the same function on this device"
        )
    return Prediction(built, call, seconds, error)


def measure(config: Mapping[str, Any], device: torch.device) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Time every contender on `device` in every runtime of the configuration that the device has.

    Gives the times, and why what was not timed was not: see `runtimes`. What does not fit the memory is left out, and
    what a runtime other than eager fails to run; eager's other failures are raised.

    The times have one row a network, variant, runtime, batch and measure. Columns: network, variant, runtime, precision
    (float32, tf32 or bf16), batch, measure (host: wall clock, launches included; device: between CUDA events),
    median_us, q1_us, q3_us (microseconds an image), repeats, samples_us (text: all of them, a round each, as
    `statistics.saving` takes them), max_difference and prepare_seconds (see `Prediction`), gpu_state (see
    `provenance.gpu_state`, read after the samples of a batch), then the stamp. Contenders
    take turns, once a round, so a drift of the clocks meets all of them alike; each is warm, and its batch in the
    caches where it fits.
    """
    settings = config["timing"]
    batches = settings["batch_sizes"]
    images = torch.rand(max(batches), *INPUT_SHAPE, generator=torch.Generator().manual_seed(1))
    names = [name for name in settings["runtimes"] if RUNTIMES[name].missing(device) is None]
    rows, forms, failures = [], [], []
    start = clock()
    for contender in contenders(device):
        for name in names:
            if any(_wanted(settings, contender, name, batch) for batch in batches):
                with _reported(failures, contender, name):
                    forms.append(build_in(contender, name, device))
    with torch.inference_mode(), arithmetic("tf32"):
        for batch in batches:
            x = images[:batch].to(device)
            predictions = []
            for built in forms:
                if _wanted(settings, built.contender, built.runtime, batch):
                    with _reported(failures, built.contender, built.runtime, batch):
                        predictions.append(predict(built, x))
            calls = [prediction.call for prediction in predictions]
            prepared = clock()
            measured = _interleaved(calls, settings, device)
            state = gpu_state(device)  # while it is warm
            timed = clock()
            took = f"prepared in {prepared - start:.0f} s, timed in {timed - prepared:.0f} s"
            print(f"timing: batch {batch}: {len(calls)} predictions {took}", flush=True)
            start = timed
            for way, samples in measured.items():
                found = [_row(each, batch, way, seconds) for each, seconds in zip(predictions, samples, strict=True)]
                rows += [row | {"gpu_state": state} for row in found]
    return pd.DataFrame(rows).assign(**_stamp(config, device)), runtimes(config, device, failures)


@dataclass(frozen=True)
class Failure:
    """A contender that a runtime did not run, for batches of one size or, None, of any, and why."""

    contender: Contender
    runtime: str
    batch: int | None
    reason: str


@contextlib.contextmanager
def _reported(failures: list[Failure], contender: Contender, runtime: str, batch: int | None = None) -> Iterator[None]:
    """Adds what fails to `failures`: one runtime that does not work must not cost the times of the others."""
    try:
        yield
    except Exception as error:  # of many kinds, from the runtimes
        if full := _out_of_memory(error):
            torch.cuda.empty_cache()
        elif runtime == "eager":
            raise
        reason = "out of memory" if full else first_line(error)
        failures.append(Failure(contender, runtime, batch, reason))
        print(f"timing: {contender.network} {contender.variant} in {runtime}, {_of(batch)}: {reason}", flush=True)


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether `error`, or one that it hides, says that the memory is full; each library says so in its own words."""
    return error is not None and (bool(FULL.search(str(error))) or _out_of_memory(error.__context__))


def _of(batch: int | None) -> str:
    return "any batch" if batch is None else f"batch {batch}"


def runtimes(config: Mapping[str, Any], device: torch.device, failures: Sequence[Failure] = ()) -> pd.DataFrame:
    """Every runtime, and why it was not timed or not for all networks. Columns: runtime, precision, remark, STAMP."""
    settings = config["timing"]
    rows = []
    for name, runtime in RUNTIMES.items():
        remarks = []
        if missing := runtime.missing(device):
            remarks.append(missing)
        elif name not in settings["runtimes"]:
            remarks.append("not named in timing.runtimes")
        elif _is_compiled(name) and "compiled" in settings:
            remarks += [f"{key} {', '.join(map(str, only))} only" for key, only in settings["compiled"].items()]
        remarks += _failed([failure for failure in failures if failure.runtime == name])
        rows.append({"runtime": name, "precision": runtime.precision(device), "remark": "; ".join(remarks) or None})
    return pd.DataFrame(rows).assign(**_stamp(config, device))


def _failed(failures: Sequence[Failure]) -> list[str]:
    """One remark a batch and reason, with the first of the networks."""
    alike: dict[tuple[int | None, str], list[str]] = {}
    for failure in failures:
        network = f"{failure.contender.network} {failure.contender.variant}"
        alike.setdefault((failure.batch, failure.reason), []).append(network)
    return [
        f"{_of(batch)}: {first}{f' and {len(others)} more' if others else ''}: {reason}"
        for (batch, reason), (first, *others) in alike.items()
    ]


def _wanted(settings: Mapping[str, Any], contender: Contender, runtime: str, batch: int) -> bool:
    """Whether it is timed: compiling takes long, and may be asked for some variants and batches only."""
    only = settings.get("compiled")
    if only is None or not _is_compiled(runtime):
        return True
    return contender.variant in only["variants"] and batch in only["batch_sizes"]


def _is_compiled(runtime: str) -> bool:
    return runtime.startswith("compile")


def _stamp(config: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    made = {"tier": config["tier"], **stamp(device, {})}
    return {key: made[key] for key in STAMP}


def _row(prediction: Prediction, batch: int, way: str, seconds: list[float]) -> dict[str, Any]:
    samples = [1e6 * value / batch for value in seconds]
    first, median, third = statistics.quantiles(samples, n=4)
    built = prediction.built
    return {
        "network": built.contender.network,
        "variant": built.contender.variant,
        "runtime": built.runtime,
        "precision": RUNTIMES[built.runtime].precision(built.device),
        "batch": batch,
        "measure": way,
        "median_us": median,
        "q1_us": first,
        "q3_us": third,
        "repeats": len(samples),
        "samples_us": " ".join(f"{sample:.6g}" for sample in samples),
        "max_difference": prediction.difference,
        "prepare_seconds": prediction.prepare_seconds,
    }


def _interleaved(
    calls: list[Callable[[], Any]], settings: Mapping[str, Any], device: torch.device
) -> dict[str, list[list[float]]]:
    """Seconds a call by way of measuring, taken in turns after a warm-up.

    Each call has `repeats` samples, or at least three where these would last longer than `cell_seconds`.
    """
    timers = [timeit.Timer(call, timer=clock) for call in calls]
    ways = {"host": lambda timer, number, call: timer.timeit(number) / number}
    if device.type == "cuda":
        ways["device"] = lambda timer, number, call: _between_events(call, number)
    numbers = []
    for timer in timers:
        timer.timeit(1)
        numbers.append(max(1, min(1000, int(SAMPLE_SECONDS / timer.timeit(1)))))
    samples = {way: [[] for _ in calls] for way in ways}
    for _ in range(settings["repeats"]):
        for way, sample in ways.items():
            for timer, number, call, seconds in zip(timers, numbers, calls, samples[way], strict=True):
                if len(seconds) < 3 or sum(seconds) * number < settings["cell_seconds"]:
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

"""The certificate of a network that was rewritten: it is the same function as before."""

import contextlib
import dataclasses
import inspect
import io
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from skipfold.errors import InputShapeError, SkipError, SkipfoldError, first_line
from skipfold.structure import paths
from skipfold.subject import (
    BATCHNORM,
    certifying,
    copied,
    dtype_and_device,
    in_float64,
    input_errors,
    relative_error,
    sample_shape,
)

TOLERANCE = 1e-9
"""Largest difference in float64, relative to the largest output, of two networks that count as the same function."""

OWN_TOLERANCE, HALF_TOLERANCE = 1e-4, 1e-2
"""The same in a network's own precision, where rounding is what differs: float32 or float64, and half precision."""

PROBES = 2
"""Inputs of each kind: in [0, 1] as pixels are, and normal as normalized ones are."""

WIDTH = 3.0
"""Standard deviation of the second kind."""


@dataclasses.dataclass(frozen=True)
class Equality:
    """How far a rewritten network is from its source; errors are relative to the largest output, over `probes` inputs.

    `max_error` is in float64 with random weights and statistics in every BatchNorm, and random weights in the place of
    parameters that are 0, since fresh ones hide mistakes; `repeated_error` the same after rewriting what was rewritten.
    `own_error` compares the two networks as they are in their own `dtype`, and `exported_error` the rewritten one with
    what torch.export makes of it (None: not exported). `additions` counts the additions of two activations that are
    left, and `elsewhere` those of them that no Skip does, by the path of the module that adds ("": the network itself).
    """

    operation: str
    max_error: float
    repeated_error: float
    own_error: float
    exported_error: float | None
    additions: int
    elsewhere: dict[str, int]
    tolerance: float
    probes: int
    dtype: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        exported = "not exported" if self.exported_error is None else f"{self.exported_error:.1e} after torch.export"
        named = ", ".join(f"{path or 'network'} ({count})" for path, count in self.elsewhere.items())
        return "\n".join(
            (
                f"operation      {self.operation}",
                f"error          {self.max_error:.1e} in float64 with random BatchNorms (up to {self.tolerance:.0e})",
                f"done twice     {self.repeated_error:.1e}",
                f"as it is       {self.own_error:.1e} in {self.dtype}, {exported}",
                f"additions      {self.additions} of two activations are left" + (f", in {named}" if named else ""),
                f"probes         {self.probes} inputs, in [0, 1] and of both signs",
                f"time           {self.seconds:.2f} s",
            )
        )


def certify(
    operation: str,
    source: nn.Module,
    convert: Callable[[nn.Module], nn.Module],
    example: torch.Tensor | Sequence[int],
    *,
    export: bool = False,
    skip: type[nn.Module] | tuple = (),
) -> Equality:
    """The certificate that `convert`, which gives a rewritten copy of a module, gives one equal to `source`.

    `example` is a batch, or the shape of one sample; `export` exports the rewritten network too, which takes seconds.
    Additions in modules of the type `skip` are only counted. Inputs of both signs are left out where `source` does not
    take them, as one that takes the root of pixels.

    Raises SkipError where the two differ, WeightsError and InputShapeError where `source` cannot be run.
    """
    start = time.perf_counter()
    dtype, device = dtype_and_device(source, example)
    x = probes(example, torch.float64, device)
    own_tolerance = HALF_TOLERANCE if torch.finfo(dtype).bits < 32 else OWN_TOLERANCE
    with certifying(device), torch.no_grad():
        reference = _unsettled(copied(source, torch.float64))
        with in_float64(dtype):
            # Before anything runs: a forward may change its weights.
            once = _rewritten(operation, convert, reference)
            twice = _rewritten(operation, convert, once)
            x, expected = _taken(reference, x)
            found = _output(operation, once, x)
            max_error = _checked(operation, _difference(found, expected), TOLERANCE)
            found = _output(operation, twice, x)
            repeated = _checked(f"{operation}, done twice", _difference(found, expected), TOLERANCE)
        count, x = len(x), x[:PROBES].to(dtype if x.is_floating_point() else x.dtype)
        own = _rewritten(operation, convert, copied(source))
        expected, found = _run(copied(source), x), _output(operation, own, x)
        own_error = _checked(operation, _difference(found, expected), own_tolerance)
        exported = None
        if export:
            exported = _checked(f"{operation}, exported", _difference(_exported(own, x), found), own_tolerance)
    left, modules = additions(own, x), dict(own.named_modules())
    return Equality(
        operation=operation,
        max_error=max_error,
        repeated_error=repeated,
        own_error=own_error,
        exported_error=exported,
        additions=left.total(),
        elsewhere={path: count for path, count in left.items() if not isinstance(modules[path], skip)},
        tolerance=TOLERANCE,
        probes=count,
        dtype=str(dtype).removeprefix("torch."),
        seconds=time.perf_counter() - start,
    )


def _unsettled(model: nn.Module) -> nn.Module:
    """`model` with random weights and statistics in every BatchNorm, as no fresh network has them, and no zero weights.

    Whatever a layer of zeros reads, a last one or the scale of a branch, does not show.
    """
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, BATCHNORM):
            for values, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
            ):
                if values is not None:
                    drawn = torch.rand(values.shape, generator=generator, dtype=torch.float64)
                    values.copy_(low + (high - low) * drawn)
    for values in model.parameters():
        if values.numel() and not values.any():
            bound = (len(values) / values.numel()) ** 0.5 if values.dim() else 1.0
            values.copy_(bound * torch.rand(values.shape, generator=generator, dtype=torch.float64))
    return model


def probes(example: torch.Tensor | Sequence[int], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Random inputs like `example`, a batch, or the shape of one sample: PROBES in [0, 1], then as many of both signs.

    Of a batch that holds no floating-point numbers, but token ids, say: its own values, each in its place, of samples
    drawn anew. Raises InputShapeError.
    """
    shape, generator = sample_shape(example), torch.Generator().manual_seed(0)
    with _making(shape):
        if isinstance(example, torch.Tensor) and not example.is_floating_point():
            rows = torch.randint(len(example), (2 * PROBES, *shape), generator=generator)
            return example.detach().gather(0, rows.to(example.device)).to(device)
        drawn = [draw(PROBES, *shape, generator=generator, dtype=torch.float64) for draw in (torch.rand, torch.randn)]
        return torch.cat((drawn[0], WIDTH * drawn[1])).to(device, dtype)


def zeros(example: torch.Tensor | Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, or of a batch that holds no floating-point numbers its own values."""
    if isinstance(example, torch.Tensor) and not example.is_floating_point():
        return probes(example, dtype, device)[:PROBES]
    shape = sample_shape(example)
    with _making(shape):
        return torch.zeros(PROBES, *shape, dtype=dtype, device=device)


@contextlib.contextmanager
def _making(shape: tuple[int, ...]) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as error:  # of memory, of sizes beyond 64 bits, of an empty batch
        raise InputShapeError(
            f"{PROBES} inputs of shape {shape} cannot be made ({first_line(error)}); give a smaller shape, or a batch "
            "with samples"
        ) from error


def _taken(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The probes `x`, without the wide ones where `model` does not take them, and its outputs."""
    try:
        expected = _run(model, x)
    except InputShapeError:
        expected = None
    if expected is None or not expected.isfinite().all():
        expected = _run(model, x := x[:PROBES])
    if not expected.is_floating_point() and not expected.is_complex():
        raise InputShapeError(
            f"the module gives {expected.dtype}, which cannot be compared up to rounding; floating-point outputs are "
            "allowed, so give the network without its last step"
        )
    if not expected.numel():
        raise InputShapeError(f"the module gives outputs of shape {list(expected.shape)}; give an input with outputs")
    return x, expected


def _run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with input_errors(x):
        output = model(x.clone())
    if not isinstance(output, torch.Tensor):
        raise InputShapeError(f"the module gives {type(output).__name__}; one tensor is allowed, so wrap the module")
    return output


@contextlib.contextmanager
def _rewriting(operation: str, model: nn.Module) -> Iterator[None]:
    try:
        yield
    except (SkipfoldError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of forwards and layers that the rewriting does not know
        raise SkipError(
            f"{operation}: does not know how to rewrite this {type(model).__name__} ({first_line(error)}); do without "
            "folding and cropping, or leave the module out"
        ) from error


def _rewritten(operation: str, convert: Callable[[nn.Module], nn.Module], source: nn.Module) -> nn.Module:
    """What `convert` makes of `source`, in eval mode."""
    with _rewriting(operation, source):
        return convert(source).eval()


def _output(operation: str, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Of a network that was rewritten."""
    # torch.fx prints a traceback of what a graph raises.
    with _rewriting(operation, model), contextlib.redirect_stderr(io.StringIO()):
        return model(x.clone())


def _exported(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Outputs of what torch.export makes of `model`."""
    try:
        return torch.export.export(model, (x.clone(),)).module()(x.clone())
    except Exception as error:  # of many kinds
        raise SkipError(f"torch.export does not take the network ({first_line(error)}); use export=False") from error


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape:  # which broadcasting would hide
        raise SkipError(
            f"the rewritten network gives outputs of shape {list(found.shape)}, it gave {list(expected.shape)}; does "
            "a skip add what is of another shape?"
        )
    return relative_error(found, expected)


def _checked(operation: str, error: float, tolerance: float) -> float:
    if not error <= tolerance:
        raise SkipError(
            f"{operation}: the result differs from the network by {error:.1e} of its largest output, more than "
            f"{tolerance:.0e}; does it draw random numbers, or change in place what a skip reads?"
        )
    return error


def additions(model: nn.Module, example: torch.Tensor | Sequence[int]) -> Counter[str]:
    """How often each module of `model` itself adds two activations, or takes their weighted mean, by its path.

    `example` is a batch, or the shape of one sample. Raises WeightsError and InputShapeError.
    """
    dtype, device = dtype_and_device(model, example)
    model, path = copied(model), [""]
    with torch.no_grad(), paths(model, path), _Additions(path) as mode:
        _run(model, zeros(example, dtype, device))
    return mode.found


class _Additions(TorchDispatchMode):
    def __init__(self, path: list[str]):
        super().__init__()
        self.path = path
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        adds = func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_, torch.ops.aten.lerp)
        if adds and all(isinstance(arg, torch.Tensor) and arg.dim() > 1 for arg in args[:2]):
            self.found[self.path[-1]] += 1
        return func(*args, **(kwargs or {}))


def calls(
    model: nn.Module, example: torch.Tensor | Sequence[int], among: Collection[str]
) -> dict[str, list[inspect.BoundArguments]]:
    """What each module of `model` whose path is in `among` is called with when it runs on `example`.

    `example` is a batch, or the shape of one sample. Raises WeightsError and InputShapeError.
    """
    dtype, device = dtype_and_device(model, example)
    model, seen = copied(model), {}

    def note(path: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
            seen.setdefault(path, []).append(bound)

        return hook

    for path, module in model.named_modules():
        if path in among:
            module.register_forward_pre_hook(note(path), with_kwargs=True)
    with torch.no_grad():
        _run(model, zeros(example, dtype, device))
    return seen

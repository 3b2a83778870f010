"""The certificate of a network that was rewritten: it is the same function as before."""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from skipfold.errors import InputShapeError, SkipError, SkipfoldError
from skipfold.structure import paths
from skipfold.subject import (
    certifying,
    copied,
    dtype_and_device,
    first_line,
    in_float64,
    input_errors,
    relative_error,
    sample_shape,
)

TOLERANCE = 1e-9
"""Largest difference in float64, relative to the largest output, of two networks that count as the same function."""

OWN_TOLERANCE = 1e-2
"""The same in a network's own precision, where rounding is what differs."""

PROBES = 2


@dataclasses.dataclass(frozen=True)
class Equality:
    """How far a rewritten network is from its source; errors are relative to the largest output, over `probes` inputs.

    `max_error` is in float64 with random weights and statistics in every BatchNorm, since fresh ones hide mistakes;
    `repeated_error` the same after rewriting what was rewritten. `own_error` compares the two networks as they are in
    their own `dtype`, and `exported_error` the rewritten one with what torch.export makes of it (None: not exported).
    `additions` counts the additions of two activations that are left.
    """

    operation: str
    max_error: float
    repeated_error: float
    own_error: float
    exported_error: float | None
    additions: int
    tolerance: float
    probes: int
    dtype: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        exported = "not exported" if self.exported_error is None else f"{self.exported_error:.1e} after torch.export"
        return "\n".join(
            (
                f"operation      {self.operation}",
                f"error          {self.max_error:.1e} in float64 with random BatchNorms (up to {self.tolerance:.0e})",
                f"done twice     {self.repeated_error:.1e}",
                f"as it is       {self.own_error:.1e} in {self.dtype}, {exported}",
                f"additions      {self.additions} of two activations are left",
                f"probes         {self.probes} random inputs in [0, 1]",
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
) -> Equality:
    """The certificate that `convert`, which gives a rewritten copy of a module, gives one equal to `source`.

    `example` is a batch, or the shape of one sample; `export` exports the rewritten network too, which takes seconds.
    Raises SkipError where the two differ, WeightsError and InputShapeError where `source` cannot be run.
    """
    start = time.perf_counter()
    shape = sample_shape(example)
    dtype, device = dtype_and_device(source, example)
    x = torch.rand(PROBES, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    with certifying(device), torch.no_grad():
        reference = _unsettled(copied(source, torch.float64))
        with in_float64(dtype):
            expected = _run(reference, x)
            once, found = _rewritten(operation, convert, reference, x)
            max_error = _checked(operation, relative_error(found, expected), TOLERANCE)
            _, found = _rewritten(operation, convert, once, x)
            repeated = _checked(f"{operation}, done twice", relative_error(found, expected), TOLERANCE)
        x = x.to(dtype)
        expected = _run(copied(source), x)
        own, found = _rewritten(operation, convert, copied(source), x)
        own_error = _checked(operation, relative_error(found, expected), OWN_TOLERANCE)
        exported = None
        if export:
            exported = _checked(f"{operation}, exported", relative_error(_exported(own, x), found), OWN_TOLERANCE)
    return Equality(
        operation=operation,
        max_error=max_error,
        repeated_error=repeated,
        own_error=own_error,
        exported_error=exported,
        additions=additions(own, x).total(),
        tolerance=TOLERANCE,
        probes=PROBES,
        dtype=str(dtype).removeprefix("torch."),
        seconds=time.perf_counter() - start,
    )


def _unsettled(model: nn.Module) -> nn.Module:
    """`model` with random weights and statistics in every BatchNorm, as no fresh network has them."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for values, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
            ):
                if values is not None:
                    drawn = torch.rand(values.shape, generator=generator, dtype=torch.float64)
                    values.copy_(low + (high - low) * drawn)
    return model


def _run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with input_errors(x):
        output = model(x.clone())
    if not isinstance(output, torch.Tensor):
        raise InputShapeError(f"the module gives {type(output).__name__}; one tensor is allowed, so wrap the module")
    return output


def _rewritten(
    operation: str, convert: Callable[[nn.Module], nn.Module], source: nn.Module, x: torch.Tensor
) -> tuple[nn.Module, torch.Tensor]:
    """What `convert` makes of `source`, in eval mode, and its outputs."""
    try:
        model = convert(source).eval()
        return model, model(x.clone())
    except (SkipfoldError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of forwards and layers that the rewriting does not know
        raise SkipError(
            f"{operation}: does not know how to rewrite this {type(source).__name__} ({first_line(error)}); do without "
            "folding and cropping, or leave the module out"
        ) from error


def _exported(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Outputs of what torch.export makes of `model`."""
    try:
        return torch.export.export(model, (x.clone(),)).module()(x.clone())
    except Exception as error:  # of many kinds
        raise SkipError(f"torch.export does not take the network ({first_line(error)}); use export=False") from error


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
        _run(model, torch.zeros(PROBES, *sample_shape(example), dtype=dtype, device=device))
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

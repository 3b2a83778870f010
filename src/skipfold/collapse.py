"""Any affine network as one layer, with a certificate that it is the same function.

The paper's f_W(1) X + f(0) for a network of any wiring: f(0) by one forward pass, f_W(1) as the Jacobian, which for an
affine map is the same everywhere. `structure` decides by operators whether a network is affine, the residual by
numbers; both have to agree.
"""

import contextlib
import copy
import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from skipfold.cropping import LiveTaps
from skipfold.errors import (
    ConfigError,
    ExactnessError,
    InputShapeError,
    MemoryBoundError,
    ModuleError,
    NotAffineError,
    TrainingModeError,
    WeightsError,
    check_count,
    first_line,
)
from skipfold.recursion import SkipCNN
from skipfold.structure import Structure, watch
from skipfold.subject import (
    BATCHNORM,
    Shape,
    certifying,
    copied,
    dtype_and_device,
    in_float64,
    input_errors,
    sample_shape,
)

RESIDUAL_TOLERANCE = 1e-8
"""Largest affine residual, and largest relative error of a collapse, of each output of a network that counts as affine.
"""

ROUNDING = 2.0**-19
"""What float64 may lose of what float32 does: the ratio of their roundings, 2^-29, with room for how they fall."""

LOST_ROUNDINGS = 8
"""Roundings of a dtype that weights may lose in it, of their sum; they lose more where it holds them as subnormals."""

UNUSUAL_ROUNDINGS = 8
"""How many times what it was seen to round off a module may be off in its own dtype, once half of the digits are."""

NO_OPERATOR = (
    "no operator shows it, the residual does; do samples of a batch influence each other, or large parts cancel so "
    "that an output is mostly rounding?"
)

MAX_BYTES = 4 * 2**30
"""Memory that `collapse` may take beside the module itself, unless the caller sets it: 4 GiB."""


MAX_CHUNK = 2**31
"""Samples in one run, whatever the memory: torch takes no sizes of more than 63 bits."""


@dataclasses.dataclass(frozen=True)
class Certificate:
    """How well a collapsed layer stands for its network; errors are maxima over `probes` random inputs in [0, 1].

    `structure` is "affine", or names the operators that only the residual vouches for. `residual` is
    |f(a+b) - f(a) - f(b) + f(0)| in float64, the largest over all outputs, each relative to how far an input of the
    size of the smaller of a and b takes it from f(0). `max_error` is the largest difference of outputs between the
    network and its collapse, both in float64; `max_error_float32` the same with both in the network's own `dtype`;
    `module_error_float32` the network's own rounding, `dtype` against float64. `exact` is true where equality was
    proved in rational arithmetic, and `exact_rounding` is then the largest difference of the float64 weights from the
    rational ones.
    """

    affine: bool
    residual: float
    max_error: float
    max_error_float32: float
    module_error_float32: float
    probes: int
    dtype: str
    structure: str
    seconds: float
    exact: bool = False
    exact_rounding: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [
            f"structure      {self.structure}",
            f"residual       {self.residual:.1e} (affine up to {RESIDUAL_TOLERANCE:.0e})",
            f"error          {self.max_error:.1e} in float64, {self.max_error_float32:.1e} in {self.dtype}",
            f"module's own   {self.module_error_float32:.1e}, {self.dtype} against float64",
            f"probes         {self.probes} random inputs in [0, 1]",
            f"time           {self.seconds:.2f} s",
        ]
        if self.exact:
            lines.append(f"exact          proved in rational arithmetic; float64 weights {self.exact_rounding:.1e} off")
        return "\n".join(lines)


class Collapsed(nn.Module):
    """y = A x + b for inputs [N, *input_shape] and outputs [N, *output_shape].

    Inputs of any real dtype, uint8 too, are brought to the dtype of the weights. Raises InputShapeError on others.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, input_shape: Shape, output_shape: Shape):
        super().__init__()
        self.input_shape, self.output_shape = tuple(input_shape), tuple(output_shape)
        self.linear = nn.Linear(*reversed(weight.shape), device="meta")
        self.linear.weight = nn.Parameter(weight.detach().contiguous())
        self.linear.bias = nn.Parameter(bias.detach().contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if tuple(x.shape[1:]) != self.input_shape:
            raise InputShapeError(
                f"input of shape {list(x.shape)} given; [N, {', '.join(map(str, self.input_shape))}] is allowed"
            )
        y = self.linear(x.flatten(1).to(self.linear.weight.dtype))
        return y if len(self.output_shape) == 1 else y.reshape(-1, *self.output_shape)


def collapse(
    module: nn.Module,
    example: torch.Tensor | Sequence[int],
    *,
    probes: int = 4,
    max_bytes: int = MAX_BYTES,
    accept_unknown: bool = False,
    exact: bool = False,
) -> tuple[Collapsed, Certificate]:
    """One linear layer that computes what `module` does in eval mode, and its certificate.

    `example` is a batch as the module takes it, or the shape of one sample, without the batch. Weight and bias are
    found in float64 on the module's device, by gradients where there are fewer outputs than inputs, else by pushing
    unit vectors, in chunks that keep within about `max_bytes` beside the module; they are cast to the module's dtype.
    The module is left untouched. `exact` proves the equality in rational arithmetic, for a small SkipCNN.

    Raises NotAffineError, naming every offending submodule, where `module` is not affine (TrainingModeError where
    BatchNorm or Dropout is in training mode). Operators unknown to the structural check count as offending unless
    `accept_unknown`; then the residual decides, and the certificate names them. Raises ModuleError, WeightsError,
    InputShapeError and MemoryBoundError on what cannot be collapsed, ExactnessError where `exact` cannot be had,
    ConfigError on fewer than 1 of `probes` and on `max_bytes` that are no whole number.
    """
    start = time.perf_counter()
    shape = sample_shape(example)
    dtype, device = dtype_and_device(module, example)
    check_count(probes, "probes")
    check_count(max_bytes, "max_bytes", 0)
    if exact and not isinstance(module, SkipCNN):
        raise ExactnessError(f"exact=True is for a SkipCNN, {type(module).__name__} given; use exact=False")
    with certifying(device):
        own = _own(module, example, shape, dtype, device)
        reference = _Reference(module, shape, dtype, device, max_bytes)
        _refuse(module, reference.structure, accept_unknown)
        reference.check_memory()
        residual, outputs, points = reference.probe(probes)
        residual = max(residual, reference.wide_residual())
        if not residual <= RESIDUAL_TOLERANCE:
            raise NotAffineError(f"not affine (residual {residual:.1e}): {NO_OPERATOR}")
        weight, bias, max_error = _affine_map(reference, points, outputs)
        result = Collapsed(weight.to(dtype), bias.to(dtype), shape, reference.output_shape)
        _check_held(result, weight, "call .float() on the module first")
        error, own_error = _errors_in_dtype(own, result, points.split(reference.chunk), outputs, dtype)
    rounding = _prove(module, weight, bias) if exact else None
    certificate = Certificate(
        affine=True,
        residual=residual,
        max_error=max_error,
        max_error_float32=error,
        module_error_float32=own_error,
        probes=probes,
        dtype=str(dtype).removeprefix("torch."),
        structure=_verdict(reference.structure),
        seconds=time.perf_counter() - start,
        exact=exact,
        exact_rounding=rounding,
    )
    return result, certificate


def affine_residual(module: nn.Module, input_shape: Shape, probes: int = 16) -> float:
    """||f(a+b) - f(a) - f(b) + f(0)|| / ||f(a)|| over all outputs in float64, the largest of `probes` pairs in [0, 1].

    `input_shape` is that of one sample. Raises ModuleError, WeightsError and InputShapeError as `collapse` does, and
    ConfigError on fewer than 1 of `probes`.
    """
    shape = sample_shape(input_shape)
    dtype, device = dtype_and_device(module, input_shape)
    check_count(probes, "probes")
    reference = copied(module, torch.float64)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, probes, *shape, generator=generator, dtype=torch.float64).to(device)
    with certifying(device), torch.no_grad(), in_float64(dtype):
        zero = torch.zeros_like(a[:1])
        with input_errors(zero):
            output = reference(zero.clone())
        _check_output(output)
        f_a, f_b, f_sum, f_0 = (_outputs(reference, x, output.shape[1:]) for x in (a, b, a + b, zero))
    bent, size = (outputs.norm(dim=1) for outputs in (f_sum - f_a - f_b + f_0, f_a))
    return _largest(bent / size.clamp_min(torch.finfo(size.dtype).tiny))


def fold_preprocessing(
    collapsed: Collapsed,
    scale: float = 1 / 255,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
) -> Collapsed:
    """A collapsed network that takes raw pixels: A ((scale x - mean) / std) + b as one layer of x.

    `mean` and `std` are numbers, or one number for each channel (first axis of a sample). Raises InputShapeError where
    their count is not that of the channels, ConfigError where they or `scale` are not finite or a `std` is not above 0,
    ModuleError on what is no Collapsed, WeightsError where its dtype does not hold the weights.
    """
    check_collapsed(collapsed)
    weight, bias = collapsed.linear.weight.detach().double(), collapsed.linear.bias.detach().double()
    channels = collapsed.input_shape[0]
    mean, std = (_per_channel(values, channels).to(weight) for values in (mean, std))
    if not (math.isfinite(scale) and mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise ConfigError(
            f"scale {scale}, mean {mean.tolist()}, std {std.tolist()} given; finite numbers are allowed, std above 0"
        )
    by_channel = weight.reshape(len(weight), channels, -1) / std[:, None]
    bias = bias - (by_channel * mean[:, None]).sum((1, 2))
    dtype = collapsed.linear.weight.dtype
    weight = (by_channel * scale).flatten(1)
    result = Collapsed(weight.to(dtype), bias.to(dtype), collapsed.input_shape, collapsed.output_shape)
    advice = "give a scale and std of usual size, or call .float() on the collapsed network first"
    _check_held(result, weight, advice, scale)
    return result


def check_collapsed(module: object) -> None:
    """Raises ModuleError unless `module` is a Collapsed."""
    if not isinstance(module, Collapsed):
        raise ModuleError(f"{type(module).__name__} given; a Collapsed is allowed, as collapse gives it")


def _check_held(result: Collapsed, weight: torch.Tensor, advice: str, scale: float = 1.0) -> None:
    """Raises WeightsError where `result` does not hold the float64 `weight`, which is too large for it or too small.

    Of inputs up to 1 / `scale`: what their outputs, with the bias, round off is not lost.
    """
    held, bias = (parameter.detach() for parameter in result.linear.parameters())
    if not all(parameter.isfinite().all() for parameter in (held, bias)):
        raise WeightsError(f"the one layer has weights that {held.dtype} does not hold; {advice}")
    # In place, one after the other: `_Reference.fixed` leaves room for one copy.
    lost = float(held.to(torch.float64, copy=True).sub_(weight).abs_().sum(1).max())
    whole = float(weight.abs().sum(1).max())
    if lost > LOST_ROUNDINGS * torch.finfo(held.dtype).eps * (whole + abs(scale) * float(bias.abs().max())):
        raise WeightsError(
            f"the one layer has weights so small that {held.dtype} loses {lost / whole:.0%} of them; {advice}"
        )


class _Reference:
    """A float64 copy of a module, run in chunks that keep within the memory bound; f(0) and the structure seen.

    The run that sees the structure records gradients, so that `rows` needs no other.
    """

    def __init__(self, module: nn.Module, shape: Shape, dtype: torch.dtype, device: torch.device, max_bytes: int):
        self.shape, self.dtype, self.device, self.max_bytes = shape, dtype, device, max_bytes
        self.weights = 8 * sum(p.numel() for p in (*module.parameters(), *module.buffers()))
        self.inputs = math.prod(shape)
        self._check(self.weights + 8 * self.inputs, "a float64 copy of the weights and one input")
        self.module = copied(module, torch.float64)
        self.zero = torch.zeros(1, *self.shape, dtype=torch.float64, device=device, requires_grad=True)
        output, self.structure = self._watched()
        self.f_0 = output.detach()
        self.output_shape = tuple(self.f_0.shape[1:])
        self.outputs = self.f_0.numel()
        self.recorded = _flat(output)[0] if self.outputs < self.inputs else None
        # Copies of the weights in float64, float32 and as they are; the run that is recorded; the result in float64,
        # its rearrangement or cast, and the copies that the certificate evaluates.
        recorded = self.structure.constant + self.structure.sample
        self.fixed = 5 * self.weights // 2 + recorded + 3 * 8 * self.inputs * self.outputs
        # Twice, since gradients are as large as the activations they belong to.
        self.sample = 2 * (self.structure.sample + self.structure.workspace + 8 * (self.inputs + self.outputs))
        self.chunk = max(1, min((max_bytes - self.fixed) // self.sample, MAX_CHUNK))

    def check_memory(self) -> None:
        """Raises MemoryBoundError where collapsing would take more than is allowed."""
        layer = f"a layer of {self.inputs} inputs and {self.outputs} outputs, and one sample"
        self._check(self.fixed + self.sample, layer)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs [N, outputs] of inputs [N, *shape]."""
        with torch.no_grad(), in_float64(self.dtype):
            return torch.cat([_outputs(self.module, part, self.output_shape) for part in x.split(self.chunk)])

    def probe(self, probes: int) -> tuple[float, torch.Tensor, torch.Tensor]:
        """The residual at `probes` points in [0, 1], their outputs, and the points."""
        points = self._random(probes, seed=0)
        return *self._residual(points, self), points

    def wide_residual(self) -> float:
        """The residual at points of both signs, up to 1000 in size: what bends, bends somewhere.

        The points of a pair are of different sizes and each runs alone, so that a branch on a whole batch shows.
        """
        sizes = torch.tensor([1.0, 30.0, 1000.0], dtype=torch.float64, device=self.device)
        points = sizes.reshape(-1, *[1] * len(self.shape)) * (2 * self._random(3, seed=1) - 1)
        return self._residual(points, lambda x: torch.cat([self(each) for each in x.split(1)]))[0]

    def relative(
        self, differences: torch.Tensor, size: float | torch.Tensor, points: torch.Tensor, outputs: torch.Tensor
    ) -> float:
        """The largest of `differences` [N, outputs], each relative to how far an input of `size` takes that output.

        How far is told by `points` and their `outputs`. f(0) does not count, nor do other outputs: they may be large
        enough to hide anything. Where that tells too little, what float64 rounds off counts as well: where large parts
        cancel inside of the module, it is of their size.
        """
        away = (outputs - _flat(self.f_0)).abs() / _size(points)
        scale = size * away.amax(0).clamp_min(torch.finfo(away.dtype).tiny)
        found = _largest(differences.abs() / scale)
        if found > RESIDUAL_TOLERANCE / 100:
            found = _largest(differences.abs() / (scale + self._rounding(points) / RESIDUAL_TOLERANCE))
        return found

    def rows(self) -> torch.Tensor | None:
        """The Jacobian by gradients, one chunk of outputs at a time; once, since what was recorded is forgotten.

        None where outputs are as many as inputs, or the module lets no gradients through.
        """
        recorded, self.recorded = self.recorded, None
        if recorded is None or not recorded.requires_grad:
            return None
        recorded = recorded.double()

        def row(unit: torch.Tensor) -> torch.Tensor:
            return torch.autograd.grad(recorded, self.zero, unit, retain_graph=True, materialize_grads=True)[0]

        rows = torch.empty(self.outputs, self.inputs, dtype=torch.float64, device=self.device)
        for start in range(0, self.outputs, self.chunk):
            part = rows[start : start + self.chunk]
            unit = torch.zeros(len(part), self.outputs, dtype=torch.float64, device=self.device)
            unit[range(len(part)), range(start, start + len(part))] = 1
            try:
                with warnings.catch_warnings():
                    # Of operators that vmap runs row by row; is_grads_batched runs most so.
                    warnings.filterwarnings("ignore", "There is a performance drop")
                    part.copy_(torch.vmap(row)(unit).flatten(1))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # of backward passes that are not torch's, and of checkpointed parts
                return None
        return rows

    def columns(self) -> torch.Tensor:
        """The Jacobian by pushing unit vectors, one chunk of inputs at a time."""
        rows = torch.empty(self.outputs, self.inputs, dtype=torch.float64, device=self.device)
        for start in range(0, self.inputs, self.chunk):
            size = min(self.chunk, self.inputs - start)
            unit = torch.zeros(size, self.inputs, dtype=torch.float64, device=self.device)
            unit[range(size), range(start, start + size)] = 1
            rows[:, start : start + size] = (self(unit.reshape(size, *self.shape)) - _flat(self.f_0)).T
        return rows

    def _residual(self, a: torch.Tensor, run: Callable[[torch.Tensor], torch.Tensor]) -> tuple[float, torch.Tensor]:
        """The residual at the points `a`, each paired with the next, by `run`; and their outputs."""
        points = torch.cat([a, a + a.roll(1, dims=0)])
        outputs = run(points)
        f_a, f_sum = outputs.chunk(2)
        bent = f_sum - f_a - f_a.roll(1, dims=0) + _flat(self.f_0)
        size = _size(a)
        return self.relative(bent, torch.minimum(size, size.roll(1, dims=0)), points, outputs), f_a

    def _rounding(self, points: torch.Tensor) -> torch.Tensor:
        """What float64 may round off each output, by what float32 does, where the module runs in that."""
        # At more points than these few, since roundings can be 0 by chance.
        points = torch.cat([points * part for part in (1, 0.9, 0.8, 0.7)])
        outputs, module = self(points), copied(self.module, torch.float32)
        rounded = torch.finfo(torch.float32).eps * outputs.abs()
        with torch.no_grad(), contextlib.suppress(InputShapeError):
            parts = points.float().split(self.chunk)
            found = torch.cat([_outputs(module, part, self.output_shape) for part in parts])
            rounded = rounded.maximum((found - outputs).abs().nan_to_num(0, 0))
        return ROUNDING * rounded.amax(0)

    def _random(self, count: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(count, *self.shape, generator=generator, dtype=torch.float64).to(self.device)

    def _watched(self) -> tuple[torch.Tensor, Structure]:
        with input_errors(self.zero), in_float64(self.dtype):
            try:
                # The live taps alone, since backward passes wait for the bytes of the weights.
                with torch.enable_grad(), LiveTaps():
                    output, structure = watch(self.module, self.zero.clone())
            except RuntimeError:  # not of a wrong input alone: some forwards do not bear gradients
                with torch.no_grad():
                    output, structure = watch(self.module, self.zero.clone())
        _check_output(output)
        return output, structure

    def _check(self, needed: int, what: str) -> None:
        if needed > self.max_bytes:
            raise MemoryBoundError(
                f"collapsing takes at least {needed / 2**20:,.2f} MiB ({what}), {self.max_bytes / 2**20:,.2f} MiB are "
                f"allowed; set max_bytes (--max-memory) to {needed} or more, or use a smaller input",
                needed,
            )


def _affine_map(
    reference: _Reference, points: torch.Tensor, outputs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Weight and bias in float64 and their largest error at `points`.

    A module may be affine and yet hide part of its map from the gradient (detach, no_grad), so rows that fail at the
    points are found again by pushing unit vectors.
    """
    bias = reference.f_0.flatten()
    weight = reference.rows()
    for attempt in (weight, None):
        weight = reference.columns() if attempt is None else attempt
        differences = points.flatten(1) @ weight.T + bias - outputs
        error = float(differences.abs().max())
        if reference.relative(differences, 1.0, points, outputs) <= RESIDUAL_TOLERANCE:
            return weight, bias, error
    raise NotAffineError(
        f"the collapsed layer differs from the module by {error:.1e}: the samples of a batch influence each other, "
        "the module gives another output each time, or large parts cancel so that an output is mostly rounding"
    )


def _refuse(module: nn.Module, structure: Structure, accept_unknown: bool) -> None:
    training = {
        path: f"{type(child).__name__} in training mode"
        for path, child in module.named_modules()
        if child.training and isinstance(child, _CHANGED_BY_TRAINING)
    }
    offenders = training | structure.not_affine
    if not accept_unknown:
        for path, reason in structure.unknown.items():
            offenders[path] = "; ".join(filter(None, (offenders.get(path), reason)))
    if not offenders:
        return
    text = "not affine: " + ", ".join(f"{path or 'network'}: {reason}" for path, reason in offenders.items())
    if training:
        raise TrainingModeError(f"{text}; call .eval() on the module first", offenders)
    if structure.unknown and not accept_unknown:
        text += "; accept_unknown=True lets the residual decide on what is unknown"
    raise NotAffineError(text, offenders)


def _verdict(structure: Structure) -> str:
    if not structure.unknown:
        return "affine"
    named = ", ".join(f"{path or 'network'}: {reason}" for path, reason in structure.unknown.items())
    return f"accepted on request: {named}"


def _own(
    module: nn.Module, example: torch.Tensor | Sequence[int], shape: Shape, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """A copy of `module` in its own dtype, which has run once.

    A whole one, since a forward may write into weights. Before any run in float64, since a forward may keep what it
    makes in a cache that no copy is of, which then holds tensors of the module's own dtype, as it would without us.
    """
    own = copy.deepcopy(copied(module))
    zero = torch.zeros(1, *shape, dtype=dtype, device=device)
    try:
        with torch.no_grad(), input_errors(zero):
            own(zero)
    except InputShapeError as error:
        if _takes_whole_numbers(own, example, device):
            raise NotAffineError(
                f"not affine: the module takes {example.dtype} inputs and no {dtype}; give it without what reads whole "
                "numbers, such as an embedding"
            ) from error
        raise
    return own


def _takes_whole_numbers(module: nn.Module, example: object, device: torch.device) -> bool:
    if not isinstance(example, torch.Tensor) or example.is_floating_point():
        return False
    try:
        with torch.no_grad(), input_errors(example):
            module(example[:1].to(device))
    except InputShapeError:
        return False
    return True


def _check_output(output: object) -> None:
    """Raises InputShapeError unless `output`, that of one sample, is one tensor [1, ...] that is not empty."""
    if not isinstance(output, torch.Tensor) or output.shape[:1] != (1,) or not output.numel():
        raise InputShapeError(
            f"the module gives {_told(output)} for one sample; one tensor [N, ...] that is not empty is allowed, so "
            "wrap the module"
        )


def _told(output: object) -> str:
    return f"shape {list(output.shape)}" if isinstance(output, torch.Tensor) else type(output).__name__


def _outputs(module: nn.Module, x: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Float64 outputs [N, outputs] of `module`, which gives `shape` for one sample; raises InputShapeError."""
    with input_errors(x):
        y = module(x.clone())
    if not isinstance(y, torch.Tensor) or y.shape != (len(x), *shape):
        raise InputShapeError(
            f"the module gives {_told(y)} for {len(x)} samples, {[1, *shape]} for one; [N, ...] is allowed, "
            "so wrap the module"
        )
    return _flat(y).double()


def _largest(ratios: torch.Tensor) -> float:
    """Infinity where one is NaN."""
    return float(ratios.nan_to_num(math.inf, math.inf).max())


def _size(points: torch.Tensor) -> torch.Tensor:
    """[N, 1], the largest absolute value of each point."""
    return points.flatten(1).abs().amax(1, keepdim=True)


def _flat(outputs: torch.Tensor) -> torch.Tensor:
    """[N, ...] as [N, outputs], one output a sample too."""
    return outputs.reshape(len(outputs), -1)


def _errors_in_dtype(
    module: nn.Module, result: Collapsed, points: Sequence[torch.Tensor], outputs: torch.Tensor, dtype: torch.dtype
) -> tuple[float, float]:
    """Largest difference of `result` from `module` in its own dtype, and of `module` from `outputs` in float64.

    Raises ModuleError where the latter is more than `module` rounds off, as told by its residual at larger points.
    """

    def run(network: nn.Module, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([_outputs(network, part.to(dtype), result.output_shape) for part in parts])

    with torch.no_grad():
        try:
            own = run(module, points)
            own_error = float((own - outputs).abs().max())
            if own_error > math.sqrt(torch.finfo(dtype).eps) * float(own.abs().max()):
                zero, near, far = (run(module, [size * part for part in points]) for size in (0, 10, 30))
                rounding = float((far - 3 * near + 2 * zero).abs().max())
                # Where no output is another than at 0, all of the input may be rounded off.
                if own_error > UNUSUAL_ROUNDINGS * rounding and not torch.equal(own, zero):
                    raise ModuleError(
                        f"other outputs in {dtype} than in float64, by {own_error:.1e} where it rounds "
                        f"about {rounding:.1e} off: does its forward branch on the dtype, or round a constant? "
                        "Take that out, or collapse module.double()"
                    )
        except InputShapeError as error:  # though it ran before
            raise ModuleError(
                f"after float64 runs of a copy the module fails in {dtype} ({first_line(error.__cause__ or error)}): "
                "it keeps tensors in a cache outside of itself (functools.lru_cache?); clear that, and use a buffer"
            ) from error
        found = run(result, points)
    return float((found - own).abs().max()), own_error


def _prove(module: SkipCNN, weight: torch.Tensor, bias: torch.Tensor) -> float:
    """Prove the collapse of `module` in rational arithmetic; how far float64 is from it."""
    from skipfold.algebra import prove  # sympy takes half a second to import

    exact = prove(module)
    found = weight.flatten().tolist(), bias.tolist()
    return max(
        abs(float(rational) - value)
        for matrix, values in zip(exact, found, strict=True)
        for rational, value in zip(matrix.to_list_flat(), values, strict=True)
    )


_CHANGED_BY_TRAINING = (BATCHNORM, nn.modules.dropout._DropoutNd)


def _per_channel(values: float | Sequence[float], channels: int) -> torch.Tensor:
    given = torch.as_tensor(values, dtype=torch.float64).flatten()
    if len(given) not in (1, channels):
        raise InputShapeError(f"{len(given)} means or standard deviations given; 1 or {channels} are allowed")
    return given.expand(channels)

"""The module that something is made of: its sample's shape, its dtype and device, a copy, and the error against it."""

import contextlib
import copy
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from skipfold.errors import InputShapeError, ModuleError, SkipfoldError, WeightsError, first_line

Shape = tuple[int, ...]

BATCHNORM = nn.modules.batchnorm._BatchNorm
"""The class of all of torch's BatchNorms, for isinstance."""


ON_FLOAT32 = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,
    torch.backends.cudnn.rnn,
    torch.backends.mkldnn.matmul,
    torch.backends.mkldnn.conv,
    torch.backends.mkldnn.rnn,
)
"""The operators that torch can let compute on float32 in a coarser type, each with its `fp32_precision`."""

OLDER_SWITCHES = (
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (lambda: torch.backends.cudnn.allow_tf32, partial(setattr, torch.backends.cudnn, "allow_tf32")),
)
"""How the same is told and set for several at once."""


def check_module(module: object) -> None:
    """Raises ModuleError unless `module` is an nn.Module of Python code, whose submodules are too."""
    if not isinstance(module, nn.Module):
        raise ModuleError(f"{type(module).__name__} given; a torch.nn.Module is allowed, so wrap what computes it")
    for path, child in module.named_modules():
        if isinstance(child, nn.parallel.DistributedDataParallel):
            raise ModuleError(f"{path or 'network'}: a DistributedDataParallel given; give the .module that it holds")
        if isinstance(child, torch.jit.ScriptModule):
            raise ModuleError(f"{path or 'network'}: a TorchScript module given; give the module that it was made from")


def copied(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy in eval mode without gradients; floating weights in `dtype`, or shared with `module` where it is None.

    So are tensors that a submodule holds as attributes, in lists and dictionaries too. Raises ModuleError where it
    cannot be copied, WeightsError where weights are not initialised.
    """
    _check_initialised(module)
    memo = {}
    for parameter in module.parameters():
        values = parameter.detach() if dtype is None else parameter.detach().to(dtype, copy=True)
        memo[id(parameter)] = nn.Parameter(values, requires_grad=False)
    attributes = (value for child in module.modules() for value in tree_leaves(vars(child)))
    tensors = [value for value in attributes if isinstance(value, torch.Tensor) and value.is_leaf]
    for held in (*module.buffers(), *(value for value in tensors if id(value) not in memo)):
        floating = dtype is not None and held.is_floating_point()
        memo[id(held)] = held.detach().to(dtype if floating else held.dtype, copy=True)
    try:
        return copy.deepcopy(module, memo).eval()
    except (RuntimeError, TypeError) as error:
        raise ModuleError(
            f"{type(module).__name__} cannot be copied ({first_line(error)}); hold in its attributes nothing that "
            "was computed from its weights, as prune and the old weight_norm of torch.nn.utils do until their remove"
        ) from error


def sample_shape(example: torch.Tensor | Sequence[int]) -> Shape:
    """The shape of one sample from it or from a batch; raises InputShapeError."""
    given = tuple(example.shape[1:]) if isinstance(example, torch.Tensor) else example
    try:
        shape = tuple(operator.index(size) for size in given)
    except TypeError:
        shape = ()
    if not shape or min(shape) < 1:
        raise InputShapeError(
            f"shape {given!r} of one sample given; sizes of at least 1, without the batch, are allowed, "
            "e.g. (1, 28, 28)"
        )
    return shape


def dtype_and_device(module: nn.Module, example: torch.Tensor | Sequence[int]) -> tuple[torch.dtype, torch.device]:
    """Of the weights, or of an example tensor where there are none; raises ModuleError and WeightsError."""
    check_module(module)
    _check_initialised(module)
    parameters = dict(module.named_parameters())
    held = parameters | dict(module.named_buffers())
    for path, tensor in held.items():
        if tensor.is_meta:
            raise WeightsError(f"{path}: on the meta device, which holds no values; load the weights first")
        if tensor.layout is not torch.strided:
            raise WeightsError(f"{path}: {tensor.layout} weights given; dense ones are allowed, use .to_dense()")
        if tensor.is_complex():
            raise WeightsError(
                f"{path}: {tensor.dtype} weights given; real ones are allowed, so hold torch.view_as_real of them"
            )
        if path in parameters and not tensor.is_floating_point():
            raise WeightsError(f"{path}: {tensor.dtype} weights given; floating-point ones are allowed, use .float()")
        if tensor.is_floating_point() and not _finite(tensor):
            raise WeightsError(f"{path}: holds NaN or infinity; collapse a network with finite weights")
    floating = [tensor for tensor in held.values() if tensor.is_floating_point()]
    devices = {str(tensor.device) for tensor in held.values()}
    if len(devices) > 1:
        raise WeightsError(f"weights on several devices given ({', '.join(sorted(devices))}); move them to one")
    if floating:
        return floating[0].dtype, floating[0].device
    if isinstance(example, torch.Tensor) and example.is_floating_point():
        return example.dtype, example.device
    raise WeightsError("the module has no weights that tell dtype and device; give a floating-point tensor as example")


def _check_initialised(module: nn.Module) -> None:
    for path, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise WeightsError(f"{path}: not initialised yet; run the module once on an input")


def _finite(tensor: torch.Tensor) -> bool:
    """By the extremes, which NaN and infinity reach: no mask as large as the weights."""
    return not tensor.numel() or bool(torch.stack(tensor.detach().aminmax()).isfinite().all())


@contextlib.contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """`module` in training or in eval mode; afterwards each submodule is in its own mode again."""
    modes = {each: each.training for each in module.modules()}
    module.train(training)
    try:
        yield
    finally:
        for each, mode in modes.items():
            each.training = mode


@contextlib.contextmanager
def certifying(device: torch.device) -> Iterator[None]:
    """Full precision: no TF32, no autocast; and outside of inference mode, which records no gradients."""
    with _full_float32(), torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        yield


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """No operator on float32 computes in TF32 or bfloat16.

    By torch's older switches, which torch.export asks, and by its newer ones, of each operator. Once a caller has set a
    newer one, the older cannot be told, and are not put back.
    """
    older = []
    for tell, put in OLDER_SWITCHES:
        with contextlib.suppress(RuntimeError):
            older.append((put, tell()))
    newer = [(operators, operators.fp32_precision) for operators in ON_FLOAT32]
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        for operators in ON_FLOAT32:
            operators.fp32_precision = "ieee"
        yield
    finally:
        for put, told in older:
            put(told)
        for operators, precision in newer:
            operators.fp32_precision = "none"  # as the backend has it, if it was so
            if operators.fp32_precision != precision:
                operators.fp32_precision = precision


def in_float64(dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """While it is on, float32 that a forward names, or gets by default, is float64.

    For the float64 copy of a network of `dtype`, which may cast, or make tensors, in its forward. One that is of
    float64 itself means float32 where it says so. For this thread alone, as a default dtype would not be.
    """
    return contextlib.nullcontext() if dtype is torch.float64 else _InFloat64()


class _InFloat64(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = [torch.float64 if arg is torch.float32 else arg for arg in args]
        kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in kwargs.items()}
        given = [*args, *kwargs.values()]
        flat = [each for arg in given for each in (arg if isinstance(arg, list | tuple) else (arg,))]
        if {torch.float32, torch.float64} <= {each.dtype for each in flat if isinstance(each, torch.Tensor)}:
            # The float32 one is not the module's: a constant of its file, or of a cache. What is written to stays.
            first = int(_writes(func.__name__))
            args = [*args[:first], *tree_map_only(torch.Tensor, _promoted, args[first:])]
            kwargs = {name: arg if name == "out" else _promoted(arg) for name, arg in kwargs.items()}
        result = func(*args, **kwargs)
        return _promoted(result)


def _promoted(value):
    return value.double() if isinstance(value, torch.Tensor) and value.dtype is torch.float32 else value


def _writes(name: str) -> bool:
    """Whether a function of that name writes into its first argument."""
    return name.endswith("_") and (name[-2] != "_" or name.startswith(("__i", "__set")))


@contextlib.contextmanager
def input_errors(x: torch.Tensor) -> Iterator[None]:
    """What a module raises on the input `x` becomes an InputShapeError, but SkipfoldErrors and memory running out."""
    try:
        yield
    except (SkipfoldError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        raise InputShapeError(
            f"the module does not take an input of shape {list(x.shape)}, {x.dtype}: {first_line(error)}; "
            "give the shape of one sample, without the batch, or a batch as example"
        ) from error


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference of two tensors, relative to the largest absolute value in `expected`.

    Infinite where the shapes differ, or where `expected` is all 0 and `found` is not; 0 where both are. Infinite or not
    a number where either holds such values: ask whether the error is within a tolerance, not whether it is beyond one.
    """
    if found.shape != expected.shape:
        return math.inf
    difference = float((found - expected).detach().abs().max())
    scale = float(expected.detach().abs().max())
    if scale == 0:
        return math.inf if difference else 0.0
    return difference / scale

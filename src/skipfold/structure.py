"""Which operators a module runs, and whether each is affine in what depends on the input.

The operators are watched at PyTorch's dispatcher while the module runs once on a real input. A torch.export graph
would hold the same aten operators; watching needs no capture, so modules that cannot be exported are judged as well,
every offender is found rather than the first, and each is known by the submodule that ran it. Values that leave torch
(`tensor.numpy()`) are out of sight, so that leaving is noted: the numerical residual is the second check.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

JOINTLY_AFFINE = set(
    """
    add sub rsub neg positive sum mean cumsum trace fill zero copy clone detach alias lift_fresh _to_copy
    cat stack view reshape _unsafe_view _reshape_alias view_copy unsqueeze squeeze expand permute transpose t slice
    select narrow split split_with_sizes chunk unbind as_strided flip roll repeat tril triu diagonal diag_embed unfold
    slice_scatter select_scatter im2col col2im pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle
    constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d _adaptive_avg_pool2d _adaptive_avg_pool3d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_lanczos2d_aa
    """.split()
)
"""Operators that are affine in all their tensors together."""

PRODUCT = ({0}, {1})
PRODUCT_AND_SUM = ({0, 1}, {0, 2})
FIRST = ({0},)

AFFINE_IN = {
    "mul": PRODUCT,
    "mm": PRODUCT,
    "bmm": PRODUCT,
    "mv": PRODUCT,
    "dot": PRODUCT,
    "matmul": PRODUCT,
    "addmm": PRODUCT_AND_SUM,
    "baddbmm": PRODUCT_AND_SUM,
    "addbmm": PRODUCT_AND_SUM,
    "addmv": PRODUCT_AND_SUM,
    "addcmul": PRODUCT_AND_SUM,
    "addcdiv": ({0, 1},),
    "convolution": ({0, 2}, {1, 2}),
    "linear": ({0, 2}, {1, 2}),
    "lerp": ({0, 1}, {2}),
    "where": ({1, 2},),
    "masked_fill": ({0, 2},),
    "index_put": ({0, 2},),
    "index_add": ({0, 3},),
    "index_copy": ({0, 3},),
    "scatter": ({0, 3},),
    "scatter_add": ({0, 3},),
    "div": FIRST,
    "ldexp": FIRST,
    "index": FIRST,
    "index_select": FIRST,
    "gather": FIRST,
    "grid_sampler_2d": FIRST,
    "grid_sampler_3d": FIRST,
    "native_batch_norm": FIRST,
    "_native_batch_norm_legit": FIRST,
    "_native_batch_norm_legit_no_training": FIRST,
    "_batch_norm_no_update": FIRST,
    "cudnn_batch_norm": FIRST,
    "miopen_batch_norm": FIRST,
}
"""For each operator, the sets of argument positions that may depend on the input together."""

CONSTANT = set(
    "empty_like zeros_like ones_like full_like new_empty new_zeros new_ones new_full _shape_as_tensor".split()
)
"""Operators whose result depends on the shape of their tensors, not on the values."""

READS_VALUES = set(
    "_local_scalar_dense item is_nonzero equal allclose nonzero _is_all_true _is_any_true unique".split()
)
"""Operators by which Python, or a shape, comes to depend on values: a branch on data."""

LEAVES = {torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__, torch.Tensor.__dlpack__}
"""Methods by which values leave torch, past its dispatcher."""

NOT_AFFINE = set(
    """
    relu relu6 leaky_relu elu celu selu gelu silu mish sigmoid log_sigmoid_forward tanh hardtanh hardswish hardsigmoid
    hardshrink softshrink softplus prelu _prelu_kernel rrelu_with_noise threshold glu abs sgn sign exp expm1 log log1p
    log2 sqrt rsqrt reciprocal pow sin cos tan atan erf round floor ceil trunc frac clamp clamp_min clamp_max maximum
    minimum fmax fmin max min amax amin aminmax median argmax argmin sort topk kthvalue cummax cummin max_pool1d
    max_pool2d max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d adaptive_max_pool3d
    fractional_max_pool2d _softmax _log_softmax logsumexp var std var_mean std_mean norm linalg_vector_norm
    native_layer_norm _fused_rms_norm native_group_norm prod cumprod gt lt ge le eq ne isnan logical_and logical_or
    logical_not bitwise_not floor_divide remainder fmod _native_multi_head_attention
    _scaled_dot_product_attention_math _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
    _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
    """.split()
)
"""Operators known not to be affine; whatever is in none of these lists is unknown."""


@dataclass
class Structure:
    """What was seen while a module ran once.

    `not_affine` and `unknown` map submodule paths ("" is the module itself) to reasons. In bytes: `sample` is the
    memory of all tensors that the run made from its input, `constant` of those that it made without, `workspace` of the
    largest copy of a convolution's input in columns.
    """

    not_affine: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    sample: int = 0
    constant: int = 0
    workspace: int = 0


def watch(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, Structure]:
    """`module(x)` and the structure seen. Whatever `module` raises is let through."""
    watcher = _Watcher(module, x)
    with paths(module, watcher.path), watcher, _Leaving(watcher):
        output = module(x)
    if isinstance(output, torch.Tensor):
        if not watcher.depends(output):
            watcher.note(False, "the output does not depend on the input by any operator", path="")
        if not output.is_floating_point():
            watcher.note(True, f"the output is {output.dtype}", path="")
    return output, watcher.structure


@contextlib.contextmanager
def paths(module: nn.Module, path: list[str]) -> Iterator[None]:
    """Keep the path of the submodule that runs at the end of `path`."""

    def leave(*_) -> None:
        path.pop()

    hooks = []
    for name, child in module.named_modules():
        hooks.append(child.register_forward_pre_hook(lambda *_, name=name: path.append(name)))
        hooks.append(child.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Watcher(TorchDispatchMode):
    """Follows, operator by operator, which storages depend on the input."""

    def __init__(self, module: nn.Module, x: torch.Tensor):
        super().__init__()
        self.module = module
        self.path = [""]
        self.structure = Structure()
        self.held = [x]  # keeps storages alive, so that none is taken for another at the same address
        self.dependent = {_storage(x)}
        self.seen = {_storage(x)}

    def depends(self, tensor: torch.Tensor) -> bool:
        return _storage(tensor) in self.dependent

    def note(self, known: bool, reason: str, path: str | None = None) -> None:
        path = self.path[-1] if path is None else path
        reasons = self.structure.not_affine if known else self.structure.unknown
        if reason not in (held := reasons.get(path, "")):
            reasons[path] = f"{held}; {reason}" if held else reason

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Before the call, since an operator that works in place changes what its argument depends on.
        name = func.overloadpacket.__name__.rstrip("_")
        positions = self._dependent_positions(func, args, kwargs)
        result = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.note(True, self._reason(name, "draws random numbers"))
        if positions:
            self._judge(func, name, positions, args, kwargs)
            if name in JOINTLY_AFFINE:
                self._note_rounding(name, (args, kwargs), result)
        self._follow(result, bool(positions), name not in CONSTANT)
        if name == "convolution":
            self._count_workspace(args, result)
        return result

    def _dependent_positions(self, func, args, kwargs) -> set[int]:
        names = [argument.name for argument in func._schema.arguments]
        values = dict(enumerate(args)) | {names.index(key): value for key, value in kwargs.items()}
        return {i for i, value in values.items() if any(map(self.depends, _tensors(value)))}

    def _judge(self, func, name: str, positions: set[int], args, kwargs) -> None:
        if kwargs.get("rounding_mode"):
            self.note(True, self._reason(name, "is not affine", "with a rounding mode "))
        elif name in JOINTLY_AFFINE or name in CONSTANT:
            return
        elif name in AFFINE_IN:
            if "batch_norm" in name and True in args[5:6]:
                self.note(True, self._reason(name, "uses the statistics of the batch"))
            elif not any(positions <= allowed for allowed in AFFINE_IN[name]):
                names = " and ".join(f"`{func._schema.arguments[i].name}`" for i in sorted(positions))
                self.note(True, self._reason(name, "is not affine", f"with input-dependent {names} "))
        elif name in READS_VALUES:
            self.note(True, f"aten.{name} reads values of the input (a branch on data, or .item())")
        elif name in NOT_AFFINE:
            self.note(True, self._reason(name, "is not affine"))
        else:
            self.note(False, self._reason(name, "is unknown to the structural check"))

    def _note_rounding(self, name: str, given, result) -> None:
        """Where an affine operator gives what depends on the input a coarser dtype."""
        finest = min(_step(tensor) for tensor in _tensors(given) if self.depends(tensor))
        coarse = [tensor.dtype for tensor in _tensors(result) if _step(tensor) > finest]
        if coarse:
            self.note(True, self._reason(name, f"rounds to {coarse[0]}"))

    def _reason(self, name: str, verdict: str, arguments: str = "") -> str:
        """The verdict on the running submodule where it is one of torch's own layers, else on the operator."""
        module = self.module.get_submodule(self.path[-1])
        own = type(module).__module__.startswith("torch.nn.modules") and not any(module.children())
        return f"{type(module).__name__} {verdict}" if own else f"aten.{name} {arguments}{verdict}"

    def _follow(self, result, made_of_input: bool, by_values: bool) -> None:
        for tensor in _tensors(result):
            key = _storage(tensor)
            if key not in self.seen:
                self.seen.add(key)
                self.held.append(tensor)
                if made_of_input:
                    self.structure.sample += tensor.untyped_storage().nbytes()
                else:
                    self.structure.constant += tensor.untyped_storage().nbytes()
            if made_of_input and by_values:
                self.dependent.add(key)

    def _count_workspace(self, args, result: torch.Tensor) -> None:
        """CPU convolutions in float64 first lay their input out in columns, one for each output pixel."""
        x, weight, transposed = args[0], args[1], args[6]
        pixels = (x if transposed else result).shape[2:]
        columns = (result if transposed else x).shape[1] * math.prod(weight.shape[2:]) * math.prod(pixels)
        self.structure.workspace = max(self.structure.workspace, len(x) * columns * x.element_size())


class _Leaving(TorchFunctionMode):
    """Notes where values that depend on the input leave torch."""

    def __init__(self, watcher: _Watcher):
        super().__init__()
        self.watcher = watcher

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in LEAVES and self.watcher.depends(args[0]):
            self.watcher.note(False, f"Tensor.{func.__name__} reads values of the input, out of torch's sight")
        return func(*args, **kwargs or {})


def _tensors(value) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _step(tensor: torch.Tensor) -> float:
    """Distance of 1 to the next value that the dtype holds."""
    return torch.finfo(tensor.dtype).eps if tensor.is_floating_point() or tensor.is_complex() else 1.0

"""Affine layers that follow or meet each other, as one layer: BatchNorms, convolutions, the weights of skips."""

import copy
import inspect
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torchvision.ops import FrozenBatchNorm2d

from skipfold.chains import CONVOLUTIONS, collapse_convolution, extent
from skipfold.cropping import CroppedConv2d
from skipfold.equality import Equality, calls, certify
from skipfold.errors import CollapseError, SkipError, first_line
from skipfold.graphs import Reader, alike, check_forward, fixed_parameters, hooked, needed
from skipfold.homotopy import ADDS, Skip
from skipfold.subject import BATCHNORM

CONVOLVING = {*CONVOLUTIONS, CroppedConv2d}
"""By exact type, see `_convolves`."""

TRANSPOSED = {nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d}
IDENTITIES = {nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout}
IDENTITIES |= {nn.Identity}
"""In eval mode, in which networks are folded; by exact type."""

STATISTICS = ("running_mean", "running_var", "weight", "bias")
"""What a BatchNorm in eval mode normalizes by."""


def fold_affine(
    model: nn.Module, example: torch.Tensor | Sequence[int], *, grow: bool = True, export: bool = True
) -> tuple[nn.Module, Equality]:
    """A copy of `model` in eval mode in which neighbouring affine layers are one, and the certificate.

    For a network whose skips stay, at any t: a BatchNorm goes into the convolution or linear layer before it, or into
    the convolution after it if that does not pad, a convolution without padding into the convolution before it (the
    kernel grows), a linear layer into the one before, the weights of a Skip into what it adds, and parallel
    convolutions of one input into one kernel where they fit; the input itself counts as one, and a BatchNorm of it.
    What is not affine stays, and so does what no one convolution is: zeros put between two of them are no zeros of the
    input. Without `grow` two layers stay where one would hold more weights: a depthwise convolution and the 1x1
    convolution after it are a dense one, which takes longer. Read by torch.fx, so the result is a torch.fx.GraphModule;
    t is fixed in it, and so are weights that a parametrization computes. A part that torch.fx cannot read stays as it
    is.

    Raises SkipError where torch.fx cannot read the network's own forward, or where the result is not the same function;
    ModuleError, InputShapeError and WeightsError where `model` cannot be run.
    """

    def convert(source: nn.Module) -> nn.Module:
        return fold(copy.deepcopy(source).eval(), grow, example)

    certificate = certify("fold_affine", model, convert, example, export=export)
    return convert(model), certificate


def fold_batchnorm(model: nn.Module, example: torch.Tensor | Sequence[int] | None = None) -> nn.Module:
    """A copy of `model` in eval mode with every BatchNorm that follows a convolution or linear layer folded into it.

    Weights that a parametrization computes, as torch's weight_norm does, are fixed. `example`, a batch or the shape of
    one sample, tells of a BatchNorm after a linear layer whether it normalizes what that gives, as it does in [N, C];
    without it that is assumed. Not certified. Raises SkipError where torch.fx cannot read the network's own forward; a
    part that it cannot read keeps its BatchNorms.
    """
    model = copy.deepcopy(model).eval()
    _settle(model)
    graph = _read(model, runs=False)
    gone = _fold_batchnorms(model, graph, example)
    _drop_identities(model, graph)
    chains = [module for module in model.modules() if isinstance(module, nn.Sequential)]
    before = [dict(chain._modules) for chain in chains]
    for chain in chains:
        for name, child in list(chain.named_children()):
            if child in gone and len(chain) > 1:
                delattr(chain, name)
    try:
        left = _read(model, runs=False)
        _drop_identities(model, left)
        same = alike(model, graph, left)
    except SkipError:
        same = False
    if not same:  # a forward takes the layers of one by their places
        for chain, layers in zip(chains, before, strict=True):
            chain._modules = layers
    return model


def fold(model: nn.Module, grow: bool = True, example: torch.Tensor | Sequence[int] | None = None) -> fx.GraphModule:
    """`fold_affine` without a copy and a certificate."""
    _settle(model)
    graph = _read(model)
    _fold_batchnorms(model, graph, example)
    whole = fx.GraphModule(model, graph, type(model).__name__)
    has_effect = needed(whole, graph)
    # Every node, and then again: by then what a step left unused, which keeps others from folding, is gone.
    while sum(_folded(whole, node, grow) for node in list(whole.graph.nodes)):
        whole.graph.eliminate_dead_code(has_effect)
        whole.delete_all_unused_submodules()
    whole.graph.lint()
    whole.recompile()
    return whole.eval()


def _settle(model: nn.Module) -> None:
    """Weights that a parametrization computes become what they are now; torchvision's frozen BatchNorms are torch's."""
    for module in filter(parametrize.is_parametrized, list(model.modules())):
        values = {name: getattr(module, name).detach() for name in module.parametrizations}
        learns = any(parameter.requires_grad for parameter in module.parametrizations.parameters())
        # torch's remove_parametrizations changes the class, which the network that this is a copy of has too.
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        for name, value in values.items():
            setattr(module, name, nn.Parameter(value, learns))
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if path and type(module) is FrozenBatchNorm2d:
            model.set_submodule(path, _thawed(module))


def _thawed(frozen: FrozenBatchNorm2d) -> nn.BatchNorm2d:
    """torchvision's BatchNorm with fixed statistics and weights, as torch's."""
    norm = nn.BatchNorm2d(len(frozen.weight), frozen.eps).to(frozen.weight)
    norm.load_state_dict(frozen.state_dict(), strict=False)  # it does not count batches
    return norm.requires_grad_(False).eval()


class _Layers(Reader):
    """Reads a whole network, down to torch's own layers; a part that it cannot read stays whole."""

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        known = isinstance(module, Skip | BATCHNORM) or _convolves(module)
        return known or super().is_leaf_module(module, path)

    def call_module(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        read, stack = len(self.graph.nodes), self.module_stack.copy()
        try:
            return super().call_module(module, forward, args, kwargs)
        except Exception:  # whatever a forward does with the proxies of torch.fx
            for node in reversed(list(self.graph.nodes)[read:]):
                self.graph.erase_node(node)
            self.module_stack = stack
            return self.create_proxy("call_module", self.path_of_module(module), args, kwargs)


def _read(model: nn.Module, runs: bool = True) -> fx.Graph:
    try:
        check_forward(model)
        # A network is called with one input.
        called = inspect.signature(model.forward).bind_partial(object())
        return _Layers(fixed_parameters(model, [called]), runs).trace(model)
    except Exception as error:  # whatever a forward does with the proxies of torch.fx
        raise SkipError(
            f"torch.fx cannot read this {type(model).__name__} ({first_line(error)}); give the network itself where "
            "this only wraps it, or rewrite its forward without branches on values, or do without folding"
        ) from error


def _fold_batchnorms(model: nn.Module, graph: fx.Graph, example: torch.Tensor | Sequence[int] | None) -> set[nn.Module]:
    """Each BatchNorm into the layer before it, in `model`; gives the identities put in their places."""
    _drop_identities(model, graph)
    pairs = [(node.target, _pair(model, node)) for node in graph.nodes]
    norms = {path for path, pair in pairs if pair and type(pair[0]) is nn.Linear and isinstance(pair[1], BATCHNORM)}
    seen = calls(model, example, norms) if norms and example is not None else {}
    gone = set()
    for node in graph.nodes:
        if node.target in seen:
            node.meta["sizes"] = max(next(iter(call.arguments.values())).dim() for call in seen[node.target])
        if _normalized(model, node) and type(rest := model.get_submodule(node.target)) is nn.Identity:
            gone.add(rest)
    return gone


def _normalized(model: nn.Module, node: fx.Node) -> bool:
    """A BatchNorm into the layer before it."""
    pair = _pair(model, node)
    if pair is None or not isinstance(pair[1], BATCHNORM) or pair[1].running_mean is None:
        return False
    layer, norm = pair
    if (rest := _after(norm)) is None:
        return False
    if _convolves(layer):
        folded = fuse_conv_bn_eval(layer, norm)
    elif type(layer) in TRANSPOSED and layer.groups == 1:
        folded = fuse_conv_bn_eval(layer, norm, transpose=True)
    # Of more sizes than [N, C] it normalizes another than the last, which the layer gives.
    elif type(layer) is nn.Linear and layer.out_features == norm.num_features and node.meta.get("sizes", 2) == 2:
        folded = fuse_linear_bn_eval(layer, norm)
    else:
        return False
    folded.bias.requires_grad_(layer.weight.requires_grad)  # or it would be frozen where it is new
    _put(model, node.args[0].target, folded)
    _put(model, node.target, rest)
    return True


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    """`module` in the place of the one at `path`, under all paths that it has."""
    old = model.get_submodule(path)
    for each in [each for each, other in model.named_modules(remove_duplicate=False) if other is old]:
        model.set_submodule(each, module)


def _convolves(layer: nn.Module) -> bool:
    """Whether `layer` convolves by its own weights: one of torch's, or of a subclass that is only made otherwise."""
    own = type(layer)
    return own in CONVOLVING or any(
        isinstance(layer, base) and own.forward is base.forward and own._conv_forward is base._conv_forward
        for base in CONVOLUTIONS
    )


def _after(norm: nn.Module) -> nn.Module | None:
    """What a BatchNorm in eval mode does to what it has normalized, as timm's do; None where that is unknown."""
    if type(norm).forward in (BATCHNORM.forward, nn.SyncBatchNorm.forward):
        return nn.Identity()
    try:
        rest = fx.GraphModule(norm, _Layers().trace(norm), type(norm).__name__)
    except Exception:  # whatever a forward does with the proxies of torch.fx
        return None
    graph = rest.graph
    has_effect = needed(rest, graph)
    for check in graph.find_nodes(op="call_function", target=torch._assert):
        graph.erase_node(check)
    graph.eliminate_dead_code(has_effect)
    x, *others = graph.find_nodes(op="placeholder")
    normalize, *more = x.users or [None]
    if others or more or normalize is None or normalize.target is not nn.functional.batch_norm:
        return None
    given = inspect.signature(nn.functional.batch_norm).bind(*normalize.args, **normalize.kwargs)
    given.apply_defaults()
    of_norm = {name: None if getattr(norm, name) is None else name for name in STATISTICS}
    if any(getattr(given.arguments[name], "target", None) != held for name, held in of_norm.items()):
        return None
    if given.arguments["training"] is not False or given.arguments["eps"] != norm.eps:
        return None
    normalize.replace_all_uses_with(x)
    graph.erase_node(normalize)
    _drop_identities(rest, graph)
    graph.eliminate_dead_code(has_effect)
    rest.delete_all_unused_submodules()
    rest.recompile()
    steps = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    if not steps:
        return nn.Identity()
    return rest.get_submodule(steps[0].target) if [node.op for node in steps] == ["call_module"] else rest


def _pair(model: nn.Module, node: fx.Node) -> tuple[nn.Module, nn.Module] | None:
    """The module of the node before and of `node`, where neither is used elsewhere."""
    if node.op != "call_module" or len(node.args) != 1 or node.args[0].op != "call_module":
        return None
    before = node.args[0]
    if len(before.users) > 1 or any(_uses(node.graph, each) > 1 for each in (before, node)):
        return None
    pair = model.get_submodule(before.target), model.get_submodule(node.target)
    return pair if all(_plain(module) for module in pair) else None


def _plain(module: nn.Module) -> bool:
    """Whether it does what its class says and no more."""
    return not hooked(module) and "forward" not in vars(module)


def _uses(graph: fx.Graph, node: fx.Node) -> int:
    """How many nodes use the module at `node`, a weight of it, or a part of the network that it is in."""
    used = [f"{other.target}." for other in graph.nodes if other.op in ("call_module", "get_attr")]
    mine = f"{node.target}."
    return sum(other.startswith(mine) or mine.startswith(other) for other in used)


def _folded(whole: fx.GraphModule, node: fx.Node, grow: bool) -> bool:
    """Whether `node` was folded into its neighbours."""
    steps = (_without_effect, _normalized, _normalized_before, _weighted, _joined)
    return any(step(whole, node) for step in steps) or _chained(whole, node, grow)


def _drop_identities(model: nn.Module, graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        _without_effect(model, node)


def _without_effect(model: nn.Module, node: fx.Node) -> bool:
    """Whether `node` gave what it was given, and is gone: an identity, a dropout, what adds 0 as Python's sum does."""
    if (node.op, node.target) in ADDS and not node.kwargs and 0 in node.args:
        given = [arg for arg in node.args if isinstance(arg, fx.Node)]
    elif node.op == "call_module":
        module = model.get_submodule(node.target)
        given = node.args if type(module) in IDENTITIES and _plain(module) else ()
    else:
        return False
    if len(given) != 1:
        return False
    node.replace_all_uses_with(given[0])
    node.graph.erase_node(node)
    return True


def _chained(whole: fx.GraphModule, node: fx.Node, grow: bool) -> bool:
    """A convolution into the convolution before it, a linear layer into the linear layer before it."""
    pair = _pair(whole, node)
    if pair is None or not (grow or _no_larger(*pair)):
        return False
    before, after = pair
    if type(before) is nn.Linear and type(after) is nn.Linear:
        one = _linear_chain(before, after)
    elif type(before) in CONVOLUTIONS and type(after) in CONVOLUTIONS:
        try:
            one, _ = collapse_convolution(nn.Sequential(before, after))
        except CollapseError:
            return False
        one.requires_grad_(after.weight.requires_grad)
    else:
        return False
    whole.set_submodule(node.args[0].target, one)
    node.replace_all_uses_with(node.args[0])
    whole.graph.erase_node(node)
    return True


def _normalized_before(whole: fx.GraphModule, node: fx.Node) -> bool:
    """A BatchNorm into the convolution after it, which must not pad: its zeros would be no zeros of the input."""
    pair = _pair(whole, node)
    if pair is None or not _is_batchnorm(pair[0]) or type(pair[1]) not in CONVOLUTIONS:
        return False
    norm, layer = pair
    if layer.padding != "valid" and any(size != 0 for size in layer.padding):
        return False
    apart = (layer.groups, 1, -1, *[1] * len(layer.kernel_size))
    scale, shift = (values.view(apart) for values in _scale_and_shift(norm))
    grouped = layer.weight.detach().double().unflatten(0, (layer.groups, -1))
    bias = (grouped * shift).flatten(2).sum(2).flatten()
    if layer.bias is not None:
        bias += layer.bias.detach().double()
    weight = (grouped * scale).flatten(0, 1)
    whole.set_submodule(node.target, _filled(copy.deepcopy(layer), weight, bias, layer.weight))
    whole.set_submodule(node.args[0].target, nn.Identity())
    return True


def _is_batchnorm(module: nn.Module) -> bool:
    """Whether it is a BatchNorm with statistics, which does nothing else."""
    return (
        isinstance(module, BATCHNORM)
        and _plain(module)
        and module.running_mean is not None
        and type(_after(module)) is nn.Identity
    )


def _scale_and_shift(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """What a BatchNorm in eval mode multiplies each channel by, and then adds; float64."""
    mean, variance, gain, bias = (
        None if (held := getattr(norm, name)) is None else held.detach().double() for name in STATISTICS
    )
    scale = (variance + norm.eps).rsqrt() * (1 if gain is None else gain)
    return scale, (0 if bias is None else bias) - mean * scale


def _no_larger(before: nn.Module, after: nn.Module) -> bool:
    """Whether one layer in the place of two of a kind holds no more weights than they do."""
    if type(before) is nn.Linear and type(after) is nn.Linear:
        weights = before.in_features * after.out_features
    elif type(before) in CONVOLUTIONS and type(after) in CONVOLUTIONS:
        kernel, _ = extent([before, after])
        weights = before.in_channels * after.out_channels * math.prod(kernel)
    else:
        return False
    return weights <= before.weight.numel() + after.weight.numel()


def _linear_chain(before: nn.Linear, after: nn.Linear) -> nn.Linear:
    first, second = before.weight.detach().double(), after.weight.detach().double()
    bias = torch.zeros(len(second), dtype=torch.float64, device=second.device)
    if before.bias is not None:
        bias = bias + second @ before.bias.detach().double()
    if after.bias is not None:
        bias = bias + after.bias.detach().double()
    one = nn.Linear(before.in_features, after.out_features, device="meta")
    return _filled(one, second @ first, bias, after.weight)


def _filled(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None, like: nn.Parameter) -> nn.Module:
    """`layer` with these values, in the dtype of `like`, and learning if that does."""
    for name, values in (("weight", weight), ("bias", bias)):
        setattr(layer, name, None if values is None else nn.Parameter(values.to(like), like.requires_grad))
    return layer


def _weighted(whole: fx.GraphModule, node: fx.Node) -> bool:
    """A Skip as an addition; its weights go into the layers before it, where there are any."""
    if node.op != "call_module" or not isinstance(skip := whole.get_submodule(node.target), Skip):
        return False
    weights = [float(weight) for weight in skip.pair(torch.float64)]
    given = inspect.signature(skip.forward).bind(*node.args, **node.kwargs).args
    sides = [
        (side, 1.0 if _scaled(whole, side, weight) else weight)
        for side, weight in zip(given, weights, strict=True)
        if weight
    ]
    sides.sort(key=lambda item: item[1] != 1)
    with whole.graph.inserting_before(node):
        result, weight = sides[0]
        if weight != 1:
            result = whole.graph.call_function(operator.mul, (result, weight))
        for other, alpha in sides[1:]:
            result = whole.graph.call_function(torch.add, (result, other), {"alpha": alpha})
    node.replace_all_uses_with(result)
    whole.graph.erase_node(node)
    return True


def _scaled(whole: fx.GraphModule, node: fx.Node, weight: float) -> bool:
    """Whether the layer at `node` could be multiplied by `weight`: it is one, and nothing else reads it."""
    if node.op != "call_module" or len(node.users) > 1 or _uses(whole.graph, node) > 1:
        return False
    layer = whole.get_submodule(node.target)
    if not _plain(layer) or type(layer) not in CONVOLVING | TRANSPOSED | {nn.Linear}:
        return False
    bias = None if layer.bias is None else layer.bias.detach() * weight
    _filled(layer, layer.weight.detach() * weight, bias, layer.weight)
    return True


def _joined(whole: fx.GraphModule, node: fx.Node) -> bool:
    """The sum of two convolutions of one input, one of which may be the input itself or a BatchNorm of it, as one."""
    sides = [side for side in node.args if isinstance(side, fx.Node)]
    if (node.op, node.target) not in ADDS or len(sides) != 2:
        return False
    layers = [_convolution(whole, side) for side in sides]
    alpha = float(node.kwargs.get("alpha", 1))
    if alpha != 1 and layers[1] is not None:
        return False
    for i, (layer, other) in enumerate(zip(layers, reversed(layers), strict=True)):
        if layer is None and other is not None:
            layers[i] = _one_tap(whole, sides[i], sides[1 - i].args[0], other, alpha if i else 1.0)
            break
    else:
        if None in layers or sides[0].args[0] is not sides[1].args[0]:
            return False
    if None in layers:
        return False
    large, small = sorted(layers, key=lambda layer: layer.kernel_size, reverse=True)
    if not _fits(small, large):
        return False
    place = next(side for side in sides if _convolution(whole, side) is not None)
    whole.set_submodule(place.target, _sum(large, small))
    node.replace_all_uses_with(place)
    whole.graph.erase_node(node)
    return True


def _convolution(whole: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The convolution at `node`, where nothing but one addition reads it."""
    if node.op != "call_module" or len(node.users) > 1 or _uses(whole.graph, node) > 1:
        return None
    layer = whole.get_submodule(node.target)
    return layer if type(layer) in CONVOLUTIONS and _plain(layer) else None


def _one_tap(whole: fx.GraphModule, node: fx.Node, x: fx.Node, like: nn.Module, weight: float) -> nn.Module | None:
    """`weight` times `node` as a convolution of `x` with one tap, where it is `x` or a BatchNorm of it; else None.

    None too where `like`, the convolution that it shall be added to, changes size or channels.
    """
    if like.in_channels != like.out_channels or set(like.stride) != {1}:
        return None
    scale, shift = torch.ones(like.in_channels, dtype=torch.float64, device=like.weight.device), None
    if node is not x:
        norm = whole.get_submodule(node.target) if node.op == "call_module" else None
        if norm is None or not _is_batchnorm(norm) or node.args != (x,) or len(node.users) > 1:
            return None
        scale, shift = _scale_and_shift(norm)
    one = type(like)(len(scale), len(scale), 1, groups=like.groups, device="meta")
    eye = torch.eye(len(scale) // like.groups, dtype=scale.dtype, device=scale.device).repeat(like.groups, 1)
    kernel = (weight * scale[:, None] * eye).reshape(one.weight.shape)
    return _filled(one, kernel, None if shift is None else weight * shift, like.weight)


def _fits(small: nn.Module, large: nn.Module) -> bool:
    """Whether the taps of `small` are taps of `large` on the same input."""
    if any(isinstance(layer.padding, str) or layer.padding_mode != "zeros" for layer in (small, large)):
        return False
    if type(small) is not type(large) or small.groups != large.groups or small.stride != large.stride:
        return False
    if small.dilation != large.dilation and max(small.kernel_size) > 1:
        return False
    for i, dilation in enumerate(large.dilation):
        shift, rest = divmod(large.padding[i] - small.padding[i], dilation)
        sizes = large.kernel_size[i], small.kernel_size[i]
        spare = dilation * (sizes[0] - 1) - 2 * large.padding[i]
        if rest or not 0 <= shift <= sizes[0] - sizes[1]:
            return False
        if spare != small.dilation[i] * (sizes[1] - 1) - 2 * small.padding[i]:
            return False
    return True


def _sum(large: nn.Module, small: nn.Module) -> nn.Module:
    weight = large.weight.detach().clone()
    shifts = [(large.padding[i] - small.padding[i]) // large.dilation[i] for i in range(len(large.kernel_size))]
    place = tuple(slice(shift, shift + size) for shift, size in zip(shifts, small.kernel_size, strict=True))
    weight[(slice(None), slice(None), *place)] += small.weight.detach()
    biases = [layer.bias.detach() for layer in (large, small) if layer.bias is not None]
    return _filled(copy.deepcopy(large), weight, sum(biases) if biases else None, large.weight)

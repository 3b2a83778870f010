"""Skip connections taken out of a network whose skip strength is 0."""

import copy
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import fx, nn

from skipfold.cropping import crop_dead_taps
from skipfold.equality import Equality, certify
from skipfold.errors import NoSkipsError, SkipError
from skipfold.folding import fold_batchnorm
from skipfold.graphs import free_name, needed
from skipfold.homotopy import (
    HomotopyBlock,
    Skip,
    adding,
    check_hooks,
    innermost_first,
    insert_skips,
    skip_strengths,
    skips,
)
from skipfold.recursion import SkipCNN
from skipfold.subject import check_module, copied


def remove_skips(
    model: nn.Module,
    example: torch.Tensor | Sequence[int],
    *,
    fold: bool = True,
    crop: bool = False,
    export: bool = True,
) -> tuple[nn.Module, Equality]:
    """A copy of `model`, whose t are all 0, in eval mode without skips, and the certificate that it is the same.

    No addition, no projection, no t; blocks that are left as a chain become an nn.Sequential. Only what a Skip adds is
    a skip here: other additions stay, and the certificate names them. `fold` puts BatchNorms into the layers before
    them, `crop` leaves out the taps of kernels that only ever meet padding: exact for the size of `example` (a batch,
    or the shape of one sample), refused for others. `export` certifies what torch.export makes of the result too.

    Raises SkipError, naming the blocks, where a t is not 0, and where the result is not the same function; NoSkipsError
    where the network has no t though it adds what it skips; ModuleError, InputShapeError and WeightsError where `model`
    cannot be run.
    """
    check_module(model)
    if not skips(model):
        _check_additions(model, example)

    def convert(source: nn.Module) -> nn.Module:
        plain = strip(source).eval()
        plain = fold_batchnorm(plain, example) if fold else plain
        plain = crop_dead_taps(plain, example) if crop else plain
        for parameter in plain.parameters():
            parameter.data = parameter.data.contiguous()
        return plain

    _check_strengths(model)
    certificate = certify("remove_skips", model, convert, example, export=export, skip=Skip)
    return convert(model), certificate


def strip(model: nn.Module) -> nn.Module:
    """A copy of `model`, whose t are all 0, without its skips; not folded, not certified. Raises SkipError."""
    _check_strengths(model)
    model = copy.deepcopy(model)
    if isinstance(model, SkipCNN):
        model.shares, model.skip = {}, None
        return model
    done: dict[int, nn.Module] = {}
    for path, module in innermost_first(model):
        if id(module) in done:
            plain = done[id(module)]
        elif isinstance(module, HomotopyBlock):
            check_hooks(path, module)
            plain = _chain(module, [*module.order, "relu"])
        elif isinstance(module, fx.GraphModule) and any(isinstance(child, Skip) for child in module.children()):
            check_hooks(path, module)
            plain = _without_skips(module)
        else:
            continue
        if not path:
            return plain
        done[id(module)] = plain
        model.set_submodule(path, plain)
    if left := list(skips(model)):
        raise SkipError(f"skips that no block of to_homotopy holds: {', '.join(left)}; convert the network with it")
    return model


def _check_additions(model: nn.Module, example: torch.Tensor | Sequence[int]) -> None:
    """Raises NoSkipsError where `to_homotopy` would find a skip, which a network without skips has not."""
    try:
        found = skips(insert_skips(copied(model), among=adding(model, example)))
    except SkipError:
        return
    named = ", ".join(path.rpartition(".")[0] or "network" for path in found)
    raise NoSkipsError(f"the network has no skip strength t, but skips in {named}; convert it with to_homotopy first")


def _check_strengths(model: nn.Module) -> None:
    held = {path: t for path, t in skip_strengths(model).items() if t}
    if held:
        named = ", ".join(f"{path} (t = {t:g})" for path, t in held.items())
        raise SkipError(f"skips can be removed at t = 0 only; not 0 in: {named}; train with a schedule that ends at 0")


def _chain(block: nn.Module, order: Sequence[str]) -> nn.Sequential:
    """The children of `block` that `order` names, in this order; one named twice is there twice."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name in order:
        layers[free_name(name, layers)] = block.get_submodule(name)
    chain = nn.Sequential(layers)
    chain.training = block.training
    return chain


def _without_skips(block: fx.GraphModule) -> nn.Module:
    has_effect = needed(block, block.graph)
    for node in list(block.graph.nodes):
        if node.op == "call_module" and isinstance(block.get_submodule(node.target), Skip):
            node.replace_all_uses_with(node.args[0])
            block.graph.erase_node(node)
    block.graph.eliminate_dead_code(has_effect)
    block.delete_all_unused_submodules()
    block.recompile()
    order = [node for node in block.graph.nodes if node.op not in ("placeholder", "output")]
    before = [*block.graph.find_nodes(op="placeholder"), *order]
    is_chain = len(before) == len(order) + 1 and all(
        node.op == "call_module" and node.args == (source,) and not node.kwargs and "." not in node.target
        for node, source in zip(order, before, strict=False)
    )
    return _chain(block, [node.target for node in order]) if is_chain else block

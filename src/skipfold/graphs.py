"""One module's own forward as a torch.fx graph, in training and in eval mode alike."""

import itertools
import random
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from skipfold.errors import SkipError
from skipfold.subject import in_mode


class ByMode(nn.Module):
    """Gives one of two constants, by its mode.

    A submodule and no self.training in the graph, since the graph is read again when its module is unpickled.
    """

    def __init__(self, in_training: Any, in_eval: Any):
        super().__init__()
        self.in_training, self.in_eval = in_training, in_eval

    def forward(self) -> Any:
        return self.in_training if self.training else self.in_eval

    def extra_repr(self) -> str:
        return f"in_training={self.in_training!r}, in_eval={self.in_eval!r}"


def own_graph(module: nn.Module) -> fx.Graph:
    """The forward of `module`, its submodules kept whole, but for those that only combine values (see `combines`).

    torch.fx runs a forward once, in Python: a constant that depends on self.training would be fixed, as would a random
    number. So it is read in both modes; such constants are given by submodules, which `module` gets. Raises SkipError
    where the modes run other operators, or where random numbers are drawn outside of submodules, and whatever torch.fx
    raises.
    """
    states, graphs = _random_states(), []
    for training in (True, False):
        with in_mode(module, training):
            graphs.append(_Shallow().trace(module))
    if _random_states() != states:
        raise SkipError("it draws random numbers itself; let a submodule draw them")
    return _merged(module, *graphs)


def module_of(graph: fx.Graph, module: nn.Module) -> fx.GraphModule:
    """`module` with `graph` as its forward: its mode, and all that it holds under the names that a state_dict has.

    torch.fx takes only what the graph names, and makes containers anew and every buffer persistent.
    """
    made = fx.GraphModule(module, graph, type(module).__name__)
    made.training = module.training
    constants = made._buffers.keys() - module._buffers.keys()
    made._non_persistent_buffers_set = module._non_persistent_buffers_set | constants
    for held in ("_parameters", "_buffers", "_modules"):
        getattr(made, held).update(getattr(module, held))
    return made


def free_name(stem: str, taken: Container[str]) -> str:
    """The first of stem, stem_1, stem_2, ... that is not in `taken`."""
    numbered = (f"{stem}_{number}" for number in itertools.count(1))
    return next(name for name in itertools.chain([stem], numbered) if name not in taken)


def sources(node: fx.Node) -> set[fx.Node]:
    """`node` and everything that it is computed from, in its torch.fx graph."""
    found, waiting = set(), [node]
    while waiting:
        source = waiting.pop()
        if source not in found:
            found.add(source)
            waiting += source.all_input_nodes
    return found


def combines(module: nn.Module) -> bool:
    """Whether `module` holds nothing, neither weights nor parts, and is none of torch's own: a network's Add, say."""
    held = itertools.chain(module.children(), module.parameters(), module.buffers())
    return next(held, None) is None and not type(module).__module__.startswith("torch.nn.")


class _Shallow(fx.Tracer):
    """Reads one module's own forward, and what combines several values in it; other submodules stay whole."""

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return True

    def call_module(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if combines(module) and sum(isinstance(arg, fx.Proxy) for arg in (*args, *kwargs.values())) > 1:
            return forward(*args, **kwargs)
        return super().call_module(module, forward, args, kwargs)


def _random_states() -> tuple:
    return torch.get_rng_state().tolist(), random.getstate()


def _merged(module: nn.Module, in_training: fx.Graph, in_eval: fx.Graph) -> fx.Graph:
    """`in_training` with a ByMode of `module` in the place of each constant that is another one in eval mode."""

    def chosen(training: Any, evaluating: Any) -> Any:
        if training is evaluating or training == evaluating:
            return training
        if isinstance(training, fx.Node) or isinstance(evaluating, fx.Node):
            raise SkipError("it reads other values in training mode than in eval mode; let a submodule do so")
        name = free_name("by_mode", dir(module))
        module.add_module(name, ByMode(training, evaluating).train(module.training))
        return in_training.call_module(name)

    same = dict(zip(in_eval.nodes, in_training.nodes, strict=False))
    if len(in_training.nodes) != len(in_eval.nodes) or not all(_alike(module, *pair) for pair in same.items()):
        raise SkipError("it runs other operators in training mode than in eval mode; let a submodule do so")
    for theirs, ours in same.items():
        given, spec = tree_flatten((ours.args, ours.kwargs))
        found, other = tree_flatten(fx.map_arg((theirs.args, theirs.kwargs), same.__getitem__))
        if spec != other:
            raise SkipError("it calls an operator otherwise in training mode than in eval mode; let a submodule do so")
        with in_training.inserting_before(ours):
            values = [chosen(*pair) for pair in zip(given, found, strict=True)]
        ours.args, ours.kwargs = tree_unflatten(values, spec)
    return in_training


def _alike(module: nn.Module, one: fx.Node, other: fx.Node) -> bool:
    """Whether both run the same operator, or read the same value; each reading names a constant tensor anew."""
    if one.op != other.op or one.target == other.target:
        return one.op == other.op
    values = [getattr(module, node.target, None) for node in (one, other) if node.op == "get_attr"]
    return len(values) == 2 and all(isinstance(value, torch.Tensor) for value in values) and torch.equal(*values)

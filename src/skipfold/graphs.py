"""One module's own forward as a torch.fx graph, in training and in eval mode alike."""

import contextlib
import copy
import inspect
import itertools
import operator
import random
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph_module import reduce_graph_module
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from skipfold.errors import SkipError
from skipfold.subject import copied, in_mode

CONSTANT = (type(None), bool, int, float, str)
"""Types of values that a forward may branch on while torch.fx reads it."""

SAVES = "it checkpoints activations or saves them elsewhere, which a graph does not; let the caller of the module do so"

IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod}
IN_PLACE |= {operator.ipow, operator.iand, operator.ior, operator.ixor}
"""Python's operators that change their first tensor."""


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


class Converted(fx.GraphModule):
    """A module with another forward; its copies and pickles hold, as torch.fx's do not, all that it holds as it does.

    torch.fx's forget which buffers are persistent, what containers are, and hooks.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> "Converted":
        return _holding(super().__deepcopy__(memo), copy.deepcopy(vars(self), memo))

    def __reduce__(self) -> tuple:
        _, (body, imports) = super().__reduce__()
        return _unpickled, (body, imports, type(self).__name__)


def _unpickled(body: dict[str, Any], imports: str, name: str) -> Converted:
    made = reduce_graph_module(body, imports)
    return _holding(Converted(made, made.graph, name), body)


def _holding(made: Converted, held: Mapping[str, Any]) -> Converted:
    vars(made).update({name: held[name] for name in vars(nn.Module())})
    return made


def own_graph(module: nn.Module, fixed: Mapping[str, Any] | None = None) -> fx.Graph:
    """The forward of `module`, its submodules kept whole, but for those that only combine values (see `combines`).

    torch.fx runs a forward once, in Python: a constant that depends on self.training would be fixed, as would a random
    number. So it is read in both modes; such constants are given by submodules, which `module` gets. Parameters in
    `fixed` have the values there, and the graph refuses others. Raises SkipError where the modes run other operators,
    where outside of submodules random numbers are drawn, gradients turned off, autocast set or activations
    checkpointed, and whatever torch.fx raises.
    """
    check_forward(module)
    states, graphs = _random_states(), []
    for training in (True, False):
        with in_mode(module, training), torch.enable_grad(), torch.autograd.graph.disable_saved_tensors_hooks(SAVES):
            graphs.append(_Shallow(fixed).trace(module))
    if _random_states() != states:
        raise SkipError("it draws random numbers itself; let a submodule draw them")
    return _merged(module, *graphs)


def hooked(module: nn.Module) -> bool:
    """Whether it does more, or its gradients, than its forward says."""
    return any(
        getattr(module, hooks)
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )


def check_forward(module: nn.Module) -> None:
    """Raises SkipError where `module` has a forward of its own: torch.fx would read that of its class."""
    if "forward" in vars(module):
        raise SkipError("its forward was assigned to the instance; define it in a class")


def module_of(graph: fx.Graph, module: nn.Module) -> Converted:
    """`module` with `graph` as its forward: its mode, and all that it holds under the names that a state_dict has.

    torch.fx takes only what the graph names, and makes containers anew and every buffer persistent.
    """
    made = Converted(module, graph, type(module).__name__)
    made.training = module.training
    constants = made._buffers.keys() - module._buffers.keys()
    made._non_persistent_buffers_set = module._non_persistent_buffers_set | constants
    for held in ("_parameters", "_buffers", "_modules"):
        getattr(made, held).update(getattr(module, held))
    return made


def fixed_parameters(module: nn.Module, calls: list[inspect.BoundArguments]) -> dict[str, Any]:
    """Optional parameters of its forward that none of `calls` gives another value than the default, with that."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {
        each.name: each.default
        for each in parameters
        if isinstance(each.default, CONSTANT)
        and all(_same(call.arguments.get(each.name, each.default), each.default) for call in calls)
    }


def _same(value: Any, constant: Any) -> bool:
    return type(value) is type(constant) and value == constant


@fx.wrap
def as_read(value: Any, constant: Any, name: str) -> None:
    """Refuses, when a graph runs, another value of a parameter than the one that it was read with."""
    if not _same(value, constant):
        raise SkipError(f"{name}: given to a module that was read with {name}={constant!r}; leave it out")


class Reader(fx.Tracer):
    """torch.fx's, but that parameters in `fixed` are these values, so that a forward may branch on them.

    Buffers are read when the graph runs, so that none is changed, and no branch on one is taken, while torch.fx reads.
    Raises SkipError where one is assigned, as by `self.count += 1`, which no graph does; and, of a graph that `runs`
    and is not only looked at, where the forward sets autocast, which a graph forgets.
    """

    proxy_buffer_attributes = True

    def __init__(self, fixed: Mapping[str, Any] | None = None, runs: bool = True):
        super().__init__()
        self.fixed, self.runs = fixed or {}, runs

    def trace(self, root: nn.Module, concrete_args: Any = None) -> fx.Graph:
        self.autocasts = _autocasts()
        held = {module: dict(module._buffers) for module in root.modules()}
        try:
            graph = super().trace(root, concrete_args)
            if any(isinstance(value, fx.Proxy) for module in held for value in module._buffers.values()):
                raise SkipError("it assigns to a buffer; let a submodule do so, or change it by a method such as add_")
        finally:
            for module, buffers in held.items():
                module._buffers.update(buffers)
        return graph

    def create_node(self, *args, **kwargs) -> fx.Node:
        if self.runs and _autocasts() != self.autocasts:
            raise SkipError("it sets autocast; let a submodule do so, or the caller")
        return super().create_node(*args, **kwargs)

    def create_args_for_root(self, root_fn: Callable, is_module: bool, concrete_args: Any = None) -> tuple:
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        return function, [self._given(arg) for arg in args]

    def _given(self, arg: Any) -> Any:
        name = arg.node.target if isinstance(arg, fx.Proxy) else None
        if name not in self.fixed:
            return arg
        check = self.create_proxy("call_function", as_read, (arg, self.fixed[name], name), {})
        check.node.meta["is_wrapped"] = True  # as torch.fx marks what it does not look into
        return self.fixed[name]


def _autocasts() -> int:
    """How many are entered, of any device, one that is off, or as it was before, too."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def needed(module: nn.Module, graph: fx.Graph) -> Callable[[fx.Node], bool]:
    """Tells which nodes of `graph`, of `module`, have an effect though nothing reads them; for what it is now.

    torch.fx takes every method and every module for pure. Here what is called as a statement has an effect, and what
    changes a value in place, unless it is the only reader of what a layer with weights made.
    """
    readings = (getattr, operator.getitem)
    statements = {node for node in graph.nodes if not node.users and node.target not in readings}

    def has_effect(node: fx.Node) -> bool:
        if _changes_in_place(module, node):
            return not _alone(module, node)
        return node.is_impure() or (node in statements and node.op.startswith("call_"))

    return has_effect


def _changes_in_place(module: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(node.target), "inplace", False))
    if not node.op.startswith("call_"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    given = dict(node.kwargs)
    with contextlib.suppress(TypeError, ValueError):  # a method, or a function of C++
        given |= inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
    marked = name.endswith("_") and not name.endswith("__")
    return marked or node.target in IN_PLACE or given.get("inplace") is True or "out" in given


def _alone(module: nn.Module, node: fx.Node) -> bool:
    made = next(iter(node.all_input_nodes), None)
    if made is None or made.op != "call_module" or set(made.users) != {node}:
        return False
    return next(module.get_submodule(made.target).parameters(), None) is not None


def shapes(module: nn.Module, graph: fx.Graph, call: inspect.BoundArguments) -> dict[fx.Node, torch.Size]:
    """Of each tensor in `graph`, of `module`, when it is called so in eval mode; empty where it takes *args."""
    call.apply_defaults()
    names = [node.target for node in graph.find_nodes(op="placeholder")]
    if any(name.startswith("*") for name in names):
        return {}
    dtype = next((each.dtype for each in module.parameters() if each.is_floating_point()), None)

    def cast(value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype or value.dtype, copy=True) if floating else value

    watching = _Shapes(copied(module), graph=graph)
    with torch.no_grad():
        watching.run(*(tree_map(cast, call.arguments[name]) for name in names))
    return watching.found


class _Shapes(fx.Interpreter):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.found: dict[fx.Node, torch.Size] = {}

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if isinstance(value, torch.Tensor):
            self.found[node] = value.shape
        return value


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


class _Shallow(Reader):
    """Reads one module's own forward, and what combines several values in it; other submodules stay whole.

    With gradients on before; raises SkipError where the forward turns them off, which a graph would forget.
    """

    def create_node(self, *args, **kwargs) -> fx.Node:
        if not torch.is_grad_enabled():
            raise SkipError(
                "it turns gradients off, or checkpoints with use_reentrant; let a submodule do so, or use detach"
            )
        return super().create_node(*args, **kwargs)

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

    same = _matched(module, in_eval, in_training)
    if same is None:
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


def alike(module: nn.Module, one: fx.Graph, other: fx.Graph) -> bool:
    """Whether two graphs of `module` are the same but for the names of their nodes."""
    same = _matched(module, one, other)
    return same is not None and all(
        fx.map_arg((mine.args, mine.kwargs), same.__getitem__) == (theirs.args, theirs.kwargs)
        for mine, theirs in same.items()
    )


def _matched(module: nn.Module, one: fx.Graph, other: fx.Graph) -> dict[fx.Node, fx.Node] | None:
    """Each node of `one` and the one in its place in `other`; None where they run different operators."""
    same = dict(zip(one.nodes, other.nodes, strict=False))
    if len(one.nodes) != len(other.nodes) or not all(_alike(module, *pair) for pair in same.items()):
        return None
    return same


def _alike(module: nn.Module, one: fx.Node, other: fx.Node) -> bool:
    """Whether both run the same operator, or read the same value; each reading names a constant tensor anew."""
    if one.op != other.op or one.target == other.target:
        return one.op == other.op
    values = [getattr(module, node.target, None) for node in (one, other) if node.op == "get_attr"]
    return len(values) == 2 and all(isinstance(value, torch.Tensor) for value in values) and torch.equal(*values)

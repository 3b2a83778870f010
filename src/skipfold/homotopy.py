"""Skip connections with a strength t, in any network whose blocks add what they skip."""

import copy
import inspect
import operator
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import fx, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from skipfold.equality import Equality, additions, calls, certify
from skipfold.errors import ConfigError, NoSkipsError, SkipError, first_line
from skipfold.graphs import (
    check_forward,
    combines,
    fixed_parameters,
    free_name,
    hooked,
    module_of,
    own_graph,
    shapes,
    sources,
)
from skipfold.schedules import check_strength
from skipfold.subject import BATCHNORM, check_module

ORDER = {
    BasicBlock: ("conv1", "bn1", "relu", "conv2", "bn2"),
    Bottleneck: ("conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3", "bn3"),
}
"""The layers of F in torchvision's residual blocks."""

WEIGHTS = {
    "convex": lambda t: (1 - t, t),
    "variance": lambda t: ((1 - t * t).sqrt(), t),
}
"""Weights of F(x) and skip(x) at skip strength t: the paper's, and the pair whose squares sum to 1."""

MARKS = ("variance", "normalized")
"""Buffers of a Skip whose weights are not the paper's, so that its state_dict says which they are."""

HALF = (torch.float16, torch.bfloat16)
"""Dtypes in which 1 - t of a t near 1 has few digits left."""

ADDS = {("call_function", add) for add in (operator.add, operator.iadd, torch.add)}
ADDS |= {("call_method", add) for add in ("add", "add_")}
"""What adds, by op and target of its torch.fx node."""


class Skip(nn.Module):
    """(1 - t) F(x) + t skip(x), from F(x) and skip(x) of one shape, any floating dtypes; the paper's homotopy.

    t = 0 has no skip, t = 1 the skip alone; with weights "variance" the two are sqrt(1 - t^2) and t. At equal weights
    (t = 1/2, or 1/sqrt(2)) this is the ordinary sum times that weight; `normalize` divides both by the larger one, so
    that there it is the ordinary sum and at t = 0 still F(x).

    t is a 0-dim float32 buffer, in a network of any precision, changed in place, so that a captured CUDA graph follows
    it. It is part of the state_dict; one that lacks it, as a pretrained network's does, leaves it as it is. Other
    weights than the paper's are told there too, by an entry `variance` or `normalized`.
    """

    t: torch.Tensor

    def __init__(self, t: float = 0.5, weights: str = "convex", normalize: bool = False):
        super().__init__()
        if weights not in WEIGHTS:
            raise ConfigError(f"weights: {weights!r} given; allowed are {', '.join(WEIGHTS)}")
        self.weights, self.normalize = weights, normalize
        self.register_buffer("t", torch.tensor(check_strength(t), dtype=torch.float32))
        for mark, wanted in zip(MARKS, (weights == "variance", normalize), strict=True):
            if wanted:
                self.register_buffer(mark, torch.tensor(True))

    def forward(self, branch: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        read = not isinstance(branch.dtype, torch.dtype)  # by torch.fx: they are proxies
        if not read and branch.shape != skip.shape:
            raise SkipError(
                f"F of shape {list(branch.shape)} and skip of {list(skip.shape)} given; one shape is allowed, since "
                "without the skip the sum would have another"
            )
        apart = not read and (branch.dtype in HALF or branch.dtype != skip.dtype)  # by autocast
        if self.weights == "convex" and not self.normalize and not apart:
            return torch.lerp(branch, skip, self.t.to(branch.dtype))
        of_branch, of_skip = self.pair(branch.dtype)
        return of_branch * branch + of_skip * skip

    def pair(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights of F(x) and of skip(x), 0-dim, in `dtype`; in float32 for HALF, where 1 - t would be far off."""
        half = isinstance(dtype, torch.dtype) and dtype in HALF
        pair = WEIGHTS[self.weights](self.t if half else self.t.to(dtype))
        return tuple(weight / torch.maximum(*pair) for weight in pair) if self.normalize else pair

    def _apply(self, fn, recurse=True):
        """As a module does when it is moved or cast, but t is not cast: it would be rounded for good."""
        t = self.t
        super()._apply(fn, recurse)
        self.t = self.t.float() if t.is_meta else t.to(self.t.device)
        return self

    def extra_repr(self) -> str:
        return f"t={float(self.t):g}, weights={self.weights!r}, normalize={self.normalize}"

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if f"{prefix}t" not in state_dict:
            state_dict |= {f"{prefix}{name}": value for name, value in self.named_buffers()}
        super()._load_from_state_dict(state_dict, prefix, *args)


class HomotopyBlock(nn.Module):
    """A basic or bottleneck block of torchvision's ResNets that gives relu((1 - t) F(x) + t skip(x)).

    Holds the block's own layers under their own names; its projection, if any, belongs to the skip.
    """

    def __init__(self, block: BasicBlock | Bottleneck, skip: Skip):
        super().__init__()
        self.training = block.training
        self.order = ORDER[type(block)]
        for name, child in block.named_children():
            self.add_module(name, child)
        self.downsample = block.downsample
        self.skip = skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        out = x
        for name in self.order:
            out = getattr(self, name)(out)
        return self.relu(self.skip(out, skip))


def to_homotopy(
    model: nn.Module,
    example: torch.Tensor | Sequence[int],
    *,
    t: float = 0.5,
    weights: str = "convex",
    normalize: bool = False,
    leave: Collection[str] = (),
    export: bool = True,
) -> tuple[nn.Module, Equality]:
    """A copy of `model` with skip strength t in every residual block, and the certificate that it is the same network.

    Blocks of torchvision's ResNets are known; in other modules (timm's ResNets, your own) the additions of a residual
    and a skip are found by torch.fx, in the module or in a part of it that only adds, the skip being the side with
    fewer weight layers; such a module becomes a torch.fx.GraphModule, which has its layers and its forward, not its
    other methods. Parameters keep their names, so pretrained weights load before or after. `weights` and `normalize` as
    in Skip: with `normalize` the network at equal weights is the original. The forward of a module whose path is in
    `leave` is left as it is, not that of modules in it. A block that the network runs several times has one strength
    for all. Additions of two shapes stay, and so do optional parameters at the values that they have on `example`.

    `example` is a batch, or the shape of one sample. The certificate compares the rewired network, normalized and at
    equal weights, with `model`, and unless `export` is False with what torch.export makes of it. Raises SkipError where
    no skip is found, or one that has its strength, or a module that adds cannot be read, ConfigError on bad values,
    ModuleError, InputShapeError and WeightsError where `model` cannot be run.
    """
    check_module(model)
    if held := skips(model):
        raise SkipError(f"the network has skip strengths already, in {', '.join(held)}; use set_skip_strength")
    among = adding(model, example, leave)

    def convert(source: nn.Module) -> nn.Module:
        return insert_skips(copy.deepcopy(source), t=0.5, normalize=True, among=among)

    result = insert_skips(copy.deepcopy(model), t, weights, normalize, among)
    return result, certify("to_homotopy", model, convert, example, export=export, skip=Skip)


def adding(
    model: nn.Module, example: torch.Tensor | Sequence[int], leave: Collection[str] = ()
) -> dict[str, list[inspect.BoundArguments]]:
    """Paths of the modules of `model` that add two activations themselves, without those in `leave`, and their calls.

    With one that only combines what it is given, also the one that it is part of. Of a module that runs under several
    paths, all. Raises ConfigError on a path in `leave` that is not there, ModuleError, InputShapeError and WeightsError
    where `model` cannot be run on `example`.
    """
    if isinstance(leave, str):
        raise ConfigError(f"leave: {leave!r} given; a list of paths is allowed, e.g. [{leave!r}]")
    modules = dict(model.named_modules(remove_duplicate=False))
    if unknown := sorted(set(leave) - modules.keys()):
        raise ConfigError(f"leave: no module at {', '.join(unknown)}; paths as named_modules gives them are allowed")
    wanted = {id(modules[path]) for path in additions(model, example)}
    parts = [path for path, module in modules.items() if id(module) in wanted and combines(module)]
    wanted |= {id(modules[path.rpartition(".")[0]]) for path in parts}
    wanted -= {id(modules[path]) for path in leave}
    found = {path: module for path, module in modules.items() if id(module) in wanted}
    by_module = {id(modules[path]): made for path, made in calls(model, example, found).items()}
    return {path: by_module.get(id(module), []) for path, module in found.items()}


def insert_skips(
    model: nn.Module,
    t: float = 0.5,
    weights: str = "convex",
    normalize: bool = False,
    among: Collection[str] | None = None,
) -> nn.Module:
    """`model` with a Skip in place of each residual addition, changed in place and not certified; see to_homotopy.

    Only modules whose paths are in `among` are read (see `adding`, which gives their calls too); None means all.
    """
    seen = among if isinstance(among, Mapping) else {}
    device = next((parameter.device for parameter in model.parameters()), None)

    def make() -> Skip:
        return Skip(t, weights, normalize).to(device)

    make()  # refuses bad values before anything is changed
    done: dict[int, nn.Module] = {}
    for path, module in innermost_first(model):
        if _settled(module) or (among is not None and path not in among):
            continue
        try:
            converted = done.get(id(module)) or _converted(module, make, seen.get(path, ()))
        except Exception as error:  # whatever a forward does with the proxies of torch.fx
            unread = "give an input shape" if among is None else "name it in leave"
            raise SkipError(
                f"{path or 'network'}: torch.fx cannot read this {type(module).__name__} ({first_line(error)}); "
                f"rewrite its forward without branches on values, or {unread} if it adds no skip"
            ) from error
        if converted is not None:
            check_hooks(path, module)
            done[id(module)] = converted
            if not path:
                return converted
            model.set_submodule(path, converted)
    if not skips(model):
        added = f"; other additions are in {', '.join(path or 'network' for path in among)}" if among else ""
        raise NoSkipsError(
            "no skip connection found: no block adds its input, or a projection of it, of one shape, to what it "
            f"computes{added}"
        )
    return model


def check_hooks(path: str, module: nn.Module) -> None:
    """Raises SkipError where `module`, which another will take the place of, has hooks."""
    if hooked(module):
        raise SkipError(f"{path or 'network'}: has hooks, which would be lost; remove them first")


def _settled(module: nn.Module) -> bool:
    """Whether `module` is known to add no skip itself: a layer of torch's, a BatchNorm, a ResNet around its blocks."""
    own = type(module).__module__.startswith("torch.nn.") or type(module) is ResNet
    # timm's BatchNorms count in a way that torch.fx cannot read.
    return own or isinstance(module, BATCHNORM | Skip | HomotopyBlock)


def _converted(module: nn.Module, make: Callable[[], Skip], seen: Sequence[inspect.BoundArguments]) -> nn.Module | None:
    """`module` with its skips weighted by what `make` gives, all in their own modes; None where it adds none.

    `seen` are calls of it, by which its optional parameters and the shapes of what it adds are known.
    """
    if type(module) in ORDER:
        check_forward(module)
        return HomotopyBlock(module, make().train(module.training))
    graph = own_graph(module, fixed_parameters(module, seen) if seen else None)
    shape = shapes(module, graph, seen[0]) if seen else {}
    adds = False
    for node in list(graph.nodes):
        # Read now: one of its sides may be an addition that was just replaced.
        if (sides := _residual(module, node)) is None or len({shape.get(side) for side in sides}) > 1:
            continue
        adds = True
        name = free_name("skip", dir(module))
        module.add_module(name, make().train(module.training))
        with graph.inserting_after(node):
            weighted = graph.call_module(name, sides)
        node.replace_all_uses_with(weighted)
        shape[weighted] = shape.get(node)
        graph.erase_node(node)
    return module_of(graph, module) if adds else None


def _residual(module: nn.Module, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """F and skip where `node` adds them: both read one value, F through more weight layers."""
    sides = (*node.args, *(node.kwargs[name] for name in ("input", "other") if name in node.kwargs))
    if (node.op, node.target) not in ADDS or len(node.args) + len(node.kwargs) != 2 or len(sides) != 2:
        return None
    if not all(isinstance(side, fx.Node) for side in sides):
        return None
    read = [sources(side) for side in sides]
    shared = read[0] & read[1]
    if all(source.op == "get_attr" for source in shared):
        return None
    layers = [sum(_weight_layers(module, source) for source in mine - shared) for mine in read]
    if layers[0] == layers[1]:
        return None
    return sides if layers[0] > layers[1] else sides[::-1]


def _weight_layers(module: nn.Module, node: fx.Node) -> int:
    """Weights of at least two axes (of convolutions, linear layers) that `node` uses."""
    if node.op == "call_module":
        return sum(weight.dim() > 1 for weight in module.get_submodule(node.target).parameters())
    if node.op == "get_attr":
        return int(isinstance(held := operator.attrgetter(node.target)(module), nn.Parameter) and held.dim() > 1)
    return 0


def innermost_first(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module of `model` with its path, one that is shared with each; `model` itself last."""
    return sorted(model.named_modules(remove_duplicate=False), key=lambda item: (not item[0], -item[0].count(".")))


def skips(model: nn.Module) -> dict[str, Skip]:
    """Every Skip of `model` by its path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Skip)}


def skip_strengths(model: nn.Module) -> dict[str, float]:
    """t of every Skip by its path."""
    return {path: float(skip.t) for path, skip in skips(model).items()}


def set_skip_strength(model: nn.Module, t: float | Mapping[str, float]) -> None:
    """Set t in every Skip of `model`, or in those named by path, in place.

    Raises ConfigError, before anything is set, on a t outside [0, 1] and on a path without a Skip, NoSkipsError where
    `model` has none.
    """
    if not (held := skips(model)):
        raise NoSkipsError("the network has no skip strength to set; convert it with to_homotopy first")
    if not isinstance(t, Mapping):
        t = dict.fromkeys(held, check_strength(t))
    if unknown := [path for path in t if path not in held]:
        raise ConfigError(f"t: no Skip at {', '.join(unknown)}; there are {', '.join(held)}")
    for path, strength in t.items():
        check_strength(strength, f"t of {path}")
    for path, strength in t.items():
        held[path].t.fill_(strength)


class StrengthScheduler:
    """Sets t by a schedule in a hand-written loop, as torch's learning-rate schedulers set the rate.

    `schedule` is a callable of the time, such as a Schedule, or one for each Skip by its path. t is set at once for
    time 0, and by each `step()`, after an epoch or after an optimizer step, for the next time. Raises ConfigError on
    an unknown path, on what is not callable and on a t outside [0, 1], NoSkipsError where `model` has no Skip.
    """

    def __init__(self, model: nn.Module, schedule: Callable[[int], float] | Mapping[str, Callable[[int], float]]):
        for each in schedule.values() if isinstance(schedule, Mapping) else (schedule,):
            if not callable(each):
                raise ConfigError(f"schedule: {each!r} given; a callable of the time is allowed, e.g. a Schedule")
        self.model, self.schedule = model, schedule
        self.set_time(0)

    def step(self) -> None:
        """Go on by one unit of time."""
        self.set_time(self.time + 1)

    def set_time(self, time: int) -> None:
        """Go to `time`, whatever it was."""
        by_path = isinstance(self.schedule, Mapping)
        t = {path: at(time) for path, at in self.schedule.items()} if by_path else self.schedule(time)
        set_skip_strength(self.model, t)
        self.time = time

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs: the time."""
        return {"time": self.time}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from the time of `state`. Raises ConfigError where it has none."""
        if "time" not in state:
            raise ConfigError(f"state: {dict(state)!r} given; what state_dict gave is allowed, e.g. {{'time': 3}}")
        self.set_time(state["time"])

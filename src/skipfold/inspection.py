"""The skip connections of a network, as a table and as a drawing."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.style
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from rich.table import Table
from torch import fx, nn

from skipfold.errors import ExportError, NoSkipsError
from skipfold.files import written
from skipfold.graphs import sources
from skipfold.homotopy import HomotopyBlock, adding, insert_skips, skips
from skipfold.recursion import SkipCNN
from skipfold.subject import check_module

WIDEST = 5.0
"""Line width, in points, of a skip whose weight is 1."""

PER_ROW = 8
"""Blocks in one row of a drawing."""


@dataclass(frozen=True)
class Connection:
    """A skip: from which value to which, past which layers, through which, and with what weights.

    `t` is None where the network adds without a strength; both weights are 1 then. `start` and `end` count the values
    that the network hands on from block to block, the input being 0.
    """

    path: str
    residual: str
    skip: str
    t: float | None
    residual_weight: float
    skip_weight: float
    start: int
    end: int


def connections(model: nn.Module, example: torch.Tensor | Sequence[int] | None = None) -> list[Connection]:
    """Every skip of `model`, in order; those of a network without strengths are found as `to_homotopy` finds them.

    With an `example`, a batch or the shape of one sample, only modules that add something on it have to be read.
    Raises SkipError where torch.fx cannot read one, ModuleError where `model` is no module, and on an example that it
    does not take InputShapeError.
    """
    check_module(model)
    if isinstance(model, SkipCNN):
        return _of_recursion(model)
    ordinary = not skips(model)
    if ordinary:
        try:
            among = None if example is None else adding(model, example)
            model = insert_skips(copy.deepcopy(model), among=among)
        except NoSkipsError:
            return []
    found = []
    for path, skip in skips(model).items():
        residual, through = _sides(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2])
        t = None if ordinary else float(skip.t)
        weights = (1.0, 1.0) if ordinary else tuple(float(weight) for weight in skip.pair(torch.float64))
        found.append(Connection(path, residual, through, t, *weights, len(found), len(found) + 1))
    return found


def _of_recursion(model: SkipCNN) -> list[Connection]:
    t = float(model.skip.t) if model.skip is not None else 0.0
    return [
        Connection(
            path=f"f({k}) into layer {i}",
            residual=", ".join(f"layer {layer}" for layer in range(k + 1, i)),
            skip="identity" if model.shapes[k] == model.shapes[i - 1] else "resampled",
            t=t,
            residual_weight=1 - t,
            skip_weight=t * share,
            start=k,
            end=i - 1,
        )
        for (k, i), share in sorted(model.shares.items(), key=lambda item: item[0][::-1])
    ]


def _sides(block: nn.Module, name: str) -> tuple[str, str]:
    """The layers of F, and of the skip, of the Skip called `name` in `block`."""
    if isinstance(block, HomotopyBlock):
        return _layers(block.get_submodule(each) for each in block.order), _through(block.downsample)
    if not isinstance(block, fx.GraphModule):
        return "?", "?"
    node = next(iter(block.graph.find_nodes(op="call_module", target=name)))
    residual, skip = (sources(side) for side in node.args)
    named = [
        [block.get_submodule(each.target) for each in block.graph.nodes if each in side and each.op == "call_module"]
        for side in (residual - skip, skip - residual)
    ]
    return _layers(named[0]), _through(nn.Sequential(*named[1]) if named[1] else None)


def _through(projection: nn.Module | None) -> str:
    if projection is None or all(isinstance(layer, nn.Identity | nn.Sequential) for layer in projection.modules()):
        return "identity"
    return f"projection: {_layers([projection])}"


def _layers(modules) -> str:
    """Convolutions and linear layers among `modules`, by kind and kernel."""
    inner = [layer for module in modules for layer in module.modules()]
    said = []
    for layer in inner:
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            said.append("conv " + "x".join(map(str, layer.kernel_size)))
        elif isinstance(layer, nn.Linear):
            said.append("linear")
    return ", ".join(said) or "no weights"


def table(found: list[Connection]) -> Table:
    """The connections as a table for a terminal."""
    made = Table("skip", "F", "past it", "t", "weights of F and skip")
    for each in found:
        t = "ordinary sum" if each.t is None else f"{each.t:g}"
        made.add_row(each.path, each.residual, each.skip, t, f"{each.residual_weight:.3g}, {each.skip_weight:.3g}")
    return made


def drawing(found: list[Connection], title: str) -> Figure:
    """The connections as a drawing: values in a row, F between them, each skip an arc as wide as its weight."""
    last = max((each.end for each in found), default=0)
    rows = max(1, -(-last // PER_ROW))
    with matplotlib.style.context("skipfold.skipfold"):
        figure = Figure(figsize=(7.0, 0.5 + 1.45 * rows))
        figure.suptitle(title, fontsize=9)
        for row, axes in enumerate(figure.subplots(rows, 1, squeeze=False)[:, 0]):
            _draw_row(axes, found, row * PER_ROW, min(last, (row + 1) * PER_ROW))
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Write `figure` as SVG. Raises ExportError where `path` cannot be written."""
    with written(path, ExportError) as part, matplotlib.style.context("skipfold.skipfold"):
        figure.savefig(part, format="svg", metadata={"Date": None})


def _draw_row(axes, found: list[Connection], first: int, last: int) -> None:
    axes.set(xlim=(first - 0.3, first + PER_ROW + 0.3), ylim=(-0.75, 1.0))
    axes.axis("off")
    for value in range(first, last + 1):
        axes.plot(value, 0, marker="o", color="#222222", markersize=5, zorder=3)
        axes.annotate(str(value), (value, -0.32), ha="center", fontsize=6.5)
        if value < last:
            _arrow(axes, value, value + 1, 0.0, "#222222", 1.0, "-")
    for each in found:
        if not first <= each.start < last:
            continue
        gone = each.skip_weight == 0
        color, style = ("#8c8c8c", ":") if gone else ("#c2571a", "-")
        _arrow(axes, each.start, each.end, -0.6, color, 0.8 if gone else max(0.8, WIDEST * each.skip_weight), style)
        label = "+" if each.t is None else f"{each.skip_weight:.2g}"
        height = 0.3 * (each.end - each.start) + 0.12
        axes.annotate(label, ((each.start + each.end) / 2, height), ha="center", fontsize=6.5, color=color)
        if each.end == each.start + 1:
            axes.annotate(
                each.residual.replace(", ", "\n"),
                ((each.start + each.end) / 2, -0.1),
                ha="center",
                va="top",
                fontsize=5,
                color="#555555",
            )


def _arrow(axes, start: int, end: int, bend: float, color: str, width: float, style: str) -> None:
    axes.add_patch(
        FancyArrowPatch(
            (start, 0),
            (end, 0),
            connectionstyle=f"arc3,rad={bend}",
            arrowstyle="-|>",
            mutation_scale=7,
            linewidth=width,
            linestyle=style,
            color=color,
            shrinkA=4,
            shrinkB=4,
        )
    )

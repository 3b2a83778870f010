"""matplotlib figures from tables: the published points behind ours, one style, the stamp on each."""

import itertools
import re
import textwrap
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.container import Container
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.markers import CARETDOWN

from skipfold.errors import StoreError
from skipfold.files import written
from skipfold.replication import statistics

BLUE, ORANGE, GREEN, PURPLE, LIGHT_BLUE = "#0b3c6f", "#c2571a", "#2b7d6c", "#6b4a9e", "#4f86c0"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, "#a8323e", "#7d6a2c", "#5f6f7a", LIGHT_BLUE, "#d16ba5", "#b8902a")
PUBLISHED_COLOR = "#ababab"
"""Lighter than all of ours, in grey print too."""

PUBLISHED_SIZE = 7
STAMP_WIDTH = 120
"""Characters of a figure's stamp in one line."""

PUBLISHED_BATCH = 64
"""Of the published timings."""

MARKERS = "osD^vP*X"
FILLS = ("full", "left", "bottom", "none", "right", "top")

PER_IMAGE, SAVED = "µs an image", "% saved against skips with t"
UNITS = {"host": "wall-clock", "device": "device"}


class Look(NamedTuple):
    """How a series is drawn; marker, line and darkness all differ, so that grey print keeps them apart."""

    label: str
    color: str
    marker: str
    line: Any


LOOKS = {
    ("val", "last"): Look("validation, last epoch", BLUE, "o", "-"),
    ("val_batch", "last"): Look("the same, BatchNorm by batch as in training", LIGHT_BLUE, "D", "-"),
    ("val", "first"): Look("validation, first epoch", ORANGE, "s", (0, (4, 1.5))),
    ("train", "last"): Look("training, last epoch", GREEN, "^", (0, (1, 1.2))),
    "resnet34_linear_maxpool": Look("ResNet34 without ReLU, max-pool kept (inferred)", BLUE, "o", "-"),
    "resnet34_linear_avgpool": Look("ResNet34 without ReLU, average-pool (affine)", ORANGE, "D", (0, (6, 1.5))),
    "cnn3": Look("3-layer linear CNN with skips", GREEN, "s", (0, (4, 1.5))),
    "perceptron": Look("perceptron", PURPLE, "^", (0, (1, 1.2))),
    "static": Look("static t = {t:g}", BLUE, "o", "-"),
    "static_0.5": Look("static t = {t:g}", PURPLE, "D", (0, (6, 1.5))),
    "scheduled_from_0.9": Look("t from 0.9 to 0", ORANGE, "s", (0, (4, 1.5))),
    "scheduled_from_0.5": Look("t from 0.5 to 0", GREEN, "^", (0, (1, 1.2))),
}

SPARE = tuple(zip(PALETTE[4:8], "vXP<", ("-", (0, (6, 1.5)), (0, (4, 1.5)), (0, (1, 1.2))), strict=True))
"""Colour, marker and line of arms that LOOKS does not have, in turn."""

AT_END = {
    "val_accuracy": None,
    "skips_removed_val_accuracy": ("skips removed", "x"),
    "reestimated_val_accuracy": ("running statistics estimated anew", "+"),
}
"""Measures of the trained networks, with label and marker; None takes the arm's own."""

TITLES = {
    "resnet34": "ResNet34",
    "resnet18": "ResNet18",
    "cnn3": "3-layer linear CNN",
    "shallow_linear": "shallow linear CNN",
    "shallow_leaky_relu": "shallow leaky-ReLU CNN",
    "resnet34_linear_maxpool": "linear ResNet34, max-pool",
    "resnet34_linear_avgpool": "linear ResNet34, average-pool",
    "perceptron": "perceptron",
}

VARIANTS = {
    "skips": "skips with t",
    "skips_literal": "skips with t, written out",
    "add": "ordinary add",
    "skips_folded": "skips with t, BatchNorm folded",
    "skips_cropped": "skips with t, folded, cropped",
    "add_folded": "ordinary add, BatchNorm folded",
    "add_cropped": "ordinary add, folded, cropped",
    "skips_removed": "skips removed",
    "folded": "removed, BatchNorm folded",
    "cropped": "removed, folded, cropped",
    "collapsed": "collapsed",
    "collapsed_pixels": "collapsed, from uint8 pixels",
    "collapsed_pixels_fused": "collapsed, from uint8 pixels, one kernel",
    "perceptron": "perceptron",
}


BASELINES = ("skips_folded", "skips_cropped", "add_folded", "add_cropped")
"""What the forms without skips are compared with in the table of savings; their marks would lie on one another."""

ONE_LAYER = ("collapsed", "collapsed_pixels", "collapsed_pixels_fused", "perceptron")

ASSUMPTIONS = {
    "optimizer.resnet": "Optimizer of ResNets",
    "optimizer.linear": "Optimizer of linear networks",
    "networks.resnet": "Layers of ResNets",
    "networks.cnn3": "3-layer linear CNN",
    "networks.shallow_linear": "Shallow linear CNN",
    "experiments.schedule_comparison.static_t": "Static t",
    "experiments.schedule_comparison.shape": "Shape of schedules",
    "experiments.linear_comparison.t": "t of linear networks",
    "drop_last": "Last, smaller batch",
}
EXPERIMENTS = {"linear_comparison": "linear networks", "schedule_comparison": "schedules"}
VALUES = {
    ("drop_last", "True"): "left out",
    ("drop_last", "False"): "kept",
    ("networks.resnet", "defaults"): "usual layers and initial values",
    ("networks.cnn3", "defaults"): "width 8, kernel 3, padding 1",
    "name=sgd": "SGD",
    "name=adam": "Adam",
    "lr": "rate",
    "momentum=0.0": "no momentum",
    "stem=imagenet_pool3": "max-pool of stride 3",
    "stem=unpadded_pool3": "unpadded, max-pool of stride 3",
    "init=framework": "framework's initial values",
    "block=add": "ordinary add",
    "size=16": "images 16 × 16",
    "hidden": "hidden layers",
}
"""Words for what sensitivity is about: keys of the configuration, figures, and values with or without their key."""


def styled() -> AbstractContextManager[None]:
    """What is drawn or saved within has the style of skipfold.mplstyle, as matplotlib finds it in a package."""
    return matplotlib.style.context("skipfold.skipfold")


def accuracy_vs_t(aggregate: pd.DataFrame, published: pd.DataFrame | None = None) -> Figure:
    """Accuracy against t: validation after the first and last epoch, training in the last.

    Where there is BatchNorm, the last validation also with the statistics of each batch instead of the running ones.

    `aggregate` is one experiment's table (see `statistics.aggregate`), `published` that of `statistics.published`.
    Where the accuracies spread wide, a second panel shows the plateau alone, with carets for the last validation below.
    Ours are drawn a little beside their t, so that intervals do not lie on each other.
    """
    epochs = {"first": aggregate["epoch"].min(), "last": aggregate["epoch"].max()}
    title = TITLES.get(aggregate["network"].iloc[0], aggregate["network"].iloc[0])
    plateau = _plateau(aggregate, published)
    looks = _beside({key: look for key, look in LOOKS_VS_T.items() if key[0] in set(aggregate["split"])}, 0.005)
    with styled():
        figure = Figure(figsize=(7.0, 7.0 if plateau else 4.2))
        panels = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3)) if plateau else [figure.subplots()]
        for axes in panels:
            for (split, when), (place, look) in looks.items():
                if published is not None:
                    points = _points(published, split, {"first": 1, "last": 2}[when])
                    _draw_published(axes, points["t"], points["mean"], look)
                points = _points(aggregate, split, epochs[when])
                if epochs["first"] < epochs["last"] or when == "last":
                    _draw(axes, points["t"] + place, points, look)
            axes.set_ylabel("accuracy")
            axes.margins(x=0.07)
        panels[-1].set_xlabel("skip strength t  (0: no skip connections, 1: skip connections only)")
        if plateau:
            panels[1].set_ylim(plateau)
            panels[1].set_title("the plateau, enlarged", fontsize="small")
            place, look = looks["val", "last"]
            points = _points(aggregate, "val", epochs["last"])
            _carets(panels[1], points["t"] + place, points["mean"], look)
        _legend(figure, panels[0], f"{title}: accuracy against skip strength t")
        _stamp(figure, aggregate)
    return figure


LOOKS_VS_T = {key: look for key, look in LOOKS.items() if isinstance(key, tuple)}


def _points(frame: pd.DataFrame, split: str, epoch: int) -> pd.DataFrame:
    return frame[(frame["split"] == split) & (frame["epoch"] == epoch)].sort_values("t")


def _plateau(aggregate: pd.DataFrame, published: pd.DataFrame | None) -> tuple[float, float] | None:
    """Limits around the last validation accuracies near the best, where these are most and others lie far below."""
    last = _points(aggregate, "val", aggregate["epoch"].max())["mean"]
    if published is not None:
        last = pd.concat([last, _points(published, "val", 2)["mean"]])
    near = last[last > last.max() - 0.04]
    if last.max() - last.min() < 0.2 or 2 * len(near) < len(last):
        return None
    room = 0.2 * max(near.max() - near.min(), 0.01)
    return near.min() - room, min(1.0, near.max() + room)


def linear_comparison(
    aggregate: pd.DataFrame,
    published: pd.DataFrame | None = None,
    ceiling: float | None = None,
) -> Figure:
    """Validation accuracy per epoch of the linear networks; `ceiling` is that of the best affine classifier found."""
    with styled():
        figure = Figure(figsize=(7.0, 4.9))
        axes = figure.subplots()
        _per_epoch(axes, aggregate, published)
        if ceiling is not None:
            label = f"best affine classifier found, not a bound: {ceiling:.4f}"
            axes.axhline(ceiling, color="black", linewidth=0.9, linestyle=(0, (8, 3)), label=label)
        _legend(figure, axes, "Linear networks: validation accuracy per epoch")
        _stamp(figure, aggregate)
    return figure


def schedule_comparison(aggregate: pd.DataFrame, trials: pd.DataFrame, published: pd.DataFrame | None = None) -> Figure:
    """Validation accuracy per epoch with static and with scheduled t; below, every trial after the last epoch.

    Where there is BatchNorm, a panel between has it with the statistics of each batch instead of the running ones.
    `trials` is the tidy table that `aggregate` has the means of.
    """
    curves = {"val": "in eval mode, as deployed"}
    if (aggregate["split"] == "val_batch").any():
        curves["val_batch"] = "BatchNorm by batch as in training"
    network = aggregate["network"].iloc[0]
    with styled():
        figure = Figure(figsize=(7.0, 3.9 + 2.5 * len(curves)))
        *panels, ends = figure.subplots(len(curves) + 1, 1)
        for axes, (split, title) in zip(panels, curves.items(), strict=True):
            _per_epoch(axes, aggregate, published, split)
            axes.set_title(title, fontsize="small")
        _clip(panels[0], aggregate[aggregate["split"] == "val"], published)
        extra = _at_end(ends, trials, published)
        title = f"{TITLES.get(network, network)}: validation accuracy with static and scheduled t"
        _legend(figure, panels[0], title, extra)
        _stamp(figure, aggregate)
    return figure


def _clip(axes: Axes, ours: pd.DataFrame, published: pd.DataFrame | None) -> None:
    """Limits that the means need, but for those of the first epoch that would halve the scale of the others.

    A caret with its value marks a mean below; intervals run on over the edge.
    """
    later = ours["mean"][ours["epoch"] > ours["epoch"].min()]
    means = pd.concat([ours, published])["mean"]
    near = means[~(means < 2 * later.min() - later.max())]
    _limits(axes, near, ours[["mean", "high"]].max().max())
    axes.margins(x=0.07)
    for arm, (place, look) in _places(ours["arm"]).items():
        own = ours[ours["arm"] == arm]
        _carets(axes, own["epoch"] + place, own["mean"], look)


def _carets(axes: Axes, xs: pd.Series, means: pd.Series, look: Look) -> None:
    """What is below the panel of `means`, each marked with its value."""
    bottom = axes.get_ylim()[0]
    for x, mean in zip(xs, means, strict=True):
        if mean < bottom:
            _below(axes, x, bottom, look.color, f"{mean:.3f}")


def _limits(axes: Axes, shown: pd.Series, top: float) -> float:
    """Set limits that hold `shown`, and up to `top`, with room for marks; gives the lower one."""
    top = max(top, shown.max())
    room = 0.12 * (top - shown.min() or 0.01)
    axes.set_ylim(shown.min() - room, min(top + room, 1.0))
    return shown.min() - room


def _below(axes: Axes, x: float, bottom: float, color: str, value: str) -> None:
    """A caret at the lower end, with the value that is below it."""
    axes.plot(x, bottom, marker=CARETDOWN, color=color, markersize=5, clip_on=False)
    axes.annotate(value, (x, bottom), xytext=(-4, 2), textcoords="offset points", ha="right", fontsize=7, color=color)


def _at_end(axes: Axes, trials: pd.DataFrame, published: pd.DataFrame | None) -> list[Line2D]:
    """AT_END of every trial of every arm, the mean as a dash, the published value as a line; gives legend entries."""
    trials = trials[trials["epoch"] == trials["epoch"].max()]
    measures = {name: own for name, own in AT_END.items() if trials[name].notna().any()}
    means = trials.groupby("arm")[list(measures)].mean().stack()
    bottom = _limits(axes, means, trials[list(measures)].max().max())
    looks = _looks(trials["arm"])
    dash = {"color": "black", "linewidth": 1.2}
    line = {"color": PUBLISHED_COLOR, "linestyle": (0, (4, 2)), "linewidth": 1.2}
    for group, (arm, look) in enumerate(looks.items()):
        own = trials[trials["arm"] == arm]
        for place, (name, style) in enumerate(measures.items()):
            x, values = group + 0.27 * (place - 1), own[name].dropna().sort_values()
            marker = look.marker if style is None else style[1]
            axes.plot([x] * len(values), values, marker, color=look.color, markersize=5, markeredgewidth=1.2)
            axes.plot([x - 0.09, x + 0.09], [values.mean()] * 2, **dash)
            if len(below := values[values < bottom]):
                _below(axes, x, bottom, look.color, "\n".join(f"{value:.3f}" for value in below[::-1]))
        if published is not None:
            theirs = published[published["arm"] == arm].sort_values("epoch")["mean"].tail(1)
            axes.hlines(theirs, group - 0.42, group + 0.42, **line, zorder=1.5)
    labels = [look.label.format(t=trials[trials["arm"] == arm]["t"].iloc[0]) for arm, look in looks.items()]
    axes.set_xticks(range(len(looks)), labels)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("validation accuracy")
    axes.set_title("after the last epoch, in eval mode: every trial", fontsize="small")
    marks = [
        Line2D([], [], color="black", linestyle="", marker=own[1], label=own[0]) for own in measures.values() if own
    ]
    line_label = [Line2D([], [], **line, label="published, last epoch")] if published is not None else []
    return [*marks, Line2D([], [], **dash, label="mean of the trials"), *line_label]


def _per_epoch(axes: Axes, aggregate: pd.DataFrame, published: pd.DataFrame | None, split: str = "val") -> None:
    """Every arm's validation accuracy, nudged sideways so that markers and intervals do not lie on each other."""
    ours = aggregate[aggregate["split"] == split]
    for arm, (place, look) in _places(aggregate["arm"]).items():
        if published is not None:
            theirs = published[published["arm"] == arm].sort_values("epoch")
            _draw_published(axes, theirs["epoch"] + place, theirs["mean"], look, line=True)
        points = ours[ours["arm"] == arm].sort_values("epoch")
        look = look._replace(label=look.label.format(t=points["t"].iloc[0]))
        _draw(axes, points["epoch"] + place, points, look)
    last = int(max(ours["epoch"].max(), 0 if published is None else published["epoch"].max()))
    axes.set_xticks(range(1, last + 1))
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation accuracy")


def _places(arms: Iterable[str]) -> dict[str, tuple[float, Look]]:
    """How far each arm is drawn beside its epoch, and its look."""
    return _beside(_looks(arms), 0.1)


def _beside(looks: dict[Any, Look], step: float) -> dict[Any, tuple[float, Look]]:
    """How far each is drawn from its place, `step` apart, and its look."""
    return {key: (step * (place - (len(looks) - 1) / 2), look) for place, (key, look) in enumerate(looks.items())}


def _looks(arms: Iterable[str]) -> dict[str, Look]:
    """The look of each arm, those of LOOKS first."""
    arms = list(dict.fromkeys(arms))
    spare = itertools.cycle(SPARE)
    others = {arm: Look(_label(arm), *next(spare)) for arm in arms if arm not in LOOKS}
    return {arm: look for arm, look in LOOKS.items() if arm in arms} | others


def _label(arm: str) -> str:
    if arm.startswith("static_"):
        return LOOKS["static"].label
    if arm.startswith("scheduled_from_"):
        return f"t from {float(arm.removeprefix('scheduled_from_')):g} to 0"
    return TITLES.get(arm, arm)


def timing(frame: pd.DataFrame, published: tuple[float, float] | None = None) -> Figure:
    """Prediction time per image of every network and variant, and what it saves against t-weighted skips.

    Networks of one layer have panels of their own: they are a thousand times as fast. A panel a batch size. `frame` has
    columns network, variant, runtime, batch, measure, median_us, q1_us, q3_us, samples_us, device. Shown is the
    wall-clock ("host") time where it was measured; the runtime is in the marker. `published` are the least and the
    largest share that removing the skips is said to save, eagerly at batch PUBLISHED_BATCH.
    """
    measure = "host" if (frame["measure"] == "host").any() else frame["measure"].iloc[0]
    frame = frame[frame["measure"] == measure]
    one_layer = frame["variant"].isin(ONE_LAYER)
    batches, runtimes = sorted(frame["batch"].unique()), list(dict.fromkeys(frame["runtime"]))
    blocks = [(part, PER_IMAGE) for part in (frame[~one_layer], frame[one_layer]) if len(part)]
    if len(saved := _saved(frame[~one_layer])):
        blocks.append((saved, SAVED))
    rows = [list(dict.fromkeys(zip(part["network"], part["variant"], strict=True))) for part, _ in blocks]
    columns = min(2, len(batches))
    heights = [len(names) + 0.5 for names in rows for _ in batches[::columns]]
    with styled():
        figure = Figure(figsize=(7.0, 1.7 + 0.45 * len(heights) + (0.12 + 0.03 * len(runtimes)) * sum(heights)))
        grid = figure.subplots(len(heights), columns, sharey="row", squeeze=False, height_ratios=heights)
        panels, handles = iter(grid.flat), {}
        for (part, quantity), names in zip(blocks, rows, strict=True):
            block = [next(panels) for _ in batches]
            for axes, batch in zip(block, batches, strict=True):
                axes.set_title(f"batch {batch}")
                axes.set_yticks(range(len(names)), [timing_label(*name) for name in names], fontsize=9)
                axes.set_ylim(len(names) - 0.4, -0.6)
                axes.grid(axis="y", visible=False)
                for row in range(0, len(names), 2):  # else it is hard to say to which row a mark between two belongs
                    axes.axhspan(row - 0.5, row + 0.5, color="#f3f3f3", zorder=0)
                axes.set_xlabel(quantity)
                if quantity == SAVED:
                    if axes is not block[0]:
                        axes.sharex(block[0])
                    axes.axvline(0, color="black", linewidth=0.8)
                    if published and batch == PUBLISHED_BATCH:
                        handles |= _band(axes, names, published)
                handles |= _timed(axes, part[part["batch"] == batch], names, runtimes)
                if quantity == PER_IMAGE:
                    axes.set_xlim(left=0)
            for axes in [next(panels) for _ in range(-len(batches) % columns)]:
                axes.set_visible(False)
        _head(figure, f"Prediction time per image, {UNITS.get(measure, measure)}", list(handles.values()), 3)
        _stamp(figure, frame)
    return figure


def _saved(frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` of timings as % saved against the variant `skips` of the same network, runtime and batch.

    In the place of quartiles are the ends of the interval. What has no such variant is left out.
    """
    found = statistics.against_skips(frame).dropna(subset="saved")
    saved, low, high = (100 * found[key] for key in statistics.SAVED)
    return found.assign(median_us=saved, q1_us=low, q3_us=high)


def _timed(axes: Axes, part: pd.DataFrame, names: list[tuple[str, str]], runtimes: list[str]) -> dict[str, Any]:
    """Values with their bars, a marker a runtime, beside one another in the row of their network and variant."""
    looks = list(zip(MARKERS, PALETTE, strict=False))
    for runtime, own in part.groupby("runtime", sort=False):
        place = runtimes.index(runtime)
        shift = min(0.2, 0.8 / len(runtimes)) * (place - (len(runtimes) - 1) / 2)
        y = [names.index(name) + shift for name in zip(own["network"], own["variant"], strict=True)]
        spread = [own["median_us"] - own["q1_us"], own["q3_us"] - own["median_us"]]
        marker, color = looks[place % len(looks)]
        axes.errorbar(
            own["median_us"], y, xerr=spread, fmt=marker, color=color, linestyle="", markersize=4, linewidth=1,
            label=runtime,
        )  # fmt: skip
    return {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}


def _band(axes: Axes, names: list[tuple[str, str]], published: tuple[float, float]) -> dict[str, Any]:
    """The published range behind the rows that it is about."""
    low, high = (100 * share for share in published)
    rows = [row for row, (_, variant) in enumerate(names) if variant == "skips_removed"]
    label = f"published, of eager alone, on a GPU: {low:g} to {high:g} %"
    return {label: axes.barh(rows, high - low, left=low, height=0.8, color="#cccccc", zorder=0.5, label=label)}


def roofline(frame: pd.DataFrame) -> Figure:
    """Arithmetic reached against arithmetic intensity, beside a matrix product and a copy measured in the same run.

    `frame` is the table of `roofline.measure`; log scales, a panel a runtime. A line joins the batches of a network and
    variant, from the smallest at its left end. BASELINES are left out.
    """
    frame = frame[~frame["variant"].isin(BASELINES)]
    markers = dict(zip(frame["network"].unique(), itertools.cycle(MARKERS), strict=False))
    variants = dict.fromkeys([*VARIANTS, *frame["variant"]])
    variants = [name for name in variants if name in set(frame["variant"])]
    looks = {
        name: {"color": color, "fillstyle": fill, "markersize": 6, "linewidth": 0.7}
        for name, color, fill in zip(variants, itertools.cycle(PALETTE), itertools.cycle(FILLS), strict=False)
    }
    runtimes = list(dict.fromkeys(frame["runtime"]))
    with styled():
        figure = Figure(figsize=(7.0, 1.4 + 4.2 * len(runtimes)))
        panels = figure.subplots(len(runtimes), 1, sharex=True, squeeze=False)[:, 0]
        for axes, runtime in zip(panels, runtimes, strict=True):
            for (network, variant), part in frame[frame["runtime"] == runtime].groupby(
                ["network", "variant"], sort=False
            ):
                part = part.sort_values("batch")
                axes.plot(part["intensity"], part["flops_per_s"] / 1e9, marker=markers[network], **looks[variant])
            _references(axes, frame)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_ylabel("GFLOP/s reached")
            if len(runtimes) > 1:
                axes.set_title(runtime, fontsize="small")
        panels[-1].set_xlabel("FLOP for each byte that operators read or write")
        _head(
            figure, "Arithmetic reached in prediction", _roofline_legend(frame, looks, markers), ncols=3, fontsize=7.5
        )
        _stamp(figure, frame)
    return figure


def _references(axes: Axes, frame: pd.DataFrame) -> None:
    """What the device reached in a large copy and in a large matrix product, as lines."""
    peak, copy = frame["peak_flops_per_s"].iloc[0], frame["copy_bytes_per_s"].iloc[0]
    x = np.geomspace(frame["intensity"].min() / 2, max(frame["intensity"].max(), peak / copy) * 3, 200)
    axes.plot(x, np.minimum(peak, x * copy) / 1e9, color="black", linewidth=1.4)
    ridge = peak / copy
    slope = x[0] ** 0.3 * ridge**0.7
    for text, at, reached in (
        (f"matrix product, measured: {peak / 1e9:,.0f} GFLOP/s", ridge, peak),
        (f"copy, measured: {copy / 1e9:,.0f} GB/s", slope, slope * copy),
    ):
        axes.annotate(
            text, (at, reached / 1e9), xytext=(-4, 0), textcoords="offset points", ha="right", va="center", fontsize=8
        )


def _roofline_legend(frame: pd.DataFrame, looks: dict[str, dict], markers: dict[str, str]) -> list[Line2D]:
    """Colours and fills of variants, markers of networks, and the batches of a line."""
    variants = [
        Line2D([], [], **look, marker=markers.get(name, "o"), label=VARIANTS.get(name, name))
        for name, look in looks.items()
    ]
    # A network that is named as its variant has its mark above.
    networks = [
        Line2D([], [], color="black", linestyle="", marker=marker, label=TITLES.get(name, name))
        for name, marker in markers.items()
        if name not in looks
    ]
    batches = ", ".join(map(str, sorted(frame["batch"].unique())))
    return [*variants, *networks, Line2D([], [], linestyle="", label=f"left to right: batch {batches}")]


def timing_label(network: str, variant: str) -> str:
    """A row of the timings in words."""
    name = TITLES.get(network, network)
    return name if network == variant else f"{name}: {VARIANTS.get(variant, variant)}"


def sensitivity(frame: pd.DataFrame) -> Figure:
    """Distance of each option of each assumption from the published points, as a share of images, log scale.

    `frame` is the table of `sensitivity.table`; images may be absent.
    """
    groups = list(frame.groupby(["assumption", "figure"], sort=False))
    with styled():
        figure = Figure(figsize=(7.0, 1.6 + 0.24 * (len(frame) + 1.4 * len(groups))))
        axes = figure.subplots()
        ticks, labels, y = [], [], 0.0
        for (assumption, scored_by), group in groups:
            # A tick's label, as those of the options: so it never lies on the axis.
            ticks.append(y)
            labels.append(f"{ASSUMPTIONS.get(assumption, assumption)}, by {_scored_by(scored_by)}")
            for row in group.sort_values("rmse").itertuples():
                y += 1
                _option(axes, y, row)
                ticks.append(y)
                labels.append(f"{option_label(assumption, row.alternative)}{' (in use)' if row.chosen else ''}")
            y += 1.4
        axes.set_yticks(ticks, labels, fontsize=8)
        rows = iter(axes.get_yticklabels())
        for _, group in groups:
            next(rows).set_fontweight("bold")
            list(itertools.islice(rows, len(group)))
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(y - 0.8, -0.7)
        axes.grid(axis="y", visible=False)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("rms distance of accuracies (shares in [0, 1])", x=1, ha="right")
        handles = [
            Line2D([], [], **_mark(True, 5), label="in use"),
            Line2D([], [], **_mark(False, 5), label="another option"),
            Line2D([], [], **_mark(False, 1), label="small: one trial"),
            Line2D([], [], **BY_BATCH, markersize=4.5, label=LOOKS["val_batch", "last"].label),
        ]
        _head(figure, "How far each guess is from the published curves", handles)
        _stamp(figure, frame)
    return figure


BY_BATCH = {"marker": "D", "linestyle": "", "color": LIGHT_BLUE}


def _mark(chosen: bool, trials: int) -> dict[str, Any]:
    """How a distance in eval mode is drawn: filled where in use, small where it is of one trial."""
    face = BLUE if chosen else "white"
    return {
        "marker": "o",
        "markersize": 4 if trials == 1 else 7,
        "linestyle": "",
        "color": BLUE,
        "markerfacecolor": face,
    }


def _option(axes: Axes, y: float, row: Any) -> None:
    axes.plot([row.rmse, row.rmse_by_batch], [y, y], color=LIGHT_BLUE, linewidth=0.8, zorder=1.5)
    axes.plot([row.rmse_by_batch], [y], **BY_BATCH, markersize=3 if row.trials == 1 else 5.5)
    axes.plot([row.rmse], [y], **_mark(row.chosen, row.trials))


def _scored_by(experiment: str) -> str:
    name = experiment.removeprefix("accuracy_vs_t_")
    return f"{TITLES.get(name, name)} over t" if name != experiment else EXPERIMENTS.get(name, name)


def option_label(assumption: str, text: str) -> str:
    """The value of a key of the configuration, as `sensitivity.text` gives it, in words."""
    if (assumption, text) in VALUES:
        return VALUES[assumption, text]
    parts = re.findall(r"(\w+)=(\[.*\]|\S+)", text)
    words = [VALUES.get(f"{key}={value}") or f"{VALUES.get(key, key)} {value}" for key, value in parts]
    return ", ".join(words) or text


def save(figure: Figure, path: str | Path) -> tuple[Path, Path]:
    """Write `path` with .svg and .png added, the same bytes each time; gives both paths.

    `path` comes without a suffix; a dot in its name is kept. Raises StoreError where they cannot be written.
    """
    svg, png = (Path(f"{path}.{suffix}") for suffix in ("svg", "png"))
    for place, dateless in ((svg, {"Date": None}), (png, {"Software": None})):
        with styled(), written(place, StoreError) as part:
            figure.savefig(part, format=place.suffix[1:], metadata=dateless)
    return svg, png


def _draw(axes: Axes, x: pd.Series, points: pd.DataFrame, look: Look) -> None:
    """Our means with their intervals as bars."""
    if points.empty:
        return
    axes.plot(x, points["mean"], color=look.color, linestyle=look.line, marker=look.marker, label=look.label)
    spread = np.vstack([points["mean"] - points["low"], points["high"] - points["mean"]])
    if np.isfinite(spread).any():
        axes.errorbar(x, points["mean"], yerr=np.clip(spread, 0, None), fmt="none", ecolor=look.color, elinewidth=0.9)


def _draw_published(axes: Axes, x: pd.Series, y: pd.Series, look: Look, line: bool = False) -> None:
    """The published points: hollow, grey, behind ours, with the marker of the series that they belong to."""
    if len(x):
        axes.plot(
            x, y, linestyle="-" if line else "", linewidth=0.8, color=PUBLISHED_COLOR, marker=look.marker,
            markersize=PUBLISHED_SIZE, markerfacecolor="none", markeredgewidth=0.8, zorder=1.5,
        )  # fmt: skip


def _legend(figure: Figure, axes: Axes, title: str, extra: list[Line2D] | None = None) -> None:
    """A legend of what is drawn; one entry has the markers of all published series."""
    handles = [*axes.get_legend_handles_labels()[0], *(extra or [])]
    if theirs := [line for line in axes.lines if line.get_markerfacecolor() == "none"]:
        handles.append(Container(theirs, label="published, of the series with that marker"))
    _head(figure, title, handles)


def _head(figure: Figure, title: str, handles: list, ncols: int = 2, fontsize: float | None = None) -> None:
    """Title and legend above the axes, so that the foot is left to the stamp."""
    legend = figure.legend(
        handles=handles, title=title, loc="outside upper left", ncols=ncols, alignment="left", fontsize=fontsize,
        handler_map={Container: HandlerTuple(ndivide=None)},
    )  # fmt: skip
    legend.get_title().set_fontsize(10.5)


def _stamp(figure: Figure, frame: pd.DataFrame) -> None:
    """Tier, device, versions, date, number of trials and images, small, at the foot."""
    stamp = statistics.stamp(frame)
    parts = [f"tier {stamp['tier']}"] if stamp.get("tier") else []
    parts += [str(stamp["device"])] if stamp.get("device") else []
    parts += [f"torch {stamp['torch']}"] if stamp.get("torch") else []
    parts += [str(stamp["date"])] if stamp.get("date") else []
    counts = frame.get("trials", frame.get("n"))
    if counts is not None and len(frame):
        low, high = counts.min(), counts.max()
        trials = f"{low}" if low == high else f"{low} to {high}"
        parts.insert(0, f"{trials} trial{'' if high == 1 else 's'} a point")
    images = frame.get("images")
    if images is not None and images.notna().any():
        low, high = images.min(), "all" if images.isna().any() else images.max()
        parts.insert(1, f"trained on {low if low == high else f'{low} to {high}'} images")
    lines = textwrap.wrap("  ·  ".join(parts), STAMP_WIDTH)
    figure.supxlabel("\n".join(lines), fontsize=7, color="#555555", x=0.995, ha="right")

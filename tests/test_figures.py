"""Figures hold every point of their tables, the published ones, and the stamp; files are the same each time."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.markers import CARETDOWN

from skipfold.replication import figures, statistics

STAMP = {"tier": "quick", "device": "CPU (any)", "torch": "2.11.0", "cuda": None, "commit": "abc", "date": "2026-01-01"}


def table(experiment, epochs=None, shift=0.0):
    """The published points as if they were ours, of 3 trials."""
    frame = statistics.published(experiment)
    frame = frame.assign(
        mean=frame["mean"] - shift, low=frame["mean"] - shift - 0.001, high=frame["mean"] - shift + 0.001, n=3,
        network="resnet34", experiment=experiment, **STAMP,
    )  # fmt: skip
    return frame if epochs is None else frame[frame["epoch"] <= epochs]


def trials(aggregate, **more):
    """Two trials of each mean of `aggregate`, in the columns that the figure of the schedules reads."""
    ours = aggregate.rename(columns={"mean": "val_accuracy"})[["arm", "epoch", "t", "val_accuracy"]]
    measured = {"skips_removed_val_accuracy": np.nan, "reestimated_val_accuracy": np.nan}
    return pd.concat([ours, ours]).assign(**(measured | more))


def texts(figure):
    found = [text.get_text() for axes in figure.axes for text in (axes.title, axes.xaxis.label, *axes.texts)]
    found += [text.get_text() for legend in figure.legends for text in (legend.get_title(), *legend.get_texts())]
    return " | ".join([*found, figure.get_supxlabel()])


def drawn(axes):
    """Every point of the lines of `axes`, as a set of (x, y)."""
    points = np.vstack([line.get_xydata() for line in axes.lines if len(line.get_xydata()) > 2])
    return {tuple(point) for point in points.round(6)}


def test_accuracy_vs_t_draws_ours_and_the_published_points():
    ours, published = table("accuracy_vs_t_resnet18", shift=0.01), statistics.published("accuracy_vs_t_resnet18")
    (axes,) = figures.accuracy_vs_t(ours, published).axes
    beside = [-0.005, 0, 0.005]
    for frame, places in ((ours, beside), (published, [0] * 3)):
        for place, (split, epoch) in zip(places, [("val", 2), ("val", 1), ("train", 2)], strict=True):
            own = frame[(frame["split"] == split) & (frame["epoch"] == epoch)]
            points = {(round(t + place, 6), round(y, 6)) for t, y in zip(own["t"], own["mean"], strict=True)}
            assert points and points <= drawn(axes)


def test_the_legend_shows_the_markers_that_have_published_points():
    ours, published = table("accuracy_vs_t_resnet18"), statistics.published("accuracy_vs_t_resnet18")
    by_batch = ours[(ours["split"] == "val") & (ours["epoch"] == 2)].assign(split="val_batch")
    ours = pd.concat([ours, by_batch])
    (legend,) = figures.accuracy_vs_t(ours, published).legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "validation, last epoch", "the same, BatchNorm by batch as in training", "validation, first epoch",
        "training, last epoch", "published, of the series with that marker",
    ]  # fmt: skip
    markers = [(line.get_marker(), line.get_markerfacecolor() == "none") for line in legend.findobj(Line2D)]
    assert markers == [(own, False) for own in "oDs^"] + [(own, True) for own in "os^"]
    assert "published" not in texts(figures.accuracy_vs_t(ours))


def test_ours_are_darker_than_the_published_in_grey_print():
    def grey(color):
        return np.dot(to_rgb(color), (0.299, 0.587, 0.114))

    ours = [look.color for look in figures.LOOKS.values()]
    assert max(map(grey, ours)) < grey(figures.PUBLISHED_COLOR) - 0.15


def test_a_wide_curve_has_a_panel_for_its_plateau():
    ours = table("accuracy_vs_t_resnet34")
    last = (ours["split"] == "val") & (ours["epoch"] == 2)
    ours["mean"] = ours["mean"].where(~last | (ours["t"] != 0.995), 0.951)
    _, plateau = figures.accuracy_vs_t(ours, statistics.published("accuracy_vs_t_resnet34")).axes
    bottom = plateau.get_ylim()[0]
    assert 0.93 < bottom < 0.951
    below = ours[last & (ours["mean"] < bottom)]
    carets = [line.get_xydata().tolist() for line in plateau.lines if line.get_marker() == CARETDOWN]
    assert carets == [[pytest.approx((t - 0.005, bottom))] for t in below["t"]] and 1 in set(below["t"])
    assert [text.get_text() for text in plateau.texts] == [f"{mean:.3f}" for mean in below["mean"]]
    assert len(figures.accuracy_vs_t(table("accuracy_vs_t_cnn3")).axes) == 1


def test_the_stamp_is_on_the_figure():
    figure = figures.linear_comparison(table("linear_comparison"), ceiling=0.9274)
    foot = figure.get_supxlabel()
    for part in ("3 trials", "tier quick", "CPU (any)", "torch 2.11.0", "2026-01-01"):
        assert part in foot
    assert "0.9274" in texts(figure)


def test_every_trial_is_shown_after_the_last_epoch():
    ours = table("schedule_comparison")
    with_crosses = trials(ours, skips_removed_val_accuracy=0.98)
    figure = figures.schedule_comparison(ours, with_crosses)
    assert "skips removed" in texts(figure) and "running statistics estimated anew" not in texts(figure)
    ends = figure.axes[-1]
    assert [label.get_text() for label in ends.get_xticklabels()] == [
        "static t = nan",
        "t from 0.9 to 0",
        "t from 0.5 to 0",
    ]
    crosses = [line for line in ends.lines if line.get_marker() == "x"]
    assert [list(line.get_ydata()) for line in crosses] == [[0.98, 0.98]] * 3
    anew = trials(ours, reestimated_val_accuracy=0.99)
    assert "running statistics estimated anew" in texts(figures.schedule_comparison(ours, anew))


def test_what_is_below_the_panel_is_marked_with_its_value():
    ours = table("schedule_comparison")
    far = ours["mean"].where((ours["epoch"] > 1) | (ours["arm"] != "static"), 0.5)
    figure = figures.schedule_comparison(ours.assign(mean=far), trials(ours))
    (caret,) = [line for line in figure.axes[0].lines if line.get_marker() == CARETDOWN]
    assert caret.get_ydata() == figure.axes[0].get_ylim()[0] and caret.get_color() == figures.LOOKS["static"].color
    assert figure.axes[0].get_ylim()[0] > 0.9 and [text.get_text() for text in figure.axes[0].texts] == ["0.500"]


def test_an_interval_that_ends_below_the_panel_has_no_caret():
    ours = table("schedule_comparison").assign(low=0.5)
    (axes, _) = figures.schedule_comparison(ours, trials(ours)).axes
    assert axes.get_ylim()[0] > 0.9 and not axes.texts
    assert CARETDOWN not in [line.get_marker() for line in axes.lines]
    bars = np.concatenate([bar for bars in axes.collections for bar in bars.get_segments()])
    assert bars[:, 1].min() == pytest.approx(0.5)


def test_the_static_arm_says_its_t():
    ours = table("schedule_comparison").assign(t=0.995)
    assert "static t = 0.995" in texts(figures.schedule_comparison(ours, trials(ours)))


def test_arms_that_the_paper_does_not_have_differ():
    names = {
        "static": "static_0.7",
        "scheduled_from_0.9": "scheduled_from_0.8",
        "scheduled_from_0.5": "scheduled_from_0.6",
    }
    ours = table("schedule_comparison")
    ours = ours.assign(arm=ours["arm"].replace(names), t=0.7)
    figure = figures.schedule_comparison(ours, trials(ours))
    assert {"static t = 0.7", "t from 0.8 to 0", "t from 0.6 to 0"} <= set(texts(figure).split(" | "))
    lines = [line for line in figure.axes[0].lines if line.get_marker() not in ("_", "None")]
    assert len(lines) == len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == 3


def test_validation_by_batch_has_a_panel():
    ours = table("schedule_comparison")
    by_batch = ours.assign(split="val_batch", mean=ours["mean"] - 0.01)
    assert len(figures.schedule_comparison(ours, trials(ours)).axes) == 2
    upper, lower, _ = figures.schedule_comparison(pd.concat([ours, by_batch]), trials(ours)).axes
    for axes, frame in ((upper, ours), (lower, by_batch)):
        assert {round(mean, 6) for mean in frame["mean"]} <= {y for _, y in drawn(axes)}


def test_one_trial_has_no_bars():
    ours = table("linear_comparison").assign(low=np.nan, high=np.nan, n=1)
    figure = figures.linear_comparison(ours)
    assert not figure.axes[0].collections and "1 trial a point" in figure.get_supxlabel()


def test_timing_shows_every_row_and_what_it_saves():
    medians = {"skips": 10.0, "skips_removed": 8.0}
    rows = [
        {"network": network, "variant": variant, "runtime": "eager", "batch": batch, "measure": "host",
         "median_us": median, "q1_us": median - 1, "q3_us": median + 1,
         "samples_us": " ".join(str(median * drift) for drift in (1, 1, 1, 1, 1, 1 if variant == "skips" else 1.5)),
         **STAMP}
        for network in ("resnet18", "resnet34") for variant, median in medians.items() for batch in (1, 64, 256)
    ]  # fmt: skip
    figure = figures.timing(pd.DataFrame(rows), published=(0.22, 0.46))
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == ["batch 1", "batch 64", "batch 256"] * 2
    assert [label.get_text() for label in shown[0].get_yticklabels()] == [
        "ResNet18: skips with t", "ResNet18: skips removed", "ResNet34: skips with t", "ResNet34: skips removed",
    ]  # fmt: skip
    for axes in shown[3:]:
        (bars,) = [container for container in axes.containers if container.get_label() == "eager"]
        assert list(bars.lines[0].get_xdata()) == pytest.approx([20.0, 20.0])
        spread = bars.lines[2][0].get_segments()
        assert [segment[:, 0].tolist() for segment in spread] == [pytest.approx([-20.0, 20.0])] * 2
    assert shown[3].get_xlim() == shown[4].get_xlim() == shown[5].get_xlim() and shown[5].get_xlim()[1] > 46
    assert "published, of eager alone, on a GPU: 22 to 46 %" in texts(figure)
    bands = [[(bar.get_x(), bar.get_width()) for bar in axes.patches] for axes in shown]
    striped = [[(0, 1)] * 2, [(0, 1)]]  # every other row, from side to side
    assert bands == [*[striped[0]] * 3, striped[1], [*striped[1], *[pytest.approx((22, 24))] * 2], striped[1]]


def test_networks_of_one_layer_are_timed_in_panels_of_their_own():
    rows = [
        {"network": "resnet34_linear_avgpool", "variant": variant, "runtime": "eager", "batch": 64, "measure": "host",
         "median_us": median, "q1_us": median, "q3_us": median, "samples_us": f"{median} {median}", **STAMP}
        for variant, median in (("skips", 1000.0), ("collapsed", 0.5), ("another", 900.0))
    ]  # fmt: skip
    deep, one_layer, saved = figures.timing(pd.DataFrame(rows)).axes
    assert deep.get_xlim()[0] == one_layer.get_xlim()[0] == 0 and one_layer.get_xlim()[1] < 1
    assert [label.get_text() for label in saved.get_yticklabels()] == ["linear ResNet34, average-pool: another"]


def test_roofline_draws_every_point_beside_what_was_measured():
    rows = [
        {"network": "resnet18", "variant": variant, "runtime": "eager", "batch": batch, "intensity": intensity,
         "flops_per_s": 1e9 * intensity, "peak_flops_per_s": 4e10, "copy_bytes_per_s": 1e10, **STAMP}
        for variant in ("skips", "skips_removed", "skips_folded") for batch, intensity in ((64, 8.0), (1, 2.0))
    ]  # fmt: skip
    figure = figures.roofline(pd.DataFrame(rows))
    (axes,) = figure.axes
    *series, roof = axes.lines
    assert [line.get_xydata().tolist() for line in series] == [[[2.0, 2.0], [8.0, 8.0]]] * 2
    assert [line.get_marker() for line in series] == ["o"] * 2
    assert len({line.get_fillstyle() for line in series}) == len({line.get_color() for line in axes.lines}) - 1 == 2
    assert "skips with t | skips removed | ResNet18 | left to right: batch 1, 64" in texts(figure)
    x, y = roof.get_xydata().T
    assert y == pytest.approx(np.where(x < 4, 10 * x, 40))
    assert x.min() < 2 and x.max() > 8
    assert [text.get_text() for text in axes.texts] == [
        "matrix product, measured: 40 GFLOP/s", "copy, measured: 10 GB/s",
    ]  # fmt: skip
    two = [row | {"runtime": runtime} for row in rows for runtime in ("eager", "cuda_graph")]
    assert [axes.get_title(loc="left") for axes in figures.roofline(pd.DataFrame(two)).axes] == ["eager", "cuda_graph"]


def test_sensitivity_names_the_option_in_use():
    rows = [("padding", "1", True, 0.002, 0.001), ("padding", "0", False, 0.05, np.nan)]
    frame = pd.DataFrame(rows, columns=["assumption", "alternative", "chosen", "rmse", "rmse_by_batch"])
    frame = frame.assign(figure="accuracy_vs_t_cnn3", trials=1, n=51, **STAMP)
    figure = figures.sensitivity(frame)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["padding, by 3-layer linear CNN over t", "1 (in use)", "0"]
    marks = [line for line in figure.axes[0].lines if line.get_marker() in "oD"]
    assert [line.get_xdata()[0] for line in marks] == pytest.approx([0.001, 0.002, np.nan, 0.05], nan_ok=True)
    assert [line.get_markerfacecolor() == "white" for line in marks] == [False, False, False, True]
    assert "1 trial a point" in figure.get_supxlabel()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optimizer.resnet", "name=sgd lr=0.01 momentum=0.0", "SGD, rate 0.01, no momentum"),
        ("networks.cnn3", "width=2 skips=[[0, 2], [1, 3]]", "width 2, skips [[0, 2], [1, 3]]"),
        ("drop_last", "True", "left out"),
        ("experiments.linear_comparison.t", "0.5", "0.5"),
    ],
)
def test_options_are_named_in_words(key, value, words):
    assert figures.option_label(key, value) == words


def test_files_are_the_same_each_time(tmp_path):
    ours = table("linear_comparison")
    files = [figures.save(figures.linear_comparison(ours), tmp_path / name) for name in ("t=0.5", "again")]
    assert [path.name for path in files[0]] == ["t=0.5.svg", "t=0.5.png"]
    for first, second in zip(*files, strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_a_figure_that_cannot_be_written_leaves_the_old_one(tmp_path):
    figure = figures.linear_comparison(table("linear_comparison"))
    svg, png = figures.save(figure, tmp_path / "figure")
    held = svg.read_bytes(), png.read_bytes()
    figure.savefig = lambda part, **_: part.write_text("ha") and 1 / 0
    with pytest.raises(ZeroDivisionError):
        figures.save(figure, tmp_path / "figure")
    assert (svg.read_bytes(), png.read_bytes()) == held and sorted(tmp_path.iterdir()) == [png, svg]

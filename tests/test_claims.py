"""Claims: their published values recomputed from the published tables, and verdicts on tables made for it."""

import copy
import functools
import math
import re

import numpy as np
import pandas as pd
import pytest
import yaml

from skipfold.errors import ConfigError
from skipfold.keys import parse
from skipfold.networks import NETWORKS
from skipfold.replication import claims, config, experiments, statistics
from skipfold.replication.tables import read_table, read_tables, write_table

CHECKS = {check["id"]: check for claim in claims.load() for check in claim["checks"]}
TRAINED = ("linear_comparison", "schedule_comparison", "accuracy_vs_t_resnet34", "accuracy_vs_t_resnet18",
           "accuracy_vs_t_cnn3", "accuracy_vs_t_shallow_linear", "accuracy_vs_t_shallow_leaky_relu")  # fmt: skip


def trials(experiment, count=5, spread=1e-5, **changed):
    """A tidy table in which `count` trials lie around the published curve, symmetrically."""
    points = statistics.published(experiment)
    points = points[points["split"] == "val"]
    frames = []
    for index in range(count):
        frame = points.rename(columns={"mean": "val_accuracy"}).drop(columns="split")
        frame = frame.assign(
            val_accuracy=frame["val_accuracy"] + spread * (index - (count - 1) / 2),
            t_start=frame["t"].fillna(0.5), index=index, experiment=experiment, network="resnet34", data="mnist",
            epochs=int(frame["epoch"].max()), train_images=np.nan, val_images=np.nan,
            digest=frame["arm"] + f"/{index}", device="GPU", torch="2", tier="paper", date="2026-01-01",
        )  # fmt: skip
        frames.append(frame)
    frame = pd.concat(frames).assign(**changed)
    at_end = frame["arm"].str.startswith("scheduled") & (frame["epoch"] == frame["epochs"])
    frame["skips_removed_max_difference"] = np.where(at_end, 0.0, np.nan)
    frame["refused"] = None
    return frame


@pytest.fixture
def results(tmp_path):
    """A tier in which everything came out as published."""
    tables = tmp_path / "tables"
    tables.mkdir()
    for experiment in TRAINED:
        write_table(trials(experiment), tables / f"{experiment}_trials.csv")
    return tmp_path


def verdict(results, name):
    return claims.judge_tables(read_tables(results), [{"id": "any", "checks": [CHECKS[name]]}]).iloc[0]


def test_published_curves_themselves_are_reproduced(results):
    found = claims.judge(results)
    found = found[found["experiment"].isin(TRAINED) & (found["table"] != "tables/certificates.csv")]
    found = found[found["id"] != "linearized_both"]  # not in the published table: its network is ours
    assert set(found["verdict"]) == {claims.REPRODUCED}, found[["id", "verdict", "remark"]]
    found = found[found["low"].notna()]
    assert (found["n"] == 5).all() and (found["interval"] == claims.BOOTSTRAP).all()


def test_published_values_are_those_of_the_published_tables(results):
    """Every published number of a curve in claims.yaml, recomputed to its printed digits."""
    found = claims.judge(results)
    found = found[found["experiment"].isin(TRAINED) & found["ours"].notna()]
    checked = 0
    for row in found.itertuples():
        published = CHECKS[row.id]["published"]
        assert row.ours == pytest.approx(published, abs=6e-6), row.id
        checked += published != 0
    assert checked == 14


def test_difference_by_hand(results):
    expected = 0.98682 - 0.90762
    row = verdict(results, "linearized_above_perceptron")
    assert row["ours"] == pytest.approx(expected)
    assert expected - 4e-5 < row["low"] < expected < row["high"] < expected + 4e-5


def test_a_difference_is_of_all_trials_where_one_arm_has_more(results):
    frame = trials("linear_comparison")
    more = frame[frame["arm"] == "perceptron"].copy()
    more["digest"], more["index"], more["val_accuracy"] = more["digest"] + "+", more["index"] + 5, 0.9
    write_table(pd.concat([frame, more]), results / "tables" / "linear_comparison_trials.csv")
    row = verdict(results, "linearized_above_perceptron")
    assert row["ours"] == pytest.approx(0.98682 - (0.90762 + 0.9) / 2) and row["n"] == 5
    assert row["high"] - row["low"] > 0.004  # the perceptron's other trials are resampled too


def test_a_value_on_the_limit_is_within_however_it_is_rounded(results):
    frame = trials("linear_comparison", spread=0)
    last = (frame["arm"] == "resnet34_linear_maxpool") & (frame["epoch"] == 10)
    at_limit = [0.9833, 0.9846, 0.9838, 0.9837, 0.9837]
    assert np.mean(at_limit) < 0.98682 - 0.003 < np.mean(at_limit) + 1e-15  # the same number, rounded otherwise
    frame.loc[last, "val_accuracy"] = np.mean(at_limit)
    write_table(frame, results / "tables" / "linear_comparison_trials.csv")
    assert verdict(results, "linearized_accuracy")["verdict"] == claims.REPRODUCED


def test_an_experiment_that_is_not_the_papers_has_no_published_points(results):
    """A claim of one's own: its mean over t is judged, its distance from nothing cannot be."""
    frame = trials("accuracy_vs_t_cnn3").assign(experiment="accuracy_vs_t_mine")
    write_table(frame, results / "tables" / "accuracy_vs_t_mine_trials.csv")
    found = {}
    for kind in ("mean", "rmse"):
        check = CHECKS["cnn3_vs_t_curve"] | {"experiment": "accuracy_vs_t_mine", "published": 0.9, "tolerance": 0.1}
        check["measure"] = check["measure"] | {"kind": kind}
        (found[kind],) = claims.judge_tables(read_tables(results), [{"id": "any", "checks": [check]}])["verdict"]
    assert found == {"mean": claims.REPRODUCED, "rmse": claims.NOT_JUDGED}


def test_other_results_are_not_reproduced(results):
    frame = trials("linear_comparison")
    frame["val_accuracy"] -= 0.01
    write_table(frame, results / "tables" / "linear_comparison_trials.csv")
    row = verdict(results, "linearized_accuracy")
    assert row["verdict"] == claims.NOT_REPRODUCED and row["ours"] == pytest.approx(0.97682)
    assert verdict(results, "linearized_above_perceptron")["verdict"] == claims.REPRODUCED
    assert verdict(results, "perceptron_curve")["ours"] == pytest.approx(0.01)


def test_an_interval_across_the_limit_is_inconclusive(results):
    frame = trials("linear_comparison", spread=0.002)
    frame["val_accuracy"] += 0.0029
    write_table(frame, results / "tables" / "linear_comparison_trials.csv")
    row = verdict(results, "perceptron_accuracy")
    assert row["verdict"] == claims.INCONCLUSIVE and row["remark"] == "our value lies within the limit"
    assert row["low"] < 0.91062 - 0.0001 < row["high"]


def test_an_interval_that_holds_all_that_is_accepted_is_inconclusive(results):
    """Both ends and the mean are outside, on either side: what was measured does not speak against the claim."""
    frame = trials("schedule_comparison", spread=0.004)
    frame.loc[frame["arm"] == "scheduled_from_0.9", "val_accuracy"] -= 0.0025
    write_table(frame, results / "tables" / "schedule_comparison_trials.csv")
    row = verdict(results, "scheduled_from_0.9_level")
    assert row["low"] < 0.00018 - 0.002 and row["ours"] < 0.00018 - 0.002 and row["high"] > 0.00018 + 0.002
    assert row["verdict"] == claims.INCONCLUSIVE and row["remark"] == "our value lies outside the limit"


def test_more_than_published_is_said(results):
    frame = trials("accuracy_vs_t_resnet34")
    frame.loc[frame["t"] < 0.3, "val_accuracy"] -= 0.01
    write_table(frame, results / "tables" / "accuracy_vs_t_resnet34_trials.csv")
    row = verdict(results, "resnet34_unstable_below_0.3")
    assert row["verdict"] == claims.REPRODUCED
    assert row["remark"].endswith("published 0.17109, ours 0.18109: larger than published")


def test_removal_is_judged_by_its_largest_difference(results):
    assert verdict(results, "skips_removed_exact")["verdict"] == claims.REPRODUCED
    path = results / "tables" / "schedule_comparison_trials.csv"
    frame = read_table(path)
    at_end = frame["skips_removed_max_difference"].notna()
    frame.loc[at_end & (frame["index"] == 3), "skips_removed_max_difference"] = [1e-3, 2e-3]
    write_table(frame, path)
    row = verdict(results, "skips_removed_exact")
    assert (row["verdict"], row["ours"], row["n"]) == (claims.NOT_REPRODUCED, 2e-3, 10)
    assert row["table"] == "tables/schedule_comparison_trials.csv"
    write_table(frame.drop(columns="skips_removed_max_difference"), path)
    assert verdict(results, "skips_removed_exact")["verdict"] == claims.NOT_JUDGED


def test_published_at_the_t_that_ran_is_said(results):
    frame = trials("accuracy_vs_t_shallow_leaky_relu")
    frame = frame[np.isclose(frame["t"] * 10, (frame["t"] * 10).round())]
    write_table(frame, results / "tables" / "accuracy_vs_t_shallow_leaky_relu_trials.csv")
    row = verdict(results, "shallow_leaky_relu_declines")
    points = statistics.published("accuracy_vs_t_shallow_leaky_relu").query("epoch == 2").set_index("t")["mean"]
    expected = points[[0, 0.1, 0.2]].mean() - points[[0.8, 0.9, 1]].mean()
    assert row["ours"] == pytest.approx(expected) and expected == pytest.approx(0.0032)
    assert row["remark"] == f"published at the same t {expected:.5f}"


def test_a_range_is_judged_by_the_published_one_at_the_t_that_ran(results):
    frame = trials("accuracy_vs_t_resnet18")
    frame = frame[np.isclose(frame["t"] * 10, (frame["t"] * 10).round()) | np.isclose(frame["t"], 0.98)]
    write_table(frame, results / "tables" / "accuracy_vs_t_resnet18_trials.csv")
    row = verdict(results, "resnet18_flat")
    points = (
        statistics.published("accuracy_vs_t_resnet18").query("epoch == 2 and split == 'val'").set_index("t")["mean"]
    )
    expected = np.ptp(points[[*np.arange(10) / 10, 0.98]])
    assert row["ours"] == pytest.approx(expected) and expected < CHECKS["resnet18_flat"]["published"]
    assert row["published"] == f"{expected:.5g}" and row["limit"] == f"at most {expected + 0.005:.5g}"


def test_a_distance_has_no_published_value(results):
    row = verdict(results, "perceptron_curve")
    assert row["published"] is None and row["limit"] == "at most 0.002"
    assert row["remark"] == "10 published points; 0.00000 with the noise of our means"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"data": "digits"}, "digits instead of mnist"),
        ({"train_images": 2048}, "not all images"),
        ({"val_images": 1000}, "not all images"),
        ({"epochs": 2}, "2 instead of 10 epochs"),
        ({"count": 4}, "4 trials instead of 5"),
    ],
)
def test_another_protocol_is_not_judged(results, changed, reason):
    write_table(trials("linear_comparison", **changed), results / "tables" / "linear_comparison_trials.csv")
    row = verdict(results, "perceptron_accuracy")
    assert row["verdict"] == claims.NOT_JUDGED and reason in row["remark"] and math.isnan(row["ours"])


def test_a_protocol_may_leave_out_what_does_not_matter(results):
    check = CHECKS["perceptron_accuracy"] | {"protocol": {}}
    (row,) = claims.judge_tables(read_tables(results), [{"id": "any", "checks": [check]}]).to_dict("records")
    assert row["verdict"] == claims.REPRODUCED


def test_the_wrong_epochs_are_named(results):
    frame = trials("linear_comparison")
    last = (frame["arm"] == "perceptron") & (frame["index"] == 4)
    frame.loc[last, "epochs"] = 20
    write_table(frame, results / "tables" / "linear_comparison_trials.csv")
    assert verdict(results, "perceptron_accuracy")["remark"] == "perceptron: 20 instead of 10 epochs"


def test_the_schedules_of_another_network_are_not_judged(results):
    frame = trials("schedule_comparison", network="resnet18")
    write_table(frame, results / "tables" / "schedule_comparison_trials.csv")
    found = claims.judge(results).set_index("experiment").loc["schedule_comparison"]
    assert set(found["verdict"]) == {claims.NOT_JUDGED}
    assert found["remark"].str.contains("resnet18 instead of resnet34").all()


def test_arms_are_judged_one_by_one(results):
    frame = trials("linear_comparison")
    frame.loc[frame["arm"] == "resnet34_linear_maxpool", "train_images"] = 2048
    write_table(frame, results / "tables" / "linear_comparison_trials.csv")
    assert verdict(results, "linearized_accuracy")["verdict"] == claims.NOT_JUDGED
    assert verdict(results, "perceptron_accuracy")["verdict"] == claims.REPRODUCED


def test_validation_by_batch_is_said_beside_the_verdict(results):
    frame = trials("accuracy_vs_t_resnet34")
    frame["val_batch_accuracy"] = frame["val_accuracy"]
    frame["val_accuracy"] -= 0.02
    write_table(frame, results / "tables" / "accuracy_vs_t_resnet34_trials.csv")
    row = verdict(results, "resnet34_curve")
    assert row["verdict"] == claims.NOT_REPRODUCED and row["ours"] == pytest.approx(0.02)
    end = r"with the statistics of each batch 0\.00000 \(0\.00000 to 0\.0000\d\): reproduced$"
    assert re.search(end, row["remark"])
    frame["val_batch_accuracy"] -= 0.03
    write_table(frame, results / "tables" / "accuracy_vs_t_resnet34_trials.csv")
    assert "batch 0.03000 (0.03000 to 0.03000): not reproduced" in verdict(results, "resnet34_curve")["remark"]
    assert "batch" not in verdict(results, "cnn3_vs_t_curve")["remark"]


def test_statistics_estimated_anew_are_said_beside_the_verdict(results):
    frame = trials("schedule_comparison")
    at_end = frame["epoch"] == frame["epochs"]
    frame["reestimated_val_accuracy"] = frame["val_accuracy"].where(at_end)
    frame.loc[at_end & (frame["arm"] == "scheduled_from_0.5"), "val_accuracy"] -= 0.05
    write_table(frame, results / "tables" / "schedule_comparison_trials.csv")
    row = verdict(results, "scheduled_from_0.5_level")
    assert row["verdict"] == claims.NOT_REPRODUCED and row["ours"] == pytest.approx(0.00058 - 0.05)
    end = "with running statistics estimated anew 0.00058 (0.00055 to 0.00061): reproduced"
    assert row["remark"].endswith(end)
    assert "anew" not in verdict(results, "scheduled_from_0.5_curve")["remark"]


def test_a_missing_value_of_t_is_named(results):
    frame = trials("accuracy_vs_t_resnet34")
    write_table(frame[frame["t"] != 0.7], results / "tables" / "accuracy_vs_t_resnet34_trials.csv")
    row = verdict(results, "resnet34_plateau")
    assert row["verdict"] == claims.NOT_JUDGED and "t = 0.7 did not run" in row["remark"]


def test_a_coarse_grid_is_enough(results):
    frame = trials("accuracy_vs_t_cnn3")
    frame = frame[np.isclose(frame["t"] * 10 % 1, 0) | np.isclose(frame["t"] * 10 % 1, 1)]
    assert frame["t"].nunique() == 11
    write_table(frame, results / "tables" / "accuracy_vs_t_cnn3_trials.csv")
    row = verdict(results, "cnn3_vs_t_curve")
    assert row["verdict"] == claims.REPRODUCED and row["remark"].startswith("11 published points")


def certificate(arm, **values):
    return {"experiment": "linear_comparison", "arm": arm, "data": "mnist", "epochs": 10, "train_images": None,
            "val_images": None, "device": "GPU", "refused": None, "affine": True, "residual": 1e-15, "max_error": 1e-12,
            "max_error_float32": 1e-6, "equal_argmax": 1.0} | values  # fmt: skip


def test_certificates(results):
    rows = [certificate("cnn3", digest=f"c{i}", max_error=i * 1e-9) for i in range(5)]
    rows += [certificate("resnet34_linear_maxpool", digest=f"m{i}", residual=0.9, max_error=None, equal_argmax=None,
                         refused="not affine (residual 9.0e-01): maxpool: MaxPool2d is not affine")
             for i in range(5)]  # fmt: skip
    rows += [certificate("resnet34_linear_avgpool", digest="a", max_error=1.0)]
    write_table(pd.DataFrame(rows), results / "tables" / "certificates.csv")
    row = verdict(results, "collapse_exact")
    assert row["verdict"] == claims.REPRODUCED and row["ours"] == 4e-9 and row["n"] == 5
    assert "resnet34_linear_avgpool: 1 trial instead of 5" in row["remark"]
    row = verdict(results, "linearized_collapses")
    assert row["verdict"] == claims.NOT_REPRODUCED and "maxpool: MaxPool2d is not affine" in row["remark"]


def timing(device="GPU"):
    shared = {"network": "resnet18", "runtime": "eager", "precision": "float32", "batch": 64, "measure": "host",
              "device": device, "repeats": 6, "q1_us": 1, "q3_us": 1}  # fmt: skip
    return pd.DataFrame(
        [
            shared | {"variant": "skips", "median_us": 100, "samples_us": "100 100 100 100 100 200"},
            shared | {"variant": "skips_removed", "median_us": 70, "samples_us": "72 70 70 70 69 140"},
            shared | {"variant": "skips_removed", "median_us": 10, "samples_us": "10 10 10 10 10 10", "batch": 1},
        ]
    )


def test_saving_by_hand(results):
    write_table(timing(), results / "tables" / "timing.csv")
    row = verdict(results, "skip_removal_saves_resnet18")
    assert row["verdict"] == claims.REPRODUCED and row["ours"] == pytest.approx(0.30)
    assert (row["low"], row["high"], row["n"]) == pytest.approx((0.28, 0.31, 6))
    assert verdict(results, "skip_removal_saves_resnet34")["verdict"] == claims.NOT_JUDGED


def test_times_of_a_cpu_are_not_judged(results):
    write_table(timing("CPU (any, 2 threads)"), results / "tables" / "timing.csv")
    row = verdict(results, "skip_removal_saves_resnet18")
    assert row["verdict"] == claims.NOT_JUDGED and "CPU" in row["remark"]


def test_an_empty_tier_has_no_verdicts(tmp_path):
    found = claims.judge(tmp_path)
    assert set(found["verdict"]) == {claims.NOT_JUDGED, claims.NOT_TESTABLE} and len(found) == len(CHECKS)


@pytest.mark.parametrize(
    ("relation", "published", "inside", "outside"),
    [
        ("within", 0.5, (0.4, 0.6), (0.39, 0.61)),
        ("at_least", 0.5, (0.4, 2.0), (0.39,)),
        ("at_most", 0.5, (-1.0, 0.6), (0.61,)),
        ("between", [0.2, 0.5], (0.1, 0.6), (0.09, 0.61)),
    ],
)
def test_relations(relation, published, inside, outside):
    least, largest = claims.accepted({"relation": relation, "published": published, "tolerance": 0.1})
    assert all(least <= value <= largest for value in inside)
    assert not any(least <= value <= largest for value in outside)


def load(folder, *checks):
    """The claims of a file in which one, `mine`, has such checks."""
    path = folder / "claims.yaml"
    claim = {"id": "mine", "title": "", "statement": "", "checks": list(checks)}
    path.write_text(yaml.safe_dump({"claims": [claim]}))
    return claims.load(path)


GONE = "gone"
WRONG = [
    ("cnn3_accuracy", "tolerance", GONE, " lacks tolerance; it must be given: a finite number, at least 0"),
    ("cnn3_accuracy", "tolerance", "1e-3", ".tolerance: '1e-3' given; allowed is a finite number, at least 0; YAML"),
    ("cnn3_accuracy", "tolerance", math.inf, ".tolerance: inf given; allowed is a finite number"),
    ("cnn3_accuracy", "relation", "at least", ".relation: 'at least' given; did you mean at_least? allowed is one of"),
    ("cnn3_accuracy", "colour", "red", ".colour; allowed are id, quantity, "),
    ("cnn3_accuracy", "fitted", "by eye", ".fitted: 'by eye' given; allowed is one of value, setting"),
    ("cnn3_accuracy", "central", False, ".central: False given; allowed is true"),
    ("cnn3_accuracy", "published", [0.9, 1], ".published: [0.9, 1] given; allowed is a finite number; for a range, "),
    ("cnn3_accuracy", "relation", "between", ".published: 0.915 given; allowed is [from, to], two numbers"),
    ("skip_removal_saves_resnet34", "published", [0.4, 0.2], ".published: [0.4, 0.2] given; allowed is [from, to],"),
    ("cnn3_accuracy", "measure", GONE, ": keys central, experiment, "),
    ("cnn3_accuracy", "not_testable", "no", ": keys central, experiment, "),
    ("cnn3_accuracy", "measure", "mean", ".measure: 'mean' given; allowed is a mapping"),
    ("cnn3_accuracy", "measure.kind", GONE, ".measure lacks kind; it must be given: one of mean, range, "),
    ("cnn3_accuracy", "measure.kind", "maen", ".measure.kind: 'maen' given; did you mean mean? allowed is one of"),
    ("cnn3_accuracy", "measure.kind", "difference", ".measure lacks minus; it must be given"),
    ("cnn3_accuracy", "measure.off", 1, ".measure.off; did you mean of? allowed are kind, of"),
    ("cnn3_accuracy", "measure.of.arm", GONE, ".measure.of: keys epoch given; allowed is either an arm, or t: [from,"),
    ("cnn3_accuracy", "measure.of.t", [0, 1], ".measure.of: keys arm, epoch, t given; allowed is either an arm, or t"),
    ("cnn3_accuracy", "measure.of.epoch", 0, ".measure.of.epoch: 0 given; allowed is one of last, all, 1 and so on"),
    ("cnn3_flat", "measure.of.t", [1, 0], ".measure.of.t: [1, 0] given; allowed is [from, to], two numbers, the"),
    ("cnn3_accuracy", "measure.of.arm", "cnn_3", ".measure.of.arm: 'cnn_3' given; did you mean cnn3? allowed is one"),
    ("static_accuracy", "measure.of.arm", "static_1", ".measure.of.arm: 'static_1' given; "),
    ("collapse_exact", "measure.arms", ["cnn4"], ".measure.arms.0: 'cnn4' given; did you mean cnn3? "),
    ("collapse_exact", "measure.column", "error", ".measure.column: 'error' given; "),
    ("cnn3_flat", "experiment", "accuracy_vs_t_cnn", ".experiment: 'accuracy_vs_t_cnn' given; did you mean"),
    ("cnn3_flat", "experiment", "timing", ".experiment: 'timing' given; allowed is one of linear_comparison, "),
    ("collapse_saves", "experiment", "linear_comparison", ".experiment: 'linear_comparison' given; allowed is timing"),
    ("collapse_saves", "measure.kind", "savings", ".measure.kind: 'savings' given; did you mean saving? "),
    ("collapse_saves", "measure.runtime", "onnx", ".measure.runtime: 'onnx' given; "),
    ("collapse_saves", "measure.of.variant", "removed", ".measure.of.variant: 'removed' given; did you mean"),
    ("collapse_saves", "measure.of.network", "resnet-18", ".measure.of.network: 'resnet-18' given; did you mean"),
    ("cnn3_accuracy", "protocol.data", "minst", ".protocol.data: 'minst' given; did you mean mnist? "),
]


@pytest.mark.parametrize(("name", "key", "value", "said"), WRONG)
def test_a_wrong_check_is_refused_in_one_line_by_its_key_with_what_is_allowed(tmp_path, name, key, value, said):
    check = copy.deepcopy(CHECKS[name]) | {"central": True}
    *parents, last = key.split(".")
    place = functools.reduce(dict.__getitem__, parents, check)
    place.pop(last, None)
    if value != GONE:
        place[last] = value
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, check)
    assert f"claims.mine.checks.{name}{said}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ids_are_given_once_and_one_check_is_central(tmp_path):
    check = CHECKS["collapse_exact"]
    with pytest.raises(ConfigError, match="check collapse_exact given twice"):
        load(tmp_path, check, check)
    with pytest.raises(ConfigError, match="claim mine has 0 checks with central: true"):
        load(tmp_path, CHECKS["cnn3_curve"])
    path = tmp_path / "claims.yaml"
    (claim,) = load(tmp_path, check)
    path.write_text(yaml.safe_dump({"claims": [claim, claim | {"checks": [check | {"id": "other"}]}]}))
    with pytest.raises(ConfigError, match="claim mine given twice"):
        claims.load(path)


def test_every_arm_that_a_tier_may_have_can_be_claimed(tmp_path):
    """So can what is not testable, of any experiment."""
    own = ["experiments.accuracy_vs_t_resnet34_linear_avgpool={epochs: 1, t: [0, 1.0e-5, 0.333333, 1]}",
           "experiments.schedule_comparison={starts: [1, 0.25], other_static_t: [0, 1]}",
           f"experiments.linear_comparison.arms={list(NETWORKS)}"]  # fmt: skip
    settings = config.load("smoke", parse(own))
    arms = {(name, trial.arm) for name in settings["experiments"] for trial in experiments.trials(settings, name)}
    assert {arm for _, arm in arms} > {*NETWORKS, "static_1.0", "scheduled_from_0.25", "t=1e-05", "t=0.333333"}
    measures = [(name, {"kind": "mean", "of": {"arm": arm, "epoch": 1}}) for name, arm in sorted(arms)]
    checks = [
        CHECKS["cnn3_curve"] | {"id": f"c{i}", "experiment": name, "measure": measure}
        for i, (name, measure) in enumerate(measures)
    ]
    other = CHECKS["absolute_times"] | {"experiment": "imagenet", "central": True}
    assert load(tmp_path, *checks, other)[0]["checks"] == [*checks, other]


@pytest.mark.parametrize("text", ["claims: [", "claims: {a: 2024-13-45}", "\x00"])
def test_claims_that_are_no_yaml_are_one_line(tmp_path, text):
    path = tmp_path / "claims.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"^[^\n]*claims\.yaml: cannot be read \([^\n]*; correct it[^\n]*$"):
        claims.load(path)

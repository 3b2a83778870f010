"""Tables from records: hand-computed means, scipy's bootstrap directly, and what a stamp keeps."""

import copy

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from skipfold.errors import StoreError
from skipfold.replication import statistics


def test_savings_compare_like_with_like_in_the_fastest_form_and_runtime_of_a_precision():
    """By hand. Eager is against `skips` whatever the variant; the rest against what was optimized alike."""
    rows = [
        ("skips", "eager", "tf32", 64, 100.0),
        ("skips", "cuda_graph", "tf32", 64, 60.0),
        ("skips", "channels_last_bf16", "bf16", 64, 40.0),
        ("skips_literal", "eager", "tf32", 64, 110.0),
        ("add", "eager", "tf32", 64, 90.0),
        ("add", "cuda_graph", "tf32", 64, 50.0),
        ("skips_folded", "cuda_graph", "tf32", 64, 42.0),
        ("add_folded", "cuda_graph", "tf32", 64, 41.0),
        ("skips_cropped", "cuda_graph", "tf32", 64, 32.0),
        ("skips_removed", "eager", "tf32", 64, 75.0),
        ("skips_removed", "cuda_graph", "tf32", 64, 45.0),
        ("skips_removed", "channels_last_bf16", "bf16", 64, 30.0),
        ("folded", "eager", "tf32", 64, 41.0),
        ("cropped", "eager", "tf32", 64, 50.0),
        ("cropped", "cuda_graph", "tf32", 64, 24.0),
        ("skips", "eager", "tf32", 1, 10.0),
        ("cropped", "eager", "tf32", 1, 8.0),
    ]
    frame = pd.DataFrame(rows, columns=["variant", "runtime", "precision", "batch", "median_us"]).assign(
        network="resnet18", measure="host", **dict.fromkeys(statistics.STAMP, "")
    )
    frame["samples_us"] = [f"{value} {2 * value} {value}" for value in frame["median_us"]]
    found = statistics.savings(frame).set_index(["variant", "precision", "batch"])
    before = found[["before_variant", "before_runtime", "before_us", "after_runtime", "after_us"]].T.to_dict("list")
    empty = before.pop(("cropped", "tf32", 1))
    assert before == {
        ("skips_removed", "tf32", 64): ["add", "cuda_graph", 50.0, "cuda_graph", 45.0],
        ("skips_removed", "bf16", 64): ["skips", "channels_last_bf16", 40.0, "channels_last_bf16", 30.0],
        ("folded", "tf32", 64): ["add_folded", "cuda_graph", 41.0, "eager", 41.0],
        ("cropped", "tf32", 64): ["skips_cropped", "cuda_graph", 32.0, "cuda_graph", 24.0],
    }
    assert pd.isna(empty[:3]).all() and empty[3:] == ["eager", 8.0]
    assert found["fastest_saved"].tolist() == pytest.approx([0.1, 0.25, 0, 0.25, np.nan], nan_ok=True)
    assert found["eager_saved"].tolist() == pytest.approx([0.25, np.nan, 0.59, 0.5, 0.2], nan_ok=True)
    assert found["fastest_saved_low"].isna().all()


def test_each_saving_of_a_row_has_the_interval_of_its_own_pairs():
    """Of six rounds: the eager ratios are 0.5 to 0.75, those of the fastest 0.8 to 0.9."""
    samples = {
        ("skips", "eager"): "100 100 100 100 100 100",
        ("add", "onnxruntime"): "10 20 10 10 10 10",
        ("skips_removed", "eager"): "50 75 60 60 60 60",
        ("skips_removed", "onnxruntime"): "8 18 8.5 8.5 8.5 8.5",
    }
    frame = pd.DataFrame(samples.keys(), columns=["variant", "runtime"]).assign(
        samples_us=samples.values(), median_us=[100, 10, 60, 8.5], network="resnet18", measure="host", batch=64,
        precision="float32",
    )  # fmt: skip
    (row,) = statistics.savings(frame).to_dict("records")
    keys = [f"{which}_{key}" for which in ("eager", "fastest") for key in statistics.SAVED]
    assert [row[key] for key in keys] == pytest.approx([0.4, 0.25, 0.5, 0.15, 0.1, 0.2])


def test_saving_pairs_the_samples_of_a_round():
    """A drift of both is no saving. Of six rounds the smallest and the largest ratio hold the median by 1 - 2 / 2^6."""
    drift = np.array([1.0, 2, 4, 8, 16, 32])
    ratios = np.array([0.7, 0.9, 0.75, 0.85, 0.8, 0.6])
    of, against = (" ".join(map(str, samples)) for samples in (3 * ratios * drift, 3 * drift))
    assert statistics.saving(of, against) == pytest.approx((1 - 0.775, 0.1, 0.4))
    assert statistics.saving(of, f"{against} 1000") == statistics.saving(of, against)
    saved, *between = statistics.saving("1 2 3 4 5", "2 4 6 8 10")
    assert saved == 0.5 and np.isnan(between).all()


def test_a_stamp_of_stamps_names_each_device_once():
    devices = ["CPU; GPU", "GPU", "CPU"]
    frame = pd.DataFrame({"device": devices, "date": ["2026-01-02", "2026-01-01; 2026-01-03", None]})
    found = statistics.stamp(frame)
    assert (found["device"], found["date"], found["torch"]) == ("CPU; GPU", "2026-01-03", "")


def record(index=0, arm="cnn3", t=0.5, accuracies=(0.8, 0.9), **final):
    """A record as the store gives it, with two epochs."""
    return {
        "digest": f"{arm}-{t}-{index}",
        "trial": {
            "experiment": "linear_comparison", "arm": arm, "index": index, "network": "cnn3", "schedule": "static",
            "t": t, "data": "mnist", "train_images": None, "val_images": 100, "epochs": 2, "batch_size": 64,
            "precision": "tf32", "options": {"width": 8}, "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.0},
        },
        "epochs": [
            {"epoch": epoch, "t": t, "train_loss": 1.0, "train_accuracy": value - 0.1, "val_loss": 0.5,
             "val_accuracy": value, "seconds": 1.5}
            for epoch, value in enumerate(accuracies, start=1)
        ],
        "final": final,
        "provenance": {"device": f"device {index % 2}", "torch": "2.11.0", "cuda": None, "commit": "abc",
                       "date": f"2026-01-0{index + 1}", "data_md5": {}},
    }  # fmt: skip


def test_tidy_has_a_row_a_trial_and_epoch_with_final_measures_in_the_last():
    certificate = {"affine": True, "residual": 1e-15, "max_error": 1e-12, "max_error_float32": 1e-6}
    frame = statistics.tidy([record(certificate=certificate, collapsed_val_accuracy=0.9)], tier="quick")
    assert list(frame["epoch"]) == [1, 2]
    assert frame["collapsed_val_accuracy"].isna().tolist() == [True, False]
    assert frame["certificate_residual"].iloc[1] == 1e-15
    assert frame["optimizer"].iloc[0] == "sgd lr=0.01 momentum=0"
    assert frame["train_images"].isna().all() and (frame["val_images"] == 100).all()
    assert (frame["tier"] == "quick").all()


def test_tidy_does_not_depend_on_the_order_of_records():
    records = [record(index, t=t) for t in (0.1, 0.02, 1.0) for index in range(3)]
    assert statistics.tidy(records).equals(statistics.tidy(records[::-1]))


def test_tidy_names_the_record_that_lacks_a_part():
    broken = copy.deepcopy(record())
    del broken["epochs"][0]["val_loss"]
    with pytest.raises(StoreError, match=r"cnn3-0\.5-0.*val_loss"):
        statistics.tidy([broken])


def test_means_by_hand():
    frame = statistics.tidy([record(i, accuracies=(0.5, value)) for i, value in enumerate((0.90, 0.92, 0.97))])
    table = statistics.aggregate(frame)
    row = table[(table["split"] == "val") & (table["epoch"] == 2)].iloc[0]
    assert row["mean"] == pytest.approx((0.90 + 0.92 + 0.97) / 3) and row["n"] == 3
    row = table[(table["split"] == "train") & (table["epoch"] == 2)].iloc[0]
    assert row["mean"] == pytest.approx((0.80 + 0.82 + 0.87) / 3)
    assert row["device"] == "device 0; device 1" and row["date"] == "2026-01-03"


def test_validation_by_batch_is_a_split_of_the_networks_that_have_it():
    with_batchnorm = record(arm="resnet18")
    for epoch in with_batchnorm["epochs"]:
        epoch |= {"val_batch_loss": 0.4, "val_batch_accuracy": 0.75}
    table = statistics.aggregate(statistics.tidy([with_batchnorm, record()]))
    found = table[table["split"] == "val_batch"]
    assert list(found["arm"]) == ["resnet18"] * 2 and (found["mean"] == 0.75).all()


def test_interval_is_scipys_with_the_tails_of_five_trials():
    """By hand: Student's t of 4 degrees of freedom is 2.7764, times the root of 5/4 3.1042, with this normal tail."""
    assert statistics.tail(5) == pytest.approx(0.000954, abs=1e-6)
    assert statistics.tail(10**6) == pytest.approx(0.025, abs=1e-6)
    values = np.array([0.90, 0.92, 0.97, 0.91, 0.95])
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=9999, batch=1000, confidence_level=1 - 2 * statistics.tail(5),
        method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    assert statistics.interval(values[:, None]) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_interval_holds_the_mean_of_five_normal_values_as_often_as_is_said():
    values = np.random.default_rng(1).normal(size=(400, 5))
    found = np.array([statistics.interval(five[:, None]) for five in values])
    assert 0.89 <= np.mean((found[:, 0] <= 0) & (found[:, 1] >= 0)) <= 0.95


def test_interval_resamples_each_arm_by_itself():
    """Two arms whose trials rise together by chance differ by more than by 0; trials of one arm do not."""
    level = np.linspace(0, 0.4, 5)
    both = np.column_stack([level, level])

    def difference(trials):
        return (trials[..., 0] - trials[..., 1]).mean(axis=-1)

    assert statistics.interval(both, difference) == pytest.approx((0, 0))
    low, high = statistics.interval(both, difference, arms=["a", "b"])
    assert low < -0.2 and high > 0.2


def test_interval_of_a_curve_resamples_whole_trials():
    level = np.array([0.0, 0.1, 0.2, 0.3])
    curve = np.column_stack([level, 1 - level])
    assert statistics.interval(curve, lambda trials: trials.mean(axis=-2).sum(axis=-1)) == pytest.approx((1, 1))
    low, high = statistics.interval(curve)
    assert low < 0.1 and high > 0.2


def test_distance_is_that_of_the_means_less_their_noise():
    """By hand: means 3 and -4 of two trials, each with a variance of the mean of 1."""
    values = np.array([[2.0, -3.0], [4.0, -5.0]])
    assert statistics.distance(values, np.zeros(2))[0] == pytest.approx(((9 + 16) / 2 - 1) ** 0.5)
    assert statistics.distance(values, values.mean(axis=0))[0] == 0
    alone = statistics.distance(values[:1], np.zeros(2))
    assert alone == pytest.approx((6.5**0.5, np.nan, np.nan), nan_ok=True)


@pytest.mark.parametrize("together", [0, 0.5])
@pytest.mark.parametrize("true", [0.0, 0.6, 1.5])
def test_distance_is_as_often_in_its_interval_as_is_said(monkeypatch, true, together):
    """Ten points of five normal trials, whose means have noise of 0.45, of which a trial's points share a part."""
    monkeypatch.setattr(statistics, "RESAMPLES", 999)
    rng = np.random.default_rng(2)
    own, shared = rng.normal(size=(60, 5, 10)), rng.normal(size=(60, 5, 1))
    trials = true + (1 - together) ** 0.5 * own + together**0.5 * shared
    found = np.array([statistics.distance(values, np.zeros(10)) for values in trials])
    assert np.mean((found[:, 1] <= true) & (true <= found[:, 2])) >= 0.9
    assert (found[:, 0] ** 2).mean() == pytest.approx(true**2, abs=0.25)


def test_spread_of_means_that_are_equal_may_be_nothing():
    rng = np.random.default_rng(3)
    for equal in rng.normal(size=(20, 5, 10)):
        found, low, high = statistics.spread(equal)
        assert found == pytest.approx(np.ptp(equal.mean(axis=0))) and low == 0 and high > found
    apart = rng.normal(size=(5, 10)) + np.linspace(0, 100, 10)
    found, low, high = statistics.spread(apart)
    assert 90 < low < 100 < high < 110
    assert np.isnan(statistics.spread(apart[:1])[1:]).all()


def test_one_trial_has_no_interval():
    table = statistics.aggregate(statistics.tidy([record()]))
    assert table[["low", "high"]].isna().all(axis=None) and (table["n"] == 1).all()


def test_certificates_hold_the_collapsed_and_the_refused():
    certificate = {"affine": True, "residual": 1e-15, "max_error": 1e-12, "max_error_float32": 1e-6}
    table = statistics.certificates(
        statistics.tidy(
            [
                record(arm="cnn3", certificate=certificate, collapsed_equal_argmax=1.0),
                record(arm="resnet34_linear_maxpool", affine_residual=0.9, refused="maxpool: not affine"),
                record(arm="resnet34"),
            ]
        )
    )
    assert table[["arm", "affine", "residual"]].to_numpy().tolist() == [
        ["cnn3", True, 1e-15],
        ["resnet34_linear_maxpool", False, 0.9],
    ]
    assert table["refused"].iloc[1] == "maxpool: not affine"


@pytest.mark.parametrize(
    ("experiment", "arm", "epoch", "split", "value"),
    [
        ("linear_comparison", "resnet34_linear_maxpool", 10, "val", 0.98682),
        ("linear_comparison", "cnn3", 1, "val", 0.90064),
        ("linear_comparison", "perceptron", 10, "val", 0.90762),
        ("schedule_comparison", "scheduled_from_0.5", 10, "val", 0.98606),
        ("accuracy_vs_t_resnet34", "t=1.0", 2, "val", 0.40126),
        ("accuracy_vs_t_resnet34", "t=0.995", 1, "val", 0.96328),
        ("accuracy_vs_t_resnet18", "t=0.98", 2, "train", 0.97600),
    ],
)
def test_published_points(experiment, arm, epoch, split, value):
    points = statistics.published(experiment)
    found = points[(points["arm"] == arm) & (points["epoch"] == epoch) & (points["split"] == split)]
    assert found["mean"].tolist() == [value]


@pytest.mark.parametrize(
    ("experiment", "count"),
    [("accuracy_vs_t_resnet34", 54), ("accuracy_vs_t_resnet18", 50), ("accuracy_vs_t_cnn3", 51),
     ("accuracy_vs_t_shallow_linear", 51), ("accuracy_vs_t_shallow_leaky_relu", 51)],
)  # fmt: skip
def test_published_grids(experiment, count):
    assert statistics.published(experiment)["t"].nunique() == count

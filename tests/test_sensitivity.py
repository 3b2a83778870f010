"""sensitivity: distances from the published points, in eval mode and by batch, and verdicts that hang on an option."""

import pandas as pd
import pytest

from skipfold.errors import ConfigError
from skipfold.replication import config, experiments, figures, sensitivity, statistics
from skipfold.replication.tables import write_table

STATIC = {
    "key": "experiments.schedule_comparison.static_t",
    "figure": "schedule_comparison",
    "arms": ["static"],
    "alternatives": [0.7],
}


def options(assumption, **overrides):
    """The options of one assumption of the paper tier, one trial each."""
    return experiments.options(config.load("paper", {"sensitivity": {"assumptions": [assumption]}, **overrides}))


def record(trial, below, below_by_batch):
    """What would be stored of `trial` if its validation accuracies were so far below the published ones."""
    theirs = statistics.published(trial.experiment)
    theirs = theirs[theirs["arm"] == trial.arm].set_index("epoch")["mean"]
    measured = {"t": trial.t, "train_loss": 0.1, "train_accuracy": 0.9, "val_loss": 0.1, "seconds": 1.0}
    epochs = []
    for epoch in range(1, trial.epochs + 1):
        epochs.append({"epoch": epoch, **measured, "val_accuracy": theirs[epoch] - below})
        if below_by_batch is not None:
            epochs[-1] |= {"val_batch_loss": 0.1, "val_batch_accuracy": theirs[epoch] - below_by_batch}
    stamp = {"device": "CPU", "torch": "2.11.0", "cuda": None, "commit": "abc", "date": "2026-01-01"}
    return {"digest": trial.digest, "trial": trial.description(), "epochs": epochs, "final": {}, "provenance": stamp}


@pytest.fixture
def results(tmp_path):
    """A tier's folder where every trial with static t came out as published."""
    (tmp_path / "tables").mkdir()
    trials = experiments.trials(config.load("paper"), "schedule_comparison")
    table = statistics.tidy([record(trial, 0.0, 0.0) for trial in trials if trial.arm == "static"], "paper")
    write_table(table, tmp_path / "tables" / "schedule_comparison_trials.csv")
    return tmp_path


def test_distances_from_the_published_points(results):
    in_use, other = options(STATIC)
    records = {trial: record(trial, 0.01, 0.002) for trial in in_use.trials}
    records |= {trial: record(trial, 0.03, None) for trial in other.trials}
    table = sensitivity.table([in_use, other], records, results, "paper")
    assert list(table["alternative"]) == ["0.995", "0.7"] and list(table["chosen"]) == [True, False]
    assert list(table["rmse"]) == pytest.approx([0.01, 0.03])
    assert table["rmse_by_batch"][0] == pytest.approx(0.002)
    assert pd.isna(table["rmse_by_batch"][1])  # such records have no validation by batch
    assert set(table["n"]) == {10} and table["images"].isna().all()


def test_options_without_a_published_point_are_told_before_anything_is_trained():
    assumption = {"key": "networks.cnn3", "figure": "accuracy_vs_t_cnn3", "alternatives": [{}]}
    sensitivity.check(options({**assumption, "t": [0.5, 0.33]}))
    with pytest.raises(ConfigError, match=r"^sensitivity: networks.cnn3: no arm, or value of t, that scores it is"):
        sensitivity.check(options({**assumption, "t": [0.33]}))


def test_options_trained_on_fewer_images_say_so(results):
    in_use, other = options(STATIC, experiments={"schedule_comparison": {"train_images": 640}})
    records = {trial: record(trial, 0.0, 0.0) for trial in (*in_use.trials, *other.trials)}
    assert list(sensitivity.table([in_use, other], records, results)["images"]) == [640, 640]


def test_verdicts_that_another_option_would_flip(results):
    in_use, other = options(STATIC)
    records = {trial: record(trial, 0.0, 0.0) for trial in in_use.trials}
    for below, expected in ((0.001, ""), (0.02, "static_accuracy; static_curve")):
        records |= {trial: record(trial, below, below) for trial in other.trials}
        table = sensitivity.table([in_use, other], records, results, "paper")
        assert list(table["verdicts_flipped"]) == ["", expected]


def test_no_assumptions_give_an_empty_table_and_a_figure(results, tmp_path):
    table = sensitivity.table([], {}, results)
    assert list(table) == sensitivity.COLUMNS and table.empty
    figures.save(figures.sensitivity(table), tmp_path / "sensitivity")

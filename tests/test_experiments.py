"""experiments: which trials a figure needs, and what the sensitivity study changes in them."""

import pytest

from skipfold.errors import ConfigError
from skipfold.keys import parse
from skipfold.replication import config, experiments
from skipfold.replication.trial import Optimizer


def load(*pairs):
    return config.load("smoke", parse(pairs))


def test_more_trials_keep_the_first_ones():
    few = experiments.trials(load("trials=2"), "accuracy_vs_t_cnn3")
    more = experiments.trials(load("trials=4"), "accuracy_vs_t_cnn3")
    assert set(few) < set(more)
    assert len(more) == 2 * len(few)


def test_a_value_of_t_is_one_arm_however_it_is_written():
    listed = experiments.trials(load("experiments.accuracy_vs_t_cnn3.t=[0, 0.5, 1]"), "accuracy_vs_t_cnn3")
    by_step = experiments.trials(load("experiments.accuracy_vs_t_cnn3.t={step: 0.5, stop: 1}"), "accuracy_vs_t_cnn3")
    assert [trial.digest for trial in listed] == [trial.digest for trial in by_step]


def test_grid_has_no_rounding_errors():
    values = experiments.t_values({"step": 0.02, "stop": 1.0, "extra": [0.985, 0.99, 0.995]})
    assert len(values) == 54
    assert 0.06 in values and 0.58 in values and values[-1] == 1.0


def test_a_grid_ends_at_its_stop():
    assert experiments.t_values({"step": 0.1, "stop": 0.98})[-1] == 0.9
    assert experiments.t_values({"step": 0.6, "stop": 1.0}) == [0.0, 0.6]
    # A whole number is the same arm as in a grid, where trials are named by what they are.
    (last,) = experiments.t_values({"step": 1, "stop": 0, "extra": [1]})[1:]
    assert repr(last) == "1.0"


def test_an_arm_has_its_own_images_and_trials():
    settings = load(
        "experiments.linear_comparison.per_arm={cnn3: {trials: 1, train_images: 70}}", "train_images=200", "trials=3"
    )
    found = {}
    for trial in experiments.trials(settings, "linear_comparison"):
        found.setdefault(trial.arm, []).append(trial.train_images)
    assert found["cnn3"] == [70]
    assert found["perceptron"] == [200, 200, 200]


def test_unknown_experiment_is_refused():
    with pytest.raises(ConfigError, match="accuracy_vs_t_vgg"):
        experiments.trials(load(), "accuracy_vs_t_vgg")
    of_no_kind = {**load(), "experiments": {"rates": {"epochs": 2}}}
    with pytest.raises(ConfigError, match=r"'rates' has no arms; experiments.trials has to say which"):
        experiments.trials(of_no_kind, "rates")


def test_scheduled_arms_end_at_0_and_the_static_one_stays():
    trials = experiments.trials(load(), "schedule_comparison")
    assert [(trial.arm, trial.strengths[0], trial.strengths[-1]) for trial in trials] == [
        ("static", 0.995, 0.995),
        ("static_0.5", 0.5, 0.5),
        ("scheduled_from_0.9", 0.9, 0.0),
        ("scheduled_from_0.5", 0.5, 0.0),
    ]


def test_an_alternative_differs_in_its_assumption_alone():
    chosen, other = experiments.options(
        load(
            "sensitivity.assumptions=[{key: optimizer.linear, figure: linear_comparison, arms: [perceptron],"
            " alternatives: [{name: adam, lr: 0.001}]}]"
        )
    )
    assert (chosen.chosen, other.chosen) == (True, False)
    assert set(chosen.trials) <= set(experiments.trials(load(), "linear_comparison"))
    for ours, theirs in zip(chosen.trials, other.trials, strict=True):
        assert theirs.optimizer == Optimizer("adam", 0.001)
        differing = {key for key, value in ours.description().items() if theirs.description()[key] != value}
        assert differing == {"optimizer"}


def test_a_value_that_is_in_use_is_no_alternative():
    settings = load(
        "sensitivity.assumptions=[{key: experiments.linear_comparison.t, figure: linear_comparison, arms: [cnn3],"
        " alternatives: [0.9, 0.1]}]"
    )
    assert [(option.value, option.chosen) for option in experiments.options(settings)] == [(0.9, True), (0.1, False)]


def test_an_assumption_may_have_its_own_trials_and_t():
    own = (
        "{key: drop_last, figure: accuracy_vs_t_cnn3, alternatives: [false], trials: 3, t: [0.2]},"
        "{key: drop_last, figure: accuracy_vs_t_cnn3, alternatives: [false]}"
    )
    settings = load("trials=5", "sensitivity.trials=1", "sensitivity.t=[0.1, 0.9]", f"sensitivity.assumptions=[{own}]")
    found = [[(trial.t, trial.index) for trial in option.trials] for option in experiments.options(settings)]
    assert found == 2 * [[(0.2, 0), (0.2, 1), (0.2, 2)]] + 2 * [[(0.1, 0), (0.9, 0)]]


def test_unknown_arm_of_an_assumption_is_refused():
    with pytest.raises(ConfigError, match="resnet34_linear_maxpool"):
        load(
            "sensitivity.assumptions=[{key: optimizer.linear, figure: linear_comparison, arms: [cnn9],"
            " alternatives: [{name: adam, lr: 0.001}]}]"
        )

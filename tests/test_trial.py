"""trial: what its digest and its seeds depend on."""

import dataclasses

import pytest
import torch

from skipfold import schedules
from skipfold.errors import ConfigError
from skipfold.replication.trial import Optimizer, Trial

TRIAL = Trial(experiment="e", arm="a", index=0, network="perceptron")

CHANGES = [
    {"index": 1},
    {"network": "cnn3"},
    {"options": {"width": 4}},
    {"t": 0.25},
    {"schedule": "linear"},
    {"epochs": 3},
    {"optimizer": Optimizer("sgd", 0.02)},
    {"batch_size": 32},
    {"drop_last": True},
    {"data": "digits"},
    {"train_images": 100},
    {"precision": "float32"},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_every_part_of_the_description_is_in_the_digest(change):
    assert dataclasses.replace(TRIAL, **change).digest != TRIAL.digest


@pytest.mark.parametrize("change", CHANGES[1:], ids=lambda change: next(iter(change)))
def test_seeds_depend_on_experiment_arm_and_index_alone(change):
    def draw(trial):
        return torch.rand(4, generator=trial.generator("init")).tolist()

    assert draw(dataclasses.replace(TRIAL, **change)) == draw(TRIAL)
    assert draw(dataclasses.replace(TRIAL, index=1)) != draw(TRIAL)


def test_a_description_gives_its_trial_back():
    trial = dataclasses.replace(TRIAL, optimizer=Optimizer("adam", 0.001), options={"width": 4})
    assert Trial.from_description(trial.description()) == trial
    assert Trial.from_description(trial.description()).digest == trial.digest


@pytest.mark.parametrize(
    "change",
    [
        {"t": 1.5},
        {"t": "half"},
        {"t": float("nan")},
        {"epochs": 0},
        {"batch_size": 0},
        {"drop_last": 1},
        {"precision": "float16"},
    ],
    ids=str,
)
def test_what_cannot_be_run_is_refused(change):
    with pytest.raises(ConfigError):
        dataclasses.replace(TRIAL, **change)


def test_a_shape_that_leaves_0_to_1_is_refused(monkeypatch):
    monkeypatch.setitem(schedules.SHAPES, "steep", lambda x: 3 * (1 - x))
    assert dataclasses.replace(TRIAL, schedule="steep", t=0.3).strengths == [0.9, 0.0]
    with pytest.raises(ConfigError, match=r"schedule 'steep': 1.5 given; a number from 0"):
        dataclasses.replace(TRIAL, schedule="steep", t=0.5)

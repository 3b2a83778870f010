"""Strengths per epoch: static ones stay, all others end at 0."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_recursion import property_test

from skipfold.errors import ConfigError
from skipfold.schedules import SHAPES, Schedule, check_strength, strengths

DECREASING = sorted(set(SHAPES) - {"static"})


@property_test(50)
@given(st.floats(0, 1), st.integers(1, 50))
def test_static_stays(start, epochs):
    assert strengths("static", start, epochs) == [start] * epochs


@pytest.mark.parametrize("shape", DECREASING)
@property_test(50)
@given(start=st.floats(0, 1), epochs=st.integers(2, 50))
def test_every_other_shape_decreases_to_exactly_0(shape, start, epochs):
    values = strengths(shape, start, epochs)
    assert len(values) == epochs
    assert values[0] == pytest.approx(start, abs=1e-11)
    assert values[-1] == 0 and str(values[-1]) == "0.0"
    assert all(0 <= later <= earlier for earlier, later in itertools.pairwise(values))


def test_linear_from_0_9_over_ten_epochs():
    assert strengths("linear", 0.9, 10) == [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("cubic", 0.5, 10), "unknown shape 'cubic'; allowed are static, linear"),
        (("linear", 1.5, 10), "schedule start: 1.5"),
        (("linear", float("nan"), 10), "schedule start: nan"),
        (("linear", "0.5", 10), "schedule start: '0.5'"),
        (("linear", 0.5, 0), "epochs: 0"),
        (("static", 0.5, -1), "epochs: -1"),
        (("static", 0.5, 2.0), "epochs: 2.0"),
        (("static", 0.5, True), "epochs: True"),
        (("linear", 0.5, 1), "cannot end at 0 in 1 epoch; give at least 2 epochs"),
    ],
)
def test_what_cannot_be_is_refused(arguments, part):
    with pytest.raises(ConfigError, match=part):
        strengths(*arguments)


@pytest.mark.parametrize("t", [0, 1, 0.5, np.float32(0.5), np.int64(1)])
def test_strengths_in_range_become_floats(t):
    assert check_strength(t) == t and isinstance(check_strength(t), float)


@pytest.mark.parametrize("shape", DECREASING)
def test_a_schedule_waits_descends_and_stays(shape):
    schedule = Schedule(shape, start=0.8, end=0.2, length=12, warm_up=2)
    values = [schedule(time) for time in range(20)]
    assert values[:3] == [0.8] * 3 and values[12:] == [0.2] * 8
    assert all(0.2 <= later <= earlier for earlier, later in itertools.pairwise(values))
    assert values[7] < 0.8


def test_a_stepped_schedule_has_its_levels():
    values = [Schedule("stepped", 0.8, length=8)(time) for time in range(9)]
    assert sorted(set(values)) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])


def test_exponential_is_the_exponential_brought_to_its_end():
    schedule = Schedule("exponential", 1.0, 0.0, length=10)
    ratios = [(schedule(time + 1) - schedule(10)) - (schedule(time) - schedule(10)) for time in range(9)]
    assert [later / earlier for earlier, later in itertools.pairwise(ratios)] == pytest.approx([math.exp(-0.5)] * 8)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"end": 2}, "schedule end: 2"),
        ({"length": 0}, "schedule length: 0 given; a whole number of at least 1"),
        ({"length": 3, "warm_up": 3}, "schedule length: 3 given; a whole number of at least 4"),
        ({"warm_up": -1}, "schedule warm_up: -1"),
        ({"length": 2.5}, "schedule length: 2.5"),
    ],
)
def test_schedules_that_cannot_be_are_refused(options, part):
    with pytest.raises(ConfigError, match=part):
        Schedule(**options)

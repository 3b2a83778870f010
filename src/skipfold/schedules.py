"""The skip strength t over the time of a training: static, or decreasing (the homotopy)."""

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass

from skipfold.errors import ConfigError, check_count

STEPS = 4
"""Levels that a stepped schedule descends through."""

RATE = 5.0
"""An exponential schedule falls by exp(-RATE), and is then brought to its end."""

SHAPES: dict[str, Callable[[float], float]] = {
    "static": lambda x: 1.0,
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "quadratic": lambda x: (1 - x) ** 2,
    "exponential": lambda x: (math.exp(-RATE * x) - math.exp(-RATE)) / (1 - math.exp(-RATE)),
    "stepped": lambda x: math.ceil(STEPS * (1 - x)) / STEPS,
}
"""Share of the way from the last t to the first that is left when the fraction x in [0, 1] of the training is over."""


@dataclass(frozen=True)
class Schedule:
    """t as a function of the time, which counts from 0, in epochs or in steps, as the caller likes.

    t is `start` for the first `warm_up` units, then goes to `end`, which it has after `length` units and from then on;
    with shape "static" it stays at `start`. The paper starts at 0.9 and 0.5, ends at 0, and does not publish the shape.
    Raises ConfigError on an unknown shape, a t outside [0, 1], or a length that leaves no time after the warm-up.
    """

    shape: str = "linear"
    start: float = 0.9
    end: float = 0.0
    length: int = 9
    warm_up: int = 0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ConfigError(f"schedule: unknown shape {self.shape!r}; allowed are {', '.join(SHAPES)}")
        check_strength(self.start, "schedule start")
        check_strength(self.end, "schedule end")
        for name, least in (("warm_up", 0), ("length", self.warm_up + 1)):
            check_count(getattr(self, name), f"schedule {name}", least)

    def __call__(self, time: int) -> float:
        """t at `time`."""
        if self.shape == "static":
            return float(self.start)
        passed = min(1.0, max(0.0, (time - self.warm_up) / (self.length - self.warm_up)))
        return round(self.end + (self.start - self.end) * SHAPES[self.shape](passed), 12) + 0.0


def strengths(shape: str, start: float, epochs: int) -> list[float]:
    """t for each of `epochs` epochs; every shape but `static` ends at 0 in the last one.

    Raises ConfigError on an unknown shape, a start outside [0, 1], or too few epochs to reach 0.
    """
    check_count(epochs, "epochs")
    schedule = Schedule(shape, start, length=max(1, epochs - 1))
    if shape != "static" and epochs == 1:
        raise ConfigError(f"schedule: {shape!r} from {start} cannot end at 0 in 1 epoch; give at least 2 epochs")
    return [schedule(epoch) for epoch in range(epochs)]


def check_strength(t: object, name: str = "t") -> float:
    """`t` as a float; raises ConfigError unless it is a number in [0, 1]."""
    if isinstance(t, bool) or not isinstance(t, numbers.Real) or not 0 <= t <= 1:
        raise ConfigError(f"{name}: {t!r} given; a number from 0 (no skip) to 1 (skip only) is allowed")
    return float(t)

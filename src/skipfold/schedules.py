"""The skip strength t of each epoch, by name: static, or decreasing to 0 (the homotopy)."""

import math
from collections.abc import Callable

from skipfold.errors import ConfigError


def _linear(x: float) -> float:
    return 1 - x


def _cosine(x: float) -> float:
    return (1 + math.cos(math.pi * x)) / 2


def _quadratic(x: float) -> float:
    return (1 - x) ** 2


SHAPES: dict[str, Callable[[float], float]] = {
    "static": lambda x: 1.0,
    "linear": _linear,
    "cosine": _cosine,
    "quadratic": _quadratic,
}
"""Share of the starting t that is left when the fraction x in [0, 1] of the training is over."""


def strengths(shape: str, start: float, epochs: int) -> list[float]:
    """t for each of `epochs` epochs; every shape but `static` ends at 0 in the last one.

    The paper schedules t from 0.9 and from 0.5 to 0 over 10 epochs and does not publish the shape.
    Raises ConfigError on an unknown shape, a start outside [0, 1], or too few epochs to reach 0.
    """
    if shape not in SHAPES:
        raise ConfigError(f"schedule: unknown shape {shape!r}; allowed are {', '.join(SHAPES)}")
    check_strength(start, "schedule start")
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ConfigError(f"epochs: {epochs!r} given; a whole number of at least 1 is allowed")
    if shape == "static":
        return [float(start)] * epochs
    if epochs == 1:
        raise ConfigError(f"schedule: {shape!r} from {start} cannot end at 0 in 1 epoch; give at least 2 epochs")
    left = [start * SHAPES[shape](epoch / (epochs - 1)) for epoch in range(epochs)]
    return [round(t, 12) + 0.0 for t in left]


def check_strength(t: object, name: str = "t") -> float:
    """`t` as a float; raises ConfigError unless it is a number in [0, 1]."""
    if isinstance(t, bool) or not isinstance(t, int | float) or not 0 <= t <= 1:
        raise ConfigError(f"{name}: {t!r} given; a number from 0 (no skip) to 1 (skip only) is allowed")
    return float(t)

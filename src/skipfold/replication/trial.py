"""A trial: the full description of one training run, its seeds and its digest."""

import functools
import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from skipfold.errors import ConfigError, check_count
from skipfold.schedules import check_strength, strengths

FORMAT = 1
"""Part of every digest; raise it when the meaning of a description changes, so that old records are not read."""


@dataclass(frozen=True)
class Optimizer:
    """`sgd` or `adam`, the learning rate and, for sgd, the momentum."""

    name: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.0

    def __post_init__(self):
        if self.name not in ("sgd", "adam"):
            raise ConfigError(f"optimizer: unknown name {self.name!r}; allowed are sgd and adam")
        if not self.lr > 0 or not 0 <= self.momentum < 1:
            raise ConfigError(
                f"optimizer: lr {self.lr!r} and momentum {self.momentum!r} given; "
                "lr above 0 and momentum in [0, 1) are allowed"
            )


@dataclass(frozen=True)
class Trial:
    """One training run. Two trials with equal descriptions are the same trial and run once.

    `experiment`, `arm` and `index` name it and are all that its seeds depend on. `schedule` and `t` give the skip
    strength of each epoch (see `schedules.strengths`). `train_images` and `val_images` None mean all of them;
    `drop_last` leaves out the last batch of each epoch where it is smaller than `batch_size`.
    `precision` is `tf32` (CUDA's default for convolutions) or `float32`.
    """

    experiment: str
    arm: str
    index: int
    network: str
    options: dict[str, Any] = field(default_factory=dict)
    schedule: str = "static"
    t: float = 0.5
    epochs: int = 2
    optimizer: Optimizer = Optimizer()
    batch_size: int = 64
    drop_last: bool = False
    data: str = "mnist"
    train_images: int | None = None
    val_images: int | None = None
    precision: str = "tf32"

    def __post_init__(self):
        for t in self.strengths:
            check_strength(t, f"schedule {self.schedule!r}")
        for key in ("batch_size", "train_images", "val_images"):
            if (value := getattr(self, key)) is not None:
                check_count(value, key)
        if not isinstance(self.drop_last, bool):
            raise ConfigError(f"drop_last: {self.drop_last!r} given; true or false is allowed")
        if self.precision not in ("tf32", "float32"):
            raise ConfigError(f"precision: {self.precision!r} given; tf32 or float32 is allowed")

    @property
    def strengths(self) -> list[float]:
        """t of each epoch."""
        return strengths(self.schedule, self.t, self.epochs)

    def description(self) -> dict[str, Any]:
        """Everything that decides the outcome, as plain JSON values."""
        described = {"format": FORMAT, **asdict(self)}
        if not self.drop_last:
            del described["drop_last"]  # as in records from before there was a choice
        return described

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of the description, 32 hex digits; names the record."""
        text = json.dumps(self.description(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def __hash__(self) -> int:
        return hash(self.digest)

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator for `purpose` ("init" or "order"), seeded by (experiment, arm, index) alone."""
        text = f"{self.experiment}/{self.arm}/{self.index}/{purpose}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
        return torch.Generator().manual_seed(seed)

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> "Trial":
        """The trial that a stored description belongs to."""
        values = {key: value for key, value in description.items() if key != "format"}
        return cls(**{**values, "optimizer": Optimizer(**values["optimizer"])})

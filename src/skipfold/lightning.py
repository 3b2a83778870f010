"""The skip strength's schedule as a callback of PyTorch Lightning, which is not a dependency."""

from collections.abc import Callable, Mapping
from typing import Any

try:
    import lightning.pytorch as pl
except ImportError:  # the same under its other name
    import pytorch_lightning as pl

from skipfold.errors import ConfigError
from skipfold.homotopy import StrengthScheduler


class HomotopyCallback(pl.Callback):
    """Sets t in every Skip of the trained module, before each epoch or, with `interval` "step", before each step.

    `schedule` as in StrengthScheduler, paths counting from the LightningModule. The time is in the checkpoint.
    """

    def __init__(
        self, schedule: Callable[[int], float] | Mapping[str, Callable[[int], float]], interval: str = "epoch"
    ):
        if interval not in ("epoch", "step"):
            raise ConfigError(f"interval: {interval!r} given; epoch or step is allowed")
        self.schedule, self.interval = schedule, interval

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.interval == "epoch":
            self._set(pl_module, trainer.current_epoch)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.interval == "step":
            self._set(pl_module, trainer.global_step)

    def _set(self, module: pl.LightningModule, time: int) -> None:
        StrengthScheduler(module, self.schedule).set_time(time)

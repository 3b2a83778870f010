"""How far an experiment is, while it trains: a bar in a terminal, one line in a notebook, a line an epoch in a log."""

import datetime
import sys
import time
from typing import Any

from skipfold.replication.trial import Trial


class Progress:
    """What `sweep.run` reports to, for one experiment; shown where this process's output goes."""

    def __init__(self, name: str):
        self.name = name
        self.view = _view()

    def begin(self, total: int, stored: int, epochs: int) -> None:
        """`total` trials, of which `stored` need not run; the others have `epochs` epochs together."""
        self.total, self.finished = total, stored
        self.epochs, self.epochs_done = epochs, 0
        self.start = time.perf_counter()
        rest = f"{stored} stored, {total - stored} to train" if stored < total else "all stored"
        self.view.open(f"{self.name}: {total} trials, {rest}", epochs)

    def epoch(self, trial: Trial, epoch: dict[str, Any]) -> None:
        """`trial` has finished `epoch` (see docs/design.md)."""
        self.epochs_done += 1
        text = (
            f"{self.name}: {self.finished}/{self.total} trials; {_label(trial)} epoch {epoch['epoch']}/{trial.epochs}, "
            f"accuracy {epoch['val_accuracy']:.4f}"
        )
        self.view.update(text, self.epochs_done, f"{self._left()} left")

    def trial(self, trial: Trial, record: dict[str, Any]) -> None:
        """`trial` is stored as `record`."""
        self.finished += 1

    def end(self) -> None:
        """Everything is stored."""
        took = datetime.timedelta(seconds=round(time.perf_counter() - self.start))
        trained = f", trained in {took}" if self.epochs_done else ""
        self.view.close(f"{self.name}: {self.finished}/{self.total} trials{trained}")

    def _left(self) -> datetime.timedelta:
        """Time left, if the epochs to come take as long as those done."""
        each = (time.perf_counter() - self.start) / self.epochs_done
        return datetime.timedelta(seconds=round(each * (self.epochs - self.epochs_done)))


def _label(trial: Trial) -> str:
    arm = trial.arm if trial.arm.startswith(trial.network) else f"{trial.network} {trial.arm}"
    return f"{arm} trial {trial.index + 1}"


class Lines:
    """A line an epoch; for logs and pipes."""

    def open(self, text: str, epochs: int) -> None:
        print(text, flush=True)

    def update(self, text: str, done: int, left: str) -> None:
        print(f"{text}, {left}", flush=True)

    def close(self, text: str) -> None:
        print(text, flush=True)


class Notebook:
    """One line that is written over, so that an executed notebook keeps the last one."""

    def open(self, text: str, epochs: int) -> None:
        from IPython.display import display

        self.handle = display({"text/plain": text}, raw=True, display_id=True)

    def update(self, text: str, done: int, left: str) -> None:
        self.handle.update({"text/plain": f"{text}, {left}"}, raw=True)

    def close(self, text: str) -> None:
        self.handle.update({"text/plain": text}, raw=True)


class Terminal:
    """rich's bar, with its own estimate of the time left."""

    def open(self, text: str, epochs: int) -> None:
        from rich import progress

        columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.TimeRemainingColumn())
        self.bar = progress.Progress(*columns)
        self.task = self.bar.add_task(text, total=epochs)
        self.bar.start()

    def update(self, text: str, done: int, left: str) -> None:
        self.bar.update(self.task, description=text, completed=done)

    def close(self, text: str) -> None:
        self.bar.update(self.task, description=text)
        self.bar.stop()


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    if "ipykernel" not in sys.modules:
        return False
    from IPython import get_ipython

    return get_ipython() is not None


def _view() -> Lines | Notebook | Terminal:
    if in_notebook():
        return Notebook()
    return Terminal() if sys.stdout.isatty() else Lines()

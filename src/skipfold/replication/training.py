"""Networks in training, written so that the same steps run eagerly or inside a captured CUDA graph."""

import contextlib
import copy
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from skipfold.cropping import crop_dead_taps
from skipfold.errors import ConfigError, DeviceError
from skipfold.networks import CLASSES, INPUT_SHAPE, build
from skipfold.replication.data import Dataset, to_input
from skipfold.replication.products import with_products
from skipfold.replication.stacking import put, set_strengths, stack, take
from skipfold.replication.trial import Trial

EVALUATION_BATCH = 2500

Means = tuple[float, float]
"""Mean loss and accuracy."""


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device; raises DeviceError where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise DeviceError(
            f"device: {name!r} asked for, but no CUDA device is there (torch {torch.__version__}); "
            "use device: cpu or auto, or run where a GPU and its driver are"
        )
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"device: {name!r} given; auto, cpu, cuda or cuda:N is allowed") from error
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise DeviceError(f"device: {name!r} asked for; there are cuda:0 to cuda:{count - 1}")
    return device


def use_device(name: str) -> torch.device:
    """What `resolve_device` gives, made the current device: streams, graphs and free memory are those of that."""
    device = resolve_device(name)
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """`tf32` lets CUDA convolutions use TF32, the framework's default; `float32` does not."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before


def initial_network(trial: Trial, crop: bool) -> nn.Module:
    """The untrained network of `trial` on the CPU; `crop` leaves out kernel taps that only ever meet padding."""
    model = build(trial.network, trial.options, trial.generator("init"))
    return crop_dead_taps(model, INPUT_SHAPE) if crop else model


@functools.lru_cache(maxsize=1)
def _template(trial: Trial, crop: bool) -> nn.Module:
    """The initial network of `trial`, to be copied: a bench has many learners of one kind, and drawing takes long."""
    return initial_network(trial, crop)


def _pads_averages(module: nn.Module) -> bool:
    """Whether torch 2.11's gradients of `module` are wrong on CUDA with channels last (pytorch issue 188344)."""
    return isinstance(module, nn.AvgPool2d) and module.padding not in (0, (0, 0))


class Learner:
    """One network or several stacked ones, their optimizer and data orders on one device.

    `step` and `measure` read and write device tensors only, never the host, so a CUDA graph can hold them; `load`
    puts other trials of the same kind into the same tensors. `fast` computes the same with less: no dead taps, and on
    a CPU matrix products for convolutions on small maps. Raises ConfigError where BatchNorm would see a single image.
    """

    def __init__(self, trial: Trial, dataset: Dataset, fast: bool = True, count: int = 1):
        self.dataset, self.count = dataset, count
        self.device = dataset.train_images.device
        self.one = copy.deepcopy(_template(trial, crop=fast)).to(self.device)
        for module in self.one.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked = None  # unused with a fixed momentum, and a kernel a step
        self.model = self.one if count == 1 else stack(self.one, count)
        if self.device.type == "cuda":
            if not any(map(_pads_averages, self.model.modules())):
                self.model = self.model.to(memory_format=torch.channels_last)
        elif fast and count == 1:
            self.model = with_products(self.one, INPUT_SHAPE)
        self.norms = [module for module in self.model.modules() if isinstance(module, nn.BatchNorm2d)]
        self.optimizer = self._optimizer(trial)
        self.order = torch.arange(len(dataset.train_images), device=self.device)[:, None].repeat(1, count)
        self.full, self.rest = batch_sizes(len(self.order), trial.batch_size, trial.drop_last)
        if self.norms and 1 in (self.rest, self.full and trial.batch_size):
            raise ConfigError(
                f"batch_size: {trial.batch_size} given for {len(self.order)} images, which makes a batch of 1 image, "
                f"and BatchNorm needs 2, in {trial.network}; set another batch_size or train_images, or drop_last"
            )
        self.offsets = torch.arange(trial.batch_size, device=self.device)
        self.cursor = torch.zeros((), dtype=torch.int64, device=self.device)
        self.totals = torch.zeros(2, count, dtype=torch.float64, device=self.device)

    def _optimizer(self, trial: Trial) -> torch.optim.Optimizer:
        spec, on_cuda = trial.optimizer, self.device.type == "cuda"
        if spec.name == "adam":
            return torch.optim.Adam(self.model.parameters(), spec.lr, capturable=on_cuda, fused=on_cuda)
        return torch.optim.SGD(self.model.parameters(), spec.lr, spec.momentum, fused=on_cuda)

    def load(self, initials: Sequence[nn.Module]) -> None:
        """Start anew from the values of `initials`, in place; of `count` networks those that are left out idle."""
        for index, initial in enumerate(initials):
            put(self.model, index, self.count, initial)
        with torch.no_grad():
            for state in self.optimizer.state.values():
                for value in state.values():
                    if isinstance(value, torch.Tensor):
                        value.zero_()

    def begin(self, strengths: Sequence[float], orders: Sequence[torch.Tensor]) -> None:
        """Start an epoch, each network at its own skip strength and over the images in its order, int64 [N]."""
        idle = self.count - len(orders)
        set_strengths(self.model, [*strengths, *strengths[:1] * idle])
        self.order.copy_(torch.stack([*orders, *orders[:1] * idle], 1))
        self.cursor.zero_()
        self.totals.zero_()
        self.model.train()

    def epoch(self, strengths: Sequence[float], orders: Sequence[torch.Tensor]) -> None:
        """`begin` an epoch and take all of its steps."""
        self.begin(strengths, orders)
        for _ in range(self.full):
            self.step(len(self.offsets))
        if self.rest:
            self.step(self.rest)

    @property
    def trained_images(self) -> int:
        """Images of an epoch."""
        return self.full * len(self.offsets) + self.rest

    def step(self, size: int) -> None:
        """One update of each network on its next `size` images."""
        index = self.order.index_select(0, self.cursor + self.offsets[:size]).flatten()
        images = to_input(self.dataset.train_images.index_select(0, index)).view(size, self.count, *INPUT_SHAPE[1:])
        labels = self.dataset.train_labels.index_select(0, index)
        logits = self.logits(images)
        losses = F.cross_entropy(logits, labels, reduction="none")
        self.optimizer.zero_grad(set_to_none=True)
        (losses.sum() / size).backward()
        self.optimizer.step()
        self._count(losses.detach(), logits.detach(), labels)
        self.cursor += size

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """[N, count, 28, 28] to [N count, 10]."""
        return self.model(images).view(-1, CLASSES)

    def _count(self, losses: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        rows = torch.stack((losses.double(), (logits.argmax(1) == labels).double()))
        self.totals += rows.view(2, -1, self.count).sum(1)

    @torch.no_grad()
    def measure(self) -> None:
        """Losses and correct predictions over the validation images, in eval mode, into `totals`."""
        self.totals.zero_()
        batch = max(EVALUATION_BATCH // self.count, 500)
        batches = zip(self.dataset.val_images.split(batch), self.dataset.val_labels.split(batch), strict=True)
        for images, labels in batches:
            self._validate(images, labels)

    def _validate(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        labels = labels.repeat_interleave(self.count)
        logits = self.logits(to_input(images).expand(-1, self.count, -1, -1))
        self._count(F.cross_entropy(logits, labels, reduction="none"), logits, labels)

    def val_batches(self) -> list[int]:
        """Sizes of the batches for `measure_batch`: as few as there can be, as equal as they can be.

        Empty without BatchNorm, and for a single image, which has no statistics.
        """
        images = len(self.dataset.val_images)
        if not self.norms or images < 2:
            return []
        count = -(-images // len(self.offsets))
        return [images // count + (i < images % count) for i in range(count)]

    def begin_batches(self) -> None:
        """Before the first `measure_batch`."""
        self.cursor.zero_()
        self.totals.zero_()
        self.model.train()

    def measure_by_batch(self) -> None:
        """`measure_batch` over all validation images."""
        self.begin_batches()
        for size in self.val_batches():
            self.measure_batch(size)

    @torch.no_grad()
    def measure_batch(self, size: int) -> None:
        """Of the next `size` validation images, normalized by their own statistics as in training, into `totals`.

        In training mode; the running statistics stay as they are.
        """
        index = self.cursor + self.offsets[:size]
        momenta = [norm.momentum for norm in self.norms]
        for norm in self.norms:
            norm.momentum = 0.0
        self._validate(self.dataset.val_images.index_select(0, index), self.dataset.val_labels.index_select(0, index))
        for norm, momentum in zip(self.norms, momenta, strict=True):
            norm.momentum = momentum
        self.cursor += size

    def means(self, images: int) -> list[Means]:
        """Mean loss and accuracy of each network from `totals` over `images` images; waits for the device."""
        return [(loss / images, correct / images) for loss, correct in self.totals.T.tolist()]

    def network(self, index: int) -> nn.Module:
        """Network `index` by itself; where there are several, in the same tensors for every index."""
        if self.count > 1:
            take(self.model, index, self.count, self.one)
        return self.one.train(self.model.training)


def measures(trained: Means, measured: Means, by_batch: Means | None) -> dict[str, float]:
    """What an epoch's record holds of training, of validation and, with BatchNorm, of `Learner.measure_batch`."""
    found = {"train": trained, "val": measured, "val_batch": by_batch}
    return {
        f"{split}_{name}": value
        for split, means in found.items()
        if means
        for name, value in zip(("loss", "accuracy"), means, strict=True)
    }


def batch_sizes(images: int, batch_size: int, drop_last: bool = False) -> tuple[int, int]:
    """Full batches in an epoch, and the size of the last, smaller one (0: none, or dropped); the only one stays."""
    full, rest = divmod(images, batch_size)
    return full, 0 if drop_last and full else rest


def train(trial: Trial, dataset: Dataset, fast: bool = False) -> tuple[list[dict[str, Any]], nn.Module]:
    """Train `trial` the plain way on the device of `dataset`; gives its epochs (see docs/design.md) and the network.

    The reference for every faster way.
    """
    with arithmetic(trial.precision):
        learner = Learner(trial, dataset, fast)
        order = trial.generator("order")
        images = len(dataset.train_images)
        epochs = []
        for number, t in enumerate(trial.strengths, start=1):
            start = time.perf_counter()
            learner.epoch([t], [torch.randperm(images, generator=order)])
            (trained,) = learner.means(learner.trained_images)
            by_batch = None
            if learner.val_batches():
                learner.measure_by_batch()
                (by_batch,) = learner.means(len(dataset.val_images))
            learner.model.eval()
            learner.measure()
            (measured,) = learner.means(len(dataset.val_images))
            seconds = time.perf_counter() - start
            epochs.append({"epoch": number, "t": t, **measures(trained, measured, by_batch), "seconds": seconds})
    return epochs, learner.network(0)

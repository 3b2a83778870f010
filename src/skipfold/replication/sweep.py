"""Many trials through one call: what is stored is read, the rest is trained; side by side where CUDA is."""

import contextlib
import copy
import functools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from skipfold.errors import DeviceError, first_line
from skipfold.networks import can_be_stacked
from skipfold.replication.data import Dataset
from skipfold.replication.evaluation import measure_trained
from skipfold.replication.provenance import stamp
from skipfold.replication.store import Record, Store
from skipfold.replication.training import Learner, Means, arithmetic, initial_network, measures
from skipfold.replication.trial import Trial

SIDE_BY_SIDE = 16
"""Trials in one CUDA graph, where memory allows; measured in docs/engine.md."""

STACKED_ON_CPU = 8
"""Trials of a network other than a ResNet that are trained as one network; measured in docs/engine.md."""

WORTH_MEASURING = 40_000
"""Steps of all trials from which on it pays to measure on CUDA how many of them to stack; it takes some seconds."""

MEMORY_SHARE = 0.9
"""Of the GPU's free memory, what the trials side by side may take."""

FEW = SIDE_BY_SIDE // 2
"""Trials of a kind that, alone, leave a GPU idle: on CUDA they are trained beside other kinds."""

# Read when CUDA starts: with the default of 8, more than 8 branches of a graph wait for each other.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

NAMING = ("experiment", "arm", "index", "schedule", "t")
"""Fields of a trial that may differ between trials of one kind."""

PROTOCOL = ("data", "train_images", "val_images", "batch_size", "drop_last", "epochs", "precision")
"""Fields of a trial that are the same for trials side by side, of whatever kinds: they take the same steps."""


def run(
    trials: Sequence[Trial],
    store: Store,
    load_data,
    device: torch.device,
    progress=None,
    side_by_side: int | None = None,
    stacked: int | None = None,
) -> list[Record]:
    """The records of `trials`, in order: read from `store`, or trained on `device` and stored.

    `side_by_side` trials are trained at once, `stacked` of them as one network, None: as many as are best on `device`.
    `load_data(trial)` gives the trial's Dataset on the CPU; it is called only where something has to be trained. Raises
    DeviceError where not even one trial fits the memory.
    """
    records = {trial: store.get(trial) for trial in trials}
    missing = [trial for trial in records if records[trial] is None]
    if progress:
        progress.begin(len(records), len(records) - len(missing), sum(trial.epochs for trial in missing))
    for together in rounds(missing, device):
        dataset = load_data(together[0]).to(device)
        size = group_size(len(together), side_by_side or _fitting_size(together, dataset))
        steps = sum(trial.epochs for trial in together) * len(dataset.train_images) // together[0].batch_size
        as_one = choose_stacked(together[0], dataset, size, steps, stacked) if len(kinds(together)) == 1 else 1
        for trial, epochs, model in _train(together, dataset, size, as_one, progress):
            final = _measured(trial, model, dataset)
            provenance = stamp(device, dataset.md5)
            records[trial] = store.put(trial, {"epochs": epochs, "final": final, "provenance": provenance})
            if progress:
                progress.trial(trial, records[trial])
    if progress:
        progress.end()
    return [records[trial] for trial in trials]


def _measured(trial: Trial, model: nn.Module, dataset: Dataset) -> dict:
    """What the trained network tells, on the CPU where the device, full of others, has no memory left for it."""
    with arithmetic("float32"):  # TF32 would be larger than the differences that are certified
        try:
            return measure_trained(trial, model, dataset)
        except torch.OutOfMemoryError:
            print(f"sweep: out of memory at the measurement of {trial.network}; going on with the CPU", flush=True)
            torch.cuda.empty_cache()
        return measure_trained(trial, copy.deepcopy(model).cpu(), dataset.to("cpu"))


def kinds(trials: Iterable[Trial]) -> list[list[Trial]]:
    """Trials that differ in nothing but NAMING, together."""
    kinds: dict[str, list[Trial]] = {}
    for trial in trials:
        description = trial.description()
        for name in NAMING:
            description.pop(name)
        description["options"].pop("t", None)
        kinds.setdefault(json.dumps(description, sort_keys=True), []).append(trial)
    return list(kinds.values())


def rounds(trials: Iterable[Trial], device: torch.device) -> list[list[Trial]]:
    """Trials that are trained together, in groups: a kind, or on CUDA all kinds of at most FEW trials and one PROTOCOL.

    A kind of its own for a single trial would take as long as one of many.
    """
    found: dict[tuple, list[Trial]] = {}
    for number, kind in enumerate(kinds(trials)):
        few = device.type == "cuda" and len(kind) <= FEW
        key = tuple(getattr(kind[0], name) for name in PROTOCOL) if few else (number,)
        found.setdefault(key, []).extend(kind)
    return list(found.values())


def _train(trials: Sequence[Trial], dataset: Dataset, side_by_side: int, stacked: int, progress) -> Iterator[tuple]:
    """Train in groups of equal size, those of one kind all on one bench; out of memory halves the group."""
    waiting, one_kind = list(trials), len(kinds(trials)) == 1
    while waiting:
        size = group_size(len(waiting), side_by_side)
        try:
            with arithmetic(waiting[0].precision), _drawing(dataset) as draw:
                ahead = draw(waiting[:size])
                bench = None  # the last one's memory is free before the next one takes any
                bench = Bench(waiting[:size], dataset, stacked)
                while waiting:
                    group, initials = waiting[:size], ahead
                    ahead = draw(waiting[size : 2 * size]) if one_kind else []
                    yield from bench.train(group, [drawn() for drawn in initials], progress)
                    del waiting[: len(group)]
                    if not one_kind:
                        break
            continue
        except torch.OutOfMemoryError as error:
            if size == 1:
                raise _does_not_fit(waiting[0]) from error
        bench = None
        torch.cuda.empty_cache()
        side_by_side = size // 2
        print(f"sweep: out of memory at {size} trials side by side; going on with {side_by_side}", flush=True)


def _does_not_fit(trial: Trial) -> DeviceError:
    return DeviceError(f"{trial.network}: one trial does not fit the free memory; free some, or use device: cpu")


def best_size(network: str, device: torch.device) -> int:
    """Trials side by side, where the memory is enough; on a CPU as many as are one network."""
    if device.type == "cuda":
        return SIDE_BY_SIDE
    return STACKED_ON_CPU if can_be_stacked(network) and not network.startswith("resnet") else 1


def expected_size(together: Sequence[Trial], device: torch.device, side_by_side: int | None = None) -> int:
    """Trials in a group of a round, at most `side_by_side` (None: `best_size`), where the memory is enough."""
    return group_size(len(together), side_by_side or best_size(together[0].network, device))


def choose_stacked(trial: Trial, dataset: Dataset, size: int, steps: int, asked: int | None = None) -> int:
    """How many of `size` trials like `trial` are trained as one network, where all trials take `steps` steps together.

    As many as `asked`, but 1 of a network that cannot be stacked. Where nothing is asked, on CUDA none, some or all,
    whichever is measured to be fastest on `dataset`, and said, since it decides on the time.
    """
    device = dataset.train_images.device
    if not can_be_stacked(trial.network):
        return 1
    if asked:
        return asked
    if device.type != "cuda":
        return best_size(trial.network, device)
    if size == 1 or steps < WORTH_MEASURING:
        return 1
    return fastest_stacked(trial, dataset, size)


def fastest_stacked(trial: Trial, dataset: Dataset, size: int) -> int:
    """The measurement of `choose_stacked`; an arrangement that does not run, or does not fit, is left out."""
    times = {}
    with arithmetic(trial.precision):
        for stacked in dict.fromkeys((1, group_size(size, 4), size)):
            try:
                times[stacked] = Bench([trial] * size, dataset, stacked).seconds_a_step() / size
            except RuntimeError as error:  # torch.OutOfMemoryError is one, and what cuDNN says of what it does not have
                print(f"sweep: {trial.network}: {stacked} stacked is left out: {first_line(error)}", flush=True)
            if dataset.train_images.is_cuda:
                torch.cuda.synchronize()  # raises where the error has left the device unusable
                torch.cuda.empty_cache()
    if not times:
        return 1
    best = min(times, key=times.get)
    measured = ", ".join(f"{stacked} stacked {1e6 * seconds:.0f} us" for stacked, seconds in times.items())
    print(f"sweep: {trial.network}: a step and trial takes with {measured}; going on with {best}", flush=True)
    return best


def _fitting_size(trials: Sequence[Trial], dataset: Dataset) -> int:
    """Trials side by side; on CUDA by the memory that one takes and that is free, and said: it decides on the time."""
    device = dataset.train_images.device
    most = best_size(trials[0].network, device)
    if device.type != "cuda":
        return most
    needed = max(_memory(kind[0], dataset) for kind in kinds(trials))
    free = torch.cuda.mem_get_info()[0]
    size = fitting(free, needed, min(most, len(trials)))
    named = ", ".join(dict.fromkeys(trial.network for trial in trials))
    print(
        f"sweep: {named}: {size} of {len(trials)} trials side by side, about {needed / 2**30:.2f} GiB "
        f"each, {free / 2**30:.1f} GiB free",
        flush=True,
    )
    return size


def group_size(trials: int, most: int) -> int:
    """Trials in a group, where they are in as few groups of equal size as have at most `most` each."""
    groups = -(-trials // most)
    return -(-trials // groups)


def fitting(free: int, needed: int, wanted: int) -> int:
    """How many trials of `needed` bytes fit `free` bytes, at most `wanted` and at least 1."""
    return max(1, min(wanted, int(MEMORY_SHARE * free) // max(1, needed)))


def _memory(trial: Trial, dataset: Dataset) -> int:
    """Bytes that one learner takes on the GPU, by a step and a validation pass; raises DeviceError where it has not."""
    try:
        with arithmetic(trial.precision):
            before = torch.cuda.memory_allocated()
            learner = Learner(trial, dataset)
            for _ in range(2):
                # The first pass tries algorithms, some of which take more memory than the one that is kept.
                torch.cuda.reset_peak_memory_stats()
                learner.model.train()
                learner.cursor.zero_()
                learner.step(min(trial.batch_size, len(dataset.train_images)))
                learner.model.eval()
                learner.measure()
            torch.cuda.synchronize()
            needed = torch.cuda.max_memory_allocated() - before
    except torch.OutOfMemoryError as error:
        raise _does_not_fit(trial) from error
    del learner
    torch.cuda.empty_cache()
    return needed


@contextlib.contextmanager
def _drawing(dataset: Dataset) -> Iterator[Callable[[Sequence[Trial]], list[Callable[[], nn.Module]]]]:
    """Draws initial networks on the CPU, in threads of one core each while a GPU trains."""
    if dataset.train_images.device.type != "cuda":
        yield lambda trials: [functools.partial(initial_network, trial, crop=True) for trial in trials]
        return
    with ThreadPoolExecutor(initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield lambda trials: [pool.submit(initial_network, trial, crop=True).result for trial in trials]


class Bench:
    """A network for each of `trials`, of one PROTOCOL, on one device, in learners of at most `stacked`.

    On a GPU a step of all learners is one CUDA graph of parallel branches, on a CPU they step in turn. Where `stacked`
    is more than 1, the trials are of one kind.
    """

    def __init__(
        self, trials: Sequence[Trial], dataset: Dataset, stacked: int = 1, learner: Callable[..., Learner] = Learner
    ):
        self.dataset = dataset
        self.stacked = group_size(len(trials), stacked)
        first = {trial: kind[0] for kind in kinds(trials) for trial in kind}  # a learner of any of a kind is for all
        self.learners = [learner(first[trial], dataset, count=self.stacked) for trial in trials[:: self.stacked]]
        self.active = self.learners
        self.on_cuda = dataset.train_images.device.type == "cuda"
        self.full, self.rest = self.learners[0].full, self.learners[0].rest
        if self.on_cuda:
            # A root of its own: one of the branches would be waited for by those that come later.
            self.root, *self.streams = (torch.cuda.Stream() for _ in range(1 + len(self.learners)))
            self.pool = torch.cuda.graph_pool_handle()
        self.batch_size = trials[0].batch_size
        self.steps = {
            batch: self._prepare(lambda learner, batch=batch: learner.step(batch), training=True)
            for batch, count in ((self.batch_size, self.full), (self.rest, self.rest))
            if count
        }

    def _prepare(self, action: Callable[[Learner], None], training: bool) -> Callable[[], None]:
        """`action` of every learner as one call."""
        return self._capture(action, training).replay if self.on_cuda else lambda: self._in_turn(action)

    @functools.cached_property
    def measure(self) -> Callable[[], None]:
        """`Learner.measure` of all; prepared when it is asked for, since what only times steps needs none."""
        return self._prepare(Learner.measure, training=False)

    @functools.cached_property
    def val_batches(self) -> list[Callable[[], None]]:
        """What measures the validation images by batch, in order."""
        sizes = next(filter(None, (learner.val_batches() for learner in self.learners)), [])
        calls = {
            size: self._prepare(lambda learner, size=size: learner.measure_batch(size), training=True)
            for size in dict.fromkeys(sizes)
        }
        return [calls[size] for size in sizes]

    def seconds_a_step(self, steps: int = 20) -> float:
        """Of all learners, by the wall clock, after as many steps to warm up."""
        steps = max(1, min(steps, self.full))
        step = self.steps[self.batch_size if self.full else self.rest]
        for _ in range(2):
            for learner in self.learners:
                learner.cursor.zero_()
                learner.model.train()
            self._finish()
            start = time.perf_counter()
            for _ in range(steps):
                step()
            self._finish()
            seconds = (time.perf_counter() - start) / steps
        return seconds

    def _finish(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()

    def _in_turn(self, action: Callable[[Learner], None]) -> None:
        for learner in self.active:
            action(learner)

    def _capture(self, action: Callable[[Learner], None], training: bool) -> torch.cuda.CUDAGraph:
        """`action` of every learner, each in its own branch; warmed up on the stream that it is captured on."""
        for learner in self.learners:
            learner.model.train(training)
        for _ in range(2):
            for learner, stream in zip(self.learners, self.streams, strict=True):
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    learner.cursor.zero_()
                    action(learner)
        torch.cuda.synchronize()
        graph, full, forked = torch.cuda.CUDAGraph(), None, []
        with torch.cuda.graph(graph, pool=self.pool, stream=self.root):
            # A capture that is broken off keeps its memory: it has to end before the error goes on.
            try:
                for learner, stream in zip(self.learners, self.streams, strict=True):
                    stream.wait_stream(self.root)
                    forked.append(stream)
                    with torch.cuda.stream(stream):
                        action(learner)
            except torch.OutOfMemoryError as error:
                full = str(error)
            for stream in forked:
                self.root.wait_stream(stream)
        if full is not None:
            raise torch.OutOfMemoryError(full)
        return graph

    def train(self, trials: Sequence[Trial], initials: Sequence[nn.Module], progress) -> Iterator[tuple]:
        """Train trials of the kinds of the first networks, from their own initial values and data orders.

        Gives each trial with its epochs and its network, which is that trial's until the next one is asked for.
        """
        _ = self.measure, self.val_batches  # made before `load`, since preparing takes steps
        chunks = [range(first, len(trials))[: self.stacked] for first in range(0, len(trials), self.stacked)]
        learners = self.active = self.learners[: len(chunks)]
        for learner, chunk in zip(learners, chunks, strict=True):
            learner.load([initials[i] for i in chunk])
        images = len(self.dataset.train_images)
        orders = [trial.generator("order") for trial in trials]
        epochs: list[list[dict]] = [[] for _ in trials]
        for number in range(trials[0].epochs):
            start = time.perf_counter()
            for learner, chunk in zip(learners, chunks, strict=True):
                strengths = [trials[i].strengths[number] for i in chunk]
                learner.begin(strengths, [torch.randperm(images, generator=orders[i]) for i in chunk])
            for learner in self.learners[len(chunks) :]:
                learner.cursor.zero_()
            for _ in range(self.full):
                self.steps[self.batch_size]()
            if self.rest:
                self.steps[self.rest]()
            trained = self._means(learners[0].trained_images)
            by_batch = self._measure_by_batch()
            for learner in learners:
                learner.model.eval()
            self.measure()
            measured = self._means(len(self.dataset.val_images))
            seconds = (time.perf_counter() - start) / len(trials)
            for trial, done, *means in zip(trials, epochs, trained, measured, by_batch, strict=False):
                found = {"epoch": number + 1, "t": trial.strengths[number], **measures(*means), "seconds": seconds}
                done.append(found)
                if progress:
                    progress.epoch(trial, found)
        for learner, chunk in zip(learners, chunks, strict=True):
            for place, i in enumerate(chunk):
                yield trials[i], epochs[i], learner.network(place)

    def _measure_by_batch(self) -> list[Means | None]:
        """Of every network of the active learners; None where nothing is normalized by batch."""
        if not self.val_batches:
            return [None] * len(self.learners) * self.stacked
        for learner in self.learners:
            learner.begin_batches()
        for measure_batch in self.val_batches:
            measure_batch()
        found = self._means(len(self.dataset.val_images))
        normalized = [bool(learner.norms) for learner in self.active for _ in range(self.stacked)]
        return [means if by_batch else None for means, by_batch in zip(found, normalized, strict=True)]

    def _means(self, images: int) -> list[Means]:
        """Of every network of the active learners, in order; those of the last one that idle come last."""
        return [means for learner in self.active for means in learner.means(images)]

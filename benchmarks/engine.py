"""Training steps per second of every way to train, as ratios to a plain eager loop, in one run.

    python benchmarks/engine.py --network resnet34 --branches 1 4 --stacked 1 16

The network and its optimizer are those of the paper tier. One line a way: microseconds a step and trial, how many times
faster than the loop with a DataLoader and than the eager loop with the data on the device, and how far from the floor:
the time that the step's arithmetic, or the bytes that it has to move, would take at the rates measured on this device
in the same run, whichever is longer.

A CUDA graph has so many branches side by side, each of so many networks stacked to one; of the last arrangement of
each number of stacked networks, the kernels that take most of the device's time are listed. With --products and with
--compile each number of stacked networks, in one branch, is also measured with its convolutions on small maps as matrix
products, in the precision of the other convolutions, and with its network through torch.compile.
"""

import argparse
import gzip
import os
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

from skipfold.networks import CLASSES, INPUT_SHAPE, build
from skipfold.replication import config, experiments
from skipfold.replication.data import FOLDER_VARIABLE, Dataset, load
from skipfold.replication.products import ProductConv2d, with_products
from skipfold.replication.provenance import device_name
from skipfold.replication.roofline import ceilings
from skipfold.replication.sweep import Bench
from skipfold.replication.training import Learner, arithmetic, use_device
from skipfold.replication.trial import Trial


def seconds_per_step(step, steps: int, warm_up: int) -> float:
    """Wall time of one `step()`, after `warm_up` of them, the device waited for."""
    for _ in range(warm_up):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def loader_step(trial: Trial, folder: Path, device: torch.device):
    """The ordinary loop: torchvision's MNIST, ToTensor, a shuffling DataLoader, eager forward, backward, SGD."""
    root = Path(tempfile.mkdtemp())
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for source in folder.rglob("*ubyte*"):
        content = source.read_bytes()
        (raw / source.name.removesuffix(".gz")).write_bytes(
            gzip.decompress(content) if source.suffix == ".gz" else content
        )
    batches = iter(DataLoader(MNIST(root, transform=ToTensor()), trial.batch_size, shuffle=True))
    model = build(trial.network, trial.options, trial.generator("init")).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), trial.optimizer.lr, trial.optimizer.momentum)

    def step():
        images, labels = next(batches)
        loss = F.cross_entropy(model(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


class Products(Learner):
    """Its convolutions on small maps are matrix products, on every device and stacked ones too."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.model = with_products(self.model, (self.count, *INPUT_SHAPE[1:]))
        self.norms = [module for module in self.model.modules() if isinstance(module, nn.BatchNorm2d)]
        for module in self.model.modules():
            if isinstance(module, ProductConv2d):
                module.weight.data = module.weight.data.contiguous()


class Compiled(Learner):
    """Its network trains through torch.compile; it is measured as it is."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        # Past it dynamo runs eagerly with no more than a warning; all networks of a class count together.
        torch._dynamo.config.recompile_limit = 1024
        self.compiled = torch.compile(self.model, dynamic=False, fullgraph=True)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        return (self.compiled if self.model.training else self.model)(images).view(-1, CLASSES)


def floor(trial: Trial, dataset: Dataset) -> float:
    """Least seconds of a step, from what it has to compute and to move; prints both with the device's rates.

    Moved are each parameter, its gradient and its momentum, read and written by SGD, and each activation that the
    backward pass needs, written once and read once; as the engine trains, without dead taps and on a CPU with matrix
    products.
    """
    learner = Learner(trial, dataset)
    learner.model.train()
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = sum(4 * p.numel() for p in learner.model.parameters())
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        learner.step(trial.batch_size)
    held = {p.data_ptr() for p in learner.model.parameters()}
    moved = 6 * parameters + 2 * sum(size for place, size in saved.items() if place not in held)
    flops, reached = counter.get_total_flops(), ceilings(dataset.train_images.device)
    arithmetic_, memory = flops / reached.flops, moved / reached.copy
    print(
        f"a step is {flops / 1e9:.2f} GFLOP and moves {moved / 1e6:.0f} MB; this device: {reached.flops / 1e12:.3g} "
        f"TFLOP/s in large products, {reached.copy / 1e9:.3g} GB/s in copies; "
        f"floor {1e6 * max(arithmetic_, memory):.0f} us (arithmetic {1e6 * arithmetic_:.0f}, "
        f"memory {1e6 * memory:.0f})",
        flush=True,
    )
    return max(arithmetic_, memory)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet34")
    parser.add_argument("--data", type=Path, help="folder with the MNIST idx files; default: as in make reproduce")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--branches", type=int, nargs="*", default=[1, 2, 4, 16])
    parser.add_argument("--stacked", type=int, nargs="*", default=[1, 4, 8, 16, 32])
    parser.add_argument("--most", type=int, default=32, help="networks at once, at most")
    parser.add_argument("--products", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--precision", default="tf32")
    arguments = parser.parse_args()
    device = use_device(arguments.device)
    paper = experiments.as_trained(config.load("paper"), arguments.network)
    trial = Trial("benchmark", "engine", 0, **paper, precision=arguments.precision)
    dataset = load("mnist", arguments.data).to(device)
    folder = arguments.data or Path(os.environ.get(FOLDER_VARIABLE) or ".data")
    where = f"{device_name(device)}, torch {torch.__version__}"
    print(f"{arguments.network}, batch {trial.batch_size}, {trial.precision}, {where}")
    times: dict[str, float] = {}
    with arithmetic(trial.precision):
        least = floor(trial, dataset)

    def note(way: str, seconds: float) -> None:
        times[way] = seconds
        loader, eager = times.get("eager + DataLoader"), times.get("eager")
        memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0
        print(
            f"{way:28s} {seconds * 1e6:10.1f} us"
            + (f" {loader / seconds:8.2f}x loader" if loader else "")
            + (f" {eager / seconds:8.2f}x eager" if eager else "")
            + f" {seconds / least:8.1f}x floor"
            + f"  {memory:.1f} GiB",
            flush=True,
        )

    with arithmetic(trial.precision):
        note("eager + DataLoader", seconds_per_step(loader_step(trial, folder, device), arguments.steps, 10))
        for way, fast, count in (("eager", False, 1), ("eager, fast", True, 1), ("eager, 4 stacked", True, 4)):
            learner = Learner(trial, dataset, fast, count)
            learner.model.train()
            note(way, seconds_per_step(eager_step(learner), arguments.steps, 15) / count)
            del learner
        if device.type != "cuda":
            return
        for count in arguments.stacked:
            arranged = [(number, Learner) for number in arguments.branches if number * count <= arguments.most]
            others = {Products: arguments.products, Compiled: arguments.compile}
            arranged += [(1, other) for other, asked in others.items() if asked]
            for branches, learner in arranged:
                bench = None
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                torch.backends.cuda.matmul.allow_tf32 = learner is Products and arguments.precision == "tf32"
                bench = Bench([trial] * branches * count, dataset, count, learner)
                built = time.perf_counter() - start
                seconds = bench.seconds_a_step(arguments.steps)
                way = f"graph, {branches} x {count} stacked"
                way += f", {learner.__name__.lower()}" if learner is not Learner else ""
                note(way, seconds / branches / count)
                validation = seconds_per_step(bench.measure, 3, 1) / branches / count
                print(f"    built in {built:.1f} s; validation pass {validation * 1e3:.1f} ms a trial", flush=True)
            bench.learners[0].model.train()
            print_kernels(eager_step(bench.learners[0]))


def eager_step(learner: Learner):
    """One full step, always on the first images."""

    def step():
        learner.cursor.zero_()
        learner.step(len(learner.offsets))

    return step


def print_kernels(step, most: int = 20) -> None:
    """Number and time of the kernels of one `step()`, and those that take longest, by name."""
    step()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in found.key_averages() if event.device_type == DeviceType.CUDA]
    kernels.sort(key=lambda event: -event.device_time_total)
    total = sum(event.device_time_total for event in kernels)
    print(f"    {sum(event.count for event in kernels)} kernels, {total:.0f} us one after the other")
    for event in kernels[:most]:
        print(f"    {event.device_time_total:9.0f} us {event.count:5d}  {event.key[:110]}")


if __name__ == "__main__":
    main()

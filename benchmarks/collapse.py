"""Ratios of `collapse` against what one would write by hand, and the memory that a 224x224x3 input takes.

    python benchmarks/collapse.py [--device cuda] [--skip-large]

The network is the affine ResNet34 of the paper. Every way computes the same float64 weight and bias, which is checked.
"""

import argparse
import resource
import time
from collections.abc import Callable

import torch
from torch import nn

from skipfold.collapse import MAX_BYTES, _Reference, collapse
from skipfold.networks import INPUT_SHAPE, build

LARGE_SHAPE = (3, 224, 224)
LARGE_BOUND = 8 * 10**9


def push_identity(module: nn.Module, batch: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Baseline: f(0) and f of each of the 784 unit vectors, by forward passes in batches."""
    parameter = next(module.parameters())
    inputs = torch.eye(784, dtype=torch.float64, device=parameter.device).reshape(784, *INPUT_SHAPE)
    with torch.no_grad():
        bias = module(torch.zeros_like(inputs[:1]))[0]
        weight = torch.cat([module(part) for part in inputs.split(batch)]) - bias
    return weight.T, bias


def autograd_jacobian(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Baseline: torch.autograd.functional.jacobian, one backward pass for each output."""
    parameter = next(module.parameters())
    zero = torch.zeros(1, *INPUT_SHAPE, dtype=torch.float64, device=parameter.device)
    weight = torch.autograd.functional.jacobian(lambda x: module(x)[0], zero)
    with torch.no_grad():
        return weight.flatten(1), module(zero)[0]


def gradients(module: nn.Module, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours, from the float32 module: float64 copy, structural check, f(0), Jacobian; no probes."""
    reference = _Reference(module, INPUT_SHAPE, torch.float32, device, MAX_BYTES)
    return reference.rows(), reference.f_0.flatten()


def seconds(function: Callable[[], object], repeats: int) -> tuple[float, object]:
    """Shortest of `repeats` runs, after one more that is not counted where there are several."""
    times = []
    for _ in range(repeats + (repeats > 1)):
        _synchronize()
        start = time.perf_counter()
        result = function()
        _synchronize()
        times.append(time.perf_counter() - start)
    return min(times), result


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(device: torch.device) -> None:
    """Time each way at 28x28 and print it against pushing the identity."""
    module = build("resnet34_linear_avgpool").eval().to(device)
    double = build("resnet34_linear_avgpool").double().eval().to(device)
    few = 5 if device.type == "cuda" else 2
    ways = {
        "push the identity (baseline)": (lambda: push_identity(double), few),
        "autograd.functional.jacobian": (lambda: autograd_jacobian(double), 10),
        "weight and bias, by collapse": (lambda: gradients(module, device), 10),
        "collapse with its certificate": (lambda: _weights(collapse(module, INPUT_SHAPE)[0]), 10),
    }
    expected, baseline = None, None
    print(f"ResNet34 without ReLUs, 784 to 10, {device}, {torch.get_num_threads()} threads")
    for name, (function, repeats) in ways.items():
        took, (weight, bias) = seconds(function, repeats)
        expected, baseline = (expected or (weight, bias)), (baseline or took)
        error = max(float((a.double() - b).abs().max()) for a, b in zip((weight, bias), expected, strict=True))
        print(f"  {name:32} {took:9.3f} s   {baseline / took:6.1f} x   largest difference {error:.1e}")


def _weights(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.linear.weight.detach(), layer.linear.bias.detach()


def large(device: torch.device) -> None:
    """Collapse a ResNet34 from 224x224x3 to 10 classes and print the peak of memory."""
    module = build("resnet34_linear_avgpool").eval()
    module.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
    module = module.to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    took, (_, certificate) = seconds(lambda: collapse(module, LARGE_SHAPE, max_bytes=LARGE_BOUND), 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    print(f"ResNet34 without ReLUs, 3x224x224 to 10, {device}: {took:.1f} s, error {certificate.max_error:.1e}")
    print(f"  peak memory of the process {peak / 1e9:.2f} GB of {LARGE_BOUND / 1e9:.0f} GB allowed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--skip-large", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if not arguments.skip_large:  # first, so that the peak of memory is its own
        large(device)
    compare(device)


if __name__ == "__main__":
    main()

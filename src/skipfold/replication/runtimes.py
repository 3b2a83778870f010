"""Ways to run a network: eagerly, compiled, as a CUDA graph, in onnxruntime; and what a device lacks of them."""

import copy
import functools
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from skipfold.deploy import export_onnx
from skipfold.errors import first_line
from skipfold.networks import INPUT_SHAPE

TOLERANCE = {"float32": 1e-3, "tf32": 2e-2, "bf16": 0.1}
"""Largest difference from the float64 network, relative to its largest logit, at which a network may be timed, by
precision. TF32 may cut digits off instead of rounding them, which adds up over the layers."""

GRAPHS: weakref.WeakSet["torch.cuda.CUDAGraph"] = weakref.WeakSet()
"""Captured predictions, which run one at a time and so share the memory of what lies between input and output."""


@dataclass(frozen=True)
class Runtime:
    """A way to run a network: `build(module, device)` gives a function from a batch to the call that predicts it.

    `missing(device)` says why the device does not have it, or is None.
    """

    build: Callable[[nn.Module, torch.device], Callable[[torch.Tensor], Callable[[], Any]]]
    missing: Callable[[torch.device], str | None] = lambda device: None
    bf16: bool = False

    def precision(self, device: torch.device) -> str:
        """bf16, or what the framework takes for float32: TF32 in convolutions on CUDA."""
        return "bf16" if self.bf16 else "tf32" if device.type == "cuda" else "float32"


def _eager(module: nn.Module, device: torch.device):
    return lambda x: lambda: module(x)


def _channels_last(dtype: torch.dtype):
    def build(module: nn.Module, device: torch.device):
        module = copy.deepcopy(module).to(dtype, memory_format=torch.channels_last)

        def bind(x: torch.Tensor):
            x = x.to(dtype, memory_format=torch.channels_last)
            return lambda: module(x)

        return bind

    return build


def _compiled(mode: str):
    def build(module: nn.Module, device: torch.device):
        # Past these limits, which count all networks of a class together, dynamo runs eagerly with no more than a
        # warning; fullgraph makes that an error.
        torch._dynamo.config.recompile_limit = 1024
        torch._dynamo.config.accumulated_recompile_limit = 4096
        compiled = torch.compile(copy.deepcopy(module), mode=mode, dynamic=False, fullgraph=True)
        return lambda x: lambda: compiled(x)

    return build


def _cuda_graph(module: nn.Module, device: torch.device):
    return lambda x: _captured(module, x)


@functools.cache
def _capture_stream() -> torch.cuda.Stream:
    """The one that every prediction is captured on: graphs share a pool's memory only within a stream."""
    return torch.cuda.Stream()


def _captured(module: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The whole prediction as one CUDA graph; its output is the same tensor each time, until another graph runs."""
    stream = _capture_stream()
    stream.wait_stream(torch.cuda.current_stream())  # which may be making x
    with torch.cuda.stream(stream):
        for _ in range(3):
            module(x)
    torch.cuda.synchronize()
    graph, pool = torch.cuda.CUDAGraph(), next((other.pool() for other in GRAPHS), None)
    # torch.compile's own graphs free every cuBLAS workspace; this one has to have its own, in its pool.
    torch._C._cuda_clearCublasWorkspaces()
    with torch.cuda.graph(graph, stream=stream, pool=pool):
        output = module(x)
    torch._C._cuda_clearCublasWorkspaces()
    GRAPHS.add(graph)

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay


def _onnxruntime(module: nn.Module, device: torch.device):
    """On the CPU with as many threads as torch; on CUDA from and to tensors that lie there."""
    session = _session(module, device)

    def bind_on_cpu(x: torch.Tensor):
        images = {"input": x.numpy()}
        return lambda: torch.from_numpy(session.run(None, images)[0])

    return functools.partial(_bound, session) if device.type == "cuda" else bind_on_cpu


def _bound(session, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The prediction of `x` where it lies; its output is the same tensor each time."""
    logits = torch.empty(len(x), 10, device=x.device)
    binding = session.io_binding()
    bound = (x.device.type, x.device.index or 0, np.float32)
    binding.bind_input("input", *bound, tuple(x.shape), x.data_ptr())
    binding.bind_output(session.get_outputs()[0].name, *bound, tuple(logits.shape), logits.data_ptr())

    def predict() -> torch.Tensor:
        session.run_with_iobinding(binding)
        return logits

    return predict


def _session(module: nn.Module, device: torch.device):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    provider = f"{device.type.upper()}ExecutionProvider"
    choice = {}
    if device.type == "cuda":  # where by default each session's memory grows to the next power of two
        choice = {"device_id": device.index or 0, "arena_extend_strategy": "kSameAsRequested"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        export_onnx(copy.deepcopy(module).cpu(), INPUT_SHAPE, path, tolerance=TOLERANCE["float32"])
        return onnxruntime.InferenceSession(path, options, providers=[(provider, choice)])


def _without_cuda(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "needs CUDA"


@functools.cache
def _without_compiler(device: torch.device) -> str | None:
    """Whether the compiler that torch.compile calls is there and works shows only when it is tried."""
    try:
        torch.compile(nn.Linear(2, 2).to(device), fullgraph=True)(torch.ones(2, 2, device=device))
    except Exception as error:
        return f"torch.compile fails on this machine: {first_line(error)}"
    return None


def _without_provider(device: torch.device) -> str | None:
    import onnxruntime

    provider = f"{device.type.upper()}ExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        return f"the onnxruntime installed has no {provider}; onnxruntime-gpu has"
    # One that does not load is replaced by the CPU's with no more than a warning.
    used = _session(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).eval(), device).get_providers()[0]
    return None if used == provider else f"onnxruntime's {provider} does not load on this machine"


RUNTIMES = {
    "eager": Runtime(_eager),
    "channels_last": Runtime(_channels_last(torch.float32)),
    "channels_last_bf16": Runtime(_channels_last(torch.bfloat16), bf16=True),
    "compile": Runtime(_compiled("default"), missing=_without_compiler),
    "compile_reduce_overhead": Runtime(
        _compiled("reduce-overhead"), missing=lambda device: _without_cuda(device) or _without_compiler(device)
    ),
    "compile_max_autotune": Runtime(_compiled("max-autotune"), missing=_without_compiler),
    "cuda_graph": Runtime(_cuda_graph, missing=_without_cuda),
    "onnxruntime": Runtime(_onnxruntime, missing=_without_provider),
}

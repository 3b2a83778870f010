"""What each timed network computes and moves, against what the device can: operators, FLOPs, bytes, ceilings."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.func import functional_call
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from skipfold.collapse import Collapsed, fold_preprocessing
from skipfold.errors import DeviceError, first_line
from skipfold.networks import INPUT_SHAPE
from skipfold.pixels import PixelLayer
from skipfold.replication.provenance import STAMP, gpu_state
from skipfold.replication.runtimes import RUNTIMES, TOLERANCE
from skipfold.replication.timing import contenders
from skipfold.replication.training import arithmetic
from skipfold.subject import relative_error

AS_COUNTED = ("eager", "cuda_graph")
"""Runtimes that run the operators that are counted; the others fuse some of them."""

COLLAPSED = ("resnet34_linear_avgpool", "collapsed")
PIXELS = "collapsed_pixels"
FUSED = "collapsed_pixels_fused"
"""The collapsed network that takes uint8 pixels as they are stored; on CUDA also in one kernel (see `pixels`)."""

PIXEL_BATCHES = {"cpu": (1, 64, 2**16), "cuda": (1, 64, 2**19)}
"""The last one does not fit into a cache."""

MATRIX = {"cpu": 1024, "cuda": 8192}
"""Side of the square matrices whose measured product stands for the device's arithmetic; a convolution may beat it."""

CONVOLVED = (16, 512, 14, 14)
"""Images, channels, height and width of the large 3x3 convolution that is measured beside it."""

COPIED = 2**27
"""Bytes of the copy that is the ceiling of memory; more than a cache holds."""

SAMPLE_SECONDS = 0.2
KERNELS_BATCH = 64


@dataclass(frozen=True)
class Work:
    """What one prediction asks for: operators that compute, FLOPs of convolutions and matrix products an image, bytes
    of activations that operators read and write an image, bytes of weights."""

    operators: int
    flops: int
    activations: int
    weights: int


@dataclass(frozen=True)
class Ceilings:
    """What the device reached: FLOP/s in a matrix product (of side MATRIX) and in a convolution (of CONVOLVED), bytes/s
    read and written by a large copy, seconds to launch a CUDA graph of one empty kernel (None on a CPU)."""

    flops: float
    convolution: float
    copy: float
    launch: float | None


def work(module: nn.Module, dtype: torch.dtype = torch.float32) -> Work:
    """The work of `module` for images of `dtype`, from shapes alone: nothing is computed.

    An operator counts every tensor that it reads or writes once, as if none were in a cache; views count nothing.
    """
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    weights = {name: value.to("meta") for name, value in state.items()}
    x = torch.empty(1, *INPUT_SHAPE, dtype=dtype, device="meta")
    with torch.inference_mode(), FlopCounterMode(display=False) as flops, _Traffic(weights.values()) as traffic:
        functional_call(module, weights, x)
    return Work(traffic.operators, flops.get_total_flops(), traffic.activations, traffic.weights)


class _Traffic(TorchDispatchMode):
    def __init__(self, weights):
        super().__init__()
        self.held = {id(weight) for weight in weights}
        self.operators = self.activations = self.weights = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        read = [arg for arg in args if isinstance(arg, torch.Tensor)]
        view = func.is_view and out.dtype == read[0].dtype  # `to` is a view unless it converts
        if read and not view:
            self.operators += 1
            held = [tensor for tensor in read if id(tensor) in self.held]
            moved = [tensor for tensor in read if id(tensor) not in self.held]
            self.weights += sum(tensor.nbytes for tensor in held)
            self.activations += sum(tensor.nbytes for tensor in [*moved, out])
        return out


def ceilings(device: torch.device) -> Ceilings:
    """Measured on `device` now, with the threads and in the present precision of convolutions, products too."""
    side = MATRIX[device.type]
    a, b = torch.rand(2, side, side, device=device)
    source = torch.rand(COPIED // 4, device=device)
    target = torch.empty_like(source)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        product = _seconds(lambda: a @ b)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    count, channels, height, width = CONVOLVED
    x, kernel = torch.rand(CONVOLVED, device=device), torch.rand(channels, channels, 3, 3, device=device)
    convolution = _seconds(lambda: F.conv2d(x, kernel, padding=1))
    copy = _seconds(lambda: target.copy_(source))
    launch = None
    if device.type == "cuda":
        launch = _seconds(RUNTIMES["cuda_graph"].build(torch.Tensor.zero_, device)(target[:1]))
    convolved = 2 * kernel.numel() * count * height * width
    return Ceilings(2 * side**3 / product, convolved / convolution, 2 * COPIED / copy, launch)


def _seconds(call: Callable[[], object]) -> float:
    """Median seconds of a warm call; the device is waited for."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=SAMPLE_SECONDS).median


def kernels(module: nn.Module, x: torch.Tensor) -> int | None:
    """CUDA kernels that one eager prediction of `x` launches; None on a CPU."""
    if x.device.type != "cuda":
        return None
    module(x)  # chooses the convolutions' algorithms
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        module(x)
        torch.cuda.synchronize()
    launched = [event.name for event in found.events() if event.device_type == DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in launched)


def measure(timings: pd.DataFrame, device: torch.device) -> pd.DataFrame:
    """Every eager or CUDA-graph time of `timings` (see `timing.measure`) beside its work and the device's ceilings.

    Then the collapsed network on uint8 pixels, timed here, on CUDA in one kernel too. Columns: network, variant,
    runtime, batch, measure (device where it was measured, else host), median_us (microseconds an image), operators,
    kernels (empty on a CPU), flops and bytes (an image, the weights' share included), intensity (FLOP a byte),
    flops_per_s, peak_flops_per_s, convolution_flops_per_s, copy_bytes_per_s and launch_us (see `Ceilings`; the first
    is of the matrix product), roof_share (of what product and copy allow at this intensity; above 1 where caches serve
    what is counted as memory, or convolutions beat the product), input_share (input bytes a second, of
    copy_bytes_per_s), matrix_side, gpu_state (see `provenance.gpu_state`, read while the device is warm), STAMP.
    """
    with torch.inference_mode(), arithmetic("tf32"):
        roof = ceilings(device)
        state = gpu_state(device)
        modules = {(each.network, each.variant): each.module for each in contenders(device)}
        x = torch.rand(KERNELS_BATCH, *INPUT_SHAPE, device=device)
        counted = {key: (work(module), kernels(module, x)) for key, module in modules.items()}
        rows = [_row(row, *counted[row["network"], row["variant"]], roof) for row in _shown(timings)]
        rows += _pixel_rows(modules[COLLAPSED], device, roof)
    shared = {"matrix_side": MATRIX[device.type], "gpu_state": state, **{key: timings[key].iloc[0] for key in STAMP}}
    return pd.DataFrame(rows).astype({"kernels": "Int64"}).assign(**shared)


def _shown(timings: pd.DataFrame) -> list[dict]:
    way = "device" if (timings["measure"] == "device").any() else "host"
    rows = timings[timings["runtime"].isin(AS_COUNTED) & (timings["measure"] == way)]
    return rows[["network", "variant", "runtime", "batch", "measure", "median_us"]].to_dict("records")


def _row(timed: dict, work: Work, kernels: int | None, roof: Ceilings, input_bytes: int = 4) -> dict:
    seconds = timed["median_us"] / 1e6
    moved = work.activations + work.weights / timed["batch"]
    allowed = min(roof.flops, work.flops / moved * roof.copy)
    pixels = torch.Size(INPUT_SHAPE).numel()
    return {
        **timed,
        "operators": work.operators,
        "kernels": kernels,
        "flops": work.flops,
        "bytes": moved,
        "intensity": work.flops / moved,
        "flops_per_s": work.flops / seconds,
        "peak_flops_per_s": roof.flops,
        "convolution_flops_per_s": roof.convolution,
        "copy_bytes_per_s": roof.copy,
        "launch_us": roof.launch and 1e6 * roof.launch,
        "roof_share": work.flops / seconds / allowed,
        "input_share": pixels * input_bytes / seconds / roof.copy,
    }


def _pixel_rows(collapsed: Collapsed, device: torch.device, roof: Ceilings) -> list[dict]:
    layer = fold_preprocessing(collapsed).to(device)
    modules = {PIXELS: layer}
    if device.type == "cuda":
        fused = PixelLayer(layer).to(device)
        try:
            fused(torch.zeros(1, *INPUT_SHAPE, dtype=torch.uint8, device=device))
            modules[FUSED] = fused
        except Exception as error:  # of many kinds: Triton compiles here, with a compiler that may be missing
            print(f"roofline: {FUSED} is left out: {first_line(error)}", flush=True)
    rows = []
    for variant, module in modules.items():
        _check_pixels(variant, module, collapsed, device)
        counted = _fused_work(layer) if variant == FUSED else work(layer, torch.uint8)
        for batch in PIXEL_BATCHES[device.type]:
            x = torch.randint(0, 256, (batch, *INPUT_SHAPE), dtype=torch.uint8, device=device)
            launched = kernels(module, x)
            for runtime in AS_COUNTED:
                if RUNTIMES[runtime].missing(device):
                    continue
                call = RUNTIMES[runtime].build(module, device)(x)
                timed = {"network": COLLAPSED[0], "variant": variant, "runtime": runtime, "batch": batch}
                timed |= {"measure": "host", "median_us": 1e6 * _seconds(call) / batch}
                rows.append(_row(timed, counted, launched, roof, input_bytes=1))
    return rows


def _fused_work(layer: Collapsed) -> Work:
    """One operator that reads pixels and weights and writes logits."""
    counted = work(layer, torch.uint8)
    outputs, inputs = layer.linear.weight.shape
    return Work(1, counted.flops, inputs + 4 * outputs, counted.weights)


def _check_pixels(variant: str, module: nn.Module, collapsed: Collapsed, device: torch.device) -> None:
    x = torch.randint(0, 256, (8, *INPUT_SHAPE), dtype=torch.uint8, device=device)
    error = relative_error(module(x), collapsed(x / 255))
    if not error <= TOLERANCE["float32"]:
        raise DeviceError(
            f"roofline: {COLLAPSED[0]} {variant} differs from the collapsed network by {error:.1e} of the largest "
            f"logit, more than {TOLERANCE['float32']:g}; it is not the same function on this device"
        )

"""Networks as files that were checked before they are there: ONNX, safetensors."""

import contextlib
import io
import json
import math
import operator
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from skipfold.checkpoint import not_finite, not_plain, read_state, some
from skipfold.collapse import Certificate, Collapsed
from skipfold.errors import CheckpointError, ExportError, first_line
from skipfold.files import written
from skipfold.subject import certifying, dtype_and_device, in_mode, input_errors, relative_error, sample_shape

TOLERANCE = 1e-4
"""Largest difference of a file's outputs from the network's, relative to the largest."""

BATCHES = (1, 16, 3)
"""Sizes at which the file is run: one sample, more than what it is traced at, and that, which is the last."""


def export_onnx(
    module: nn.Module,
    example: torch.Tensor | Sequence[int],
    path: str | Path,
    *,
    uint8: bool = False,
    tolerance: float | None = None,
) -> float:
    """Write `module`, in eval mode, as ONNX for batches of any size; gives the largest difference found.

    `example` is a batch, or the shape of one sample; with `uint8` the file takes bytes. Input and output are named so.
    The file is run by onnxruntime on random inputs of three batch sizes and is at `path` only if its outputs are those
    of `module`, up to `tolerance` of the largest (None: TOLERANCE, at half precision 8 roundings). Raises ExportError
    where they are not, or where the export fails, and leaves nothing behind then; ModuleError, InputShapeError and
    WeightsError where `module` cannot be run.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError("onnxruntime is not installed; pip install 'skipfold[deploy]'") from error

    shape = sample_shape(example)
    dtype, device = dtype_and_device(module, example)
    tolerance = max(TOLERANCE, 8 * torch.finfo(dtype).eps) if tolerance is None else tolerance
    with in_mode(module, False):
        inputs = [_random(count, shape, torch.uint8 if uint8 else dtype, device) for count in BATCHES]
        with certifying(device), torch.no_grad(), input_errors(inputs[-1]):
            expected = [module(x.clone()) for x in inputs]
        _check_outputs(expected)
        with written(path, ExportError) as part:
            try:
                _write_onnx(module, inputs[-1], part)
            except Exception as error:  # of many kinds, from torch.onnx
                raise ExportError(f"{path}: torch.onnx does not take the network ({_reason(error)})") from error
            try:
                options = onnxruntime.SessionOptions()
                options.log_severity_level = 4  # what it would print is in what it raises
                session = onnxruntime.InferenceSession(part, options, providers=["CPUExecutionProvider"])
                found = [session.run(None, {"input": x.cpu().numpy()})[0] for x in inputs]
            except Exception as error:  # of many kinds, from onnxruntime
                raise ExportError(
                    f"{path}: onnxruntime does not run the network ({first_line(error)}); does it take batches of any "
                    "size, as [N, ...]?"
                ) from error
            return _compared(path, expected, [torch.from_numpy(output) for output in found], tolerance)


def _reason(error: Exception) -> str:
    """Why torch.onnx failed: the first line, that is no heading, of what `error`, which tells what to do, came from."""
    cause = error.__cause__ or error
    said = first_line(cause)
    told = "".join(str(cause).strip().splitlines()[1:2]).strip()
    return told.removeprefix("- ") if told and (said.endswith(":") or told.startswith("- ")) else said


def _check_outputs(outputs: Sequence[Any]) -> None:
    """Raise ExportError where the network's own outputs are nothing to compare with."""
    for output in outputs:
        if not isinstance(output, torch.Tensor):
            raise ExportError(f"the network gives {type(output).__name__}; one tensor is allowed, so wrap the network")
        if not output.isfinite().all():
            raise ExportError("the network gives NaN or infinity on inputs in [0, 1]; there is nothing to compare with")


def _write_onnx(module: nn.Module, x: torch.Tensor, path: Path) -> None:
    # A caller's autocast would be written into the file; older releases of onnxscript print what they rewrite.
    with warnings.catch_warnings(), certifying(x.device), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (x,),
            path,
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=["input"],
            output_names=["output"],
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        )


def save_state(module: nn.Module, path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write the state_dict of `module` as safetensors, t included; read again and compared before it is at `path`.

    Raises ExportError where `path` does not end in .safetensors, by which it is known, or cannot be written, and where
    the state_dict holds anything but finite tensors that are dense and have values.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        name = f"{path.stem or 'weights'}.safetensors"
        raise ExportError(f"{str(path)!r}: does not end in .safetensors; name it {path.parent / name}")
    if other := not_plain(module.state_dict()):
        raise ExportError(f"{path}: the network holds {some(other)}; dense tensors with values can be written")
    state = {key: value.detach().cpu().contiguous().clone() for key, value in module.state_dict().items()}
    if bad := not_finite(state):
        raise ExportError(f"{path}: the network holds NaN or infinity in {some(bad)}; finite weights can be written")
    with written(path, ExportError) as part:
        try:
            safetensors.torch.save_file(state, part, metadata)
        except KeyError as error:  # a dtype
            raise ExportError(f"{path}: safetensors holds no {error} tensors; cast the network first") from error
        again = safetensors.torch.load_file(part)
        if set(again) != set(state) or not all(torch.equal(again[key], value) for key, value in state.items()):
            raise ExportError(f"{path}: what was written is not what is read; is the disk full?")


def save_collapsed(layer: Collapsed, certificate: Certificate, path: str | Path) -> None:
    """Write a collapsed network as safetensors, with its shapes and certificate in the metadata."""
    shapes = {"input_shape": layer.input_shape, "output_shape": layer.output_shape}
    held = shapes | {"certificate": certificate.as_dict()}
    save_state(layer, path, {"skipfold": "collapsed"} | {key: json.dumps(value) for key, value in held.items()})


def load_collapsed(path: str | Path) -> tuple[Collapsed, Certificate]:
    """What `save_collapsed` wrote. Raises CheckpointError where the file is none such."""
    state = read_state(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            held = {key: json.loads(value) for key, value in (file.metadata() or {}).items() if key != "skipfold"}
        weight, bias = state["linear.weight"], state["linear.bias"]
        shapes = [tuple(operator.index(size) for size in held[key]) for key in ("input_shape", "output_shape")]
        inputs, outputs = (math.prod(shape) for shape in shapes)
        if weight.shape != (outputs, inputs) or bias.shape != (outputs,) or weight.dtype != bias.dtype:
            said = " and ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in (weight, bias))
            raise ValueError(f"{said} for {inputs} to {outputs}")
        return Collapsed(weight, bias, *shapes).eval(), Certificate(**held["certificate"])
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        # RuntimeError: integer weights, which cannot be a layer's, and JSON that is nested too deep.
        raise CheckpointError(
            f"{path}: no collapsed network ({type(error).__name__}: {first_line(error)}); write one with skipfold "
            "collapse --output FILE.safetensors"
        ) from error


def compare_collapsed(path: str | Path, layer: Collapsed) -> float:
    """Largest difference of weights and biases in the file at `path` from those of `layer`, relative to the largest.

    Raises CheckpointError where the file holds no collapsed network, or another function.
    """
    held, _ = load_collapsed(path)
    shapes = [(each.input_shape, each.output_shape) for each in (held, layer)]
    if shapes[0] != shapes[1]:
        held_said, said = (f"{inputs} to {outputs}" for inputs, outputs in shapes)
        raise CheckpointError(f"{path}: maps {held_said}, the network {said}; is it of another network?")
    with torch.no_grad():
        values, expected = (torch.cat([each.cpu().flatten() for each in x.parameters()]) for x in (held, layer))
    worst = relative_error(values, expected)
    if not worst <= TOLERANCE:
        raise CheckpointError(
            f"{path}: another function than the network: its weights differ by {worst:.1e} of the largest; was it "
            "made from other weights, or with another preprocessing?"
        )
    return worst


def _random(count: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    with input_errors(torch.empty((), dtype=dtype, device="meta").expand(count, *shape)):
        if dtype == torch.uint8:
            return torch.randint(0, 256, (count, *shape), generator=generator, dtype=dtype).to(device)
        return torch.rand(count, *shape, generator=generator, dtype=dtype).to(device)


def _compared(
    path: str | Path, expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor], tolerance: float
) -> float:
    worst = 0.0
    for theirs, ours in zip(expected, found, strict=True):
        theirs, ours = theirs.detach().cpu().double(), ours.double()
        if theirs.shape != ours.shape:
            raise ExportError(f"{path}: gives {list(ours.shape)} where the network gives {list(theirs.shape)}")
        error = relative_error(ours, theirs)
        if not error <= tolerance:  # NaN neither
            raise ExportError(
                f"{path}: its outputs differ from the network's by {error:.1e} of the largest; {tolerance:.0e} are "
                "allowed"
            )
        worst = max(worst, error)
    return worst

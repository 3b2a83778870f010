"""The commands for a network of one's own: collapse, certify, remove-skips, export, inspect."""

import argparse
import errno
import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from skipfold.errors import CheckpointError, ConfigError, SkipfoldError, first_line, is_too_large
from skipfold.keys import parse

# torch takes seconds to import: each command imports what it needs.

SUFFIXES = (".onnx", ".safetensors")
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Of a disk, and of the share of it that one user may take."""

LARGEST = 2**63
"""What torch counts in has to stay below it."""

UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
MODELS = """\
MODEL is one of skipfold's networks (cnn3, resnet18, resnet34_linear_avgpool, ...), a name of torchvision.models (as
torchvision:resnet18 where skipfold has that name too), or timm:NAME. A checkpoint is a .safetensors file or a
state_dict written by torch.save, of the network or of what wrapped it for training (torch.compile, DataParallel,
Lightning); no code in it is run.

exit status: 0 done, 1 an error, said in one line, 2 a command that cannot be read, 130 Ctrl-C
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives its exit status, see `run`."""
    return run(_parser(), arguments)


def run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None, stopped: str = "stopped") -> int:
    """Run the command that `parser` reads; gives 0, 1 after an error's one line, or 130 after Ctrl-C.

    Such are SkipfoldErrors, and memory or a disk that runs out; all else is a bug and raised. Gives 1 too where what
    read the output has gone.
    """
    given = parser.parse_args(arguments)
    try:
        status = given.run(given) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        return 1
    except SkipfoldError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
    except Exception as error:
        said = first_line(error)
        if isinstance(error, OSError) and error.errno in FULL:
            what = f"cannot write ({said}); make room, then run it again"
        elif is_too_large(error):
            what = f"does not fit into memory ({said}); ask for smaller sizes or use a machine with more memory"
        else:
            raise
        asked = shlex.join(sys.argv[1:] if arguments is None else arguments)
        print(f"error: {parser.prog} {asked}: {what}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="skipfold", description="Collapse affine networks, and take the skip connections out of any ResNet."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    collapse = _command(
        commands,
        _collapse,
        "collapse",
        "write an affine network as one layer, with its certificate",
        "skipfold collapse cnn3 --checkpoint trained.safetensors --input-shape 1,28,28 --output layer.onnx --uint8",
    )
    _certified(collapse)
    _output(collapse)

    certify = _command(
        commands,
        _certify,
        "certify",
        "say whether a network is affine, or whether a collapsed one is the same function; writes nothing",
        "skipfold certify cnn3 --checkpoint trained.safetensors --input-shape 1,28,28 --collapsed layer.safetensors",
    )
    certify.add_argument(
        "--collapsed",
        type=partial(_file, (".safetensors",)),
        metavar="FILE",
        help="what skipfold collapse wrote, to be compared; .safetensors",
    )
    _certified(certify)

    remove = _command(
        commands,
        _remove_skips,
        "remove-skips",
        "write a network, whose t are 0, without its skips, BatchNorms folded, with its certificate",
        "skipfold remove-skips resnet18 --checkpoint trained.safetensors --input-shape 1,28,28 --output plain.onnx",
    )
    remove.add_argument("--crop", action="store_true", help="leave out taps that only meet padding at this input size")
    remove.add_argument("--json", action="store_true", help="print the certificate as JSON")
    _shape(remove)
    _output(remove)

    export = _command(
        commands,
        _export,
        "export",
        "write a network as ONNX, checked with onnxruntime, or as safetensors",
        "skipfold export resnet50 --checkpoint weights.pth --input-shape 3,224,224 --output resnet50.onnx",
    )
    _shape(export)
    _output(export)

    inspect = _command(
        commands,
        _inspect,
        "inspect",
        "show a network's skip connections and their t",
        "skipfold inspect resnet18 --checkpoint trained.safetensors --svg skips.svg",
    )
    inspect.add_argument(
        "--input-shape", type=_sizes, metavar="C,H,W", help="of one sample; with it only what adds on one is read"
    )
    inspect.add_argument("--svg", type=partial(_file, (".svg",)), metavar="FILE", help="draw them too")
    return parser


def _command(commands, run, name: str, text: str, example: str) -> argparse.ArgumentParser:
    added = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"example:\n  {example}\n\n{MODELS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    added.set_defaults(run=run)
    added.add_argument("model", metavar="MODEL")
    added.add_argument("--checkpoint", type=Path, metavar="FILE", help="its weights; without, they are random")
    added.add_argument("--t", type=float, help="its skip strength; default: what the checkpoint says")
    added.add_argument("--option", nargs="+", default=[], metavar="KEY=VALUE", help="options of the network's builder")
    return added


def _certified(command: argparse.ArgumentParser) -> None:
    _shape(command)
    command.add_argument("--uint8", action="store_true", help="fold (x / 255 - mean) / std in: the layer takes bytes")
    command.add_argument("--mean", type=_numbers, metavar="M[,M]", help="of each channel; default: 0")
    command.add_argument("--std", type=_numbers, metavar="S[,S]", help="of each channel; default: 1")
    command.add_argument("--accept-unknown", action="store_true", help="let numbers decide on unknown operators")
    command.add_argument("--exact", action="store_true", help="prove it in rational arithmetic (small recursions)")
    command.add_argument("--max-memory", type=_bytes, metavar="SIZE", help="e.g. 512MiB; default: 4GiB")
    command.add_argument("--json", action="store_true", help="print the certificate as JSON")


def _shape(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--input-shape", type=_sizes, required=True, metavar="C,H,W", help="of one sample, without the batch"
    )


def _output(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--output", "-o", type=partial(_file, SUFFIXES), required=True, metavar="FILE", help=" or ".join(SUFFIXES)
    )


def _collapse(given: argparse.Namespace) -> None:
    from skipfold.deploy import export_onnx, save_collapsed

    layer, certificate = _collapsed(given)
    if given.output.suffix == ".onnx":
        _say_exported(export_onnx(layer, given.input_shape, given.output, uint8=given.uint8))
    else:
        save_collapsed(layer, certificate, given.output)
    _show(certificate, given)
    print(f"{given.output}: {layer.linear.in_features} inputs to {layer.linear.out_features} outputs", file=sys.stderr)


def _certify(given: argparse.Namespace) -> None:
    layer, certificate = _collapsed(given)
    _show(certificate, given)
    if given.collapsed:
        from skipfold.deploy import compare_collapsed

        error = compare_collapsed(given.collapsed, layer)
        print(f"{given.collapsed}: the same function, up to {error:.1e} of the largest weight", file=sys.stderr)


def _collapsed(given: argparse.Namespace):
    from skipfold.collapse import MAX_BYTES, collapse, fold_preprocessing

    preprocessing = {key: value for key in ("mean", "std") if (value := getattr(given, key)) is not None}
    if preprocessing and not given.uint8:
        raise ConfigError(f"--{' and --'.join(preprocessing)} given without --uint8, which folds them in; add it")
    layer, certificate = collapse(
        _model(given),
        given.input_shape,
        max_bytes=MAX_BYTES if given.max_memory is None else given.max_memory,
        accept_unknown=given.accept_unknown,
        exact=given.exact,
    )
    return (fold_preprocessing(layer, **preprocessing) if given.uint8 else layer), certificate


def _remove_skips(given: argparse.Namespace) -> None:
    from skipfold.homotopy import skips
    from skipfold.removal import remove_skips

    model = _model(given)
    if not skips(model):
        raise CheckpointError(
            f"{given.checkpoint or given.model}: holds no skip strength t, so {given.model} has its skips in full; "
            "train it by homotopy (docs/tutorial.md), or say --t 0 if it was trained at t = 0"
        )
    plain, certificate = remove_skips(model, given.input_shape, crop=given.crop)
    _write(plain, given)
    _show(certificate, given)


def _export(given: argparse.Namespace) -> None:
    _write(_model(given), given)


def _inspect(given: argparse.Namespace) -> None:
    from rich.console import Console

    from skipfold import inspection

    found = inspection.connections(_model(given), given.input_shape)
    if not found:
        print("no skip connections" + (f"; {given.svg} is not written" if given.svg else ""))
        return
    Console().print(inspection.table(found))
    if given.svg:
        inspection.save(inspection.drawing(found, given.model), given.svg)


def _model(given: argparse.Namespace):
    from skipfold.checkpoint import load_model

    output = getattr(given, "output", None)
    if output and given.checkpoint and os.path.realpath(output) == os.path.realpath(given.checkpoint):
        raise ConfigError(f"--output: {output} is the checkpoint, whose weights would be lost; give another name")
    if given.checkpoint is None:
        print(f"{given.model}: no --checkpoint given, so its weights are random", file=sys.stderr)
    return load_model(given.model, given.checkpoint, t=given.t, options=parse(given.option), example=given.input_shape)


def _write(model, given: argparse.Namespace) -> None:
    from skipfold.deploy import export_onnx, save_state

    if given.output.suffix == ".onnx":
        _say_exported(export_onnx(model, given.input_shape, given.output))
    else:
        save_state(model, given.output)
    print(f"{given.output}: written", file=sys.stderr)


def _say_exported(error: float) -> None:
    print(f"onnxruntime gives the same outputs, up to {error:.1e} of the largest", file=sys.stderr)


def _show(certificate, given: argparse.Namespace) -> None:
    print(json.dumps(certificate.as_dict(), indent=2) if given.json else certificate)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} given; whole numbers are allowed, e.g. 1,28,28") from None
    if abs(math.prod(sizes)) >= LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} given; sizes whose product is below {LARGEST} are allowed")
    return sizes


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} given; numbers are allowed, e.g. 0.485,0.456,0.406") from None


def _bytes(text: str) -> int:
    number = text.rstrip("KMGiB")
    unit = text[len(number) :]
    if not number.isdecimal() or unit not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} given; a size such as 512MiB or 8GiB is allowed")
    if (size := int(number) * UNITS[unit]) >= LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} given; a size below {LARGEST // UNITS['GiB']}GiB is allowed")
    return size


def _file(suffixes: Sequence[str], text: str) -> Path:
    path = Path(text)
    if path.suffix not in suffixes:
        raise argparse.ArgumentTypeError(f"{text!r} given; a file ending in {' or '.join(suffixes)} is allowed")
    if not os.path.isdir(path.parent):
        raise argparse.ArgumentTypeError(f"{text!r} given, but there is no folder {path.parent}")
    return path

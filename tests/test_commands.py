"""The commands for a network of one's own, as a user types them."""

import json
import os
import subprocess
import sys

import onnxruntime
import pytest
import torch
import torchvision

from skipfold.commands import main
from skipfold.deploy import load_collapsed, save_state
from skipfold.homotopy import insert_skips
from skipfold.inspection import connections, drawing
from skipfold.networks import build


@pytest.fixture
def cnn3(tmp_path):
    path = tmp_path / "cnn3.safetensors"
    save_state(build("cnn3", {"t": 0.25}), path)
    return ["cnn3", "--checkpoint", str(path)]


SHAPE = ["--input-shape", "1,28,28"]


def test_collapse_writes_what_certify_confirms(cnn3, tmp_path, capsys):
    layer = str(tmp_path / "layer.safetensors")
    assert main(["collapse", *cnn3, *SHAPE, "--uint8", "--mean", "0.5", "--json", "-o", layer]) == 0
    assert json.loads(capsys.readouterr().out)["affine"] is True
    assert load_collapsed(layer)[0].linear.in_features == 784
    assert main(["certify", *cnn3, *SHAPE, "--uint8", "--mean", "0.5", "--collapsed", layer]) == 0
    assert "the same function" in capsys.readouterr().err
    assert main(["certify", *cnn3, *SHAPE, "--collapsed", layer]) == 1
    assert "another function than the network" in capsys.readouterr().err


def test_collapse_to_onnx_runs_there(cnn3, tmp_path):
    path = tmp_path / "layer.onnx"
    assert main(["collapse", *cnn3, *SHAPE, "--uint8", "-o", str(path)]) == 0
    assert onnxruntime.InferenceSession(path).get_inputs()[0].type == "tensor(uint8)"


def test_certify_names_what_is_not_affine(capsys):
    assert main(["certify", "resnet34_linear_maxpool", *SHAPE]) == 1
    assert "maxpool: MaxPool2d is not affine" in capsys.readouterr().err


def test_memory_bound_is_said(cnn3, capsys):
    assert main(["certify", *cnn3, *SHAPE, "--max-memory", "1KiB"]) == 1
    assert "set max_bytes (--max-memory) to 513432" in capsys.readouterr().err


def test_skips_are_removed_where_the_checkpoint_says_so(tmp_path, capsys):
    zero, path = tmp_path / "zero.pth", tmp_path / "plain.onnx"
    model = insert_skips(torchvision.models.resnet18(num_classes=3), 0.0)
    torch.save(model.state_dict(), zero)
    command = ["remove-skips", "torchvision:resnet18", "--input-shape", "3,32,32", "-o", str(path), "--checkpoint"]
    assert main([*command, str(zero), "--crop", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["additions"] == 0 and "onnxruntime gives the same outputs" in printed.err
    ordinary = tmp_path / "ordinary.pth"
    torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), ordinary)
    assert main([*command, str(ordinary)]) == 1
    assert "has its skips in full; train it by homotopy" in capsys.readouterr().err
    assert main([*command, str(zero), "--t", "0.5"]) == 1
    assert "layer1.0.skip (t = 0.5)" in capsys.readouterr().err


def test_export_writes_both_kinds(cnn3, tmp_path):
    for suffix in ("onnx", "safetensors"):
        assert main(["export", *cnn3, *SHAPE, "-o", str(tmp_path / f"model.{suffix}")]) == 0
        assert (tmp_path / f"model.{suffix}").stat().st_size > 1000


def test_inspect_shows_each_skip(cnn3, tmp_path, capsys):
    assert main(["inspect", *cnn3, "--svg", str(tmp_path / "skips.svg")]) == 0
    printed = capsys.readouterr().out
    assert "f(0) into layer 3" in printed and "0.25" in printed
    assert (tmp_path / "skips.svg").read_text().startswith("<?xml")
    assert main(["inspect", "vgg11"]) == 0
    assert "no skip connections" in capsys.readouterr().out


def test_what_torch_fx_cannot_read_but_adds_nothing_takes_an_input_shape(tmp_path, capsys):
    """The head of timm's RegNets branches, and adds nothing."""
    regnet, shape = "timm:regnetx_002", ["--input-shape", "3,32,32"]
    assert main(["inspect", regnet]) == 1
    assert "head: torch.fx cannot read this ClassifierHead" in (said := capsys.readouterr().err)
    assert "give an input shape if it adds no skip" in said
    assert main(["inspect", regnet, *shape]) == 0
    printed = capsys.readouterr().out
    assert "projection:" in printed and "identity" in printed and "no weights" not in printed
    assert main(["remove-skips", regnet, "--t", "0", *shape, "-o", str(tmp_path / "plain.safetensors")]) == 0


def test_connections_of_ordinary_and_weighted_networks():
    ordinary = connections(torchvision.models.resnet50())
    assert len(ordinary) == 16 and {each.t for each in ordinary} == {None}
    assert ordinary[0].residual == "conv 1x1, conv 3x3, conv 1x1" and ordinary[0].skip == "projection: conv 1x1"
    assert ordinary[1].skip == "identity"
    found = connections(build("resnet18", {"t": 0.25}))
    assert (found[0].residual_weight, found[0].skip_weight) == (0.75, 0.25)
    mobile = connections(torchvision.models.mobilenet_v2())
    assert [each.path for each in mobile][:2] == ["features.3.skip", "features.5.skip"]
    assert mobile[0].residual == "conv 1x1, conv 3x3, conv 1x1" and mobile[0].skip == "identity"
    assert len(drawing(ordinary, "resnet50").axes) == 2


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--input-shape", "1,x", "-o", "a.onnx"], "'1,x' given; whole numbers are allowed"),
        (["--input-shape", "1,28,28", "-o", "a.txt"], "'a.txt' given; a file ending in .onnx or .safetensors"),
        (["--input-shape", "1,28,28", "-o", "none/a.onnx"], "there is no folder none"),
        (["--input-shape", "1,28,28", "-o", "a.onnx", "--max-memory", "4 bytes"], "'4 bytes' given; a size such as"),
        (["--input-shape", "1,28,28", "-o", "a.onnx", "--max-memory", f"{10**30}GiB"], "a size below 8589934592GiB is"),
        (["--input-shape", f"{10**30},1", "-o", "a.onnx"], "sizes whose product is below"),
        (["--input-shape", "1,28,28", "-o", f"{'n' * 300}/a.onnx"], "there is no folder nnn"),
    ],
)
def test_bad_arguments_are_refused_before_anything(arguments, part, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["collapse", "cnn3", *arguments])
    assert caught.value.code == 2 and part in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "given", "suffix"),
    [("inspect", ["--svg", "skips.png"], ".svg"), ("certify", [*SHAPE, "--collapsed", "layer.onnx"], ".safetensors")],
)
def test_files_are_named_as_what_they_are(command, given, suffix, capsys):
    with pytest.raises(SystemExit):
        main([command, "cnn3", *given])
    assert f"'{given[-1]}' given; a file ending in {suffix} is allowed" in capsys.readouterr().err


def test_memory_that_there_is_not_is_one_line(monkeypatch, capsys):
    command = ["inspect", "cnn3", "--option", "width=100000000"]
    assert main(command) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: skipfold inspect cnn3 --option width=100000000: does not fit into memory (")
    monkeypatch.setattr("skipfold.checkpoint.load_model", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(command)


@pytest.mark.parametrize("value", ["maybe", "5", "2020-13-45"])
def test_an_option_that_is_true_or_false_takes_nothing_else(value, capsys):
    assert main(["inspect", "perceptron", "--option", f"bias={value}"]) == 1
    assert "given; " in capsys.readouterr().err.splitlines()[-1]


def test_preprocessing_is_not_left_out_silently(cnn3, tmp_path, capsys):
    path = tmp_path / "layer.onnx"
    assert main(["collapse", *cnn3, *SHAPE, "--mean", "0.1307", "--std", "0.3081", "-o", str(path)]) == 1
    assert capsys.readouterr().err == ("error: --mean and --std given without --uint8, which folds them in; add it\n")
    assert not path.exists()


@pytest.mark.parametrize("name", ["cnn3.safetensors", "link.safetensors"])
@pytest.mark.parametrize("command", ["collapse", "export"])
def test_a_checkpoint_is_not_written_over(command, name, cnn3, tmp_path, capsys):
    checkpoint = tmp_path / "cnn3.safetensors"
    before = checkpoint.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(checkpoint)
    assert main([command, *cnn3, *SHAPE, "-o", str(tmp_path / name)]) == 1
    assert "is the checkpoint, whose weights would be lost" in capsys.readouterr().err
    assert checkpoint.read_bytes() == before


def test_help_and_errors_from_a_shell():
    command = [sys.executable, "-m", "skipfold"]
    shown = subprocess.run([*command, "collapse", "--help"], capture_output=True, text=True, check=True).stdout
    assert "example:" in shown and "exit status" in shown
    run = subprocess.run([*command, "inspect", "resnet99"], capture_output=True, text=True)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith("error: network 'resnet99'")


def test_a_reader_that_has_gone_is_no_bug():
    read, write = os.pipe()
    os.close(read)
    said = "import argparse, sys; from skipfold.commands import run; parser = argparse.ArgumentParser(); "
    said += "parser.set_defaults(run=lambda given: print('any')); sys.exit(run(parser, []))"
    run = subprocess.run([sys.executable, "-c", said], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (run.returncode, run.stderr) == (1, "")

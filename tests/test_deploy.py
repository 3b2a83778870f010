"""Exported networks give the outputs of the network, or are not there."""

import os
import stat
import sys

import onnxruntime
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from samples import DEVICES
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from skipfold import deploy
from skipfold.collapse import collapse, fold_preprocessing
from skipfold.deploy import compare_collapsed, export_onnx, load_collapsed, save_collapsed, save_state
from skipfold.errors import CheckpointError, ExportError, InputShapeError
from skipfold.homotopy import insert_skips
from skipfold.networks import INPUT_SHAPE, build
from skipfold.removal import remove_skips


@pytest.mark.parametrize("device", DEVICES)
def test_a_network_without_skips_is_the_same_in_onnxruntime(device, tmp_path):
    model = build("resnet18", {"t": 0.0}).eval().to(device)
    plain, _ = remove_skips(model, INPUT_SHAPE, crop=True, export=False)
    plain.train()
    plain.layer1.eval()
    modes = [module.training for module in plain.modules()]
    assert export_onnx(plain, INPUT_SHAPE, tmp_path / "plain.onnx") < 1e-4
    assert [module.training for module in plain.modules()] == modes and {*modes} == {True, False}
    assert [path.name for path in tmp_path.iterdir()] == ["plain.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "plain.onnx")
    x = torch.rand(7, *INPUT_SHAPE)
    (found,) = session.run(None, {"input": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), plain.cpu().eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", ["convex", "variance"])
def test_a_network_of_half_precision_is_exported_up_to_its_rounding(weights, tmp_path):
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5).half()
    assert export_onnx(insert_skips(model, 0.3, weights), (3, 32, 32), tmp_path / "half.onnx") < 8e-3


def test_autocast_around_an_export_is_none_of_the_network(tmp_path):
    with torch.autocast("cpu"):
        assert export_onnx(nn.Linear(3, 2), (3,), tmp_path / "linear.onnx") < 1e-6


def test_a_collapsed_network_takes_bytes_in_onnxruntime(tmp_path):
    layer, _ = collapse(build("cnn3", {"width": 2}).eval(), INPUT_SHAPE)
    raw = fold_preprocessing(layer, mean=0.1307, std=0.3081)
    export_onnx(raw, INPUT_SHAPE, tmp_path / "raw.onnx", uint8=True)
    pixels = torch.randint(0, 256, (5, *INPUT_SHAPE), dtype=torch.uint8)
    (found,) = onnxruntime.InferenceSession(tmp_path / "raw.onnx").run(None, {"input": pixels.numpy()})
    expected = layer((pixels.float() / 255 - 0.1307) / 0.3081)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_a_collapsed_network_is_read_again_with_its_certificate(device, tmp_path):
    layer, certificate = collapse(build("cnn3").eval().to(device), INPUT_SHAPE)
    save_collapsed(layer, certificate, tmp_path / "layer.safetensors")
    again, its = load_collapsed(tmp_path / "layer.safetensors")
    x = torch.rand(3, *INPUT_SHAPE)
    assert compare_collapsed(tmp_path / "layer.safetensors", layer) == 0
    assert torch.equal(again(x), layer.cpu()(x)) and its == certificate
    other, _ = collapse(build("cnn3", generator=torch.Generator().manual_seed(1)).eval(), INPUT_SHAPE)
    with pytest.raises(CheckpointError, match="another function than the network"):
        compare_collapsed(tmp_path / "layer.safetensors", other)
    small, _ = collapse(nn.Linear(3, 2), (3,))
    with pytest.raises(CheckpointError, match=r"maps \(1, 28, 28\) to \(10,\), the network \(3,\) to \(2,\)"):
        compare_collapsed(tmp_path / "layer.safetensors", small)


def test_a_collapsed_network_that_is_all_zero_is_compared(tmp_path):
    network = nn.Linear(3, 2)
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    zero, certificate = collapse(network, (3,))
    save_collapsed(zero, certificate, tmp_path / "layer.safetensors")
    assert compare_collapsed(tmp_path / "layer.safetensors", zero) == 0
    other, _ = collapse(nn.Linear(3, 2), (3,))
    save_collapsed(other, certificate, tmp_path / "layer.safetensors")
    with pytest.raises(CheckpointError, match="another function than the network"):
        compare_collapsed(tmp_path / "layer.safetensors", zero)


def test_a_file_without_a_collapsed_network_is_refused(tmp_path):
    save_state(build("perceptron"), tmp_path / "state.safetensors")
    with pytest.raises(CheckpointError, match="no collapsed network"):
        load_collapsed(tmp_path / "state.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"linear.weight": torch.ones(3, 2)}, r"torch\.float32 \[3, 2\]"),
        ({"linear.weight": torch.ones(2, 3).char()}, r"torch\.int8 \[2, 3\]"),
        ({"linear.weight": torch.ones(2, 3).char(), "linear.bias": torch.ones(2).char()}, "floating"),
        ({"certificate": "[" * 100_000}, "RecursionError"),
        ({"input_shape": "[3.0]"}, "TypeError"),
    ],
    ids=["shape", "int8 weight", "int8", "deep", "sizes"],
)
def test_a_file_made_by_others_is_refused_in_one_line(change, words, tmp_path):
    path = tmp_path / "layer.safetensors"
    save_collapsed(*collapse(nn.Linear(3, 2), (3,)), path)
    with safe_open(path, "pt") as file:
        held = {key: file.get_tensor(key) for key in file.keys()} | file.metadata() | change
    tensors = {key: value for key, value in held.items() if isinstance(value, torch.Tensor)}
    save_file(tensors, path, {key: value for key, value in held.items() if key not in tensors})
    with pytest.raises(CheckpointError, match=rf"layer\.safetensors: no collapsed network \(.*{words}"):
        load_collapsed(path)


class Counting(nn.Linear):
    """Another function from four samples on, which the export, made with three, does not see."""

    def forward(self, x):
        return super().forward(x) * (1 if len(x) <= 3 else 2)


def test_a_larger_batch_than_the_export_s_own_is_compared(tmp_path):
    with pytest.raises(ExportError, match=r"its outputs differ from the network's by 5\.0e-01"):
        export_onnx(Counting(3, 2), (3,), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_an_input_that_no_memory_holds_is_refused(tmp_path):
    with pytest.raises(InputShapeError, match=r"input of shape \[1, 1000000, 1000000, 1000000\]"):
        export_onnx(nn.Linear(3, 2), (1_000_000, 1_000_000, 1_000_000), tmp_path / "model.onnx")


class Rounded(nn.Module):
    """Exports to something that is not itself: ONNX knows nothing of the counter."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(3, 2), 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x) + self.calls


def test_what_differs_after_export_is_not_left_behind(tmp_path):
    with pytest.raises(ExportError, match=r"its outputs differ from the network's by .*1e-04 are allowed"):
        export_onnx(Rounded(), (3,), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else x


class RowByRow(nn.Module):
    """Loops over the batch, whose rows an export counts."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return torch.stack([self.linear(row) for row in x])


class SequenceFirst(nn.GRU):
    """Takes what should be the batch for the time; newer exports let that pass, in a file for one batch size."""

    def forward(self, x):
        return super().forward(x)[0]


def test_what_cannot_be_exported_is_said_and_replaces_nothing(tmp_path, capfd):
    path = tmp_path / "model.onnx"
    path.write_text("before")
    for network, shape, why in (
        (Branching(), (3,), r"torch\.onnx does not take the network \(.*data-dependent"),
        (RowByRow(), (3,), r"torch\.onnx does not take the network \(.*(a static shape|a constant)"),
        (SequenceFirst(3, 2), (4, 3), r"(torch\.onnx does not take|onnxruntime does not run) the network \("),
    ):
        with pytest.raises(ExportError, match=rf"^/.*/model\.onnx: {why}"):
            export_onnx(network, shape, path)
    with pytest.raises(InputShapeError, match="input of shape"):
        export_onnx(nn.Linear(3, 2), (4,), path)
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1
    assert "onnxruntime" not in capfd.readouterr().err  # what it would print is in the error


def test_files_are_as_readable_as_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        save_state(nn.Linear(1, 1), tmp_path / "state.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "state.safetensors").stat().st_mode) == 0o640


class Overflowing(nn.Linear):
    """Finite in torch, which knows the function; NaN where it is written out by exponentials."""

    def forward(self, x):
        y = super().forward(x) + 200
        return torch.logaddexp(y, y + 1) - torch.logaddexp(y, y + 2)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Overflowing(4, 3), "outputs differ from the network's by nan"),
        (nn.LayerNorm(4, eps=-1.0), "the network gives NaN or infinity"),
        (nn.LSTM(4, 3), "the network gives tuple; one tensor is allowed"),
    ],
    ids=["by onnxruntime alone", "by the network", "tuple"],
)
def test_what_cannot_be_compared_is_no_success(network, words, tmp_path):
    shape = (2, 4) if isinstance(network, nn.LSTM) else (4,)
    with pytest.raises(ExportError, match=words):
        export_onnx(network.eval(), shape, tmp_path / "network.onnx")
    assert not list(tmp_path.iterdir())


def test_without_onnxruntime_it_is_said_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match=r"onnxruntime is not installed; pip install 'skipfold\[deploy\]'"):
        export_onnx(nn.Linear(2, 2), (2,), tmp_path / "network.onnx")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ExportError, match=r"none/state\.safetensors: cannot be written"):
        save_state(nn.Linear(1, 1), tmp_path / "none" / "state.safetensors")


@pytest.mark.parametrize(("length", "fits"), [(255, True), (256, False)])
def test_names_are_as_long_as_the_disk_takes(length, fits, tmp_path):
    path = tmp_path / f"{'n' * (length - len('.safetensors'))}.safetensors"
    if fits:
        save_state(nn.Linear(1, 1), path)
    else:
        with pytest.raises(ExportError, match=r"cannot be written \(File name too long\)"):
            save_state(nn.Linear(1, 1), path)
    assert list(tmp_path.iterdir()) == [path] * fits


class Described(nn.Linear):
    def get_extra_state(self):
        return {"version": 1}


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (nn.Linear(1, 1, device="meta"), r"weight \(on the meta device"),
        (nn.LazyLinear(1), r"weight \(not initialised\)"),
        (Described(1, 1), r"_extra_state \(dict\)"),
        (nn.Linear(1, 1, dtype=torch.complex128), r"no torch\.complex128 tensors"),
        (nn.Linear(1, 1, dtype=torch.float64), "NaN or infinity in weight; finite weights"),
    ],
    ids=["meta", "lazy", "extra state", "complex", "NaN"],
)
def test_what_safetensors_cannot_hold_is_named(network, words, tmp_path):
    if words.startswith("NaN"):
        nn.init.constant_(network.weight, float("nan"))
    with pytest.raises(ExportError, match=words):
        save_state(network, tmp_path / "state.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_name_that_names_nothing_is_refused():
    with pytest.raises(ExportError, match=r"name it weights\.safetensors"):
        save_state(nn.Linear(1, 1), "")
    with pytest.raises(ExportError, match="names no file"):
        export_onnx(nn.Linear(1, 1), (1,), "")


def test_safetensors_that_would_not_be_known_as_such_are_not_written(tmp_path):
    with pytest.raises(ExportError, match=r"name it .*weights\.safetensors"):
        save_state(nn.Linear(2, 2), tmp_path / "weights.pt")
    assert list(tmp_path.iterdir()) == []


def test_safetensors_that_read_otherwise_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(deploy.safetensors.torch, "load_file", lambda path: {})
    with pytest.raises(ExportError, match="what was written is not what is read"):
        save_state(nn.Linear(1, 1), tmp_path / "state.safetensors")
    assert not list(tmp_path.iterdir())

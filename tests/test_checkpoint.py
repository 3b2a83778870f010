"""Weights are read from files without running code, and only into networks that they fit."""

import os
from collections import OrderedDict

import pytest
import pytorch_lightning as pl
import safetensors.torch
import timm
import torch
import torchvision
from torch.optim.swa_utils import AveragedModel

from skipfold.checkpoint import load_model, read_state
from skipfold.deploy import save_state
from skipfold.errors import CheckpointError
from skipfold.homotopy import insert_skips, skip_strengths, skips, to_homotopy
from skipfold.networks import build


def test_a_torchvision_state_is_unwrapped_and_tells_classes_and_channels(tmp_path):
    model = torchvision.models.resnet18(num_classes=3)
    model.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    torch.save({"epoch": 7, "state_dict": model.state_dict()}, tmp_path / "weights.pth")
    loaded = load_model("torchvision:resnet18", tmp_path / "weights.pth")
    assert not loaded.training and loaded.fc.out_features == 3 and not skip_strengths(loaded)
    assert torch.equal(loaded.conv1.weight, model.conv1.weight)


class Trained(pl.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        torch.nn.DataParallel,
        lambda model: torch.nn.DataParallel(torch.compile(model)),
        lambda model: torch.compile(torch.nn.DataParallel(model)),
        AveragedModel,
        Trained,
        lambda model: model.set_submodule("layer1", torch.compile(model.layer1)) or model,
    ],
    ids=["compiled", "parallel", "parallel of compiled", "compiled of parallel", "averaged", "lightning", "in part"],
)
def test_names_that_a_wrapper_gave_are_read(wrap, tmp_path):
    model = insert_skips(torchvision.models.resnet18(num_classes=3), 0.25).eval()
    x = torch.rand(2, 3, 32, 32)
    expected = model(x)
    torch.save(wrap(model).state_dict(), tmp_path / "weights.pth")
    loaded = load_model("torchvision:resnet18", tmp_path / "weights.pth")
    assert set(skip_strengths(loaded).values()) == {0.25}
    torch.testing.assert_close(loaded(x), expected)


def test_skips_are_those_that_the_file_names(tmp_path):
    """A block that was left with its ordinary sum stays so; the second skip of a forward has its t too."""
    path, shape = tmp_path / "weights.safetensors", (3, 32, 32)
    model = torchvision.models.resnet18(num_classes=3).eval()
    homotopy, _ = to_homotopy(model, shape, t=0.25, leave=["layer1.0"], export=False)
    save_state(homotopy, path)
    loaded = load_model("torchvision:resnet18", path)
    assert skip_strengths(loaded) == skip_strengths(homotopy) and "layer1.0.skip" not in skip_strengths(loaded)
    x = torch.rand(2, *shape)
    torch.testing.assert_close(loaded(x), homotopy(x))
    save_state(torchvision.models.swin_t(num_classes=3), path)
    loaded = load_model("swin_t", path, t=0.5, example=shape)
    assert skip_strengths(loaded).keys() >= {"features.1.0.skip", "features.1.0.skip_1"}


def test_timm_and_safetensors(tmp_path):
    model = timm.create_model("resnet18", num_classes=4, in_chans=1)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    loaded = load_model("timm:resnet18", tmp_path / "weights.safetensors")
    assert torch.equal(loaded.conv1.weight, model.conv1.weight) and loaded.fc.out_features == 4


@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "resnetv2_50x1_bit"])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_classes_and_channels_are_those_of_the_layers_that_have_them(name, suffix, tmp_path):
    """In safetensors, which are sorted by name, other layers come first and last; one classifier is a convolution."""
    model = timm.create_model(name, num_classes=4, in_chans=1)
    path = tmp_path / f"weights.{suffix}"
    safetensors.torch.save_file(model.state_dict(), path) if suffix == "safetensors" else torch.save(
        model.state_dict(), path
    )
    loaded = load_model(f"timm:{name}", path)
    assert loaded.num_classes == 4
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize(("weights", "normalize"), [("variance", False), ("convex", True), ("variance", True)])
def test_other_weights_than_the_paper_s_come_from_the_file(weights, normalize, tmp_path):
    model = insert_skips(torchvision.models.resnet18(num_classes=3), 0.3, weights, normalize).eval()
    path, x = tmp_path / "weights.safetensors", torch.rand(2, 3, 32, 32)
    save_state(model, path)
    loaded = load_model("torchvision:resnet18", path)
    assert {(skip.weights, skip.normalize) for skip in skips(loaded).values()} == {(weights, normalize)}
    torch.testing.assert_close(loaded(x), model(x))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        insert_skips(torchvision.models.resnet18(num_classes=3)).load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(insert_skips(torchvision.models.resnet18(num_classes=3)).state_dict())
    model.load_state_dict(torchvision.models.resnet18(num_classes=3).state_dict())


def test_a_strength_that_is_none_is_refused(tmp_path):
    state = insert_skips(torchvision.models.resnet18(num_classes=3)).state_dict()
    state["layer1.0.skip.t"] = torch.tensor(1.7)
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"layer1\.0\.skip\.t is 1\.7; a skip strength lies in \[0, 1\]"):
        load_model("torchvision:resnet18", tmp_path / "weights.pt")


def test_strengths_of_another_network_are_named(tmp_path):
    save_state(build("cnn3"), tmp_path / "cnn3.safetensors")
    with pytest.raises(CheckpointError, match=r"strength of skips \(skip\.t\) that perceptron does not have; is it of"):
        load_model("perceptron", tmp_path / "cnn3.safetensors")


def test_t_comes_from_the_file_unless_it_is_given(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_state(insert_skips(torchvision.models.resnet18(num_classes=3), 0.25), path)
    assert set(skip_strengths(load_model("torchvision:resnet18", path)).values()) == {0.25}
    assert set(skip_strengths(load_model("torchvision:resnet18", path, t=0.0)).values()) == {0.0}
    plain = build("resnet18", {"block": "add"})
    save_state(plain, path)
    with pytest.raises(CheckpointError, match=r"does not say the skip strength t of resnet18; state it, e\.g\. --t 0"):
        load_model("resnet18", path)
    loaded = load_model("resnet18", path, t=0.5)
    assert torch.equal(loaded.layer4[1].conv2.weight, plain.layer4[1].conv2.weight)
    assert set(skip_strengths(loaded).values()) == {0.5}


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Senseless:
    """Allowed by name, and called with what it does not take."""

    def __reduce__(self):
        return OrderedDict, (5,)


def test_code_in_a_pickle_is_not_run(tmp_path):
    torch.save({"fc.weight": torch.ones(1), "more": Malicious(tmp_path / "run")}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"weights\.pth: holds more than weights.*\.safetensors"):
        load_model("resnet50", tmp_path / "weights.pth")
    assert not (tmp_path / "run").exists()


def test_torch_s_advice_to_run_code_is_not_passed_on(tmp_path):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match=r"a TorchScript module.*save model\.state_dict\(\)") as caught:
        read_state(tmp_path / "script.pt")
    assert "weights_only" not in str(caught.value)


def test_what_cannot_be_unpickled_is_refused_in_one_line(tmp_path):
    torch.save(Senseless(), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_state(tmp_path / "weights.pt")


def test_files_that_are_no_state_dict_are_refused(tmp_path):
    good = tmp_path / "good.safetensors"
    save_state(build("perceptron"), good)
    torch.save(build("perceptron").state_dict(), tmp_path / "good.pth")
    for name, content, part in (
        ("cut.safetensors", good.read_bytes()[:-100], "cannot be read"),
        ("cut.pth", (tmp_path / "good.pth").read_bytes()[:-100], "cannot be read|is damaged"),
        ("text.pth", b"weights", "cannot be read|is damaged"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=part):
            read_state(tmp_path / name)
    for name in ("none.pth", f"{'n' * 300}.pth"):
        with pytest.raises(CheckpointError, match="no such file"):
            read_state(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"a folder; give a \.safetensors file"):
        read_state(tmp_path)
    (tmp_path / "log.pth").write_text("epoch 1\n")
    with pytest.raises(CheckpointError, match=r"cannot be read as what torch\.save writes"):
        read_state(tmp_path / "log.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds no state_dict"):
        read_state(tmp_path / "list.pth")
    torch.save({"a": torch.tensor([1.0, float("nan")])}, tmp_path / "nan.pth")
    with pytest.raises(CheckpointError, match="NaN or infinity in a"):
        read_state(tmp_path / "nan.pth")


def test_what_does_not_fit_is_named(tmp_path):
    state = build("cnn3").state_dict()
    state["extra"], state["convolutions.0.bias"] = torch.ones(1), torch.ones(7)
    del state["convolutions.1.weight"], state["convolutions.2.bias"]
    safetensors.torch.save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_model("cnn3", tmp_path / "other.safetensors")
    for part in (
        "2 missing: convolutions.1.weight, convolutions.2.bias",
        "1 unexpected: extra",
        "1 of another shape: convolutions.0.bias ([7], the network has [8])",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_of_another_kind_are_not_cast(dtype, tmp_path):
    """load_state_dict would, and drop scales and imaginary parts; half precision and float64 stay welcome."""
    path, weight = tmp_path / "weights.safetensors", build("perceptron").state_dict()["1.weight"]
    said = rf"1 of another kind: 1\.weight \({dtype}, the network has torch\.float32\)"
    safetensors.torch.save_file({"1.weight": weight.to(dtype)}, path)
    with pytest.raises(CheckpointError, match=said):
        load_model("perceptron", path)
    for cast in (weight.half(), weight.double()):
        safetensors.torch.save_file({"1.weight": cast}, path)
        assert torch.equal(load_model("perceptron", path)[1].weight, cast.float())


@pytest.mark.parametrize(
    ("weight", "kind"),
    [
        (lambda: torch.ones(2).to(torch.float8_e4m3fn), r"torch\.float8_e4m3fn"),
        (lambda: torch.ones(2).to_sparse(), r"torch\.sparse_coo"),
        (lambda: torch.ones(2, 2).to_sparse_csr(), r"torch\.sparse_csr"),
        (lambda: torch.ones(2, device="meta"), "on the meta device, without values"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), r"torch\.qint8"),
        (lambda: {"weight": torch.ones(2)}, "dict"),
    ],
    ids=["float8", "sparse", "csr", "meta", "nested", "quantized", "wrapped"],
)
def test_what_is_no_ordinary_tensor_is_named(weight, kind, tmp_path):
    torch.save({"net": weight(), "epoch": 3}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=rf"but net \({kind}\), epoch \(int\); save"):
        read_state(tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["fcn_resnet50", "ssdlite320_mobilenet_v3_large"])
def test_a_backbone_is_not_downloaded(name, monkeypatch):
    def download(*args, **kwargs):
        raise OSError("download")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    assert not load_model(name).training


@pytest.mark.parametrize("name", ["resnet99", "timm:no_such_net", "torchvision:none"])
def test_unknown_networks_are_refused(name):
    with pytest.raises(CheckpointError, match="allowed are perceptron, cnn3"):
        load_model(name)

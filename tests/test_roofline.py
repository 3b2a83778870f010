"""The roofline: work counted by hand, shares of known ceilings, and ceilings that are measured."""

import pandas as pd
import pytest
import torch
from torch import nn

from skipfold.collapse import Collapsed, fold_preprocessing
from skipfold.errors import DeviceError
from skipfold.folding import fold_batchnorm
from skipfold.networks import build
from skipfold.removal import strip
from skipfold.replication import roofline

CPU = torch.device("cpu")
STAMP = {"tier": "smoke", "device": "any", "torch": "2", "cuda": None, "commit": "abc", "date": "2026-01-01"}


def timings(measure="host", *runtimes):
    rows = [("resnet34", "skips", 64, 2000.0), ("perceptron", "perceptron", 64, 1.0)]
    frame = pd.DataFrame(rows, columns=["network", "variant", "batch", "median_us"]).assign(measure=measure, **STAMP)
    return pd.concat([frame.assign(runtime=runtime) for runtime in runtimes or ("eager",)], ignore_index=True)


def test_work_is_what_one_counts_by_hand():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 26 * 26, 10))
    features, weights = 4 * 26 * 26, sum(value.numel() for value in network.parameters())
    found = roofline.work(network)
    assert found.operators == 3  # the flattening moves nothing
    assert found.flops == 2 * 9 * features + 2 * features * 10
    assert found.activations == 4 * ((784 + features) + 2 * features + (features + 10))
    assert found.weights == 4 * weights


def test_work_from_pixels_has_their_conversion():
    layer = Collapsed(torch.rand(10, 784), torch.rand(10), (1, 28, 28), (10,))
    assert roofline.work(layer).operators == 1
    found = roofline.work(layer, torch.uint8)
    assert found.operators == 2 and found.flops == 2 * 7840
    assert found.activations == (784 + 4 * 784) + 4 * (784 + 10)


def test_one_kernel_reads_pixels_and_writes_logits():
    layer = Collapsed(torch.rand(10, 784), torch.rand(10), (1, 28, 28), (10,))
    assert roofline._fused_work(layer) == roofline.Work(1, 2 * 7840, 784 + 40, 4 * 7850)


def test_removal_takes_away_the_operators_of_the_skips():
    """8 weighted sums and 3 projections of two operators each, then 17 BatchNorms."""
    network = build("resnet18", {"t": 0.0}).eval()
    removed = strip(network)
    counts = [roofline.work(each).operators for each in (network, removed, fold_batchnorm(removed))]
    assert counts == [68, 68 - 8 - 3 * 2, 68 - 8 - 3 * 2 - 17]


def test_shares_are_of_the_ceilings(monkeypatch):
    """40 GFLOP/s and 8 GB/s meet at 5 FLOP a byte: the ResNet is beyond, the perceptron is not."""
    monkeypatch.setattr(roofline, "ceilings", lambda device: roofline.Ceilings(4e10, 5e10, 8e9, None))
    monkeypatch.setattr(roofline, "PIXEL_BATCHES", {"cpu": (1, 8)})
    table = roofline.measure(timings("host", "onnxruntime", "eager"), CPU)
    assert list(table["runtime"]) == ["eager"] * 4  # onnxruntime fuses operators
    resnet, perceptron, *pixels = table.to_dict("records")
    assert resnet["flops"] == 139307520 and resnet["intensity"] > 5
    assert resnet["roof_share"] == pytest.approx(139307520 / 2e-3 / 4e10)
    moved = 4 * 794 + 4 * 7840 / 64
    assert perceptron["bytes"] == moved
    assert perceptron["roof_share"] == pytest.approx(15680 / 1e-6 / (15680 / moved * 8e9))
    assert perceptron["input_share"] == pytest.approx(4 * 784 / 1e-6 / 8e9)
    assert [(row["variant"], row["batch"]) for row in pixels] == [(roofline.PIXELS, 1), (roofline.PIXELS, 8)]
    for row in pixels:
        assert row["input_share"] == pytest.approx(784 / (row["median_us"] / 1e6) / 8e9)
    assert (table["convolution_flops_per_s"] == 5e10).all() and (table["matrix_side"] == 1024).all()
    assert table["kernels"].isna().all() and table["gpu_state"].isna().all()


def test_device_time_is_taken_where_it_was_measured():
    both = pd.concat([timings("host"), timings("device", "eager", "cuda_graph")])
    assert {row["measure"] for row in roofline._shown(both)} == {"device"}
    assert len(roofline._shown(both)) == 4


def test_a_wrong_network_on_pixels_is_refused(monkeypatch):
    monkeypatch.setattr(roofline, "ceilings", lambda device: roofline.Ceilings(4e10, 5e10, 8e9, None))
    monkeypatch.setattr(roofline, "fold_preprocessing", lambda layer: fold_preprocessing(layer, scale=1 / 128))
    with pytest.raises(DeviceError, match="collapsed_pixels differs from the collapsed network"):
        roofline.measure(timings(), CPU)


def test_ceilings_are_measured(monkeypatch):
    """2 FLOP for each of side cubed, and for each weight and place; a copy reads and writes; a second of real calls."""
    found = roofline.ceilings(CPU)
    assert 1e8 < found.flops < 1e14 and 1e8 < found.convolution < 1e14 and 1e8 < found.copy < 1e13
    assert found.launch is None
    results = []
    monkeypatch.setattr(roofline, "_seconds", lambda call: results.append(call()) or 0.5)
    found = roofline.ceilings(CPU)
    product, convolved, copied = results
    assert product.shape == (1024, 1024) and found.flops == 4 * 1024**3
    assert convolved.shape == roofline.CONVOLVED and found.convolution == 4 * 9 * 512 * convolved.numel()
    assert found.copy == 4 * copied.untyped_storage().nbytes()


@pytest.mark.cuda
def test_on_cuda_kernels_launches_and_clocks_are_read():
    device = torch.device("cuda")
    table = roofline.measure(timings("device", "eager", "cuda_graph"), device)
    by_network = table.drop_duplicates("network").set_index("network")
    assert by_network.loc["resnet34", "kernels"] >= 0.5 * by_network.loc["resnet34", "operators"]
    assert by_network.loc["perceptron", "kernels"] >= 1
    assert (table["launch_us"] > 0).all() and (table["launch_us"] < 1000).all()
    pixels = table[table["variant"].isin([roofline.PIXELS, roofline.FUSED])]
    assert {"eager", "cuda_graph"} == set(pixels["runtime"])
    assert (pixels[pixels["variant"] == roofline.FUSED]["kernels"] == 1).all()
    assert (pixels[pixels["variant"] == roofline.PIXELS]["kernels"] > 1).all()
    assert table["gpu_state"].str.contains("clocks.sm").all()

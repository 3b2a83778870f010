"""Skip strength, skip removal, dead taps and folded BatchNorms of the ResNets."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_recursion import property_test
from torch import nn
from torch.nn import functional as F

from skipfold.errors import ConfigError, SkipError
from skipfold.networks import INPUT_SHAPE, build
from skipfold.recursion import Layer, SkipCNN
from skipfold.resnet import (
    CroppedConv2d,
    HomotopyBlock,
    _cropped,
    crop_dead_taps,
    fold_batchnorm,
    remove_skips,
    resnet,
    set_skip_strength,
    skip_strengths,
)


def unsettled(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` in eval mode and float64, its BatchNorms as after training: statistics, weight and bias off default."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
            ):
                values.uniform_(low, high, generator=generator)
    return model.double().eval()


def images(count=2, side=28):
    return torch.rand(count, 1, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def block(t: float, projection: bool = False) -> HomotopyBlock:
    downsample = nn.Sequential(nn.Conv2d(3, 4, 1, 2, bias=False), nn.BatchNorm2d(4)) if projection else None
    made = HomotopyBlock(3, 4 if projection else 3, 2 if projection else 1, downsample)
    set_skip_strength(made, t)
    return unsettled(made)


def branches(made: HomotopyBlock, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """F(x) and skip(x), step by step."""
    residual = made.bn2(made.conv2(F.relu(made.bn1(made.conv1(x)))))
    return residual, x if made.downsample is None else made.downsample(x)


@pytest.mark.parametrize(("name", "count"), [("resnet18", 11_175_370), ("resnet34", 21_283_530)])
@pytest.mark.parametrize("kind", ["homotopy", "add"])
def test_parameter_counts(name, count, kind):
    with torch.device("meta"):
        model = resnet(name, block=kind)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_block_weighs_residual_and_skip(t, projection):
    made, x = block(t, projection), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    residual, skip = branches(made, x)
    strength = float(made.t)  # 0.9 is held in float32
    torch.testing.assert_close(made(x), F.relu((1 - strength) * residual + strength * skip), rtol=0, atol=1e-12)


def test_half_is_half_the_ordinary_sum_before_the_relu():
    made, x = block(0.5), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    made.relu2 = nn.Identity()
    torch.testing.assert_close(made(x), sum(branches(made, x)) / 2, rtol=0, atol=1e-14)


def test_at_0_the_skip_does_not_matter_and_at_1_the_residual_does_not():
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for t, ignored in ((0.0, "downsample.0.weight"), (1.0, "conv1.weight")):
        made = block(t, projection=True)
        before = made(x)
        with torch.no_grad():
            made.get_parameter(ignored).add_(1)
        assert torch.equal(made(x), before)


def test_strength_is_set_in_place():
    model = resnet("resnet18", t=0.5)
    places = {path: model.get_submodule(path).t.data_ptr() for path in skip_strengths(model)}
    assert len(places) == 8
    set_skip_strength(model, 0.25)
    assert set(skip_strengths(model).values()) == {0.25}
    assert {path: model.get_submodule(path).t.data_ptr() for path in places} == places
    assert not [key for key in model.state_dict() if key.endswith(".t")]


@pytest.mark.parametrize("t", [-0.1, 1.1, float("nan"), "0.5", None, True])
def test_strength_outside_0_to_1_is_refused(t):
    model = resnet("resnet18")
    with pytest.raises(ConfigError, match="from 0"):
        set_skip_strength(model, t)
    assert set(skip_strengths(model).values()) == {0.5}


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_removed_skips_leave_the_same_function(name):
    model = unsettled(resnet(name, t=0.0))
    plain = remove_skips(model)
    assert not skip_strengths(plain)
    assert not [path for path, _ in plain.named_modules() if "downsample" in path]
    with torch.no_grad():
        torch.testing.assert_close(plain(images()), model(images()), rtol=1e-12, atol=1e-12)


def test_removal_is_idempotent_and_leaves_its_argument_alone():
    model = unsettled(resnet("resnet18", t=0.0))
    once = remove_skips(model)
    twice = remove_skips(once)
    assert len(skip_strengths(model)) == 8
    assert list(once.state_dict()) == list(twice.state_dict())
    with torch.no_grad():
        assert torch.equal(once(images()), twice(images()))
        next(once.parameters()).zero_()
    assert next(model.parameters()).any() and next(twice.parameters()).any()


def test_removal_at_other_strengths_names_the_blocks():
    model = resnet("resnet18", t=0.0)
    model.layer2[0].t.fill_(0.5)
    model.layer4[1].t.fill_(0.125)
    with pytest.raises(SkipError, match=r"layer2\.0 \(t = 0\.5\), layer4\.1 \(t = 0\.125\)") as caught:
        remove_skips(model)
    assert "layer1.0" not in str(caught.value)


def test_removal_from_a_recursion_needs_t_0_too():
    model = SkipCNN((1, 4, 4), [Layer(1, 1)] * 2, [(0, 2)], t=0.5)
    with pytest.raises(SkipError, match=r"network \(t = 0\.5\)"):
        remove_skips(model)


def test_folded_batchnorm_is_the_same_function():
    model = unsettled(resnet("resnet18", t=0.3))
    folded = fold_batchnorm(model)
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        expected = model(images())
        torch.testing.assert_close(folded(images()), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(fold_batchnorm(folded)(images()), expected, rtol=1e-12, atol=1e-12)
        plain = fold_batchnorm(remove_skips(unsettled(resnet("resnet18", t=0.0))))
    assert not [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]


def convolution_weights(model: nn.Module) -> int:
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))


def test_52_percent_of_resnet34s_convolution_weights_are_dead_at_28():
    with torch.device("meta"):
        model = resnet("resnet34")
    cropped = crop_dead_taps(model, INPUT_SHAPE)
    dead = 1 - convolution_weights(cropped) / convolution_weights(model)
    assert dead == pytest.approx(0.52, abs=0.005)
    last = cropped.layer4[1].conv1
    assert last.kernel_size == (1, 1) and last.weight.is_contiguous()


def test_cropped_network_has_the_same_outputs_and_gradients():
    model = unsettled(resnet("resnet18", t=0.3))
    cropped = crop_dead_taps(model, INPUT_SHAPE)
    x, y = images().requires_grad_(), images().requires_grad_()
    expected, output = model(x), cropped(y)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    expected.square().sum().backward()
    output.square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-9, atol=1e-9)
    for whole, kept in zip(model.parameters(), cropped.parameters(), strict=True):
        # Dead taps have no gradient, and cropping keeps the order of the others.
        torch.testing.assert_close(kept.grad[kept.grad != 0], whole.grad[whole.grad != 0], rtol=1e-8, atol=1e-8)


def test_cropped_network_refuses_other_input_sizes():
    cropped = crop_dead_taps(unsettled(resnet("resnet18")), INPUT_SHAPE)
    with pytest.raises(SkipError, match="crop the network again"):
        cropped(images(side=64))


@pytest.mark.parametrize("training", [False, True])
def test_cropping_leaves_its_argument_alone(training):
    model = resnet("resnet18").train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cropped = crop_dead_taps(model, INPUT_SHAPE)
    assert model.training is training and cropped.training is training
    assert all(m.training is training for m in cropped.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not model.conv1._forward_pre_hooks
    assert all(torch.equal(cropped.state_dict()[key], before[key]) for key in before if "bn" in key)


@property_test(150)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 4), st.integers(0, 4)),
    st.booleans(),
)
def test_any_cropped_convolution_is_the_same(size, kernel, stride, padding, bias):
    fits = all(s + 2 * p >= k for s, k, p in zip(size, kernel, padding, strict=True))
    if not fits:
        return
    whole = nn.Conv2d(2, 4, kernel, stride, padding, groups=2, bias=bias).double()
    cropped = _cropped(whole, size)
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    if cropped is not None:
        assert isinstance(cropped, CroppedConv2d)
        assert cropped.weight.numel() < whole.weight.numel()
        torch.testing.assert_close(cropped(x), whole(x), rtol=0, atol=1e-12)


def test_ordinary_resnet_is_torchvisions():
    from torchvision.models import resnet18

    ours, theirs = unsettled(resnet("resnet18", block="add")), resnet18(num_classes=10)
    theirs.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert torch.equal(ours(images()), theirs.double().eval()(images()))


def test_linearized_networks_have_no_relu():
    for pool in ("maxpool", "avgpool"):
        with torch.device("meta"):
            model = resnet("resnet34", linear=pool)
        assert not [m for m in model.modules() if isinstance(m, nn.ReLU)]
        assert isinstance(model.maxpool, nn.MaxPool2d if pool == "maxpool" else nn.AvgPool2d)
        assert sum(p.numel() for p in model.parameters()) == 21_283_530


@pytest.mark.parametrize(
    ("arguments", "part"), [(("resnet50",), "unknown ResNet 'resnet50'"), (("resnet18", 0.5, "relu"), "linear: 'relu'")]
)
def test_unknown_names_are_refused(arguments, part):
    with pytest.raises(ConfigError, match=part):
        resnet(*arguments)


@pytest.mark.cuda
def test_cuda_graph_follows_the_strength():
    made = block(0.0).float().cuda()
    x = torch.randn(2, 3, 6, 6, device="cuda")
    with torch.no_grad():
        made(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = made(x)
        set_skip_strength(made, 1.0)
        graph.replay()
    torch.testing.assert_close(output, F.relu(x))


def test_remove_skips_of_a_skip_cnn_leaves_none():
    """At t = 0 the recursion without its skips is the same function."""
    model = build("cnn3", {"t": 0.0, "width": 2})
    plain = remove_skips(model)
    x = torch.rand(3, 1, 28, 28)
    assert plain.shares == {} and model.shares != {}
    torch.testing.assert_close(plain(x), model(x))

"""Collapse of affine networks of any wiring, and refusal, by name, of those that are not affine."""

import copy
import itertools
import json
import math
import warnings

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from test_recursion import property_test, skip_cnns
from test_resnet import unsettled
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from skipfold.chains import collapse_convolution
from skipfold.collapse import Certificate, affine_residual, collapse, fold_preprocessing
from skipfold.cropping import crop_dead_taps
from skipfold.errors import (
    CollapseError,
    ConfigError,
    ExactnessError,
    InputShapeError,
    MemoryBoundError,
    ModuleError,
    NotAffineError,
    NotConvolutionError,
    SkipError,
    TrainingModeError,
    WeightsError,
)
from skipfold.networks import INPUT_SHAPE, build
from skipfold.recursion import Layer, SkipCNN


class Calls(nn.Module):
    """A function of its submodules, given by name."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)


def settled(module: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode and float64, BatchNorms of any dimension with statistics as after training."""
    generator = torch.Generator().manual_seed(seed)
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.running_mean.uniform_(-0.5, 0.5, generator=generator)
            child.running_var.uniform_(0.5, 2, generator=generator)
    return module.double().eval()


def check(module, shape, tolerance=1e-10, **arguments):
    """Collapse and compare on inputs of both signs; returns the certificate."""
    layer, certificate = collapse(module, shape, **arguments)
    x = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), module(x), rtol=0, atol=tolerance)
    assert certificate.affine and certificate.residual < 1e-10 and certificate.max_error < tolerance
    return certificate


def least_bytes(module, shape):
    """The smallest bound that is not refused."""
    least = 0
    while True:
        try:
            collapse(module, shape, max_bytes=least)
            return least
        except MemoryBoundError as error:
            least = error.needed


# Networks that are affine, of any wiring.


def u_net():
    def forward(net, x):
        down = net.down(x)
        deep = net.deep(F.avg_pool2d(down, 2))
        up = F.interpolate(deep, scale_factor=2, mode="bilinear", align_corners=False)
        return net.out(torch.cat([net.up(deep), up, down], 1))

    return Calls(
        forward,
        down=nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)),
        deep=nn.Conv2d(3, 4, 3, padding=1),
        up=nn.ConvTranspose2d(4, 3, 2, 2),
        out=nn.Conv2d(10, 2, 1),
    )


def dense_net():
    def forward(net, x):
        for layer in net.layers:
            x = torch.cat([x, layer(x)], 1)
        return net.head(F.adaptive_avg_pool2d(x, 1).flatten(1))

    layers = [nn.Sequential(nn.BatchNorm2d(c), nn.Conv2d(c, 2, 3, padding=1, bias=False)) for c in (3, 5, 7)]
    return Calls(forward, layers=nn.ModuleList(layers), head=nn.Linear(9, 4))


def inception():
    def forward(net, x):
        return torch.cat([net.one(x), net.three(x), net.pool(F.avg_pool2d(x, 3, 1, 1))], 1).mean((2, 3)) * 0.5

    return Calls(
        forward,
        one=nn.Conv2d(3, 2, 1),
        three=nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 4, 3, padding=1)),
        pool=nn.Conv2d(3, 2, 1),
    )


AFFINE = {
    "linear": (lambda: nn.Linear(5, 3), (5,)),
    "linear_on_sequence": (lambda: nn.Linear(5, 3, bias=False), (4, 5)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3, 2, 1, groups=2), nn.BatchNorm1d(6), nn.AvgPool1d(2)), (4, 11)),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, 2, 2, dilation=2, groups=4), (4, 9, 8)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), nn.AdaptiveAvgPool3d(2)), (2, 5, 4, 6)),
    "depthwise": (lambda: nn.Conv2d(3, 3, 3, padding="same", padding_mode="reflect", groups=3), (3, 6, 6)),
    "transposed1d": (lambda: nn.ConvTranspose1d(2, 3, 3, 2, 1, output_padding=1), (2, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 2, 3, 2, 1, groups=2, dilation=2), (4, 5, 4)),
    "transposed3d": (lambda: nn.ConvTranspose3d(1, 2, 2, 2), (1, 3, 2, 2)),
    "pads": (
        lambda: nn.Sequential(
            nn.ZeroPad2d(1), nn.ConstantPad2d(1, 3.0), nn.ReflectionPad2d(2), nn.ReplicationPad2d(1), nn.Conv2d(1, 2, 5)
        ),
        (1, 5, 5),
    ),
    "circular": (lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), (1, 4, 4)),
    "pools": (lambda: nn.Sequential(nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(2), nn.Conv2d(2, 1, 2)), (2, 8, 8)),
    "upsample": (
        lambda: nn.Sequential(
            nn.Upsample(scale_factor=2), nn.Conv2d(1, 1, 2), nn.Upsample((5, 9), mode="bilinear", align_corners=True)
        ),
        (1, 3, 3),
    ),
    "shuffles": (lambda: nn.Sequential(nn.Conv2d(1, 8, 1), nn.PixelShuffle(2), nn.ChannelShuffle(2)), (1, 3, 3)),
    "dropouts": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 1), nn.Dropout2d(), nn.Flatten(), nn.AlphaDropout(), nn.Linear(18, 4)),
        (1, 3, 3),
    ),
    "u_net": (u_net, (2, 6, 6)),
    "dense_net": (dense_net, (3, 5, 5)),
    "inception": (inception, (3, 5, 5)),
    "in_place": (lambda: Calls(lambda net, x: net.a(x).add_(x.mul_(2.0)).sub_(1), a=nn.Linear(4, 4)), (4,)),
    "writes_into_a_buffer": (
        lambda: Calls(lambda net, x: _into_zeros(net.a(x)), a=nn.Linear(4, 4)),
        (4,),
    ),
    "einsum": (lambda: Calls(lambda net, x: torch.einsum("nij,kj->nki", x, net.a.weight), a=nn.Linear(4, 3)), (2, 4)),
    "powers_of_two": (
        lambda: Calls(lambda net, x: torch.ldexp(net.a(x), torch.arange(3, device=x.device)), a=nn.Linear(4, 3)),
        (4,),
    ),
    "hidden_gradient": (
        lambda: Calls(lambda net, x: net.a(x) + net.b(x.detach()), a=nn.Linear(6, 2), b=nn.Linear(6, 2)),
        (6,),
    ),
    "no_gradient": (lambda: Calls(torch.no_grad()(lambda net, x: net.a(x)), a=nn.Linear(6, 2)), (6,)),
    "constant": (lambda: Calls(lambda net, x: 0 * net.a(x) + 3, a=nn.Linear(6, 2)), (6,)),
    "one_number": (lambda: Calls(lambda net, x: net.a(x).sum(1), a=nn.Linear(6, 2)), (6,)),
    "shared_layer": (
        lambda: Calls(lambda net, x: net.a(net.a(x)) + net.b(x), **dict.fromkeys("ab", nn.Linear(3, 3))),
        (3,),
    ),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), (4,)),
    "split_and_stack": (
        lambda: Calls(lambda net, x: torch.stack(net.a(x).chunk(2, 1), -1).permute(0, 2, 1)[:, :1], a=nn.Linear(4, 6)),
        (4,),
    ),
}


def _into_zeros(y):
    out = y.new_zeros(len(y), 8)
    out[:, 2:6] = y
    return out


@pytest.mark.parametrize("name", AFFINE)
def test_affine_modules_of_any_kind(name):
    torch.manual_seed(0)
    build_module, shape = AFFINE[name]
    certificate = check(settled(build_module()), shape)
    assert certificate.structure == "affine"


@pytest.mark.parametrize(
    ("mode", "antialias"),
    [(mode, False) for mode in ("nearest", "nearest-exact", "area", "bilinear", "bicubic")]
    + [(mode, True) for mode in ("bilinear", "bicubic", "lanczos")],
)
def test_every_resampling_of_images_is_affine(mode, antialias):
    if mode == "lanczos" and not hasattr(torch.ops.aten, "_upsample_lanczos2d_aa"):
        pytest.skip("this torch has no Lanczos resampling")
    resized = Calls(
        lambda net, x: F.interpolate(net.a(x), (4, 9), mode=mode, antialias=antialias), a=nn.Conv2d(1, 2, 3)
    )
    assert check(settled(resized), (1, 8, 8)).structure == "affine"


def test_an_operator_that_vmap_runs_row_by_row_is_no_warning_to_the_user():
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Upsample((3, 4), mode="nearest-exact"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(settled(module), (1, 8, 8))


@property_test(50)
@given(skip_cnns())
def test_any_recursion(model):
    check(model, model.input_shape)


@st.composite
def graphs(draw):
    """Random convolutional networks in which each layer reads a random earlier one, by add, cat or lerp."""
    channels, side = draw(st.integers(1, 3)), draw(st.integers(3, 6))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    widths, layers, wiring = [channels], [], []
    for _ in range(draw(st.integers(1, 5))):
        how = draw(st.sampled_from(["none", "add", "cat", "lerp"]))
        source = draw(st.integers(0, len(widths) - 1))
        if how in ("add", "lerp") and widths[source] != widths[-1]:
            how = "cat"
        width = widths[-1] + (widths[source] if how == "cat" else 0)
        groups = draw(st.sampled_from([g for g in (1, 2, 3) if width % g == 0]))
        out = groups * draw(st.integers(1, 2))
        kernel, dilation = draw(st.sampled_from([(1, 1), (3, 1), (3, 2), (5, 1)]))
        mode = draw(st.sampled_from(["zeros", "replicate", "circular"]))
        layer = [nn.Conv2d(width, out, kernel, 1, kernel // 2 * dilation, dilation, groups, padding_mode=mode)]
        layer += [nn.BatchNorm2d(out)] * draw(st.booleans()) + [nn.Dropout()] * draw(st.booleans())
        layers.append(nn.Sequential(*layer))
        wiring.append((how, source))
        widths.append(out)
    small = side - 2 * (side > 2)
    heads = [nn.Identity(), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Upsample(scale_factor=2), nn.ZeroPad2d(-1)]
    head = draw(st.sampled_from(heads if small > 0 else heads[:-1]))

    def forward(net, x):
        outputs = [x]
        for (how, source), layer in zip(wiring, net.layers, strict=True):
            read, skipped = outputs[-1], outputs[source]
            if how == "cat":
                read = torch.cat([read, skipped], 1)
            elif how != "none":
                read = read + skipped if how == "add" else torch.lerp(read, skipped, 0.3)
            outputs.append(layer(read))
        return net.head(outputs[-1])

    return settled(Calls(forward, layers=nn.ModuleList(layers), head=head)), (channels, side, side)


@property_test(60)
@given(graphs(), st.booleans())
def test_any_graph(graph, bounded):
    module, shape = graph
    check(module, shape, max_bytes=least_bytes(module, shape) if bounded else 2**30)


@pytest.mark.parametrize("name", ["perceptron", "cnn3", "shallow_linear", "resnet34_linear_avgpool"])
def test_networks_of_the_paper(name):
    model = unsettled(build(name)).float()
    layer, certificate = collapse(model, INPUT_SHAPE)
    x = torch.rand(4, *INPUT_SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), model(x), rtol=1e-4, atol=1e-5)
    assert certificate.dtype == "float32" and certificate.residual < 1e-10
    assert layer(x).shape == (4, 10) and layer.linear.weight.dtype == torch.float32


# Networks that are not.


class Residual(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.function = function

    def forward(self, x):
        return self.function(self.layer(x))


def branch(y):
    return y + 1 if y.sum() > 0 else y - 1


FUNCTIONS = {
    "relu": (F.relu, "aten.relu is not affine"),
    "relu_in_place": (lambda y: F.relu_(y), "aten.relu is not affine"),
    "abs": (torch.abs, "aten.abs is not affine"),
    "whole_numbers": (lambda y: y.long().to(y), "aten._to_copy rounds to torch.int64"),
    "half_buffer": (
        lambda y: torch.empty_like(y, dtype=torch.half).copy_(y).to(y),
        "aten.copy rounds to torch.float16",
    ),
    "softmax": (lambda y: y.softmax(1), "aten._softmax is not affine"),
    "layer_norm": (lambda y: F.layer_norm(y, (4,)), "aten.native_layer_norm is not affine"),
    "product": (lambda y: y * y.flip(1), "aten.mul with input-dependent `self` and `other` is not affine"),
    "matrix_product": (lambda y: y[:, None] @ y[:, :, None], "aten.bmm with input-dependent `self` and `mat2`"),
    "quotient": (lambda y: 1 / (2 + y), "aten.reciprocal is not affine"),
    "quotient_of_constant": (lambda y: torch.ones(4).to(y) / (2 + y), "aten.div with input-dependent `other`"),
    "mask": (lambda y: y * (y > 0), "aten.gt is not affine"),
    "clamp": (lambda y: y.clamp(-1, 1), "aten.clamp is not affine"),
    "maximum": (lambda y: torch.maximum(y, -y), "aten.maximum is not affine"),
    "branch": (branch, "aten._local_scalar_dense reads values of the input"),
    "item": (lambda y: y * y[0, 0].item(), "aten._local_scalar_dense reads values of the input"),
    "sort": (lambda y: y.sort(1).values, "aten.sort is not affine"),
    "noise": (lambda y: y + torch.rand_like(y), "aten.rand_like draws random numbers"),
    "dropout": (lambda y: F.dropout(y, 0.5, True), "draws random numbers"),
    "weight_from_input": (lambda y: torch.lerp(y, -y, y.sigmoid()), "aten.lerp with input-dependent `self` and `end`"),
    "std": (lambda y: y / y.std(1, keepdim=True), "aten.std is not affine"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_are_not_affine_are_named(name):
    function, reason = FUNCTIONS[name]
    model = nn.Sequential(nn.Linear(4, 4), Residual(function)).eval()
    with pytest.raises(NotAffineError) as caught:
        collapse(model, (4,))
    assert list(caught.value.offenders) == ["1"]
    assert reason in caught.value.offenders["1"]
    assert f"1: {caught.value.offenders['1']}" in str(caught.value)


LAYERS = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.LeakyReLU(),
    nn.PReLU(),
    nn.ELU(),
    nn.GELU(),
    nn.SiLU(),
    nn.Sigmoid(),
    nn.Tanh(),
    nn.Hardswish(),
    nn.Softplus(),
    nn.Softmax(1),
    nn.LogSoftmax(1),
    nn.MaxPool2d(2),
    nn.AdaptiveMaxPool2d(2),
    nn.LPPool2d(2, 2),
    nn.LayerNorm(4),
    nn.GroupNorm(1, 2),
    nn.InstanceNorm2d(2),
    nn.LocalResponseNorm(2),
    nn.RReLU(),
    nn.Softmax2d(),
]


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_layers_that_are_not_affine_are_named(layer):
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Sequential(nn.Identity(), layer)).eval()
    with pytest.raises(NotAffineError) as caught:
        collapse(model, (1, 4, 4))
    assert list(caught.value.offenders) == ["1.1"]
    assert caught.value.offenders["1.1"].startswith(type(layer).__name__)


def test_the_published_network_is_refused_naming_the_max_pool():
    with pytest.raises(NotAffineError) as caught:
        collapse(build("resnet34_linear_maxpool").eval(), INPUT_SHAPE)
    assert caught.value.offenders == {"maxpool": "MaxPool2d is not affine"}
    assert "maxpool: MaxPool2d is not affine" in str(caught.value)


def test_every_offender_is_listed():
    with pytest.raises(NotAffineError) as caught:
        collapse(build("resnet18").eval(), INPUT_SHAPE)
    relus = [f"layer{stage}.{block}.relu" for stage in range(1, 5) for block in range(2)]
    assert set(caught.value.offenders) == {"relu", "maxpool", *relus}


def without_bends(model):
    """`model` with its ReLUs left out and its max-pools as average-pools, where they are modules."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.MaxPool2d):
                pool = nn.AvgPool2d(child.kernel_size, child.stride, child.padding, child.ceil_mode)
                setattr(module, name, pool)
    return model


@pytest.mark.parametrize("name", ["squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5"])
def test_linear_variants_of_torchvisions_networks(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=5)
    check(settled(without_bends(model)), (3, 32, 32), tolerance=1e-9)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("densenet121", {"": "aten.relu is not affine"}),
        (
            "mobilenet_v3_small",
            {"features.1.block.1": "aten.mul with input-dependent `self` and `other` is not affine"},
        ),
    ],
)
def test_what_keeps_torchvisions_networks_from_being_affine(name, expected):
    model = without_bends(torchvision.models.get_model(name, weights=None, num_classes=5)).eval()
    with pytest.raises(NotAffineError) as caught:
        collapse(model, (3, 32, 32))
    assert expected.items() <= caught.value.offenders.items()


def test_training_mode_is_named_with_the_rest():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Dropout())
    with pytest.raises(TrainingModeError, match=r"call \.eval\(\)") as caught:
        collapse(model, (1, 3, 3))
    assert caught.value.offenders == {
        "1": "BatchNorm2d in training mode",
        "4": "Dropout in training mode",
        "2": "ReLU is not affine",
    }
    network = build("resnet34_linear_avgpool")
    network.eval().layer1[0].bn1.train()
    with pytest.raises(TrainingModeError, match=r"layer1\.0\.bn1: BatchNorm2d in training mode"):
        collapse(network, INPUT_SHAPE)


def test_training_mode_without_batchnorm_or_dropout_makes_no_difference():
    check(nn.Linear(3, 2).double().train(), (3,))


def test_batchnorm_without_statistics_is_refused():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)).eval()
    with pytest.raises(NotAffineError, match="1: BatchNorm2d uses the statistics of the batch"):
        collapse(model, (1, 3, 3))


def test_samples_that_influence_each_other_are_refused():
    model = Calls(lambda net, x: net.a(x) - net.a(x).mean(0), a=nn.Linear(3, 2)).eval()
    with pytest.raises(NotAffineError, match="do samples of a batch influence each other"):
        collapse(model, (3,))


def test_unknown_operators_are_accepted_on_request_only():
    model = Calls(lambda net, x: net.a(torch.fft.rfft(x).real), a=nn.Linear(3, 2)).double().eval()
    with pytest.raises(NotAffineError, match=r"aten\._fft_r2c is unknown.*accept_unknown=True") as caught:
        collapse(model, (4,))
    assert list(caught.value.offenders) == [""]
    certificate = check(model, (4,), accept_unknown=True)
    assert certificate.structure.startswith("accepted on request: network: aten._fft_r2c")


@pytest.mark.parametrize("function", [F.relu, torch.fft.rfft, branch])
def test_the_residual_or_the_structure_refuses_what_bends(function):
    model = Calls(
        lambda net, x: function(net.a(x)).real.abs() if function is torch.fft.rfft else function(net.a(x)),
        a=nn.Linear(4, 4),
    )
    with pytest.raises(NotAffineError):
        collapse(model.eval(), (4,), accept_unknown=True)


def test_what_bends_outside_of_0_to_1_only_is_refused():
    model = Calls(lambda net, x: net.a(x + torch.heaviside(-x, x.new_zeros(()))), a=nn.Linear(2, 2))
    with pytest.raises(NotAffineError, match="residual"):
        collapse(model.eval(), (2,), accept_unknown=True)


HIDING = {
    "large_outputs": (lambda net, x: torch.cat([1e9 * net.a(x), torch.sinc(net.b(x))], 1), "the residual does"),
    "large_constant": (lambda net, x: torch.cat([torch.sinc(net.a(x)), 0 * x[:, :1] + 1.7e9], 1), "the residual does"),
    "whole_batch": (lambda net, x: net.a(x / 255 if x.detach().numpy().max() > 128 else x), "the residual does"),
    "squeezed_batch": (
        lambda net, x: net.a(x[:, None].squeeze())[..., :1],
        r"shape \[8, 1\] for 8 samples, \[1\] for one",
    ),
}


@pytest.mark.parametrize("name", HIDING)
def test_what_hides_from_one_number_or_one_batch_is_refused(name):
    function, part = HIDING[name]
    with pytest.raises((NotAffineError, InputShapeError), match=part):
        collapse(Calls(function, a=nn.Linear(4, 3), b=nn.Linear(4, 3)).eval(), (4,), accept_unknown=True)


def test_a_small_output_that_gradients_miss_is_found_beside_large_ones():
    model = Calls(
        lambda net, x: torch.cat([1e9 * net.a(x), net.b(x.detach())], 1), a=nn.Linear(8, 3), b=nn.Linear(8, 3)
    )
    layer, _ = collapse(model.double().eval(), (8,))
    torch.testing.assert_close(layer.linear.weight[3:], model.b.weight, rtol=0, atol=1e-14)


CANCELLING = {
    "to_0": lambda net, x: net.a(x) - net.b(x),
    "by_chance": lambda net, x: 3 * net.a(x) - net.a(x) - net.a(x) - net.a(x),
    "to_a_small_part": lambda net, x: (1e9 * x + net.a(x)) - 1e9 * x,
    "a_large_bias": lambda net, x: (net.a(x) + 1e9) - 1e9,
    "sizes": lambda net, x: net.a(x) * torch.logspace(-15, 15, 4).to(x) + torch.logspace(15, -15, 4).to(x),
}


@pytest.mark.parametrize("name", CANCELLING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_that_rounding_is_the_most_of_are_no_reason_to_refuse(name, dtype):
    torch.manual_seed(0)
    model = Calls(CANCELLING[name], a=nn.Linear(4, 4), b=nn.Linear(4, 4, bias=False)).double()
    model.b.weight.data = (model.a.weight / 3).detach() * 3
    nn.init.zeros_(model.a.bias)
    assert collapse(model.to(dtype).eval(), (4,))[1].affine


def test_a_division_that_rounds_is_refused_by_name():
    model = Calls(lambda net, x: net.a(torch.div(x, 2, rounding_mode="floor")), a=nn.Linear(3, 2)).eval()
    with pytest.raises(NotAffineError, match=r"aten\.div with a rounding mode is not affine"):
        collapse(model, (3,))


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: net.a(x) * (1 if x.detach().numpy().min() >= 0 else -1),
        lambda net, x: net.a(x) + torch.from_numpy(abs(x.numpy()))[:, :2],
    ],
    ids=["branch", "sum"],
)
def test_what_bends_out_of_torch_s_sight_and_below_0_only_is_refused(function):
    model = Calls(function, a=nn.Linear(3, 2)).eval()
    with pytest.raises(NotAffineError, match=r"network: Tensor\.numpy reads values of the input"):
        collapse(model, (3,))
    with pytest.raises(NotAffineError, match="no operator shows it, the residual does"):
        collapse(model, (3,), accept_unknown=True)


def test_a_map_whose_gradients_cannot_be_had_in_chunks_is_found_by_its_columns():
    inner = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
    check(Calls(lambda net, x: checkpoint(net.a, x, use_reentrant=True), a=inner).double().eval(), (6,))


def test_weights_that_the_dtype_does_not_hold_are_refused():
    layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
    for layer in layers:
        nn.init.constant_(layer.weight, 250.0)
    with pytest.raises(WeightsError, match=r"torch\.float16 does not hold; call \.float\(\)"):
        collapse(nn.Sequential(*layers).half().eval(), (4,))


def test_values_that_leave_torch_are_unknown():
    model = Calls(lambda net, x: torch.from_numpy(net.a(x).numpy() * 2), a=nn.Linear(2, 2)).eval()
    with pytest.raises(NotAffineError, match="does not depend on the input by any operator"):
        collapse(model, (2,))


UNFIT = {
    "batch_of_1": (lambda net, x: net.a(x.view(1, -1)), InputShapeError, "does not take an input of shape"),
    "one_for_all": (
        lambda net, x: net.a(x).mean(0, keepdim=True),
        InputShapeError,
        r"gives shape \[1, 3\] for 8 samples",
    ),
    "whole_numbers": (
        lambda net, x: net.a(x).long(),
        NotAffineError,
        r"rounds to torch\.int64; the output is torch\.int64",
    ),
    "choice": (lambda net, x: net.a(x).argmax(1), NotAffineError, r"aten\.argmax is not affine"),
    "complex": (lambda net, x: torch.fft.rfft(net.a(x)), NotAffineError, r"the output is torch\.complex128"),
    "nothing": (lambda net, x: net.a(x)[:, :0], InputShapeError, r"gives shape \[1, 0\] for one sample"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_modules_without_a_real_output_for_each_sample_are_told(name):
    function, error, part = UNFIT[name]
    with pytest.raises(error, match=part):
        collapse(Calls(function, a=nn.Linear(4, 3)).eval(), (4,), accept_unknown=True)


def test_a_sample_that_is_taken_as_a_batch_is_told():
    with pytest.raises(InputShapeError, match=r"does not take an input of shape \[8, 8, 8\]"):
        collapse(nn.Conv2d(1, 1, 3, padding=1), (8, 8))


@pytest.mark.parametrize("given", [{"probes": 0}, {"input_shape": (3,)}, {"input_shape": ()}])
def test_an_affine_residual_of_nothing_is_refused(given):
    with pytest.raises((ConfigError, InputShapeError)):
        affine_residual(nn.Linear(2, 2), **{"input_shape": (2,)} | given)


# The module is left as it was; the result stands on its own.


def test_module_is_left_untouched():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(18, 4)).eval()
    model[3].train()
    model[0].weight.requires_grad_(False)
    model(torch.rand(1, 1, 5, 5)).sum().backward()
    held = copy.deepcopy(model.state_dict())
    gradient, pointer = model[3].weight.grad.clone(), model[3].weight.data_ptr()
    layer, _ = collapse(model, (1, 5, 5))
    with torch.no_grad():
        layer.linear.weight.zero_()
    assert [m.training for m in model.modules()] == [False, False, False, False, True]
    assert all(
        torch.equal(held[key], value) and value.dtype == held[key].dtype for key, value in model.state_dict().items()
    )
    assert not model[0].weight.requires_grad and model[3].weight.requires_grad
    assert torch.equal(model[3].weight.grad, gradient) and model[3].weight.data_ptr() == pointer
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_buffers_that_count_calls_are_left_untouched():
    def forward(net, x):
        net.calls += 1
        net.last = x
        return net.a(x)

    model = Calls(forward, a=nn.Linear(3, 2)).eval()
    model.register_buffer("calls", torch.tensor(0))
    collapse(model, (3,))
    assert int(model.calls) == 0 and not hasattr(model, "last")


class Renormed(nn.Linear):
    def forward(self, x):
        self.weight.data.copy_(torch.renorm(self.weight.data, 2, 0, 0.1))
        return super().forward(x)


def test_weights_that_a_forward_writes_to_are_left_untouched():
    model = Renormed(4, 3).eval()
    held = model.weight.detach().clone()
    layer, _ = collapse(model, (4,))
    assert torch.equal(model.weight, held) and float(layer.linear.weight.detach().norm(dim=1).max()) < 0.11


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_of_the_module_is_kept(dtype):
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).to(dtype).eval()
    layer, certificate = collapse(model, (2, 3))
    assert layer(torch.rand(2, 2, 3, dtype=dtype)).dtype == dtype
    assert certificate.dtype == str(dtype).removeprefix("torch.")
    assert certificate.max_error < 1e-12


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * (1.001 if x.dtype == torch.float32 else 1)


class Cancelling(nn.Linear):
    """Rounds to what the large part is rounded to: in half precision much of the output, or all."""

    def __init__(self, large):
        super().__init__(20, 3)
        self.large = large

    def forward(self, x):
        return (super().forward(x) + self.large(x)) - self.large(x.flip(-1))


def test_weights_that_half_precision_rounds_to_nothing_are_refused():
    """The weights of the affine ResNet34 are 1e-6; divided by 255, below what float16 holds."""
    layer, _ = collapse(nn.Linear(4, 3, bias=False).eval(), (4,))
    layer.linear.weight.data = torch.full((3, 4), 1e-6)
    raw = fold_preprocessing(layer)
    with pytest.raises(WeightsError, match=r"torch\.float16 loses 100% of them; .*call \.float\(\) on the collapsed"):
        fold_preprocessing(layer.half())
    assert raw(torch.full((1, 4), 255)).tolist()[0] == pytest.approx([4e-6] * 3)


def test_a_branch_on_the_dtype_is_another_function():
    with pytest.raises(ModuleError, match=r"in torch\.float32 than in float64, by .* branch on the dtype,"):
        collapse(Scaled(6, 3).eval(), (6,))
    collapse(Scaled(6, 3).double().eval(), (6,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("network", ["cnn3", "deep", "constant", "sum"])
def test_rounding_is_no_other_function(network, dtype):
    if network == "deep":
        model, shape = nn.Sequential(*[nn.Linear(32, 32) for _ in range(50)]), (32,)
    elif network == "constant":
        model, shape = Cancelling(lambda x: 1e4), (20,)
    elif network == "sum":
        model, shape = Cancelling(lambda x: 1e4 * x.mean(-1, keepdim=True)), (20,)
    else:
        model, shape = unsettled(build(network)), INPUT_SHAPE
    _, certificate = collapse(model.to(dtype).eval(), shape, probes=1)
    assert certificate.module_error_float32 > 0


def test_example_tensor_is_a_batch():
    model = nn.Conv2d(2, 3, 3).double().eval()
    layer, _ = collapse(model, torch.rand(7, 2, 5, 4, dtype=torch.float64))
    assert layer.input_shape == (2, 5, 4) and layer.output_shape == (3, 3, 2)


def test_without_weights_an_example_tells_dtype_and_device():
    layer, _ = collapse(nn.AvgPool2d(2), torch.rand(1, 1, 4, 4))
    assert layer.linear.weight.dtype == torch.float32 and layer.output_shape == (1, 2, 2)
    with pytest.raises(WeightsError, match="give a floating-point tensor as example"):
        collapse(nn.AvgPool2d(2), (1, 4, 4))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inside_of_no_grad_and_inference_mode(mode):
    model = nn.Sequential(nn.Linear(6, 3)).double().eval()
    with mode():
        layer, certificate = collapse(model, (6,))
    assert certificate.max_error < 1e-12 and layer.linear.weight.requires_grad


def test_inside_of_autocast():
    model = nn.Linear(6, 3).eval()
    with torch.autocast("cpu", torch.bfloat16):
        _, certificate = collapse(model, (6,))
    assert certificate.max_error_float32 < 1e-5


def test_tf32_setting_is_put_back():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    collapse(nn.Linear(2, 2), (2,))
    with pytest.raises(NotAffineError):
        collapse(nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval(), (2,))
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


def test_result_is_contiguous_and_can_be_exported():
    layer, _ = collapse(build("cnn3").eval(), INPUT_SHAPE)
    assert layer.linear.weight.is_contiguous() and sum(1 for _ in layer.parameters()) == 2
    x = torch.rand(3, *INPUT_SHAPE)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.testing.assert_close(exported.module()(x[:2]), layer(x[:2]))
    with pytest.raises(InputShapeError, match=r"\[N, 1, 28, 28\] is allowed"):
        layer(torch.rand(1, 1, 27, 27))


# Memory.


@pytest.mark.parametrize("outputs", [3, 40])
def test_chunks_under_a_memory_bound_give_the_same(outputs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(120, outputs)).double().eval()
    whole, _ = collapse(model, (1, 30))
    least = least_bytes(model, (1, 30))
    with pytest.raises(MemoryBoundError, match=f"set max_bytes .* to {least} or more"):
        collapse(model, (1, 30), max_bytes=least - 1)
    for bound in (least, 2 * least, 5 * least):
        bounded, _ = collapse(model, (1, 30), max_bytes=bound)
        torch.testing.assert_close(bounded.linear.weight, whole.linear.weight, rtol=0, atol=1e-14)


def test_too_large_a_result_is_refused_before_it_is_made():
    model = nn.Conv2d(3, 3, 3, padding=1).eval()
    with pytest.raises(MemoryBoundError, match="150528 inputs and 150528 outputs"):
        collapse(model, (3, 224, 224))


def test_large_input_to_few_outputs_is_no_trouble():
    model = nn.Sequential(nn.Conv2d(3, 8, 7, 4), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(8 * 13 * 13, 10)).double()
    check(model.eval(), (3, 224, 224), max_bytes=2**29)


# Bad input.


def test_bad_inputs_are_told():
    model = nn.Conv2d(1, 2, 3).eval()
    for shape in ((2, 5, 5), (1, 2, 2), (5,), (1, 1, 1, 5, 5)):
        with pytest.raises(InputShapeError, match="does not take an input of shape"):
            collapse(model, shape)
    for shape in ((), (1, 0, 5), (1, 2.5, 5), torch.rand(3)):
        with pytest.raises(InputShapeError, match="of one sample given"):
            collapse(model, shape)


def test_whole_numbers_as_input_are_no_reals():
    tokens = torch.randint(0, 9, (2, 5))
    model = nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(15, 2))
    with pytest.raises(NotAffineError, match=r"takes torch\.int64 inputs and no torch\.float32"):
        collapse(model, tokens)
    with pytest.raises(InputShapeError, match="does not take an input of shape"):
        collapse(nn.Linear(4, 2), tokens)
    assert collapse(nn.Linear(5, 2), tokens)[0].input_shape == (5,)


@pytest.mark.parametrize("max_bytes", ["4GiB", -1, 1e9])
def test_a_bound_that_is_no_number_of_bytes_is_refused(max_bytes):
    with pytest.raises(ConfigError, match=f"max_bytes: {max_bytes!r} given"):
        collapse(nn.Linear(4, 2), (4,), max_bytes=max_bytes)


def test_a_bound_beyond_all_memory_bounds_nothing():
    assert collapse(nn.Linear(4, 2), (4,), max_bytes=2**120)[1].affine


def test_several_outputs_are_told():
    with pytest.raises(InputShapeError, match="gives tuple for one sample"):
        collapse(Calls(lambda net, x: (net.a(x), x), a=nn.Linear(2, 2)).eval(), (2,))
    with pytest.raises(InputShapeError, match=r"gives shape \[\] for one sample"):
        collapse(Calls(lambda net, x: net.a(x).sum(), a=nn.Linear(2, 2)).eval(), (2,))


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda w: w.fill_(float("nan")), "0.weight: holds NaN"),
        (lambda w: w.fill_(float("inf")), "0.weight: holds NaN or inf"),
    ],
)
def test_weights_that_are_not_finite(spoil, part):
    model = nn.Sequential(nn.Linear(2, 2))
    spoil(model[0].weight.data)
    with pytest.raises(WeightsError, match=part):
        collapse(model, (2,))


def test_weights_that_are_not_real():
    with pytest.raises(WeightsError, match=r"weight: torch\.complex64"):
        collapse(nn.Linear(2, 2, dtype=torch.complex64), (2,))
    whole = nn.Linear(2, 2)
    whole.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int64), requires_grad=False)
    with pytest.raises(WeightsError, match=r"weight: torch\.int64"):
        collapse(whole, (2,))
    sparse = nn.Linear(2, 2)
    sparse.register_buffer("mask", torch.eye(2).to_sparse())
    with pytest.raises(WeightsError, match=r"mask: torch\.sparse_coo weights given; dense ones are allowed"):
        collapse(sparse, (2,))
    with pytest.raises(WeightsError, match="run the module once"):
        collapse(nn.LazyLinear(2), (2,))


def test_cropped_network_tells_of_its_own_size():
    cropped = crop_dead_taps(build("resnet34_linear_avgpool").eval(), INPUT_SHAPE)
    check(unsettled(cropped), INPUT_SHAPE)
    with pytest.raises(SkipError, match="crop the network again"):
        collapse(cropped, (1, 64, 64))


def test_errors_of_bad_input_share_a_class():
    for error in (ModuleError, InputShapeError, WeightsError, MemoryBoundError, NotConvolutionError):
        assert issubclass(error, CollapseError)
    assert issubclass(TrainingModeError, NotAffineError)


# Certificate.


def test_certificate_prints_and_is_json():
    _, certificate = collapse(nn.Linear(5, 3), (5,))
    text = str(certificate)
    for part in ("structure      affine", "residual", "error", "float32", "4 random inputs"):
        assert part in text
    again = Certificate(**json.loads(json.dumps(certificate.as_dict())))
    assert again == certificate
    assert 0 <= certificate.max_error_float32 < 1e-5 and 0 <= certificate.module_error_float32 < 1e-5


def test_exact_equality_is_proved():
    model = SkipCNN((1, 5, 5), [Layer(2, 3, 1, 1), Layer(2, 3), Layer(3, 3)], [(0, 2), (1, 3)], t=0.3)
    _, certificate = collapse(model, (1, 5, 5), exact=True)
    assert certificate.exact and certificate.exact_rounding < 1e-15
    assert "proved in rational arithmetic" in str(certificate)


def test_exact_is_for_small_recursions():
    with pytest.raises(ExactnessError, match="is for a SkipCNN, Linear given"):
        collapse(nn.Linear(2, 2), (2,), exact=True)
    with pytest.raises(ExactnessError, match="use a smaller input"):
        collapse(build("cnn3"), INPUT_SHAPE, exact=True)


def test_residual_of_a_network_that_gives_0():
    model = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(model.weight)
    assert affine_residual(model, (3,)) == 0
    assert collapse(model, (3,))[1].residual == 0


# Preprocessing and convolutions.


@pytest.mark.parametrize(
    ("mean", "std"), [(0.0, 1.0), (0.5, 0.25), ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]), (torch.rand(3), 2.0)]
)
def test_raw_pixels(mean, std):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)).double().eval()
    collapsed, _ = collapse(model, (3, 8, 8))
    raw = fold_preprocessing(collapsed, mean=mean, std=std)
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    shape = (-1, 1, 1)
    x = images.double() / 255
    mean, std = (torch.as_tensor(v, dtype=torch.float64).reshape(shape) for v in (mean, std))
    x = (x - mean) / std
    torch.testing.assert_close(raw(images), model(x), rtol=0, atol=1e-12)


def test_raw_pixels_need_a_mean_for_each_channel():
    collapsed, _ = collapse(nn.Conv2d(3, 4, 3).eval(), (3, 8, 8))
    with pytest.raises(InputShapeError, match="2 means or standard deviations given; 1 or 3 are allowed"):
        fold_preprocessing(collapsed, mean=[0.1, 0.2])


@pytest.mark.parametrize(
    "values", [{"std": 0.0}, {"std": [0.5, -0.5, 0.5]}, {"std": math.nan}, {"mean": math.inf}, {"scale": math.nan}]
)
def test_raw_pixels_need_finite_numbers(values):
    collapsed, _ = collapse(nn.Conv2d(3, 4, 3).eval(), (3, 8, 8))
    with pytest.raises(ConfigError, match="given; finite numbers are allowed, std above 0"):
        fold_preprocessing(collapsed, **values)


def test_raw_pixels_need_a_collapsed_network_and_weights_that_fit():
    with pytest.raises(ModuleError, match="Linear given; a Collapsed is allowed"):
        fold_preprocessing(nn.Linear(4, 3))
    with pytest.raises(WeightsError, match=r"torch\.float32 does not hold; give a scale"):
        fold_preprocessing(collapse(nn.Linear(4, 3), (4,))[0], scale=1e300)


CHAINS = {
    "one": lambda: nn.Conv2d(2, 3, 3, 2, 1),
    "two": lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=2), nn.Conv2d(3, 4, 5)),
    "1d": lambda: nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1, dilation=2), nn.BatchNorm1d(4), nn.Conv1d(4, 2, 2, groups=2)
    ),
    "3d": lambda: nn.Sequential(nn.Conv3d(2, 2, 2), nn.Conv3d(2, 1, 2, bias=False)),
    "strided": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3, 2, 1), nn.Identity(), nn.Conv2d(3, 4, (2, 3), (1, 2), padding="valid")
    ),
    "nested": lambda: nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.BatchNorm2d(4)),
        nn.Dropout(),
        nn.Sequential(nn.Conv2d(4, 2, 3)),
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chain_is_one_convolution(name):
    chain = settled(CHAINS[name]())
    whole, certificate = collapse_convolution(chain)
    dimensions = 1 if name == "1d" else 3 if name == "3d" else 2
    x = torch.randn(2, 2, *(17, 14, 11)[:dimensions], dtype=torch.float64)
    assert isinstance(whole, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and whole.weight.is_contiguous()
    torch.testing.assert_close(whole(x), chain(x), rtol=0, atol=1e-12)
    assert certificate.max_error < 1e-12


class Standardized(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, (self.weight - self.weight.mean()) / self.weight.std(), self.bias)


class Around(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def test_a_layer_that_is_there_twice_is_folded_twice():
    layer = settled(nn.Conv2d(2, 2, 3))
    chain, x = nn.Sequential(layer, layer), torch.randn(2, 2, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(collapse_convolution(chain)[0](x), chain(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("chain", "part"),
    [
        (nn.Sequential(Standardized(1, 4, 3), nn.Conv2d(4, 2, 3)), "0: Standardized is no convolution"),
        (Around(nn.Conv2d(1, 1, 3, padding=1)), "network: Around is no convolution"),
        (nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)), "1: pads after another layer"),
        (nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 1, 3, padding=1)), "1: pads after another layer"),
        (nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU()), "1: ReLU is no convolution"),
        (nn.Sequential(nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten())), r"0\.1: Flatten is no convolution"),
        (nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")), "padding mode 'reflect'"),
        (nn.Conv2d(1, 1, 3, padding="same"), "network: padding='same'"),
        (nn.ConvTranspose2d(1, 1, 3), "ConvTranspose2d is no convolution"),
        (nn.Sequential(nn.BatchNorm2d(1)), "no convolution in the chain"),
        (nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv1d(1, 1, 3)), "1: Conv1d and Conv2d in one chain"),
    ],
)
def test_chain_that_is_no_convolution(chain, part):
    with pytest.raises(NotConvolutionError, match=part):
        collapse_convolution(chain.eval())


class Padding(nn.BatchNorm2d):
    def forward(self, x):
        return F.pad(super().forward(x), (1, 1, 1, 1))


def test_a_chain_that_gives_another_size_is_no_convolution():
    with pytest.raises(NotConvolutionError, match=r"the chain gives \[2, 2, 5, 5\] where the one convolution gives"):
        collapse_convolution(nn.Sequential(nn.Conv2d(1, 2, 3), Padding(2)).eval())


def test_a_chain_that_cannot_be_copied_is_said():
    with pytest.raises(ModuleError, match="Sequential cannot be copied"):
        collapse_convolution(nn.Sequential(torch.nn.utils.weight_norm(nn.Conv2d(1, 1, 3))))
    with pytest.raises(WeightsError, match=r"0\.weight: not initialised yet"):
        collapse_convolution(nn.Sequential(nn.LazyConv2d(1, 3)))


def test_a_list_of_layers_is_no_chain():
    with pytest.raises(ModuleError, match="list given"):
        collapse_convolution([nn.Conv2d(1, 1, 3)])


def test_chain_in_training_mode():
    chain = nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1))
    with pytest.raises(TrainingModeError, match="1: BatchNorm2d in training mode"):
        collapse_convolution(chain)


@pytest.mark.cuda
@pytest.mark.parametrize("name", AFFINE)
def test_affine_modules_on_cuda(name):
    torch.manual_seed(0)
    build_module, shape = AFFINE[name]
    module = settled(build_module()).float()
    on_host, _ = collapse(module, shape)
    on_device, certificate = collapse(module.cuda(), shape)
    assert on_device.linear.weight.is_cuda and certificate.max_error < 1e-10
    torch.testing.assert_close(on_device.cpu().linear.weight, on_host.linear.weight, rtol=1e-6, atol=1e-7)


def test_a_layer_that_is_most_of_the_memory_keeps_within_its_bound():
    module = nn.Sequential(nn.Conv2d(2, 1, 1), nn.Upsample(scale_factor=2), nn.AvgPool2d(4)).eval()
    bound = least_bytes(module, (2, 40, 40))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        collapse(module, (2, 40, 40), max_bytes=bound)
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]")
    assert bound / 2 < max(held) < bound


@pytest.mark.cuda
def test_memory_bound_holds_on_cuda():
    model = build("resnet34_linear_avgpool").eval().cuda()
    for bound in (600 * 2**20, 2**30):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        collapse(model, INPUT_SHAPE, max_bytes=bound)
        assert torch.cuda.max_memory_allocated() - before < bound

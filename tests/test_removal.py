"""Skips are taken out at t = 0 only, and what is left is the same function."""

import pytest
import timm
import torch
import torchvision
from samples import Residual, images, unsettled
from torch import fx, nn
from torch.nn import functional as F

from skipfold.collapse import collapse
from skipfold.errors import InputShapeError, NoSkipsError, NotAffineError, SkipError
from skipfold.homotopy import Skip, insert_skips, set_skip_strength, skip_strengths, skips, to_homotopy
from skipfold.networks import INPUT_SHAPE, build
from skipfold.recursion import Layer, SkipCNN
from skipfold.removal import remove_skips, strip
from skipfold.resnet import resnet


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_removed_skips_leave_the_same_function(name):
    model = unsettled(resnet(name, t=0.0))
    plain = strip(model)
    assert not skip_strengths(plain)
    assert not [path for path, _ in plain.named_modules() if "downsample" in path]
    with torch.no_grad():
        torch.testing.assert_close(plain(images()), model(images()), rtol=1e-12, atol=1e-12)


def test_removal_is_idempotent_and_leaves_its_argument_alone():
    model = unsettled(resnet("resnet18", t=0.0))
    once = strip(model)
    twice = strip(once)
    assert len(skip_strengths(model)) == 8
    assert list(once.state_dict()) == list(twice.state_dict())
    with torch.no_grad():
        assert torch.equal(once(images()), twice(images()))
        next(once.parameters()).zero_()
    assert next(model.parameters()).any() and next(twice.parameters()).any()


def test_removal_at_other_strengths_names_the_blocks():
    model = resnet("resnet18", t=0.0)
    model.layer2[0].skip.t.fill_(0.5)
    model.layer4[1].skip.t.fill_(0.125)
    with pytest.raises(SkipError, match=r"layer2\.0\.skip \(t = 0\.5\), layer4\.1\.skip \(t = 0\.125\)") as caught:
        strip(model)
    assert "layer1.0" not in str(caught.value)


def test_removal_from_a_recursion_needs_t_0_too():
    model = SkipCNN((1, 4, 4), [Layer(1, 1)] * 2, [(0, 2)], t=0.5)
    with pytest.raises(SkipError, match=r"skip \(t = 0\.5\)"):
        strip(model)


def test_remove_skips_of_a_skip_cnn_leaves_none():
    """At t = 0 the recursion without its skips is the same function."""
    model = build("cnn3", {"t": 0.0, "width": 2})
    plain = strip(model)
    x = torch.rand(3, 1, 28, 28)
    assert plain.shares == {} and model.shares != {}
    torch.testing.assert_close(plain(x), model(x))


ZOO = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "wide_resnet50_2",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "mobilenet_v2",
    "mnasnet0_5",
    "regnet_y_400mf",
    "efficientnet_b0",
]


@pytest.mark.parametrize("name", ZOO)
def test_torchvisions_networks_lose_their_skips(name):
    model = torchvision.models.get_model(name, weights=None, num_classes=7).eval()
    homotopy, certificate = to_homotopy(model, (3, 32, 32), t=0.0, export=False)
    assert certificate.max_error < 1e-9
    homotopy.load_state_dict(model.state_dict())
    assert len(skips(homotopy)) == certificate.additions > 7
    plain, certificate = remove_skips(homotopy, (3, 32, 32), export=False)
    assert certificate.max_error < 1e-9 and certificate.repeated_error < 1e-9 and certificate.own_error < 1e-4
    assert certificate.additions == 0
    assert not [m for m in plain.modules() if isinstance(m, Skip | nn.modules.batchnorm._BatchNorm)]
    assert not [path for path, _ in plain.named_modules() if "downsample" in path]
    assert all(parameter.is_contiguous() for parameter in plain.parameters())


@pytest.mark.parametrize("name", ["resnet26t", "seresnet50", "skresnet18"])
def test_timms_networks_lose_their_skips(name):
    homotopy, _ = to_homotopy(timm.create_model(name, num_classes=5).eval(), (3, 32, 32), t=0.0, export=False)
    plain, certificate = remove_skips(homotopy, (3, 32, 32), export=False)
    assert certificate.max_error < 1e-9 and not skips(plain)


def test_batchnorms_that_activate_are_folded_too():
    model, _ = to_homotopy(timm.create_model("resnetv2_18", num_classes=3), (3, 32, 32), t=0.0, export=False)
    plain, certificate = remove_skips(model, (3, 32, 32), export=False)
    norms = [path for path, m in plain.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert certificate.additions == 0 and len(norms) == 1  # after the max-pool, which no weights precede


def test_removal_folds_crops_and_is_certified_after_export():
    model = unsettled(resnet("resnet18", t=0.0)).float()
    plain, certificate = remove_skips(model, INPUT_SHAPE, crop=True)
    assert certificate.max_error < 1e-9 and certificate.exported_error < 1e-4 and certificate.additions == 0
    assert not [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
    assert isinstance(plain.layer1[0], nn.Sequential) and plain.layer4[1].conv1.kernel_size == (1, 1)
    with torch.no_grad():
        torch.testing.assert_close(plain(images().float()), model(images().float()), rtol=1e-4, atol=1e-5)
    with pytest.raises(SkipError, match="crop the network again"):
        plain(images(side=64).float())
    assert "export" in str(certificate) and certificate.as_dict()["operation"] == "remove_skips"


def test_a_chain_keeps_its_projection_gate_where_it_belongs_to_the_residual():
    """Squeeze-and-excitation multiplies the residual: it stays, in a block that is no chain, without an addition."""
    homotopy, _ = to_homotopy(timm.create_model("seresnet18", num_classes=5).eval(), (3, 32, 32), t=0.0, export=False)
    plain = strip(homotopy)
    assert [path for path, _ in plain.named_modules() if path.endswith(".se")]


def test_skips_in_skips_and_of_blocks_run_twice_are_removed():
    block = Residual(nn.Linear(4, 4))
    nested = Residual(nn.Sequential(nn.Linear(4, 4), Residual(nn.Linear(4, 4))), block)
    homotopy, certificate = to_homotopy(nn.Sequential(block, nested, nn.Tanh(), block), (4,), t=0.0)
    assert len(skips(homotopy)) == 3 and certificate.additions == 5
    plain, certificate = remove_skips(homotopy, (4,))
    assert certificate.additions == 0 and not skips(plain)
    assert [type(module) for module in plain.modules() if not list(module.children())] == [
        nn.Linear,
        nn.Linear,
        nn.Linear,
        nn.Tanh,
    ]
    x = torch.randn(3, 4)
    twice, inner = block.branch, nested.branch
    torch.testing.assert_close(plain(x), twice(inner[1].branch(inner[0](twice(x))).tanh()))


class InPlace(nn.Module):
    """What the skip does in place changes what the residual reads: without the skip it must be done still."""

    def __init__(self, relu=None):
        super().__init__()
        self.relu, self.project, self.linear = relu or nn.ReLU(inplace=True), nn.Identity(), nn.Linear(4, 4)
        self.more = nn.Linear(4, 4)
        self.register_buffer("mean", torch.ones(1))

    def forward(self, x):
        x = self.more(x)
        skip = self.project(self.relu(x))
        return self.linear(x) + skip


class Stated(InPlace):
    def forward(self, x):
        x = self.more(x)
        self.relu(x)
        return self.linear(x) + x


class Clamped(InPlace):
    def forward(self, x):
        x.clamp_(0, 1)
        x = self.more(x)
        return self.linear(x) + x


class Averaging(InPlace):
    def forward(self, x):
        self.mean.lerp_(x.mean().reshape(1), 0.5)
        x = self.more(x)
        return self.mean * (self.linear(x) + x)


class Projecting(InPlace):
    def forward(self, x):
        return self.linear(self.linear(x)) + F.relu(self.more(x), inplace=True)


@pytest.mark.parametrize("kind", [InPlace, Stated, Clamped, Averaging])
def test_what_is_done_in_place_is_done_without_skips_too(kind):
    homotopy, _ = to_homotopy(kind(), (4,), t=0.0, export=False)
    plain, _ = remove_skips(homotopy, (4,), export=False)
    x = torch.randn(9, 4)
    torch.testing.assert_close(plain(x.clone()), homotopy(x.clone()))


def test_what_is_done_in_place_to_the_skip_alone_goes_with_it():
    plain = strip(insert_skips(Projecting(), t=0.0))
    assert isinstance(plain, nn.Sequential) and list(dict(plain.named_modules())) == ["", "linear"]


class Changes(nn.Module):
    def forward(self, x):
        return x.relu_()


def test_a_removal_that_changes_the_function_is_refused():
    homotopy, _ = to_homotopy(InPlace(Changes()), (4,), t=0.0)
    with pytest.raises(SkipError, match="remove_skips: the result differs from the network by"):
        remove_skips(homotopy, (4,))


class Gated(nn.Module):
    """Adds one value a channel to all, which is no skip, and then what is one."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 1), nn.Linear(4, 4)

    def forward(self, x):
        x = x + self.one(x)
        return x + self.two(x)


def test_additions_of_two_shapes_stay_and_are_named():
    homotopy, certificate = to_homotopy(nn.Sequential(Gated()), (4,), t=0.0)
    assert list(skips(homotopy)) == ["0.skip"] and certificate.elsewhere == {"0": 1} and "in 0 (1)" in str(certificate)
    plain, certificate = remove_skips(homotopy, (4,))
    assert certificate.elsewhere == {"0": 1}
    again, _ = remove_skips(plain, (4,))
    x = torch.randn(3, 4)
    torch.testing.assert_close(again(x), homotopy(x))


def test_a_network_that_has_its_skips_in_full_is_refused():
    with pytest.raises(NoSkipsError, match=r"no skip strength t, but skips in layer1\.0, .*convert it"):
        remove_skips(torchvision.models.resnet18(num_classes=2).eval(), (3, 32, 32))


def test_a_block_with_hooks_is_named():
    model = resnet("resnet18", t=0.0)
    model.layer1[0].register_forward_hook(lambda *_: None)
    with pytest.raises(SkipError, match=r"layer1\.0: has hooks, which would be lost"):
        strip(model)


class Zero(nn.Module):
    """Its output is 0, so it does not show that the sum is no longer done in place."""

    def __init__(self):
        super().__init__()
        self.linear, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        for values in self.head.parameters():
            nn.init.zeros_(values)

    def forward(self, x):
        y = self.linear(x)
        z = y
        y += x
        return self.head(z * z + y)


def test_a_head_of_zeros_hides_nothing():
    with pytest.raises(SkipError, match="to_homotopy: the result differs"):
        to_homotopy(Zero(), (4,))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.block = nn.Embedding(7, 4), Residual(nn.Linear(4, 4))

    def forward(self, x):
        return self.block(self.embedding(x))


def test_an_example_of_token_ids_is_run_as_such():
    example = torch.tensor([[6, 0, 3], [1, 2, 5]])
    homotopy, _ = to_homotopy(Tokens(), example, t=0.0)
    plain, certificate = remove_skips(homotopy, example, crop=True)
    assert certificate.additions == 0 and torch.equal(plain(example), homotopy(example))


class Rooted(Residual):
    def forward(self, x):
        return super().forward(x.sqrt())


def test_inputs_of_both_signs_are_left_out_where_the_network_takes_none():
    assert to_homotopy(Rooted(nn.Linear(4, 4)), (4,))[1].probes == 2
    assert to_homotopy(Residual(nn.Linear(4, 4)), (4,))[1].probes == 4


class Last(Residual):
    def __init__(self, last):
        super().__init__(nn.Linear(4, 4))
        self.last = last

    def forward(self, x):
        return self.last(super().forward(x))


@pytest.mark.parametrize(
    ("last", "shape", "message"),
    [
        (lambda x: x.argmax(1), (4,), r"gives torch\.int64, which cannot be compared"),
        (lambda x: x[:0], (4,), r"outputs of shape \[0, 4\]"),
        (lambda x: x, (10**6, 10**5, 4), "cannot be made"),
        (lambda x: x, (10**30, 4), "cannot be made"),
    ],
)
def test_what_cannot_be_compared_or_drawn_is_said(last, shape, message):
    with pytest.raises(InputShapeError, match=message) as caught:
        to_homotopy(Last(last), shape)
    assert "\n" not in str(caught.value)


def test_removal_at_another_strength_is_refused_before_anything_runs():
    homotopy, _ = to_homotopy(torchvision.models.resnet18(num_classes=2).eval(), (3, 32, 32), t=0.0, export=False)
    set_skip_strength(homotopy, {"layer2.0.skip": 0.5})
    with pytest.raises(SkipError, match=r"not 0 in: layer2\.0\.skip \(t = 0\.5\); train with a schedule"):
        remove_skips(homotopy, (3, 32, 32))


def test_a_skip_outside_of_a_block_is_named():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.skip = nn.Linear(4, 4), Skip(0.0)

        def forward(self, x):
            return self.skip(self.linear(x), x)

    with pytest.raises(SkipError, match="no block of to_homotopy holds: skip"):
        strip(Bare())


def test_result_of_fx_is_no_chain_only_where_it_must_be():
    homotopy, _ = to_homotopy(timm.create_model("resnet18", num_classes=5).eval(), (3, 32, 32), t=0.0, export=False)
    blocks = [block for stage in (homotopy.layer1, homotopy.layer2) for block in stage]
    assert all(isinstance(block, fx.GraphModule) for block in blocks)
    assert all(isinstance(block, nn.Sequential) for block in strip(homotopy).layer1)


@pytest.mark.parametrize(
    ("name", "offender"),
    [
        ("alexnet", "features.1: ReLU"),
        ("vgg11_bn", "features.2: ReLU"),
        ("squeezenet1_1", "features.1: ReLU"),
        ("densenet121", "features.relu0: ReLU"),
        ("mobilenet_v3_small", "features.0.2: Hardswish"),
        ("shufflenet_v2_x0_5", "conv1.2: ReLU"),
        ("resnet18", "maxpool: MaxPool2d"),
        ("efficientnet_b0", "features.0.2: SiLU"),
        ("convnext_tiny", "GELU"),
    ],
)
def test_the_nonlinear_zoo_is_refused_with_the_names(name, offender):
    model = torchvision.models.get_model(name, weights=None, num_classes=3).eval()
    with pytest.raises(NotAffineError) as caught:
        collapse(model, (3, 64, 64), probes=1)
    assert offender in str(caught.value)

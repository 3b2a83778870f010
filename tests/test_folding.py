"""Neighbouring affine layers as one layer are the same function."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import images, unsettled
from test_recursion import property_test
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import spectral_norm as hooked_spectral_norm
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torchvision.ops import FrozenBatchNorm2d

from skipfold.errors import SkipError
from skipfold.folding import fold, fold_affine, fold_batchnorm
from skipfold.homotopy import Skip, insert_skips
from skipfold.removal import strip
from skipfold.resnet import resnet


def test_folded_batchnorm_is_the_same_function():
    model = unsettled(resnet("resnet18", t=0.3))
    folded = fold_batchnorm(model)
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        expected = model(images())
        torch.testing.assert_close(folded(images()), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(fold_batchnorm(folded)(images()), expected, rtol=1e-12, atol=1e-12)
        plain = fold_batchnorm(strip(unsettled(resnet("resnet18", t=0.0))))
    assert not [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]


class OfTheirOwn(nn.BatchNorm2d):
    """As torch's, under another name."""


class Doubling(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(2 * x)


class Adding(nn.BatchNorm2d):
    def forward(self, x):
        return x + F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def frozen(channels):
    norm = FrozenBatchNorm2d(channels, eps=0.1)
    for values in norm.buffers():
        values.uniform_(0.5, 2, generator=torch.Generator().manual_seed(3))
    return norm


@pytest.mark.parametrize(
    ("norm", "layers"),
    [
        (OfTheirOwn(4), [nn.Conv2d, nn.Conv2d]),
        (nn.SyncBatchNorm(4), [nn.Conv2d, nn.Conv2d]),
        (frozen(4), [nn.Conv2d, nn.Conv2d]),
        (BatchNormAct2d(4), [nn.Conv2d, nn.ReLU, nn.Conv2d]),
        (BatchNormAct2d(4, apply_act=False), [nn.Conv2d, nn.Conv2d]),
        (BatchNormAct2d(4, drop_layer=nn.Dropout, act_layer=nn.SiLU), [nn.Conv2d, nn.SiLU, nn.Conv2d]),
        (Doubling(4), [nn.Conv2d, Doubling, nn.Conv2d]),
        (Adding(4), [nn.Conv2d, Adding, nn.Conv2d]),
    ],
)
def test_what_a_batchnorm_does_after_normalizing_stays(norm, layers):
    model = unsettled(nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.Conv2d(4, 2, 1)))
    folded = fold_batchnorm(model)
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-12)
    assert [type(layer) for layer in folded] == layers


class Parallel(nn.Module):
    """(1 - t) of one convolution and t of another, or of the identity, of one input."""

    def __init__(self, kernels, stride=1, dilation=1, groups=1, identity=False, t=0.3):
        super().__init__()
        large, small = kernels
        self.large = nn.Conv2d(4, 4, large, stride, dilation * (large // 2), dilation, groups)
        self.small = None if identity else nn.Conv2d(4, 4, small, stride, dilation * (small // 2), dilation, groups)
        self.skip = Skip(t)

    def forward(self, x):
        return self.skip(self.large(x), x if self.small is None else self.small(x))


@property_test(60)
@given(
    st.sampled_from([(3, 1), (1, 3), (5, 3), (3, 3), (1, 1)]),
    st.integers(1, 2),
    st.integers(1, 2),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.sampled_from([0.0, 0.25, 1.0]),
)
def test_parallel_convolutions_are_one(kernels, stride, dilation, groups, identity, t):
    if identity and stride == 2:
        return
    model = Parallel(kernels, stride, dilation, groups, identity, t).double()
    whole = fold(copy.deepcopy(model).eval())
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(whole(x), model(x), rtol=0, atol=1e-12)
    if t != 1 or not identity:
        assert [type(m) for m in whole.children()] == [nn.Conv2d]


class Branches(nn.Module):
    """As RepVGG and MobileOne have them: convolutions and a BatchNorm of one input, each normalized, summed from 0."""

    def __init__(self, groups):
        super().__init__()
        convolutions = [nn.Conv2d(4, 4, size, padding=size // 2, groups=groups, bias=False) for size in (1, 3, 3)]
        self.branches = nn.ModuleList(nn.Sequential(each, nn.BatchNorm2d(4)) for each in convolutions)
        self.branches.append(nn.BatchNorm2d(4))
        self.after = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.after(sum(branch(x) for branch in self.branches)).relu()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_branches_of_one_input_are_one_convolution(groups):
    whole, certificate = fold_affine(unsettled(Branches(groups)), (4, 6, 5))
    assert [type(m) for m in whole.modules() if not list(m.children())] == [nn.Conv2d]
    assert certificate.additions == 0 and certificate.max_error < 1e-12


@pytest.mark.parametrize(
    ("layer", "folds"),
    [
        (nn.Conv2d(4, 6, 1, bias=False), True),
        (nn.Conv2d(4, 6, 3, stride=2, dilation=2, groups=2), True),
        (nn.Conv2d(4, 6, 3, padding="valid"), True),
        (nn.Conv2d(4, 6, 3, padding=1), False),
        (nn.Conv2d(4, 6, 3, padding="same"), False),
    ],
)
def test_a_batchnorm_goes_into_the_convolution_after_it_if_that_does_not_pad(layer, folds):
    whole, certificate = fold_affine(unsettled(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), layer)), (4, 7, 6))
    assert len(list(whole.children())) == (2 if folds else 3) and certificate.max_error < 1e-12


def test_convolutions_that_do_not_fit_stay_two():
    model = Parallel((3, 1)).double()
    model.small = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect").double()
    whole, certificate = fold_affine(model, (4, 6, 6))
    assert len([m for m in whole.modules() if isinstance(m, nn.Conv2d)]) == 2 and certificate.additions == 1


def test_a_chain_of_affine_layers_is_one():
    layers = [nn.Conv2d(2, 3, 3, 2, 1), nn.BatchNorm2d(3), nn.Dropout(), nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)]
    model = unsettled(nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(36, 5), nn.Linear(5, 3, bias=False)))
    whole, certificate = fold_affine(model, (2, 8, 8))
    assert [type(m) for m in whole.children()] == [nn.Conv2d, nn.ReLU, nn.Flatten, nn.Linear]
    assert certificate.max_error < 1e-9 and certificate.exported_error < 1e-9


@pytest.mark.parametrize(
    ("before", "after", "smaller"),
    [
        (nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1), False),  # 36 + 32 weights, as one 288
        (nn.Conv2d(2, 8, 3), nn.Conv2d(8, 2, 1), True),  # 144 + 16, 36
        (nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3), False),  # 9 + 9, 25
        (nn.Conv1d(2, 4, 1), nn.Conv1d(4, 2, 2), True),  # 8 + 16, 8
        (nn.Linear(6, 2), nn.Linear(2, 6), False),  # 12 + 12, 36
        (nn.Linear(6, 6), nn.Linear(6, 3), True),  # 36 + 18, 18
    ],
)
def test_what_would_grow_stays_on_request(before, after, smaller):
    model = unsettled(nn.Sequential(before, after))
    shape = (6,) if isinstance(before, nn.Linear) else (before.in_channels, *[6] * len(before.kernel_size))
    for grow in (True, False):
        folded, certificate = fold_affine(model, shape, grow=grow, export=False)
        assert len(list(folded.children())) == (1 if smaller or grow else 2) and certificate.max_error < 1e-9
        count = sum(parameter.numel() for parameter in folded.parameters())
        assert grow or count <= sum(parameter.numel() for parameter in model.parameters())


def test_padding_between_convolutions_keeps_them_apart():
    whole = fold(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 1, 3, padding=1)).double().eval())
    assert [type(m) for m in whole.children()] == [nn.Conv2d, nn.Conv2d]


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_a_resnet_at_any_strength_is_folded(t):
    whole, certificate = fold_affine(unsettled(resnet("resnet18", t=t)), (1, 28, 28), export=False)
    assert certificate.max_error < 1e-9 and certificate.repeated_error < 1e-9
    assert not [m for m in whole.modules() if isinstance(m, Skip | nn.BatchNorm2d)]
    assert certificate.additions == (0 if t in (0.0, 1.0) else 8)


def test_transposed_convolutions_and_linear_layers_take_their_batchnorm():
    model = nn.Sequential(
        nn.ConvTranspose2d(2, 4, 3, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(100, 3), nn.BatchNorm1d(3)
    )
    model = unsettled(model)
    folded = fold_batchnorm(model)
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-12)
    assert [type(m) for m in folded] == [nn.ConvTranspose2d, nn.Flatten, nn.Linear]
    grouped = unsettled(nn.Sequential(nn.ConvTranspose2d(2, 4, 3, 2, groups=2), nn.BatchNorm2d(4)))
    torch.testing.assert_close(fold_batchnorm(grouped)(x), grouped(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("parametrization", [weight_norm, spectral_norm, orthogonal], ids=lambda each: each.__name__)
def test_weights_that_are_computed_take_their_batchnorm(parametrization):
    layer = parametrization(nn.Conv2d(3, 4, 3))
    model = unsettled(nn.Sequential(layer, nn.BatchNorm2d(4), nn.ReLU()))
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    for folded in (fold_batchnorm(model), fold_affine(model, (3, 8, 8))[0]):
        assert not any(isinstance(module, nn.BatchNorm2d | ParametrizationList) for module in folded.modules())
        torch.testing.assert_close(folded(x), model(x))
    assert is_parametrized(layer, "weight")


def test_a_layer_that_is_used_twice_keeps_its_batchnorm():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1)

        def forward(self, x):
            return self.bn(self.conv(F.relu(self.bn(self.conv(x)))))

    model = unsettled(Twice())
    assert isinstance(fold_batchnorm(model).bn, nn.BatchNorm2d)


class Clamping(nn.Identity):
    def forward(self, x):
        return x.clamp(-0.1, 0.1)


def test_only_identities_of_the_folding_go():
    hooked, seen = nn.Dropout(), []
    hooked.register_forward_hook(lambda *_: seen.append(1))
    model = unsettled(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), Clamping(), hooked, nn.Identity()))
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    for folded in (fold_batchnorm(model), fold(copy.deepcopy(model))):
        torch.testing.assert_close(folded(x), model(x))
        seen.clear()
        folded(x)
        assert seen
    assert [type(layer) for layer in fold_batchnorm(model)] == [nn.Conv2d, Clamping, nn.Dropout, nn.Identity]


class Tapped(nn.Module):
    """Takes its layers by their places, and their outputs too."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.Tanh())

    def forward(self, x):
        taken = []
        for place, layer in enumerate(self.layers):
            x = layer(x)
            if place in (2, 3):
                taken.append(x)
        return torch.cat(taken, 1)


class TwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3)
        self.layers = nn.Sequential(self.conv, nn.BatchNorm2d(2))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("kind", [Tapped, TwoNames])
def test_places_and_names_of_layers_are_kept(kind):
    model, x = unsettled(kind()), torch.randn(2, 2, 6, 6, dtype=torch.float64)
    folded = fold_batchnorm(model)
    torch.testing.assert_close(folded(x), model(x))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


class Renormed(nn.Conv2d):
    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 1.0)
        return super().forward(x)


def test_weights_that_a_forward_changes_are_not_those_that_are_folded():
    conv = Renormed(2, 3, 3)
    conv.weight.data *= 3
    with pytest.raises(SkipError, match="differs"):
        fold_affine(nn.Sequential(conv, nn.BatchNorm2d(3)), (2, 5, 5), export=False)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.norm = nn.Linear(6, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        return F.linear(self.norm(self.encoder(x)), self.encoder.weight.t())


class OtherEps(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=0.1)


class OfTheBatch(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=True)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Tied(), (6,)),
        (nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), (6, 6)),
        (nn.Sequential(nn.Conv2d(2, 3, 3), OtherEps(3)), (2, 5, 5)),
        (nn.Sequential(nn.Conv2d(2, 3, 3), OfTheBatch(3)), (2, 5, 5)),
    ],
)
def test_what_does_not_fold_stays(model, shape):
    model, x = unsettled(model), torch.randn(3, *shape, dtype=torch.float64)
    whole, _ = fold_affine(model, shape, export=False)
    folded = fold_batchnorm(model, shape)
    for each in (whole, folded):
        assert any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in each.modules())
    torch.testing.assert_close(folded(x), copy.deepcopy(model)(x))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

    def forward(self, x):
        x = self.layers(x)
        return x if x.sum() > 0 else -x


def test_a_part_that_torch_fx_cannot_read_stays_whole():
    wrapped = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Sequential(Branching()))
    model = unsettled(nn.Sequential(wrapped, nn.Linear(3, 3), nn.Linear(3, 2)))
    whole, certificate = fold_affine(model, (2,), export=False)
    assert [node.target for node in whole.graph.nodes if node.op == "call_module"] == ["0.0", "0.2.0", "1"]
    assert certificate.max_error < 1e-12
    assert [type(layer) for layer in fold_batchnorm(model)[0]] == [nn.Linear, nn.Sequential]


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.skip = nn.Conv2d(2, 2, 3, padding=1), Skip(0.3)

    def forward(self, x):
        return self.skip(skip=x, branch=self.conv(x))


def test_a_skip_that_takes_its_sides_by_name_is_folded():
    folded, _ = fold_affine(ByName(), (2, 5, 5))
    assert [type(layer) for layer in folded.children()] == [nn.Conv2d]


class Precise(nn.Sequential):
    """In full precision under autocast too."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


def test_a_part_that_sets_autocast_stays_whole():
    part = Precise(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)).eval()
    folded, _ = fold_affine(nn.Sequential(part, nn.ReLU()), (2, 5, 5))
    x = 300 * torch.rand(2, 2, 5, 5)
    with torch.autocast("cpu"):
        torch.testing.assert_close(folded(x), part(x).relu())
    with pytest.raises(SkipError, match=r"torch\.fx cannot read this Precise \(it sets autocast; .* or the caller\)"):
        fold_affine(part, (2, 5, 5))
    assert [type(layer) for layer in fold_batchnorm(part)] == [nn.Conv2d]  # its forward stays


def test_a_network_that_torch_fx_cannot_read_is_refused():
    with pytest.raises(SkipError, match=r"torch\.fx cannot read this Branching .* give the network itself"):
        fold_affine(Branching(), (3,))


@pytest.mark.parametrize("learns", [True, False])
def test_what_is_folded_learns_where_it_did(learns):
    layers = [nn.Linear(12, 6), nn.Linear(6, 3)]
    norm = nn.BatchNorm2d(2)
    convolutions = [nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    model = nn.Sequential(norm, *convolutions, Parallel((3, 1)), Branches(2), nn.Conv2d(4, 3, 2), nn.Flatten(), *layers)
    model = unsettled(model).requires_grad_(learns)
    for folded in (fold_affine(model, (2, 5, 5))[0], fold_batchnorm(model)):
        assert {parameter.requires_grad for parameter in folded.parameters()} == {learns}


def test_a_batchnorm_of_another_axis_stays():
    model = unsettled(nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(5), nn.ReLU()))
    whole, certificate = fold_affine(model, (5, 8), export=False)
    assert certificate.max_error < 1e-12 and any(isinstance(module, nn.BatchNorm1d) for module in whole.modules())


def test_layers_that_a_forward_takes_by_their_places_stay_there():
    class Stem(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU())

        def forward(self, x):
            for place in range(3):
                x = self.layers[place](x)
            return x

    model, x = unsettled(Stem()), torch.rand(2, 2, 6, 6, dtype=torch.float64)
    folded = fold_batchnorm(model)
    torch.testing.assert_close(folded(x), model(x))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


def test_a_layer_whose_weights_a_hook_computes_keeps_its_batchnorm():
    model = unsettled(nn.Sequential(hooked_spectral_norm(nn.Conv2d(2, 3, 3)), nn.BatchNorm2d(3)))
    whole, certificate = fold_affine(model, (2, 5, 5), export=False)
    assert certificate.max_error < 1e-12 and any(isinstance(module, nn.BatchNorm2d) for module in whole.modules())


class MadeOtherwise(nn.Conv2d):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 3, padding=1, bias=False)


def test_a_convolution_of_a_subclass_takes_its_batchnorm_where_it_convolves_as_torch_s():
    class Scaled(MadeOtherwise):
        def forward(self, x):
            return 2 * super().forward(x)

    for kind, folds in ((MadeOtherwise, True), (Scaled, False)):
        model, x = unsettled(nn.Sequential(kind(2, 3), nn.BatchNorm2d(3))), torch.rand(1, 2, 5, 5, dtype=torch.float64)
        folded = fold_batchnorm(model)
        torch.testing.assert_close(folded(x), model(x))
        assert any(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) != folds


def test_what_folding_does_not_know_is_said(monkeypatch):
    monkeypatch.setattr("skipfold.folding._chained", lambda *_: 1 / 0)
    with pytest.raises(SkipError, match=r"does not know how to rewrite this Linear \(division by zero\)"):
        fold_affine(nn.Linear(2, 2), (2,))


def test_folding_leaves_its_argument_alone():
    model = insert_skips(unsettled(resnet("resnet18", block="add")), t=0.3).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fold_affine(model, (1, 28, 28), export=False)
    assert model.training and all(torch.equal(before[key], value) for key, value in model.state_dict().items())

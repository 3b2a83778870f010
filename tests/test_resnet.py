"""The paper's ResNets: torchvision's, with their parameter counts, linearized as asked."""

import pytest
import torch
from samples import images, unsettled
from torch import nn
from torchvision.transforms.functional import resize

from skipfold.errors import ConfigError
from skipfold.resnet import resnet


@pytest.mark.parametrize(("name", "count"), [("resnet18", 11_175_370), ("resnet34", 21_283_530)])
@pytest.mark.parametrize("kind", ["homotopy", "add"])
def test_parameter_counts(name, count, kind):
    with torch.device("meta"):
        model = resnet(name, block=kind)
    assert sum(p.numel() for p in model.parameters()) == count


def test_ordinary_resnet_is_torchvisions():
    from torchvision.models import resnet18

    ours, theirs = unsettled(resnet("resnet18", block="add")), resnet18(num_classes=10)
    theirs.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert torch.equal(ours(images()), theirs.double().eval()(images()))


def test_images_are_resized_as_torchvision_does():
    usual, sized = (unsettled(resnet("resnet18", t=0.3, size=size)) for size in (None, 16))
    sized.load_state_dict(usual.state_dict() | {"conv1.1.weight": usual.conv1.weight}, strict=False)
    with torch.no_grad():
        assert torch.allclose(sized(images()), usual(resize(images(), [16, 16])), atol=1e-12)


@pytest.mark.parametrize(
    ("options", "side"),
    [
        ({}, 6),
        ({"stem": "imagenet_pool3"}, 8),
        ({"stem": "padded1_pool3"}, 10),
        ({"stem": "unpadded_pool3"}, 11),
        ({"size": 16}, 11),
    ],
    ids=["usual", "imagenet_pool3", "padded1_pool3", "unpadded_pool3", "16x16"],
)
def test_at_t_1_the_corner_is_seen_alone(options, side):
    """docs/fit.md, What is not met: t = 1."""
    x = images().requires_grad_()
    unsettled(resnet("resnet34", t=1.0, **options)).double()(x).square().sum().backward()
    seen = x.grad.abs().sum((0, 1)) > 0
    assert not seen[side:].any() and not seen[:, side:].any()
    assert seen[side - 1].any() and seen[:, side - 1].any()


def test_linearized_networks_have_no_relu():
    for pool in ("maxpool", "avgpool"):
        with torch.device("meta"):
            model = resnet("resnet34", linear=pool)
        assert not [m for m in model.modules() if isinstance(m, nn.ReLU)]
        assert isinstance(model.maxpool, nn.MaxPool2d if pool == "maxpool" else nn.AvgPool2d)
        assert sum(p.numel() for p in model.parameters()) == 21_283_530


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("resnet50",), "network: 'resnet50' given; allowed are resnet18, resnet34"),
        (("resnet18", 0.5, "relu"), "linear: 'relu' given; allowed are null, maxpool, avgpool"),
    ],
)
def test_unknown_names_are_refused(arguments, part):
    with pytest.raises(ConfigError, match=part):
        resnet(*arguments)

"""The paper's ResNets: torchvision's, with their parameter counts, linearized as asked."""

import pytest
import torch
from samples import images, unsettled
from torch import nn

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

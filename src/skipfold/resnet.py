"""The paper's ResNets: torchvision's, for 28x28 images of one channel, with skip strength t in every block."""

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet

from skipfold.errors import ConfigError, check_count
from skipfold.homotopy import insert_skips

DEPTHS = {"resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3]}
"""Blocks per stage."""

BLOCKS = ("homotopy", "add")
"""relu((1 - t) F(x) + t skip(x)), or torchvision's relu(F(x) + skip(x)), the baseline of the timings."""

STEMS = {
    "imagenet": (7, 2, 3, (3, 2, 1)),
    "imagenet_pool3": (7, 2, 3, (3, 3, 0)),
    "imagenet_no_maxpool": (7, 2, 3, None),
    "padded1_pool3": (7, 2, 1, (3, 3, 0)),
    "unpadded_pool3": (7, 2, 0, (3, 3, 0)),
    "stride1": (7, 1, 3, (3, 2, 1)),
    "small": (3, 1, 1, (3, 2, 1)),
}
"""First convolution's kernel, stride and padding, and those of a max-pool after it; the paper does not say."""


def resnet(
    name: str,
    t: float = 0.5,
    linear: str | None = None,
    block: str = "homotopy",
    stem: str = "imagenet",
    size: int | None = None,
) -> ResNet:
    """ResNet18 or ResNet34 for [N, 1, 28, 28] and 10 classes: the usual network, its first convolution 1-channel.

    `linear` removes every ReLU: "maxpool" keeps the max-pool (which fits the published curve, and is not affine),
    "avgpool" puts an average-pool of the same geometry in its place (affine in eval mode). `size` makes the images that
    small first, in height and width (bilinear, antialiased), 12 at least. Raises ConfigError on an unknown name.
    """
    for key, value, allowed in (
        ("network", name, DEPTHS),
        ("linear", linear, (None, "maxpool", "avgpool")),
        ("block", block, BLOCKS),
        ("stem", stem, STEMS),
    ):
        if value not in [*allowed]:
            names = ", ".join("null" if choice is None else choice for choice in allowed)
            raise ConfigError(f"{key}: {value!r} given; allowed are {names}")
    model = ResNet(BasicBlock, DEPTHS[name], num_classes=10)
    *first, pool = STEMS[stem]
    model.conv1 = nn.Conv2d(1, 64, *first, bias=False)
    pooling = nn.AvgPool2d if linear == "avgpool" else nn.MaxPool2d
    model.maxpool = pooling(*pool) if pool else nn.Identity()
    if linear:
        _replace(model, nn.ReLU, nn.Identity())
    if block == "homotopy":
        insert_skips(model, t)
    if size is not None:
        # After the skips: torch.fx would read this module, which must not be while other threads run networks.
        check_count(size, "size", 12)
        model.conv1 = nn.Sequential(Resized(size), model.conv1)
    return model


class Resized(nn.Module):
    """Images [N, C, H, W] as [N, C, size, size], by antialiased bilinear resampling."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)

    def extra_repr(self) -> str:
        return f"size={self.size}"


def _replace(model: nn.Module, kind: type[nn.Module], other: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, kind):
                setattr(module, name, other)

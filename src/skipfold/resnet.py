"""torchvision's ResNets with a skip strength t in every block, and what becomes of them when t is 0."""

import copy
import itertools
from collections import OrderedDict

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import BasicBlock, ResNet

from skipfold.errors import ConfigError, SkipError
from skipfold.recursion import SkipCNN
from skipfold.schedules import check_strength

DEPTHS = {"resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3]}
"""Blocks per stage."""


class HomotopyBlock(BasicBlock):
    """A basic block that gives relu((1 - t) F(x) + t skip(x)); its projection, if any, belongs to the skip.

    t = 0 has no skip, t = 0.5 is half the sum of the ordinary block, t = 1 is the skip alone.
    """

    t: torch.Tensor

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("t", torch.tensor(0.5), persistent=False)
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(torch.lerp(out, skip, self.t.to(out.dtype)))


class AdditiveBlock(BasicBlock):
    """torchvision's basic block: relu(F(x) + skip(x)), without t; the baseline of the timings."""


BLOCKS = {"homotopy": HomotopyBlock, "add": AdditiveBlock}


STEMS = {
    "imagenet": (7, 2, True),
    "imagenet_no_maxpool": (7, 2, False),
    "stride1": (7, 1, True),
    "small": (3, 1, True),
    "small_no_maxpool": (3, 1, False),
}
"""First convolution's kernel and stride, and whether a max-pool follows; the paper does not say."""


NORMS = {"batch": nn.BatchNorm2d, "none": nn.Identity}
"""What follows each convolution; the paper does not say."""


def resnet(
    name: str,
    t: float = 0.5,
    linear: str | None = None,
    block: str = "homotopy",
    stem: str = "imagenet",
    norm: str = "batch",
) -> ResNet:
    """ResNet18 or ResNet34 for [N, 1, 28, 28] and 10 classes: the usual network, its first convolution 1-channel.

    `linear` removes every ReLU: "maxpool" keeps the max-pool (as published, not affine), "avgpool" puts an
    average-pool of the same geometry in its place (affine in eval mode). Raises ConfigError on an unknown name.
    """
    if name not in DEPTHS:
        raise ConfigError(f"network: unknown ResNet {name!r}; allowed are {', '.join(DEPTHS)}")
    if linear not in (None, "maxpool", "avgpool"):
        raise ConfigError(f"linear: {linear!r} given; maxpool, avgpool or null is allowed")
    if block not in BLOCKS:
        raise ConfigError(f"block: {block!r} given; allowed are {', '.join(BLOCKS)}")
    if norm not in NORMS:
        raise ConfigError(f"norm: {norm!r} given; allowed are {', '.join(NORMS)}")
    model = ResNet(BLOCKS[block], DEPTHS[name], num_classes=10, norm_layer=NORMS[norm])
    if stem not in STEMS:
        raise ConfigError(f"stem: {stem!r} given; allowed are {', '.join(STEMS)}")
    kernel, stride, maxpool = STEMS[stem]
    model.conv1 = nn.Conv2d(1, 64, kernel, stride, kernel // 2, bias=False)
    if not maxpool:
        model.maxpool = nn.Identity()
    if linear:
        for module in list(model.modules()):
            for child, value in module.named_children():
                if isinstance(value, nn.ReLU):
                    setattr(module, child, nn.Identity())
    if linear == "avgpool" and maxpool:
        model.maxpool = nn.AvgPool2d(kernel_size=3, stride=2, padding=1)
    if block == "homotopy":
        set_skip_strength(model, t)
    return model


def skip_strengths(model: nn.Module) -> dict[str, float]:
    """t of every submodule that has one, by its path."""
    return {
        path: float(module.t) for path, module in model.named_modules() if isinstance(module, HomotopyBlock | SkipCNN)
    }


def set_skip_strength(model: nn.Module, t: float) -> None:
    """Set t in every block of `model`, in place: a captured CUDA graph follows it."""
    check_strength(t)
    for module in model.modules():
        if isinstance(module, HomotopyBlock | SkipCNN):
            module.t.fill_(t)


def remove_skips(model: nn.Module) -> nn.Module:
    """A copy of `model` without skip connections: no add, no projection, no t; the same function.

    Raises SkipError, naming the blocks, where a t is not 0.
    """
    held = {path: t for path, t in skip_strengths(model).items() if t != 0}
    if held:
        named = ", ".join(f"{path or 'network'} (t = {t:g})" for path, t in held.items())
        raise SkipError(f"skips can be removed at t = 0 only; not 0 in: {named}; train with a schedule that ends at 0")
    model = copy.deepcopy(model)
    if isinstance(model, SkipCNN):
        model.shares = {}
    for path, block in list(model.named_modules()):
        if isinstance(block, HomotopyBlock):
            model.set_submodule(path, _plain(block))
    return model


def _plain(block: HomotopyBlock) -> nn.Sequential:
    names = ("conv1", "bn1", "relu", "conv2", "bn2", "relu2")
    return nn.Sequential(OrderedDict((name, getattr(block, name)) for name in names))


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode with every BatchNorm that follows a convolution folded into it.

    The pairs are those named convX/bnX or standing side by side in an nn.Sequential.
    """
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        for (conv_name, conv), (bn_name, bn) in itertools.pairwise(list(module.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, bn))
                setattr(module, bn_name, nn.Identity())
    return model


class CroppedConv2d(nn.Conv2d):
    """A convolution whose kernel was cropped to the taps that meet its input; for one input size only."""

    input_size: tuple[int, int]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if tuple(x.shape[-2:]) != self.input_size:
            raise SkipError(
                f"input of {tuple(x.shape[-2:])} given to a convolution whose dead taps were removed "
                f"for {self.input_size}; crop the network again for this input size"
            )
        return super().forward(x)


def crop_dead_taps(model: nn.Module, input_shape: tuple[int, int, int]) -> nn.Module:
    """A copy of `model` whose kernels keep only the taps that meet the input, for `input_shape` (C, H, W).

    On a 1x1 map a 3x3 kernel with padding 1 has one live tap. The function and the gradients of what is kept are
    unchanged; other input sizes are refused with SkipError.
    """
    model = copy.deepcopy(model)
    sizes = _convolution_inputs(model, input_shape)
    for path, size in sizes.items():
        convolution = model.get_submodule(path)
        if (cropped := _cropped(convolution, size)) is not None:
            model.set_submodule(path, cropped)
    return model


def _convolution_inputs(model: nn.Module, input_shape: tuple[int, int, int]) -> dict[str, tuple[int, int]]:
    """Height and width of what each convolution of `model` reads."""
    sizes: dict[str, tuple[int, int]] = {}

    def note(path):
        return lambda _, inputs: sizes.__setitem__(path, tuple(inputs[0].shape[-2:]))

    hooks = [
        module.register_forward_pre_hook(note(path))
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    training = model.training
    parameter = next(model.parameters())
    with torch.no_grad():
        model.eval()(torch.zeros(1, *input_shape, dtype=parameter.dtype, device=parameter.device))
    model.train(training)
    for hook in hooks:
        hook.remove()
    return sizes


def _live(size: int, kernel: int, stride: int, padding: int) -> tuple[int, int, int]:
    """First and past-last tap that ever meets the input along one axis, and the padding that is left."""
    steps = (size + 2 * padding - kernel) // stride + 1
    taps = [k for k in range(kernel) if any(0 <= o * stride + k - padding < size for o in range(steps))]
    taps = taps or range(kernel)  # every output meets padding only: nothing to gain
    first, last = min(taps), max(taps) + 1
    return first, last, padding - first


def _cropped(convolution: nn.Conv2d, size: tuple[int, int]) -> CroppedConv2d | None:
    """The cropped convolution, or None where every tap is live or the crop cannot be written as one."""
    if convolution.dilation != (1, 1) or convolution.padding_mode != "zeros":
        return None
    if isinstance(convolution.padding, str) or type(convolution) is not nn.Conv2d:
        return None
    axes = list(zip(size, convolution.kernel_size, convolution.stride, convolution.padding, strict=True))
    live = [_live(*axis) for axis in axes]
    kernel = tuple(last - first for first, last, _ in live)
    if kernel == convolution.kernel_size:
        return None
    padding = tuple(pad for _, _, pad in live)
    for (side, old, stride, pad), new, left in zip(axes, kernel, padding, strict=True):
        if left < 0 or (side + 2 * left - new) // stride != (side + 2 * pad - old) // stride:
            return None
    cropped = CroppedConv2d(
        convolution.in_channels,
        convolution.out_channels,
        kernel,
        convolution.stride,
        padding,
        groups=convolution.groups,
        bias=convolution.bias is not None,
        device="meta",
    )
    (top, bottom, _), (left, right, _) = live
    weight = convolution.weight.detach()[:, :, top:bottom, left:right].clone(memory_format=torch.contiguous_format)
    cropped.weight = nn.Parameter(weight, requires_grad=convolution.weight.requires_grad)
    if convolution.bias is not None:
        cropped.bias = convolution.bias
    cropped.input_size = size
    return cropped.train(convolution.training)

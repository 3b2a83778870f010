"""Skip strength t: what a block computes, which networks take it, who sets it."""

import pickle

import pytest
import timm
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from samples import Residual, unsettled
from test_recursion import property_test
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

from skipfold.errors import ConfigError, InputShapeError, NoSkipsError, SkipError
from skipfold.folding import fold_affine
from skipfold.homotopy import (
    HomotopyBlock,
    Skip,
    StrengthScheduler,
    insert_skips,
    set_skip_strength,
    skip_strengths,
    skips,
    to_homotopy,
)
from skipfold.removal import remove_skips
from skipfold.resnet import resnet
from skipfold.schedules import Schedule


def block(t: float, projection: bool = False) -> HomotopyBlock:
    downsample = nn.Sequential(nn.Conv2d(3, 4, 1, 2, bias=False), nn.BatchNorm2d(4)) if projection else None
    basic = BasicBlock(3, 4 if projection else 3, 2 if projection else 1, downsample)
    made = HomotopyBlock(basic, Skip(t))
    return unsettled(made)


def branches(made: HomotopyBlock, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """F(x) and skip(x), step by step."""
    residual = made.bn2(made.conv2(F.relu(made.bn1(made.conv1(x)))))
    return residual, x if made.downsample is None else made.downsample(x)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_block_weighs_residual_and_skip(t, projection):
    made, x = block(t, projection), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    residual, skip = branches(made, x)
    strength = float(made.skip.t)  # 0.9 is held in float32
    torch.testing.assert_close(made(x), F.relu((1 - strength) * residual + strength * skip), rtol=0, atol=1e-12)


def test_half_is_half_the_ordinary_block():
    made, x = block(0.5), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    residual, skip = branches(made, x)
    torch.testing.assert_close(made(x), F.relu(residual + skip) / 2, rtol=0, atol=1e-14)


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
    assert [key for key in model.state_dict() if key.endswith(".t")] == [f"{path}.t" for path in places]


@pytest.mark.parametrize("t", [-0.1, 1.1, float("nan"), "0.5", None, True])
def test_strength_outside_0_to_1_is_refused(t):
    model = resnet("resnet18")
    with pytest.raises(ConfigError, match="from 0"):
        set_skip_strength(model, t)
    assert set(skip_strengths(model).values()) == {0.5}


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


@property_test(100)
@given(st.floats(0, 1), st.sampled_from(["convex", "variance"]), st.booleans())
def test_weights_of_a_skip(t, weights, normalize):
    skip = Skip(t, weights, normalize).double()
    t = float(skip.t)
    a, b = (1 - t, t) if weights == "convex" else ((1 - t * t) ** 0.5, t)
    gain = max(a, b) if normalize else 1
    branch, skipped = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(skip(branch, skipped), (a * branch + b * skipped) / gain, rtol=0, atol=1e-12)
    assert torch.equal(Skip(0.0, weights, normalize).double()(branch, skipped), branch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("weights", "least"), [("convex", 0.005), ("variance", (1 - 0.995**2) ** 0.5)])
def test_small_weights_hold_in_low_precision(weights, least, dtype):
    skip = Skip(0.995, weights).to(dtype)
    assert skip.t.dtype == torch.float32
    torch.testing.assert_close(skip(*torch.eye(2, dtype=dtype)), torch.tensor([least, 0.995], dtype=dtype))


@pytest.mark.parametrize(("weights", "normalize"), [("convex", False), ("convex", True), ("variance", False)])
def test_autocast_may_give_the_two_sides_different_dtypes(weights, normalize):
    linear, x = nn.Linear(4, 4), torch.rand(3, 4)
    for t in (0.0, 0.25, 0.9):
        skip = Skip(t, weights, normalize)
        with torch.autocast("cpu", torch.bfloat16):
            residual = linear(x)
            assert residual.dtype == torch.bfloat16
            found = skip(residual, x), skip(x, residual)
        for sides, y in zip(((residual, x), (x, residual)), found, strict=True):
            torch.testing.assert_close(y, skip(*(side.float() for side in sides)), rtol=0.01, atol=0.01)


def test_a_traced_skip_follows_its_strength():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.skip = Skip(0.25)

        def forward(self, x):
            return self.skip(2 * x, x)

    traced, x = torch.fx.symbolic_trace(Block()), torch.randn(3)
    traced.get_submodule("skip").t.fill_(1.0)
    assert torch.equal(traced(x), x)


@pytest.mark.parametrize(("weights", "t"), [("convex", 0.5), ("variance", 0.5**0.5)])
def test_normalized_at_equal_weights_is_the_original(weights, t):
    model = unsettled(torchvision.models.resnet18(num_classes=10))
    homotopy, certificate = to_homotopy(model, (3, 32, 32), t=t, weights=weights, normalize=True)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(homotopy(x), model(x), rtol=0, atol=1e-6)  # t = 1/sqrt(2) is held in float32
    assert certificate.max_error < 1e-9 and certificate.repeated_error < 1e-9 and certificate.exported_error < 1e-5
    assert certificate.additions == 8
    assert not skips(model)


class Plain(nn.Module):
    """Two skips in one forward, one of them a projection, and a sum of two equal branches, which is none."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))

    def forward(self, x):
        one, two, three, four, left, right = self.layers
        x = x + two(F.gelu(one(x)))
        x += torch.tanh(x)
        x = three(x).add(four(F.gelu(one(x))))
        return left(x) + right(x)

    def at(self, x, t):
        one, two, three, four, left, right = self.layers
        x = t * x + (1 - t) * two(F.gelu(one(x)))
        x = x + torch.tanh(x)
        x = t * three(x) + (1 - t) * four(F.gelu(one(x)))
        return left(x) + right(x)


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
def test_skips_of_your_own_network_are_found(t):
    model = Plain().double()
    homotopy, _ = to_homotopy(model, (6,), t=t)
    x = torch.randn(5, 6, dtype=torch.float64)
    assert skip_strengths(homotopy) == {"skip": t, "skip_1": t}
    torch.testing.assert_close(homotopy(x), model.at(x, t), rtol=0, atol=1e-12)


class AddsInARow(nn.Module):
    """As a transformer's block does; the third addition adds the same input once more."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        once = x + self.first(x)
        return once + self.second(once) + once


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_additions_in_a_row_have_a_strength_each(t):
    model = AddsInARow().double()
    homotopy, certificate = to_homotopy(model, (6,), t=t)
    assert len(skips(homotopy)) == certificate.additions == 3
    x = torch.randn(5, 6, dtype=torch.float64)
    once = (1 - t) * model.first(x) + t * x
    twice = (1 - t) * model.second(once) + t * once
    torch.testing.assert_close(homotopy(x), (1 - t) * twice + t * once)


class Add(nn.Module):
    def forward(self, a, b):
        return a + b


class AddsByAPart(nn.Module):
    def __init__(self, add):
        super().__init__()
        self.one, self.two, self.add = nn.Linear(6, 6), nn.Linear(6, 6), add

    def forward(self, x):
        return self.add(x, self.two(self.one(x).relu()))


class AddsByKeyword(AddsByAPart):
    def forward(self, x):
        return self.add(a=self.two(self.one(x).relu()), b=x)


def test_a_part_may_do_the_adding():
    add = Add()
    model = nn.Sequential(AddsByAPart(add), AddsByKeyword(add)).double()
    homotopy, certificate = to_homotopy(model, (6,), t=0.25)
    assert skip_strengths(homotopy) == {"0.skip": 0.25, "1.skip": 0.25} and certificate.additions == 2
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = x
    for block in model:
        expected = 0.25 * expected + 0.75 * block.two(block.one(expected).relu())
    torch.testing.assert_close(homotopy(x), expected, rtol=0, atol=1e-12)
    set_skip_strength(homotopy, 0.0)
    plain, certificate = remove_skips(homotopy, (6,))
    assert certificate.additions == 0 and not [m for m in plain.modules() if isinstance(m, Add)]


class NamesArguments(AddsByAPart):
    def forward(self, x):
        return torch.add(other=x, input=self.two(self.one(x).relu()))


def test_an_addition_may_name_what_it_adds():
    model, x = NamesArguments(None).double(), torch.randn(5, 6, dtype=torch.float64)
    homotopy, _ = to_homotopy(model, (6,), t=0.25)
    torch.testing.assert_close(homotopy(x), 0.25 * x + 0.75 * model.two(model.one(x).relu()), rtol=0, atol=1e-12)


def test_a_part_is_not_taken_for_an_addition_by_its_name():
    part = nn.Bilinear(6, 6, 6)
    with pytest.raises(SkipError, match="no skip connection found"):
        insert_skips(AddsByAPart(part))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.linear(x) if x.sum() > -1e9 else x


def test_what_torch_fx_cannot_read_is_named_unless_it_adds_nothing():
    with pytest.raises(SkipError, match=r"1: torch\.fx cannot read this Branching .*name it in leave"):
        to_homotopy(nn.Sequential(nn.Linear(4, 4), Branching()), (4,))
    both = nn.Sequential(torchvision.models.resnet.BasicBlock(3, 3), nn.Flatten(), nn.Linear(48, 4), Branching())
    homotopy, _ = to_homotopy(both.eval(), (3, 4, 4), leave=["3"], export=False)
    assert list(skips(homotopy)) == ["0.skip"]
    with pytest.raises(SkipError, match=r"torch\.export does not take the network .*use export=False"):
        to_homotopy(both, (3, 4, 4), leave=["3"])


def test_a_module_to_leave_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"leave: no module at layer9; paths as named_modules gives"):
        to_homotopy(torchvision.models.resnet18(num_classes=2).eval(), (3, 32, 32), leave=["layer1.0", "layer9"])


def test_a_block_run_twice_has_its_strength_both_times():
    block = Residual(nn.Linear(4, 4))
    model = nn.Sequential(block, nn.Tanh(), block).double()
    x = torch.randn(3, 4, dtype=torch.float64)

    def at(x, t):
        return t * x + (1 - t) * block.branch(x)

    homotopy, _ = to_homotopy(model, (4,), t=0.25)
    assert homotopy[0] is homotopy[2] and skip_strengths(homotopy) == {"0.skip": 0.25}
    torch.testing.assert_close(homotopy(x), at(at(x, 0.25).tanh(), 0.25), rtol=0, atol=1e-12)
    with pytest.raises(SkipError, match="no skip connection found"):
        to_homotopy(model, (4,), leave=["2"])


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, mask=None):
        if mask is not None:
            x = x * mask
        return x + self.linear(x)


class Masking(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Masked(), Masked()])

    def forward(self, x, mask=None):
        for block in self.blocks:
            x = block(x, mask)
        return x


@pytest.mark.parametrize("kind", [Masked, Masking])
def test_an_optional_input_is_as_the_network_gives_it(kind, capsys):
    model, x = kind(), torch.randn(3, 4)
    homotopy, _ = to_homotopy(model, (4,), normalize=True)
    for made in (homotopy, pickle.loads(pickle.dumps(homotopy)), fold_affine(model, (4,))[0]):
        torch.testing.assert_close(made(x, None), model(x))
        with pytest.raises(SkipError, match="mask: given to a module that was read with mask=None; leave it out"):
            made(x, torch.ones(4))
    assert "Traceback" not in capsys.readouterr().err


def test_a_forward_of_the_instance_is_refused_by_name():
    model = nn.Sequential(Residual(nn.Linear(4, 4)), BasicBlock(1, 1))
    for place, block in enumerate(model):
        block.forward = lambda x, block=block: type(block).forward(block, x)
        with pytest.raises(SkipError, match=rf"^{place}: .*its forward was assigned to the instance"):
            insert_skips(model)
        del block.forward


def test_a_skip_takes_one_shape_only():
    with pytest.raises(SkipError, match=r"F of shape \[3, 1\] and skip of \[3, 4\] given; one shape is allowed"):
        Skip()(torch.ones(3, 1), torch.ones(3, 4))


class NoResidual(Masked):
    def forward(self, x):
        return self.linear(x) + self.linear(x)


def test_additions_that_are_no_skips_are_named():
    with pytest.raises(NoSkipsError, match=r"no skip connection found.*; other additions are in 0"):
        to_homotopy(nn.Sequential(NoResidual()), (4,))


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_full_backward_hook"])
def test_hooks_are_not_lost_silently(hook):
    model = Plain()
    getattr(model, hook)(lambda *_: None)
    with pytest.raises(SkipError, match="network: has hooks"):
        to_homotopy(model, (6,))


@pytest.mark.parametrize(
    ("model", "shape"),
    [(torchvision.models.vgg11(num_classes=3, init_weights=False), (3, 32, 32)), (nn.Linear(4, 4), (4,))],
)
def test_a_network_without_skips_is_refused(model, shape):
    with pytest.raises(SkipError, match="no skip connection found"):
        to_homotopy(model.eval(), shape)


def test_bad_arguments_are_refused():
    model = torchvision.models.resnet18(num_classes=2).eval()
    for arguments, part in (({"t": 2}, "t: 2 given"), ({"weights": "equal"}, "allowed are convex, variance")):
        with pytest.raises(ConfigError, match=part):
            to_homotopy(model, (3, 32, 32), **arguments)
    with pytest.raises(InputShapeError, match="input of shape"):
        to_homotopy(model, (1, 32, 32))
    homotopy, _ = to_homotopy(model, (3, 32, 32), export=False)
    with pytest.raises(SkipError, match=r"strengths already, in layer1\.0\.skip"):
        to_homotopy(homotopy, (3, 32, 32))
    with pytest.raises(ConfigError, match=r"no Skip at layer9; there are layer1\.0\.skip"):
        set_skip_strength(homotopy, {"layer9": 0.5})


def test_pretrained_weights_load_and_t_is_saved():
    plain = torchvision.models.resnet18(num_classes=2)
    homotopy = insert_skips(torchvision.models.resnet18(num_classes=2), t=0.25)
    homotopy.load_state_dict(plain.state_dict())
    assert torch.equal(homotopy.layer3[0].conv1.weight, plain.layer3[0].conv1.weight)
    assert set(skip_strengths(homotopy).values()) == {0.25}
    other = insert_skips(torchvision.models.resnet18(num_classes=2), t=0.75)
    other.load_state_dict(homotopy.state_dict())
    assert set(skip_strengths(other).values()) == {0.25}


def test_scheduler_sets_t_globally_or_by_block_and_resumes():
    model = resnet("resnet18")
    scheduler = StrengthScheduler(model, Schedule("linear", 0.8, length=4))
    seen = []
    for _ in range(6):
        seen.append(skip_strengths(model)["layer4.1.skip"])
        scheduler.step()
    assert seen == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0, 0.0])
    by_block = {"layer1.0.skip": Schedule(length=2), "layer4.0.skip": lambda time: 0.25}
    resumed = StrengthScheduler(model, by_block)
    resumed.load_state_dict({"time": 1})
    assert skip_strengths(model) == pytest.approx(
        dict.fromkeys(skip_strengths(model), 0.0) | {"layer1.0.skip": 0.45, "layer4.0.skip": 0.25}
    )
    assert resumed.state_dict() == {"time": 1}


@pytest.mark.parametrize("make", [torchvision.models.resnet18, Plain])
def test_every_layer_keeps_its_own_mode(make):
    model = make().train()
    frozen = {path for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d | nn.Linear)}
    for path in frozen:
        model.get_submodule(path).eval()
    converted = insert_skips(model)
    assert frozen == {path for path, module in converted.named_modules() if not module.training} != set()
    assert not any(module.training for module in insert_skips(make().eval()).modules())


def test_strengths_of_a_network_without_any_are_refused():
    with pytest.raises(NoSkipsError, match="no skip strength to set; convert it with to_homotopy"):
        set_skip_strength(torchvision.models.resnet18(), 0.3)


def test_a_state_without_its_time_and_a_path_for_paths_are_refused():
    with pytest.raises(ConfigError, match=r"state: \{\} given"):
        StrengthScheduler(block(0.5), Schedule()).load_state_dict({})
    with pytest.raises(ConfigError, match=r"leave: 'linear' given; a list of paths is allowed"):
        to_homotopy(Masked(), (4,), leave="linear")


def test_a_scheduler_that_would_set_nothing_is_refused():
    with pytest.raises(SkipError, match="no skip strength to set; convert it with to_homotopy"):
        StrengthScheduler(torchvision.models.resnet18(), Schedule())
    for schedule in ([0.9, 0.5], {"skip": 0.5}):
        with pytest.raises(ConfigError, match="given; a callable of the time is allowed"):
            StrengthScheduler(block(0.5), schedule)


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_lightning_callback_follows_the_schedule(interval, tmp_path):
    import pytorch_lightning as pl

    from skipfold.lightning import HomotopyCallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.seen = insert_skips(Plain(), t=0.5), []

        def training_step(self, batch, _):
            self.seen.append(skip_strengths(self)["net.skip"])
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    module = Module()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 6)), batch_size=2)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=3,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[HomotopyCallback(Schedule("linear", 0.9, length=2 if interval == "epoch" else 5), interval)],
    )
    trainer.fit(module, loader)
    expected = [0.9, 0.9, 0.45, 0.45, 0, 0] if interval == "epoch" else [0.9, 0.72, 0.54, 0.36, 0.18, 0]
    assert module.seen == pytest.approx(expected)


@pytest.mark.parametrize("name", ["resnet18", "resnet50d", "resnext50_32x4d", "seresnet50"])
def test_timms_resnets_take_a_strength(name):
    model = timm.create_model(name, num_classes=5).eval()
    homotopy, certificate = to_homotopy(model, (3, 32, 32), t=0.25, export=False)
    blocks = {"resnet18": 8}.get(name, 16)
    assert len(skips(homotopy)) == blocks == certificate.additions
    homotopy.load_state_dict(model.state_dict())

"""The paper's networks by name: shapes, counts, which of them are affine, and reproducible initial values."""

import inspect
import json

import pytest
import torch
from torch import nn

from skipfold import homotopy
from skipfold.collapse import affine_residual
from skipfold.errors import ConfigError
from skipfold.homotopy import skip_strengths
from skipfold.networks import AFFINE, INPUT_SHAPE, NETWORKS, PUBLISHED_AS_AFFINE, build, initialize, skip_cnn
from skipfold.replication import config, experiments
from skipfold.resnet import STEMS

PARAMETERS = {
    "perceptron": 7840,
    "cnn3": 8 * 9 + 8 + 8 * 8 * 9 + 8 + 10 * 8 * 784 + 10,
    "resnet18": 11_175_370,
    "resnet34": 21_283_530,
    "resnet34_linear_maxpool": 21_283_530,
    "resnet34_linear_avgpool": 21_283_530,
}


@pytest.fixture(scope="module")
def networks():
    return {name: build(name) for name in NETWORKS}


@pytest.mark.parametrize("name", NETWORKS)
def test_images_to_ten_logits(networks, name):
    model = networks[name].eval()
    with torch.no_grad():
        logits = model(torch.rand(2, *INPUT_SHAPE))
    assert logits.shape == (2, 10) and logits.dtype == torch.float32
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(networks, name):
    assert sum(p.numel() for p in networks[name].parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_affine_networks_are_named_as_such(networks, name):
    residual = affine_residual(networks[name], INPUT_SHAPE, probes=2)
    assert (residual < 1e-10) == (name in AFFINE)
    if name == PUBLISHED_AS_AFFINE:
        assert residual > 1e-3


@pytest.mark.parametrize("name", ["perceptron", "cnn3", "resnet18"])
def test_initial_values_depend_on_the_generator_alone(name):
    first, again, other = (
        build(name, generator=torch.Generator().manual_seed(seed)).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_no_network_of_a_trial_is_read_by_torch_fx(monkeypatch):
    # It patches nn.Module for every thread, and networks are drawn in threads while others run.
    def forbidden(module):
        raise AssertionError(f"torch.fx read {type(module).__name__}")

    monkeypatch.setattr(homotopy, "own_graph", forbidden)
    settings = config.load("paper")
    trials = [trial for name in experiments.names(settings) for trial in experiments.trials(settings, name)]
    different = {(trial.network, json.dumps(trial.options)): trial for trial in trials if trial.t == 0.9}
    assert any("size" in trial.options for trial in different.values())
    for trial in different.values():
        build(trial.network, trial.options)


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    build("cnn3")
    assert torch.rand(1) == expected


@pytest.mark.parametrize("name", ["perceptron", "cnn3", "resnet18"])
def test_initial_values_spread_as_the_frameworks_do(networks, name):
    for path, module in networks[name].named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all(), path
            assert (module.running_mean == 0).all() and (module.running_var == 1).all(), path
        elif isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            weight = module.weight.detach()
            spread = (1 / (3 * weight[0].numel())) ** 0.5
            if name == "resnet18" and isinstance(module, torch.nn.Conv2d):
                spread = (2 / weight[:, 0].numel()) ** 0.5
            assert float(weight.std()) == pytest.approx(spread, rel=0.15), path
            if module.bias is not None:
                assert float(module.bias.detach().abs().max()) <= 3**0.5 * spread, path


def test_framework_initialisation_is_uniform_in_fan_in():
    weight = build("resnet18", {"init": "framework"}).layer4[1].conv2.weight.detach()
    bound = weight[0].numel() ** -0.5
    assert float(weight.abs().max()) <= bound
    assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.01)


@pytest.mark.parametrize("stem", STEMS)
def test_every_stem_gives_ten_logits(stem):
    model = build("resnet18", {"stem": stem}).eval()
    with torch.no_grad():
        assert model(torch.rand(1, *INPUT_SHAPE)).shape == (1, 10)
    assert isinstance(model.maxpool, torch.nn.MaxPool2d) == ("no_maxpool" not in stem)


@pytest.mark.parametrize("name", ["cnn3", "resnet18"])
def test_t_reaches_every_block(name):
    strengths = skip_strengths(build(name, {"t": 0.125}))
    assert strengths and set(strengths.values()) == {0.125}
    assert set(skip_strengths(build(name)).values()) == {0.5}


@pytest.mark.parametrize(
    "options",
    [{"padding": 0}, {"kernel": 5, "padding": 2}, {"stride": 2}, {"hidden": 1, "skips": ((0, 2),)}, {"width": 3}],
)
def test_options_of_the_recursion(options):
    model = build("cnn3", options)
    assert model(torch.rand(1, *INPUT_SHAPE)).shape == (1, 10)
    assert affine_residual(model, INPUT_SHAPE, probes=1) < 1e-10


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("resnet50",), "unknown network 'resnet50'"),
        (("cnn3", {"depth": 3}), "network cnn3: unknown option depth; allowed are t, width, kernel"),
        (("resnet34_linear_maxpool", {"linear": None}), "unknown option linear; allowed are t, block"),
        (("resnet18", {"linear": "none"}), "linear: 'none'"),
        (("resnet18", {"stem": "large"}), "stem: 'large'"),
        (("resnet18", {"stem": [7]}), r"stem: \[7\]"),
        (("resnet18", {"size": 11}), "size: 11 given; a whole number of at least 12"),
        (("resnet18", {"init": "zeros"}), "init: 'zeros'"),
        (("cnn3", {"t": 2}), "t: 2"),
        (("cnn3", {"hidden": -1}), "hidden: -1"),
        (("cnn3", {"width": "8"}), "channels of a layer: '8'"),
        (("cnn3", {"kernel": 99}), "layer 1 has a kernel of 99"),
        (("resnet18", {"t": -1}), "t: -1"),
        (("cnn3", {"activation": "relu"}), "activation: 'relu'"),
        (("cnn3", {"skips": ((2, 1),)}), r"skip \(2, 1\)"),
        (("perceptron", {"t": 0.5}), "network perceptron: unknown option t; allowed are bias, init"),
    ],
)
def test_unknown_names_and_options_are_refused(arguments, part):
    with pytest.raises(ConfigError, match=part):
        build(*arguments)


def test_a_layer_without_initial_values_is_refused():
    with pytest.raises(ConfigError, match=r"^1: PReLU has no initial values; add them to networks\.initialize"):
        initialize(nn.Sequential(nn.Linear(2, 2), nn.PReLU()), torch.Generator())


def test_every_affine_name_is_a_network():
    assert {*AFFINE, PUBLISHED_AS_AFFINE} <= set(NETWORKS)
    assert inspect.signature(skip_cnn).parameters["t"].default == 0.5

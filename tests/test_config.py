"""config: tiers, overrides, and every bad value refused in one line."""

import re
import shutil

import pandas as pd
import pytest
import torch
import yaml
from torch import nn

from skipfold import networks
from skipfold.errors import ConfigError
from skipfold.keys import get, parse, put, render, typed
from skipfold.replication import config, experiments, records

BAD = {
    "trials=0": "trials: 0 given",
    "trials=2.0": "trials: 2.0 given",
    "trials=two": "a whole number",
    "trials=100000": "trials: 100000 given; allowed is a whole number, at least 1 and at most 1000",
    "threads=100000": "threads: 100000 given",
    "shards=100000": "shards: 100000 given",
    "experiments.linear_comparison.epochs=1000000000": "at most 10000",
    "experiments.accuracy_vs_t_cnn3.t={step: 1.0e-9, stop: 1}": "step: 1e-09 given; allowed is a finite number",
    "tier=long": "tier: 'smoke' given, and 'long' among the keys",
    "extends=long": "extends: 'long' given; only a tier's file",
    "trails=3": "did you mean trials?",
    "device=gpu": "cuda:0",
    "store=''": "allowed is a text, not empty",
    "data_folder=''": "a text, not empty or null",
    "train_images=0": "train_images",
    "optimizer.linear.lr=0": "optimizer.linear.lr",
    "optimizer.linear.lr=1e-3": "as in 1.0e-3",
    "optimizer.linear.lr=.inf": "optimizer.linear.lr: inf given; allowed is a finite number, above 0",
    "optimizer.linear.lr=.nan": "optimizer.linear.lr: nan given",
    "timing.cell_seconds=.nan": "timing.cell_seconds: nan given",
    "optimizer.linear.nesterov=true": "unknown key optimizer.linear.nesterov",
    "experiments.linear_comparison.epochs=0": "experiments.linear_comparison.epochs: 0 given",
    "experiments.linear_comparison.t=-0.1": "at least 0 and at most 1",
    "experiments.linear_comparison.t=.nan": "nan",
    "experiments.linear_comparison.arms=[resnet50]": "resnet50",
    "experiments.accuracy_vs_t_cnn4.epochs=2": "accuracy_vs_t_cnn3",
    "experiments.accuracy_vs_t_perceptron={epochs: 2, t: [0]}": "unknown key experiments.accuracy_vs_t_perceptron",
    "experiments.accuracy_vs_t_cnn3.t=[0, 1.5]": "1.5 given",
    "experiments.accuracy_vs_t_cnn3.t=[0, half]": "'half' given",
    "experiments.accuracy_vs_t_cnn3.t=[]": "[] given",
    "experiments.schedule_comparison.epochs=1": "cannot end at 0",
    "experiments.schedule_comparison.shape=static": "linear, cosine, quadratic",
    "experiments.schedule_comparison.network=cnn3": "resnet34",
    "networks.perceptron.with=9": "network perceptron: unknown option with",
    "networks.cnn3.kernel=99": "kernel of 99",
    "networks.cnn3.with=9": "did you mean width?",
    "networks.cnn3.width=1000000": "smaller sizes are allowed",
    "networks.resnet.stem=large": "stem: 'large' given",
    "networks.resnet.block=add": "networks.resnet.block: 'add' given; allowed is homotopy",
    "networks=3": "a mapping",
    "sensitivity.assumptions=[{key: a.b, figure: linear_comparison, alternatives: [1]}]": "a.b",
    "sensitivity.assumptions=[{key: trials, figure: nothing, alternatives: [1]}]": "nothing",
    "sensitivity.assumptions=[{key: networks.cnn3, figure: linear_comparison, alternatives: [{with: 3}]}]": "width",
    "trials": "key=value",
}


@pytest.mark.parametrize("pair", BAD)
def test_bad_values_are_refused_in_one_line(pair):
    with pytest.raises(ConfigError) as caught:
        records.check(config.load("smoke", parse([pair])))
    assert BAD[pair] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_networks_and_schedules_are_those_of_the_core():
    avgpool = "accuracy_vs_t_resnet34_linear_avgpool"
    own = [
        f"experiments={{{avgpool}: {{epochs: 2, t: [0, 1]}}}}",
        "experiments.schedule_comparison.shape=stepped",
        "experiments.linear_comparison.arms=[shallow_linear, cnn3, perceptron]",
        "experiments.linear_comparison.per_arm={resnet18: {trials: 1}}",
    ]
    loaded = config.load("smoke", parse(own))
    assert {trial.network for trial in experiments.trials(loaded, avgpool)} == {"resnet34_linear_avgpool"}
    assert not config.published(avgpool).exists() and config.published("accuracy_vs_t_cnn3").is_file()
    scored = f"sensitivity.assumptions=[{{key: trials, figure: {avgpool}, alternatives: [1]}}]"
    with pytest.raises(ConfigError, match=f"{avgpool} has no published points"):
        config.load("smoke", parse([*own, scored]))


class Adds(nn.Module):
    def __init__(self, t: float = 0.5, width: int = 4, last: int = 10):
        super().__init__()
        self.first, self.last = nn.Linear(784, width), nn.Linear(width, last)

    def forward(self, x):
        y = self.first(x.flatten(1))
        return self.last(y + y.relu())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("{width: four}", "network adds: {'width': 'four'} given, which cannot be built and run (TypeError: "),
        ("{last: 9}", "network adds: gives (1, 9) for one image; allowed is (1, 10)"),
        ("{}", "network adds: its builder takes t, but no addition of it has a strength; add with"),
    ],
)
def test_a_network_of_one_s_own_is_tried_before_anything_is_trained(monkeypatch, options, named):
    monkeypatch.setitem(networks.NETWORKS, "adds", Adds)
    monkeypatch.setattr(config, "_validator", config._validator.__wrapped__)
    own = ["experiments.accuracy_vs_t_adds={epochs: 1, t: [0]}", f"networks.adds={options}"]
    settings = config.load("smoke", parse(own))
    monkeypatch.setattr(records, "_has_t", records._has_t.__wrapped__)
    with pytest.raises(ConfigError) as caught:
        records.records(settings, "accuracy_vs_t_adds")
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_tier_is_refused():
    with pytest.raises(ConfigError, match=r"smoke, quick, long, paper, auto, or a new one: write config/<tier>.yaml"):
        config.load("huge")


@pytest.mark.parametrize("tier", config.TIERS)
def test_every_tier_is_valid_and_has_every_experiment(tier):
    assert set(config.load(tier)["experiments"]) == set(experiments.TRAINED)


def test_a_tier_that_extends_another_differs_where_it_says_so():
    quick, long, paper = map(config.load, ("quick", "long", "paper"))
    assert config.files("quick") == [f"config/{name}.yaml" for name in ("config", "paper", "long", "quick")]
    assert quick["experiments"]["schedule_comparison"]["train_images"] == 8192
    assert long["experiments"]["schedule_comparison"] == paper["experiments"]["schedule_comparison"]
    assert long["experiments"]["accuracy_vs_t_cnn3"] == {"epochs": 2, "trials": 15, "t": {"step": 0.1, "stop": 1.0}}
    assert quick["experiments"]["accuracy_vs_t_cnn3"] == {**long["experiments"]["accuracy_vs_t_cnn3"], "trials": 5}
    assert quick["networks"] == long["networks"] == paper["networks"]


def place(folder, monkeypatch, **tiers):
    """The current folder becomes one whose config/ has such tiers beside ours."""
    shutil.copytree(config.root() / "config", folder / "config")
    for name in ("workflow", "results"):
        (folder / name).symlink_to(config.root() / name)
    for tier, text in tiers.items():
        (folder / "config" / f"{tier}.yaml").write_text(text)
    monkeypatch.chdir(folder)


def test_another_tier_is_a_file_and_leaves_out_what_is_null(tmp_path, monkeypatch):
    """That of config/README.md."""
    (own,) = re.findall(r"```yaml\n(.*?)```", (config.root() / "config" / "README.md").read_text(), re.DOTALL)
    place(tmp_path, monkeypatch, mine=own)
    loaded, quick = config.load("mine"), config.load("quick")
    assert config.files("mine") == [f"config/{name}.yaml" for name in ("config", "paper", "long", "quick", "mine")]
    assert config.resolve_tier("mine")[1] == "tier mine (asked for); it is what config/mine.yaml says"
    assert set(loaded["experiments"]) == set(quick["experiments"]) - {"schedule_comparison"}
    assert (loaded["batch_size"], loaded["trials"]) == (128, quick["trials"])
    assert loaded["experiments"]["accuracy_vs_t_cnn3"] == {"epochs": 2, "trials": 5, "t": {"step": 0.25, "stop": 1.0}}


@pytest.mark.parametrize(
    ("left_out", "said"),
    [
        (
            "schedule_comparision: null",
            "unknown key experiments.schedule_comparision; did you mean schedule_comparison?",
        ),
        ("accuracy_vs_t_perceptron: null", "unknown key experiments.accuracy_vs_t_perceptron"),
        ("linear_comparison: 3", "experiments.linear_comparison: 3 given"),
    ],
)
def test_an_experiment_that_is_left_out_by_a_wrong_name_is_told(tmp_path, monkeypatch, left_out, said):
    place(tmp_path, monkeypatch, mine=f"extends: smoke\nexperiments: {{{left_out}}}\n")
    with pytest.raises(ConfigError, match=re.escape(said)):
        config.load("mine")


@pytest.mark.parametrize("name", ["published", "auto", "a tier", ".hidden"])
def test_a_tier_is_not_named_like_other_folders_nor_with_a_space(tmp_path, monkeypatch, name):
    """Results of one named published would lie among the paper's points."""
    place(tmp_path, monkeypatch, **{name: "extends: quick\n"})
    assert config.tiers() == [*config.TIERS]


@pytest.mark.parametrize("base", ["long", "quick", "pages", "claims"])
def test_a_tier_cannot_extend_itself_nor_what_is_none(tmp_path, monkeypatch, base):
    place(tmp_path, monkeypatch, long=f"extends: {base}\n")
    said = "config/(long|quick).yaml: extends: '(.*)' given; allowed is a tier that does not extend this one: smoke, "
    with pytest.raises(ConfigError, match=said):
        config.load("long")


@pytest.mark.parametrize("content", [b"", b"- trials\n", b"trials: \xff\n", b"trials: [\n"])
def test_a_tier_s_file_that_holds_no_keys_is_refused_in_one_line(tmp_path, monkeypatch, content):
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "config.yaml").write_text("tier: smoke\n")
    (folder / "smoke.yaml").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^config/smoke.yaml: .*$"):
        config.load("smoke")


@pytest.mark.parametrize(("cuda", "tier"), [(True, "paper"), (False, "smoke")])
def test_auto_says_which_tier_why_and_how_to_get_another(monkeypatch, cuda, tier):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    found, note = config.resolve_tier("auto")
    assert found == tier
    assert f"tier {tier}" in note and "CUDA" in note and "TIER=quick" in note


def test_overrides_are_laid_over_key_by_key():
    loaded = config.load("smoke", parse(["experiments.linear_comparison.epochs=7", "trials=3"]))
    assert loaded["trials"] == 3
    assert loaded["experiments"]["linear_comparison"]["epochs"] == 7
    unchanged = "experiments.linear_comparison.t"
    assert get(loaded, unchanged) == get(config.load("smoke"), unchanged)


def test_rendered_overrides_are_read_back():
    import shlex

    values = {"trials": 3, "experiments": {"a b": {"t": [0.5, None]}}, "data_folder": "it's"}
    assert parse(shlex.split(render(values))) == values


def test_texts_that_snakemake_gives_are_values():
    given = {"t": ["0", "0.5", "null"], "drop_last": "true", "folder": "/a b", "glob": "*", "none": "", "trials": 3}
    read = {"t": [0, 0.5, None], "drop_last": True, "folder": "/a b", "glob": "*", "none": "", "trials": 3}
    assert typed({"inner": given, "store": "2024-13-45"}) == {"inner": read, "store": "2024-13-45"}


def test_put_leaves_the_original_alone():
    before = {"a": {"b": 1}}
    assert put(before, "a.b", 2) == {"a": {"b": 2}}
    assert get(before, "a.b") == 1


def test_every_key_of_the_schema_is_described():
    schema = yaml.safe_load((config.root() / "workflow" / "schemas" / "config.schema.yaml").read_text())
    definitions = schema["$defs"]

    def undescribed(node, path):
        for name, child in node.get("properties", {}).items():
            shared = definitions.get(child.get("$ref", "").removeprefix("#/$defs/"), {})
            told = "description" in child or "description" in shared
            # What an experiment or an arm may set for itself is described at the top.
            if not told and name not in schema["properties"]:
                yield f"{path}.{name}"
            yield from undescribed(child, f"{path}.{name}")

    missing = list(undescribed(schema, "config"))
    missing += [key for name, node in definitions.items() for key in undescribed(node, name)]
    assert missing == []


@pytest.mark.parametrize("model", ["resnet34", "resnet18", "cnn3", "shallow_linear", "shallow_leaky_relu"])
def test_paper_tier_has_the_published_values_of_t(model):
    name = f"accuracy_vs_t_{model}"
    published = pd.read_csv(config.root() / "results" / "published" / f"{name}.csv")["t"]
    trials = experiments.trials(config.load("paper"), name)
    assert sorted({trial.t for trial in trials}) == sorted(published.unique())
    assert {trial.epochs for trial in trials} == {2}
    assert len(trials) == 5 * published.nunique()

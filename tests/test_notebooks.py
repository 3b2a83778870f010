"""notebooks: thin, without outputs, and with the parameters that the core knows."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from skipfold.errors import ConfigError, StoreError
from skipfold.replication import config, study
from skipfold.replication.execute import execute
from skipfold.replication.statistics import STAMP
from skipfold.replication.tables import read_table

NOTEBOOKS = sorted((config.root() / "notebooks").glob("*.ipynb"))


def code(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize(("network", "has"), [("resnet34", True), ("resnet18", False)])
def test_published_points_are_shown_beside_their_own_network_alone(network, has):
    settings = config.load("smoke", {"experiments": {"schedule_comparison": {"network": network}}})
    published = study.published(study.Study("schedule_comparison", settings))
    assert (published is not None) == has


def test_there_is_one_for_every_study():
    assert {path.stem for path in NOTEBOOKS} == set(study.STUDIES)


def test_a_notebook_that_nothing_is_known_of_is_refused():
    with pytest.raises(ConfigError, match=r"notebook: 'rates' given; allowed are those of .*STUDIES"):
        study.run("rates", {"tier": "smoke"})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_thin_and_has_no_outputs(path):
    cells = code(path)
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    beside = [line for cell in cells[1:] for line in cell["source"] if line.strip()]
    assert len(beside) < 15


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_parameters_are_the_core_s(path):
    first = code(path)[0]
    assert first["metadata"]["tags"] == ["parameters"]
    namespace = {}
    exec("".join(first["source"]), namespace)
    del namespace["__builtins__"]
    assert sorted(namespace) == sorted(study.STUDIES[path.stem].parameters)


BAD = [
    ({"model": "vgg"}, "vgg"),
    ({"modle": "resnet18"}, "modle"),
    ({"tier": "huge"}, "huge"),
    ({"t_values": [0, 1.5]}, "1.5"),
    ({"t_values": "0, half"}, "half"),
    ({"t_values": float("nan")}, "nan"),
    ({"trials": 0}, "trials: 0"),
    ({"epochs": 0}, "epochs: 0"),
    ({"epochs": "many"}, "many"),
    ({"device": "gpu"}, "gpu"),
    ({"overrides": {"trails": 1}}, "trails"),
    ({"overrides": 3}, "mapping"),
    ({"results": 3}, "results: 3 given; the name of a folder"),
    ({"trials": np.int64(0)}, "int64(0) given"),
    ({"overrides": "{trials: 2"}, "no YAML"),
    ({"t_values": "[0, 0.5"}, "no YAML"),
    ({"t_values": "2024-13-45"}, "no YAML"),
]


@pytest.mark.parametrize(("parameters", "named"), BAD, ids=lambda value: str(value))
def test_bad_parameters_are_refused_before_anything_runs(monkeypatch, parameters, named):
    monkeypatch.setattr(study, "records", None)
    with pytest.raises(ConfigError) as caught:
        study.run("accuracy_vs_t", {"tier": "smoke", "model": "cnn3", **parameters})
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_results_that_cannot_be_written_are_refused_before_anything_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(study, "times", None)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="writable folder"):
        study.run("timing", {"tier": "smoke", "results": str(tmp_path / "file")})


def test_what_cannot_be_run_or_kept_is_refused_before_anything_runs(monkeypatch, tmp_path):
    monkeypatch.setattr("papermill.execute_notebook", None)
    (bad := tmp_path / "bad.ipynb").write_text("{")
    (file := tmp_path / "file").touch()
    for error, words, notebook, output in (
        (ConfigError, "is no notebook", bad, tmp_path / "out.ipynb"),
        (ConfigError, "is not a file", tmp_path / "missing.ipynb", tmp_path / "out.ipynb"),
        (ConfigError, "is a folder", NOTEBOOKS[0], tmp_path),
        (StoreError, "writable folder", NOTEBOOKS[0], file / "out.ipynb"),
    ):
        with pytest.raises(error, match=words):
            execute(notebook, output, {}, tmp_path / "logs")
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    "given", [[0.0, 0.5], "0, 0.5", "[0, 0.5]", (0, 0.5)], ids=["list", "text", "bracketed text", "tuple"]
)
def test_values_of_t_may_come_as_papermill_gives_them(given):
    _, settings = study.configure("accuracy_vs_t", {"tier": "smoke", "model": "cnn3", "t_values": given})
    assert settings["experiments"]["accuracy_vs_t_cnn3"]["t"] == [0, 0.5]


@pytest.mark.parametrize("given", [{"train_images": 640}, "train_images=640", '{"train_images": 640}'])
def test_other_keys_may_come_as_papermill_gives_them(given):
    _, settings = study.configure("timing", {"tier": "smoke", "overrides": given})
    assert settings["train_images"] == 640


def test_names_of_the_kernel_and_results_of_cells_are_no_parameters():
    namespace = {"tier": "smoke", "_i1": "x", "In": [], "Out": {}, "found": object(), "study": study}
    assert study.parameters("timing", namespace) == {"tier": "smoke"}


def test_a_table_is_shown_in_short():
    rows = [("cnn3", 1.23456, 2.3e-7, None), ("resnet18", 15978.112, 0.0, "needs CUDA")]
    table = pd.DataFrame(rows, columns=["network", "median_us", "max_difference", "remark"])
    shown = study.show(table.assign(batch=64, launch_us=float("nan"), **dict.fromkeys(STAMP, "x"))).data
    caption, heads, cells = (re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", shown) for tag in ("caption", "th", "td"))
    assert caption == ["batch 64"] and heads == list(table)
    assert cells == ["cnn3", "1.235", "2.3e-07", "", "resnet18", "15978", "0", "needs CUDA"]
    assert 'id="T_table"' in shown


def test_times_of_an_earlier_run_are_drawn_and_not_measured(monkeypatch, tmp_path):
    monkeypatch.setattr("skipfold.replication.timing.measure", None)
    measured = config.root() / "results" / "long" / "tables"
    found = study.run("timing", {"tier": "long", "measured": str(measured), "results": str(tmp_path)})
    pd.testing.assert_frame_equal(found.table, read_table(measured / "timing.csv"))
    assert [path.name for path in (tmp_path / "tables").iterdir()] == ["savings.csv"]
    assert (tmp_path / "tables" / "savings.csv").read_text() == (measured / "savings.csv").read_text()
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"{name}.{suffix}" for name in ("timing", "roofline") for suffix in ("svg", "png")
    }
    with pytest.raises(ConfigError, match=r"measured: .*timing.csv is not there"):
        study.run("timing", {"tier": "long", "measured": str(tmp_path / "tables")})

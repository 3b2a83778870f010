"""The smoke tier through Snakemake and papermill: one run in a copy of the repository, and what may befall it."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import papermill
import pytest
import torch

from skipfold.errors import NotebookError, StoreError
from skipfold.replication import claims, config, experiments, records, report, study, sweep
from skipfold.replication.__main__ import main
from skipfold.replication.execute import execute
from skipfold.replication.store import Store
from skipfold.replication.tables import read_table, write_table
from skipfold.replication.trial import Trial

PARTS = ("Snakefile", "config", "environment.yml", "notebooks", "profiles", "results/published", "src", "workflow")
SMOKE = ["--config", "tier=smoke"]


def copy(place):
    for part in PARTS:
        source = config.root() / part
        if source.is_dir():
            shutil.copytree(source, place / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, place / part)
    return place


def environment(place):
    """Of a shell in `place`: its own sources, this environment's programs."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    kept = {key: value for key, value in os.environ.items() if key != "SKIPFOLD_MNIST"}
    return kept | {"PATH": path, "PYTHONPATH": str(place / "src")}


def shell(place, *words):
    return subprocess.run(
        words, cwd=place, env=environment(place), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def snakemake(place, *words):
    return shell(place, "snakemake", *words)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """A copy of the repository in which `snakemake reproduce` has run; its folder and what was printed."""
    place = copy(tmp_path_factory.mktemp("smoke"))
    run = snakemake(place, "reproduce", *SMOKE)
    assert run.returncode == 0, run.stdout[-6000:]
    return place, run.stdout


@pytest.fixture
def bare(tmp_path):
    """A copy of the repository in which nothing has run."""
    return copy(tmp_path)


MLP = """

class Residual(nn.Module):
    def __init__(self, t):
        super().__init__()
        self.linear, self.skip = nn.Linear(16, 16), Skip(t)

    def forward(self, x):
        return self.skip(self.linear(x).relu(), x)


def mlp(t: float = 0.5, depth: int = 1) -> nn.Sequential:
    blocks = [Residual(t) for _ in range(depth)]
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.LayerNorm(16), *blocks, nn.Linear(16, CLASSES))


NETWORKS["mlp"] = mlp
"""


def test_another_network_is_a_builder_and_a_key_and_results_may_lie_elsewhere(bare, tmp_path_factory):
    """As the README says under "Extend it"; keys of Snakemake's command line may be nested, or null."""
    with (bare / "src" / "skipfold" / "networks.py").open("a") as file:
        file.write(MLP)
    elsewhere = tmp_path_factory.mktemp("else where")
    own = "{accuracy_vs_t_mlp: {epochs: 2, t: [0, 0.5]}}"
    given = ["tier=smoke", "trials=1", "train_images=null", f"results={elsewhere}", f"experiments={own}"]
    given = ["--config", *given, "networks={mlp: {depth: 2}}"]
    run = snakemake(bare, f"{elsewhere}/smoke/figures/accuracy_vs_t_mlp.svg", *given)
    assert run.returncode == 0, run.stdout[-3000:]
    table = read_table(elsewhere / "smoke" / "tables" / "accuracy_vs_t_mlp_trials.csv")
    assert set(table["options"]) == {"depth=2"} and table["train_images"].isna().all()
    assert sorted(set(table["t"])) == [0.0, 0.5] and len(table) == 2 * 2
    write_table(claims.judge(elsewhere / "smoke"), elsewhere / "smoke" / "verdicts.csv")
    assert "Accuracy against t, mlp" in report.build(elsewhere / "smoke").read_text()


def test_everything_is_there(smoke):
    place, _ = smoke
    results = place / "results" / "smoke"
    names = [*experiments.TRAINED, "timing", "sensitivity"]
    expected = [f"figures/{name}.{suffix}" for name in [*names, "roofline"] for suffix in ("svg", "png")]
    expected += [f"tables/{name}.csv" for name in [*names, "roofline", "runtimes", "savings"]]
    expected += [f"tables/{name}_trials.csv" for name in experiments.TRAINED]
    expected += [f"notebooks/{name}.ipynb" for name in names]
    expected += ["tables/certificates.csv", "tables/ceiling.csv", "verdicts.csv", "report.html", "trials.jsonl.gz"]
    missing = [name for name in expected if not (results / name).is_file() or not (results / name).stat().st_size]
    assert missing == []


def test_the_tier_is_told_first_and_last(smoke):
    _, output = smoke
    note = config.resolve_tier("smoke")[1]
    assert output.count(note) == 2
    assert output.index(note) < output.index("Training ") < output.rindex(note)


def test_progress_is_in_the_log(smoke):
    place, output = smoke
    log = (place / "logs" / "smoke" / "train_accuracy_vs_t_cnn3_1_of_1.log").read_text()
    assert "cnn3 t=0.5 trial 2 epoch 2/2, accuracy" in log
    assert log.splitlines()[0] in output


def test_a_second_run_has_nothing_to_do(smoke):
    place, _ = smoke
    run = snakemake(place, "reproduce", *SMOKE)
    assert run.returncode == 0
    assert "Nothing to be done" in run.stdout


def test_a_run_in_more_parts_and_with_more_trials_times_nothing_again(smoke):
    place, _ = smoke
    run = snakemake(place, "reproduce", "-n", *SMOKE, "shards=2", "trials=3")
    assert run.returncode == 0
    assert "part 2 of 2" in run.stdout and "Timing prediction" not in run.stdout


def test_what_is_verified_is_made_first(bare):
    run = snakemake(bare, "verify", "reproduce", "-n", *SMOKE)
    said = re.findall(r"^Job \d+: (\w+)", run.stdout, re.MULTILINE)
    assert said.index("Verifying") > said.index("Writing") > said.index("Training")


@pytest.mark.parametrize("lost", ["tables/certificates.csv", "figures/linear_comparison.png"])
def test_what_was_deleted_is_made_again(smoke, tmp_path, lost):
    place, _ = smoke
    victim = place / "results" / "smoke" / lost
    victim.rename(tmp_path / "kept")
    run = snakemake(place, "reproduce", "-n", *SMOKE)
    (tmp_path / "kept").rename(victim)
    assert "Drawing linear_comparison" in run.stdout and "Training" not in run.stdout


def test_a_changed_source_runs_its_rules_again(smoke):
    place, _ = smoke
    source = place / "src" / "skipfold" / "replication" / "figures.py"
    text, times = source.read_text(), source.stat()
    source.write_text(text + "\n# changed\n")
    try:
        run = snakemake(place, "figures", "-n", *SMOKE)
    finally:
        source.write_text(text)
        os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "Drawing linear_comparison" in run.stdout and "Drawing timing" in run.stdout
    assert "Training" not in run.stdout and "Timing prediction" not in run.stdout


def test_a_key_of_one_experiment_runs_that_one_and_what_hangs_on_it(smoke):
    place, _ = smoke
    run = snakemake(place, "reproduce", "-n", *SMOKE, "experiments={accuracy_vs_t_cnn3: {t: [0, 1]}}")
    assert run.returncode == 0, run.stdout[-3000:]
    said = re.findall(r"^Job \d+: (.*)", run.stdout, re.MULTILINE)
    drawn = {text for text in said if text.startswith("Drawing")}
    trained = {text.split(",")[0] for text in said if text.startswith("Training")}
    assert drawn == {"Drawing accuracy_vs_t of cnn3"} and "Timing prediction" not in said
    assert trained == {"Training accuracy_vs_t_cnn3", "Training sensitivity"} and "Judging the claims" in said


def test_snakemake_s_own_report_is_made(smoke, tmp_path):
    place, _ = smoke
    run = snakemake(place, "--report", str(tmp_path / "report.html"), *SMOKE)
    assert run.returncode == 0, run.stdout[-3000:]
    page = (tmp_path / "report.html").read_text()
    assert "Linear networks" in page and "where a block gives" in page


def test_every_figure_is_drawn_again_without_training(smoke, monkeypatch, tmp_path):
    place, _ = smoke

    def forbidden(*_, **__):
        raise AssertionError("a trial is trained")

    monkeypatch.chdir(place)
    monkeypatch.setattr(sweep, "Bench", forbidden)
    monkeypatch.setattr(records, "images", forbidden)
    # From the packed records alone, as on another machine.
    store = Store(tmp_path / "trials")
    store.unpack(place / "results" / "smoke" / "trials.jsonl.gz")
    asked = {"tier": "smoke", "overrides": {"store": str(store.folder)}}
    for name in experiments.TRAINED:
        over_t = name.startswith(experiments.ACCURACY_VS_T)
        model = {"model": name.removeprefix(experiments.ACCURACY_VS_T)} if over_t else {}
        again = study.run("accuracy_vs_t" if over_t else name, {**asked, **model, "results": str(tmp_path / "results")})
        assert again.name == name
    for path in (place / "results" / "smoke" / "tables").glob("accuracy_vs_t*.csv"):
        assert (tmp_path / "results" / "tables" / path.name).read_bytes() == path.read_bytes()
    for path in (place / "results" / "smoke" / "figures").glob("accuracy_vs_t*.svg"):
        assert (tmp_path / "results" / "figures" / path.name).read_bytes() == path.read_bytes()


def test_what_was_made_belongs_together_and_an_environment_need_not_be_activated(smoke):
    place, _ = smoke
    command = [Path(sys.executable).parent / "snakemake", "verify", *SMOKE]
    bare = environment(place) | {"PATH": os.defpath}
    run = subprocess.run(command, cwd=place, env=bare, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0, run.stdout


def test_a_killed_run_goes_on_where_it_stopped(smoke, bare):
    done, _ = smoke
    target = "logs/smoke/trained/accuracy_vs_t_cnn3_1_of_1"
    arguments = ["snakemake", target, *SMOKE]
    with subprocess.Popen(
        arguments, cwd=bare, env=environment(bare), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as running:  # fmt: skip
        deadline = time.monotonic() + 120
        while not (stored := list(bare.glob("trials/*.json"))) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(running.pid, signal.SIGKILL)
    assert stored
    assert not (bare / target).exists()
    stored = {path: path.stat().st_mtime_ns for path in bare.glob("trials/*.json")}
    run = snakemake(bare, target, *SMOKE)
    assert run.returncode == 0, run.stdout
    assert f"{len(stored)} stored" in run.stdout
    assert {path: path.stat().st_mtime_ns for path in stored} == stored
    accuracies = [
        [
            [epoch["val_loss"] for epoch in json.loads(path.read_text())["epochs"]]
            for path in sorted((place / "trials").glob("*.json"))
            if '"accuracy_vs_t_cnn3"' in path.read_text() and (bare / "trials" / path.name).is_file()
        ]
        for place in (done, bare)
    ]
    assert accuracies[0]
    for whole, resumed in zip(*accuracies, strict=True):
        assert resumed == pytest.approx(whole, rel=1e-6)  # stacked with others, rounded otherwise


def test_parts_share_the_trials_of_an_experiment(bare, monkeypatch):
    monkeypatch.chdir(bare)
    for part in ("1/3", "2/3", "3/3"):
        assert main(["train", "accuracy_vs_t_cnn3", "--tier", "smoke", "--shard", part]) == 0
    wanted = experiments.trials(config.load("smoke"), "accuracy_vs_t_cnn3")
    assert {path.stem for path in bare.glob("trials/*.json")} == {trial.digest for trial in wanted}


def test_parts_keep_together_what_trains_together():
    """On a CPU 20 small networks are stacked in 3 groups of 7, 7 and 6; ResNets train alone."""
    trials = [Trial("e", "a", index, network) for network, n in (("cnn3", 20), ("resnet18", 3)) for index in range(n)]
    parts = [records.part(trials, (i, 4), torch.device("cpu")) for i in (1, 2, 3, 4)]
    assert [[trial.network for trial in part] for part in parts] == [
        ["cnn3"] * 7 + ["resnet18"],
        ["cnn3"] * 7 + ["resnet18"],
        ["cnn3"] * 6,
        ["resnet18"],
    ]
    assert sorted((t.network, t.index) for part in parts for t in part) == [(t.network, t.index) for t in trials]
    by_hand = [records.part(trials, (i, 2), torch.device("cpu"), side_by_side=20) for i in (1, 2)]
    assert [len(part) for part in by_hand] == [20, 3]


def test_a_corrupt_record_is_told_and_run_again(bare, monkeypatch, capsys):
    monkeypatch.chdir(bare)
    command = ["train", "accuracy_vs_t_shallow_linear", "--tier", "smoke"]
    assert main(command) == 0
    victim = sorted(bare.glob("trials/*.json"))[0]
    victim.write_text(victim.read_text()[:100])
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "corrupt" in output and "1 to train" in output
    assert json.loads(victim.read_text())["epochs"]


@pytest.mark.parametrize(
    ("target", "words", "named"),
    [
        ("reproduce", ["tier=smoke", "optimizer={resnet: {lr: -1}}"], "optimizer.resnet.lr: -1 given"),
        ("reproduce", ["tier=smoke", "results=Snakefile"], "writable folder"),
        ("reproduce", ["tier=quick", "data_folder=nowhere"], "train-images-idx3-ubyte"),
        ("verify", ["tier=smoke"], "1 problem in results/smoke"),  # by its job, whose failure is Snakemake's
    ],
)
def test_snakemake_refuses_bad_input_in_one_line(bare, target, words, named):
    run = snakemake(bare, target, "--config", *words)
    lines = [line for line in (run.stdout).splitlines() if line.startswith("error: ")]
    assert run.returncode != 0
    assert len(lines) == 1 and named in lines[0]
    assert "Traceback" not in run.stdout and "Finished trials" not in run.stdout
    assert not list(bare.glob("trials/*.json"))


def test_a_claim_that_cannot_be_judged_is_refused_before_the_run(bare):
    (bare / "config" / "claims.yaml").write_text("claims: [{id: mine}]\n")
    run = snakemake(bare, "reproduce", *SMOKE)
    (line,) = (line for line in run.stdout.splitlines() if line.startswith("error: "))
    assert run.returncode != 0 and "config/claims.yaml: claims.mine lacks title" in line
    assert "Training" not in run.stdout


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["train", "accuracy_vs_t_vgg", "--tier", "smoke"], "accuracy_vs_t_vgg"),
        (["train", "timing", "--tier", "huge"], "huge"),
        (["train", "linear_comparison", "--tier", "smoke", "--shard", "3/2"], "3/2"),
        (["train", "linear_comparison", "--tier", "smoke", "--config", "device=cuda"], "no CUDA device"),
        (["train", "linear_comparison", "--tier", "smoke", "--config", "train_images=5000"], "5000 training images"),
        (["where", "--tier", "smoke"], "make reproduce TIER=smoke"),
        (["pack", "missing/trials.jsonl.gz", "--tier", "smoke"], "missing/trials.jsonl.gz"),
        (["unpack", "Snakefile", "--tier", "smoke"], "Snakefile"),
        (["check", "--tier", "quick", "--config", "data_folder=nowhere"], "train-images-idx3-ubyte"),
        (["notebook", "notebooks/accuracy_vs_t.ipynb", "out.ipynb", "-p", "modle=cnn3"], "modle"),
        (["notebook", "notebooks/accuracy_vs_x.ipynb", "out.ipynb"], "accuracy_vs_x"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_command_line_refuses_bad_input_in_one_line(bare, monkeypatch, capsys, words, named):
    monkeypatch.chdir(bare)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(words) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0]
    assert not list(bare.glob("trials/*.json"))


def test_a_failed_notebook_is_one_line_and_no_result(bare, monkeypatch):
    monkeypatch.chdir(bare)
    monkeypatch.setenv("PYTHONPATH", str(bare / "src"))
    output = bare / "results" / "out.ipynb"
    notebook = Path("notebooks/accuracy_vs_t.ipynb")
    with pytest.raises(NotebookError, match="ConfigError: model: 'vgg' given"):
        execute(notebook, output, {"tier": "smoke", "model": "vgg"}, Path("logs"))
    assert not output.exists()
    assert (bare / "logs" / "out.ipynb").is_file()


def test_notebooks_of_one_name_may_run_at_once(tmp_path, monkeypatch):
    notebook = config.root() / "notebooks" / "timing.ipynb"

    def run(_, running, parameters, **__):
        Path(running).write_text(parameters["tier"])
        if parameters["tier"] == "long":  # a smoke run begins and ends before it is through
            execute(notebook, tmp_path / "smoke" / "timing.ipynb", {"tier": "smoke"}, tmp_path / "logs")

    monkeypatch.setattr(papermill, "execute_notebook", run)
    execute(notebook, tmp_path / "long" / "timing.ipynb", {"tier": "long"}, tmp_path / "logs")
    assert [(tmp_path / tier / "timing.ipynb").read_text() for tier in ("smoke", "long")] == ["smoke", "long"]
    assert not list((tmp_path / "logs").iterdir())


def test_a_full_disk_is_one_line_and_leaves_no_half_of_a_notebook(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "tables").mkdir()
    monkeypatch.setattr(claims, "judge", full)
    assert main(["judge", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "No space left on device); make room" in line
    monkeypatch.setattr(papermill, "execute_notebook", lambda _, running, *__, **___: Path(running).touch())
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(StoreError, match=r"out.ipynb: cannot be written \(No space"):
        execute(config.root() / "notebooks" / "timing.ipynb", tmp_path / "out.ipynb", {}, tmp_path / "logs")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["logs", "tables"]


def test_a_notebook_runs_by_papermill_alone(smoke, tmp_path):
    place, _ = smoke
    words = ["-p", "tier", "smoke", "-p", "model", "cnn3", "-p", "t_values", "0, 0.5"]
    run = shell(place, "papermill", "notebooks/accuracy_vs_t.ipynb", str(tmp_path / "out.ipynb"), *words)
    assert run.returncode == 0, run.stdout[-3000:]
    cells = json.loads((tmp_path / "out.ipynb").read_text())["cells"]
    shown = [kind for cell in cells for output in cell.get("outputs", []) for kind in output.get("data", {})]
    assert "image/png" in shown and "text/html" in shown


def test_papermill_alone_refuses_a_parameter_that_does_not_exist(smoke, tmp_path):
    place, _ = smoke
    run = shell(place, "papermill", "notebooks/timing.ipynb", str(tmp_path / "out.ipynb"), "-p", "modle", "cnn3")
    assert run.returncode != 0
    assert run.stdout.strip().splitlines()[-1].startswith("ConfigError: parameter: 'modle'")
    names = papermill.inspect_notebook(str(place / "notebooks" / "timing.ipynb"))
    assert "modle" not in names

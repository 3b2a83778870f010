# Defines the checked configuration, the paths, and the helpers that the rules share.

import ast
import shlex
import sys
from pathlib import Path

import skipfold.files
import skipfold.keys
import skipfold.replication.claims
import skipfold.replication.config
import skipfold.replication.experiments
import skipfold.replication.records
import skipfold.replication.sensitivity
import torch
import yaml
from skipfold.errors import SkipfoldError


def or_exit(call, *arguments):
    """What `call` gives; a SkipfoldError ends Snakemake with its one line."""
    try:
        return call(*arguments)
    except SkipfoldError as error:
        sys.exit(f"error: {error}")


# Jobs run with the Python of Snakemake, whether its environment is activated or not. What is set here takes the place of
# Snakemake's own `set`, without which a job that fails would end as its `tee` does: well.
shell.prefix(f"set -euo pipefail; export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH; ")

# Keys that differ from config/config.yaml come from the command line.
COMMON = yaml.safe_load(Path("config/config.yaml").read_text())
GIVEN = {
    key: value
    for key, value in skipfold.keys.typed(config).items()
    if key != "tier" and not (key in COMMON and value == COMMON[key])  # null of a key that is the tier's is given
}
TIER, NOTE = or_exit(skipfold.replication.config.resolve_tier, config["tier"])
SETTINGS = or_exit(skipfold.replication.config.load, TIER, GIVEN)
or_exit(skipfold.files.writable, skipfold.replication.config.folder(SETTINGS))
ON_CUDA = SETTINGS["device"].startswith("cuda") or (SETTINGS["device"] == "auto" and torch.cuda.is_available())

RESULTS = f"{SETTINGS['results']}/{TIER}"
LOGS = f"logs/{TIER}"
EXPERIMENTS = list(SETTINGS["experiments"])
MODELS = [name.removeprefix("accuracy_vs_t_") for name in EXPERIMENTS if name.startswith("accuracy_vs_t_")]
SCORED = ["sensitivity"] if SETTINGS["sensitivity"]["assumptions"] else []
FIGURES = expand(
    f"{RESULTS}/figures/{{name}}.{{suffix}}",
    name=[*EXPERIMENTS, "timing", "roofline", *SCORED],
    suffix=["svg", "png"],
)
CAPTIONS = expand(
    "workflow/report/{name}.rst",
    name={skipfold.replication.experiments.rule(Path(figure).stem) for figure in FIGURES},
)
OF_LINEAR = ["certificates", "ceiling"] if "linear_comparison" in EXPERIMENTS else []
TABLES = expand(
    f"{RESULTS}/tables/{{name}}.csv",
    name=[*EXPERIMENTS, *OF_LINEAR, "timing", "runtimes", "savings", "roofline", *SCORED],
) + expand(f"{RESULTS}/tables/{{name}}_trials.csv", name=EXPERIMENTS)
NOTEBOOKS = expand(f"{RESULTS}/notebooks/{{name}}.ipynb", name=[*EXPERIMENTS, "timing", *SCORED])


def sources(*modules):
    """Files of the replication that a rule depends on; Snakemake would see a change of the rule alone."""
    return [f"src/skipfold/replication/{module}.py" for module in modules]


def with_imports(*modules):
    """The same, and those of all of skipfold that they import."""
    found, left = set(), sources(*modules)
    while left:
        file = left.pop()
        found.add(file)
        for node in ast.walk(ast.parse(Path(file).read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("skipfold"):
                names = [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
                files = [f"src/{name.replace('.', '/')}.py" for name in names]
                left += [each for each in files if each not in found and Path(each).is_file()]
    return sorted(found)


CONFIG_FILES = or_exit(skipfold.replication.config.files, TIER)
TRAINING = CONFIG_FILES + with_imports("records")
SHOWING = CONFIG_FILES + sources("figures", "statistics", "study", "tables") + ["src/skipfold/skipfold.mplstyle"]
PAGE = sorted([*CAPTIONS, *map(str, Path("src/skipfold/replication/templates").iterdir())])


wildcard_constraints:
    experiment="|".join([*EXPERIMENTS, "sensitivity"]),
    model="|".join(MODELS) or "none",
    part=r"\d+",
    parts=r"\d+",


def trained(experiment):
    """Marks of the parts that the trials of an experiment are trained in."""
    parts = SETTINGS["shards"]
    return [f"{LOGS}/trained/{experiment}_{part}_of_{parts}" for part in range(1, parts + 1)]


def published(*experiments):
    """The paper's points of those experiments that it has."""
    tables = expand("results/published/{name}.csv", name=experiments)
    return [table for table in tables if Path(table).is_file()]


def overrides(*experiments):
    """Keys of the command line that a job on `experiments` hangs on: one that was run without them is run again."""
    shared = {key: value for key, value in GIVEN.items() if key not in ("shards", "experiments")}
    # The guesses are scored by the trials of every experiment; one that is null is none of this run's.
    own = {
        name: keys
        for name, keys in GIVEN.get("experiments", {}).items()
        if name in experiments or "sensitivity" in experiments or keys is None
    }
    return shared | ({"experiments": own} if own else {})


def with_keys(given):
    """The tier, and keys beside it, of a command as shell words."""
    return f"--tier {TIER}" + (f" --config {skipfold.keys.render(given)}" if given else "")


def configured(*experiments):
    """Tier and overrides of a command as shell words."""
    return with_keys(overrides(*experiments))


def parameters(*experiments, **own):
    """A notebook's parameters as shell words."""
    given = {"tier": TIER, "results": RESULTS, **own}
    return skipfold.keys.render(given | ({"overrides": overrides(*experiments)} if overrides(*experiments) else {}))


def trains(workflow):
    """Whether this run makes results, and does not only ask for what there is."""
    return bool(set(workflow.dag_settings.targets or ["reproduce"]) - {"quote", "verify"})


def check_before_training(workflow):
    """One line and no job where data, device or folders are missing, or a claim or an option cannot be judged; other
    machines check their own device."""
    if trains(workflow):
        or_exit(skipfold.replication.claims.load)
        or_exit(skipfold.replication.sensitivity.check, skipfold.replication.experiments.options(SETTINGS))
        or_exit(skipfold.replication.records.check, SETTINGS, workflow.local_exec)

"""Dependencies, lock and environment.yml agree, and the Makefile builds .venv only when it must."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = [ROOT / "requirements" / name for name in ("bootstrap.txt", "lock.txt")]


def pins(requirements: list[str]) -> dict[str, str]:
    """Versions by name; every requirement must be `name==version`."""
    found = dict(re.fullmatch(r"([a-z0-9-]+)==([0-9][0-9a-z.]*)", requirement).groups() for requirement in requirements)
    assert len(found) == len(requirements), "a package is pinned twice"
    return found


def locked(path: Path) -> list[tuple[Requirement, int]]:
    """The requirements of a lock, each with its number of hashes."""
    entries = path.read_text().replace("\\\n", " ").splitlines()
    return [(Requirement(entry.split("--hash")[0]), entry.count("--hash=sha256:")) for entry in entries]


def direct() -> list[Requirement]:
    project = PROJECT["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(asked) for asked in project["dependencies"] + [each for extra in extras for each in extra]]


def test_environment_yml_has_the_versions_of_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *listed, package = environment["dependencies"][-1]["pip"]
    assert package == "-e ."
    names = {requirement.name for requirement in direct()}
    assert pins(listed) == {
        entry.name: str(entry.specifier).removeprefix("==") for entry, _ in locked(LOCKS[1]) if entry.name in names
    }


def test_the_library_takes_newer_releases_than_the_locked_ones():
    project = PROJECT["project"]
    for requirement in map(Requirement, project["dependencies"] + project["optional-dependencies"]["deploy"]):
        assert requirement.specifier.contains("99.0"), requirement


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("system, machine", [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")])
def test_lock_has_what_pyproject_asks_for(python, system, machine):
    here = default_environment() | {
        "python_version": python,
        "python_full_version": f"{python}.2",
        "sys_platform": system,
        "platform_machine": machine,
    }
    taken = [entry for entry, _ in locked(LOCKS[1]) if not entry.marker or entry.marker.evaluate(here)]
    versions = {entry.name: str(entry.specifier).removeprefix("==") for entry in taken}
    assert len(versions) == len(taken), "two versions of a package for one machine"
    for requirement in direct():
        assert requirement.specifier.contains(versions[requirement.name]), requirement
    assert ("nvidia-cublas" in versions) == (system == "linux")


def test_build_backend_is_locked_once():
    bootstrap = pins(PROJECT["dependency-groups"]["bootstrap"])
    assert pins(PROJECT["build-system"]["requires"]).items() <= bootstrap.items()
    assert pins([str(entry) for entry, _ in locked(LOCKS[0])]) == bootstrap
    versions = {entry.name: str(entry.specifier) for entry, _ in locked(LOCKS[1])}
    assert versions["setuptools"] == f"=={bootstrap['setuptools']}"


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_lock_is_hashed_and_names_no_place(path):
    for entry, hashes in locked(path):
        assert hashes >= 1, entry
        assert re.fullmatch(r"==[0-9a-z.]+", str(entry.specifier)), f"{entry} is not an ordinary release"
        assert entry.url is None
    assert not re.search(r"/|\bindex|\bfind-links|\bfile:", path.read_text())


def test_lock_takes_every_wheel_of_torch():
    # 28 files on the registry; a lock made from a wheel on somebody's disk would hold one hash.
    hashes = {entry.name: count for entry, count in locked(LOCKS[1])}
    assert hashes["torch"] >= 20
    assert hashes["torchvision"] >= 20


def test_version_is_said_alike():
    version = PROJECT["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


# --- the Makefile, with a stand-in for Python that writes down what it is asked ---

STAND_IN = """\
#!/bin/sh
echo "$@" >> calls
case "$*" in
    "-c import sys"*) exit ${OLD:-0} ;;
    "-c import ensurepip"*) exit ${NO_ENSUREPIP:-0} ;;
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *lock.txt) exit ${NO_NETWORK:-0} ;;
esac
"""


class Clone:
    """A folder with the Makefile and what it reads."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        shutil.copytree(ROOT / "requirements", folder / "requirements")
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / name, folder)
        python = folder / "python"
        python.write_text(STAND_IN)
        python.chmod(0o755)

    def make(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "TIER"))
        }
        return subprocess.run(
            ["make", f"PYTHON={self.folder}/python", *arguments],
            cwd=self.folder,
            env=inherited | variables,
            capture_output=True,
            text=True,
        )

    def calls(self) -> str:
        """What the stand-in was asked since the last look."""
        path = self.folder / "calls"
        asked = path.read_text() if path.exists() else ""
        path.write_text("")
        return asked

    def touch(self, name: str) -> None:
        """Make a file newer than every stamp."""
        newest = max(stamp.stat().st_mtime_ns for stamp in self.folder.glob(".venv/.*-*"))
        os.utime(self.folder / name, ns=(newest + 10**9, newest + 10**9))


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path / "a clone")


def test_setup_installs_the_lock_then_the_package(clone):
    assert clone.make("setup").returncode == 0
    asked = clone.calls().splitlines()[2:]
    assert asked[0] == "-m venv .venv"
    assert asked[1].endswith("--require-hashes -r requirements/bootstrap.txt")
    assert asked[2].endswith("--require-hashes --no-build-isolation -r requirements/lock.txt")
    assert asked[3].endswith("--no-build-isolation --no-deps --no-index --editable .")
    assert len(asked) == 4


def test_setup_twice_does_nothing_more(clone):
    clone.make("setup")
    clone.calls()
    assert clone.make("setup").returncode == 0
    assert clone.calls() == ""


def test_half_built_venv_is_built_anew(clone):
    assert clone.make("setup", NO_NETWORK="1").returncode != 0
    clone.calls()
    (clone.folder / ".venv" / "left over").touch()
    assert clone.make("setup").returncode == 0
    assert "-m venv .venv" in clone.calls()
    assert not (clone.folder / ".venv" / "left over").exists()


def test_new_pyproject_installs_only_the_package(clone):
    clone.make("setup")
    clone.calls()
    clone.touch("pyproject.toml")
    clone.make("setup")
    asked = clone.calls()
    assert "--editable ." in asked
    assert "lock.txt" not in asked


def test_new_lock_builds_venv_anew(clone):
    clone.make("setup")
    clone.calls()
    clone.touch("requirements/lock.txt")
    clone.make("setup")
    assert "-m venv .venv" in clone.calls()


def test_moved_venv_is_built_anew(clone):
    clone.make("setup")
    clone.folder = clone.folder.rename(clone.folder.with_name("moved"))
    clone.calls()
    clone.make("setup")
    assert "-m venv .venv" in clone.calls()


def test_wheelhouse_replaces_the_network(clone):
    (clone.folder / "wheelhouse").mkdir()
    clone.make("setup")
    installs = [call for call in clone.calls().splitlines() if "pip install" in call]
    assert len(installs) == 3
    assert all("--no-index" in call for call in installs)


@pytest.mark.parametrize(
    "trouble, words", [("OLD", "3.11, 3.12 or 3.13"), ("NO_ENSUREPIP", "apt-get install python3-venv")]
)
def test_unfit_python_is_named_in_one_line(clone, trouble, words):
    done = clone.make("setup", **{trouble: "1"})
    assert done.returncode != 0
    error, made = done.stderr.strip().splitlines()
    assert error.startswith("error: ")
    assert words in error
    assert made.startswith("make: ***")
    assert not (clone.folder / ".venv").exists()


def test_tier_reaches_snakemake(clone):
    assert "snakemake reproduce --config tier=smoke\n" in clone.make("-n", "reproduce", "TIER=smoke").stdout
    assert "--config" not in clone.make("-n", "reproduce").stdout


def test_the_library_does_not_need_the_replication():
    code = """
import importlib, pkgutil, sys
import skipfold
for module in pkgutil.iter_modules(skipfold.__path__):
    if module.name not in ("replication", "__main__"):
        importlib.import_module(f"skipfold.{module.name}")
print(*{"skipfold.replication", "pandas", "jinja2", "jsonschema", "sklearn"} & set(sys.modules))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []

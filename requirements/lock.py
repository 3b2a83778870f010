"""Write the locks under requirements/ and environment.yml for the dependencies in pyproject.toml.

Run it with `make lock`. Versions that are locked already stay unless pyproject.toml asks for others;
`.venv/bin/python requirements/lock.py --upgrade-package torch==2.12.0` takes another of one package, `--upgrade` the
newest of all that are not pinned.
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# One lock for every supported Python and platform, with the hashes of every file of each release.
# `fewest` keeps one version of a package for all Pythons; uv would else take newer ones for newer Pythons.
COMPILE = (
    "uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest "
    "--generate-hashes --no-annotate --no-header"
).split()

ENVIRONMENT = """\
# For conda users: the direct dependencies at the versions of the lock. Written by `make lock`.
name: skipfold
channels:
  - conda-forge
  - nodefaults
dependencies:
  - python=3.12
  - pip
  - pip:
{pins}
      - -e .
"""


def direct_pins(project: dict) -> list[str]:
    """What the lock has of the requirements of the package and of its extras, sorted."""
    extras = project["optional-dependencies"].values()
    asked = project["dependencies"] + [requirement for extra in extras for requirement in extra]
    names = {re.match("[a-z0-9-]+", requirement)[0] for requirement in asked}
    locked = re.findall(r"^([a-z0-9-]+)(==\S+)", (ROOT / "requirements" / "lock.txt").read_text(), re.MULTILINE)
    return sorted(name + version for name, version in locked if name in names)


def lock(name: str, *options: str) -> None:
    """Resolve to requirements/`name`; uv names no registry in it."""
    path = ROOT / "requirements" / name
    before = (path.read_bytes(), path.stat().st_mtime_ns) if path.exists() else (None, 0)
    subprocess.run([*COMPILE, *options, "--output-file", str(path)], cwd=ROOT, check=True)
    if path.read_bytes() == before[0]:
        # An unchanged lock stays as old as it was, so that make does not build .venv anew.
        os.utime(path, ns=(before[1], before[1]))


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lock("bootstrap.txt", "--group", "bootstrap", *sys.argv[1:])
    lock("lock.txt", "pyproject.toml", "--all-extras", *sys.argv[1:])
    pins = "\n".join(f"      - {pin}" for pin in direct_pins(project))
    (ROOT / "environment.yml").write_text(ENVIRONMENT.format(pins=pins))


if __name__ == "__main__":
    main()

"""What a number came from: device, versions, commit and data, on all that is made; checksums of a page's files."""

import datetime
import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipfold.replication.config import COMMON, published_folder, root

if TYPE_CHECKING:
    import torch  # which takes seconds, and tables need only STAMP

STAMP = ("tier", "device", "torch", "cuda", "commit", "date")
"""Columns that say what a row came from; every table carries them. `date` is that of the (last) trial."""

SOURCES = ("config/claims.yaml", "src/skipfold/replication/claims.py", "src/skipfold/replication/statistics.py")
"""Files of the repository that decide what the numbers are; the page holds their checksums."""


def device_name(device: "torch.device") -> str:
    """The GPU's name, or the CPU's and the number of threads."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({_processor()}, {threads} thread{'s' if threads > 1 else ''})"


@functools.cache
def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache
def commit() -> str:
    """The commit of the working tree, with -dirty where it differs; "unknown" where git does not hold it.

    Results do not count: a run replaces those that are committed.
    """
    git = ("git", "-C", str(root()))
    name = output(*git, "describe", "--always", "--abbrev=12")
    # In somebody else's checkout, where an archive was unpacked for example, the commit says nothing of it.
    if name is None or not output(*git, "ls-files", COMMON):
        return "unknown"
    changed = output(*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)results")
    return name if changed == "" else f"{name}-dirty"


@functools.cache
def driver() -> str:
    """Version of the NVIDIA driver; "unknown" where nvidia-smi is not there."""
    return (output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown").split("\n")[0]


def output(*command: str) -> str | None:
    """What `command` prints, without space around it; None where it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def gpu_state(device: "torch.device") -> str | None:
    """Performance state, clocks, power and temperature as nvidia-smi reads them now; None on a CPU or without it."""
    if device.type != "cuda":
        return None
    import torch

    fields = "pstate,clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu"
    which = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    values = output("nvidia-smi", f"--id={which}", f"--query-gpu={fields}", "--format=csv,noheader")
    if values is None:
        return None
    return ", ".join(f"{name} {value}" for name, value in zip(fields.split(","), values.split(", "), strict=True))


def stamp(device: "torch.device", md5: dict[str, str]) -> dict[str, Any]:
    """Device, versions, commit, date and data checksums, as plain JSON values."""
    import torch

    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "torchvision": importlib.metadata.version("torchvision"),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "driver": driver() if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "data_md5": md5,
    }


def checksums(results: str | Path) -> dict[str, str]:
    """SHA-256 of every file behind the page, by its path relative to it: tables, figures, verdicts, published
    points, and SOURCES."""
    results = Path(results)
    files = [*results.glob("verdicts.csv"), *sorted((results / "tables").glob("*.csv"))]
    files += [path for path in sorted((results / "figures").glob("*")) if path.suffix in (".svg", ".png")]
    found = {path.relative_to(results).as_posix(): path for path in files}
    files = [*sorted(published_folder().glob("*.csv")), *(root() / name for name in SOURCES)]
    found |= {relative(path, results): path for path in files}
    return {href: sha256(path) for href, path in found.items()}


def relative(path: Path, results: Path) -> str:
    """The path of a file as the page under `results` names it."""
    return Path(os.path.relpath(path, results)).as_posix()


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()

"""What a number came from: device, versions, commit, data; stamped on every record, table, figure and page."""

import datetime
import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch  # which takes seconds, and tables need only STAMP

STAMP = ("tier", "device", "torch", "cuda", "commit", "date")
"""Columns that say what a row came from; every table carries them. `date` is that of the (last) trial."""


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
    """The commit of the working tree, with -dirty where it differs; "unknown" outside a git checkout.

    Results do not count: a run replaces those that are committed.
    """
    name = output("git", "describe", "--always", "--abbrev=12")
    if name is None:
        return "unknown"
    changed = output("git", "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)results")
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

"""Everything that needs a GPU, by one command: CUDA tests, engine benchmark, paper tier, its verification; one log.

    make gpu
    python benchmarks/gpu.py tests engine      # only these parts

A part goes on after an earlier one failed; the exit status then says so. The log is logs/gpu.log.
"""

import subprocess
import sys
import time
from pathlib import Path

import torch

LOG = Path("logs") / "gpu.log"
PARTS = {
    "tests": "pytest -q -m cuda",
    "engine": "python benchmarks/engine.py --products",
    "engine-cnn3": "python benchmarks/engine.py --network cnn3 --stacked 1 16 64 --most 64",
    "quote": "snakemake quote --config tier=paper",
    "paper": "snakemake reproduce --config tier=paper",
    "verify": "snakemake verify --config tier=paper",
}


def main(parts: list[str]) -> int:
    """Run `parts`, all of them where none is named; gives the number of those that failed."""
    if unknown := set(parts) - set(PARTS):
        print(f"error: {', '.join(sorted(unknown))} given; the parts are {', '.join(PARTS)}")
        return 1
    if not torch.cuda.is_available():
        print("error: no CUDA device is there; run this where a GPU and its driver are, or make reproduce TIER=quick")
        return 1
    LOG.parent.mkdir(exist_ok=True)
    ends = []
    with LOG.open("w") as log:
        for name in parts or PARTS:
            command = PARTS[name]
            start = time.perf_counter()
            failed = _tee(log, f"$ {command}", command.split())
            ends.append(f"{name}: {'failed' if failed else 'done'} in {time.perf_counter() - start:.0f} s")
        _say(log, "\n".join([f"{torch.cuda.get_device_name()}, torch {torch.__version__}", *ends]))
    return sum("failed" in end for end in ends)


def _tee(log, title: str, command: list[str]) -> bool:
    """Whether `command` failed; what it prints goes to the terminal and to `log`."""
    _say(log, title)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            _say(log, line.rstrip("\n"))
    return process.returncode != 0


def _say(log, text: str) -> None:
    print(text, flush=True)
    print(text, file=log, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

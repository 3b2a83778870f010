"""Everything that needs a GPU, by one command: CUDA tests, benchmarks, paper tier, its verification; one log.

    make gpu
    python benchmarks/gpu.py tests paper               # only these parts
    python benchmarks/gpu.py paper pack --seconds 540  # each part is stopped after so long; the same command goes on

A part is run after an earlier one failed, too; the exit status then says so. Each run is added to logs/gpu.log, and
`pack` writes the trials that are finished to logs/paper.jsonl.gz, which `python -m skipfold.replication unpack` puts
into another checkout's store. Runs with the packages of the Python that it is given, installed or on PYTHONPATH; the
checkout itself need not be installed.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / "logs" / "gpu.log"
GRACE = 30
"""Seconds in which a part that is stopped has to end; then it is killed, so that the log has its end all the same."""

PARTS = {
    # By name, so that the log tells which one took the device with it.
    "tests": "-m pytest -v -m cuda --durations=10",
    "engine": "benchmarks/engine.py --products",
    "engine-cnn3": "benchmarks/engine.py --network cnn3 --stacked 1 16 64 --most 64",
    "collapse": "benchmarks/collapse.py --device cuda",
    "quote": "-m snakemake quote --config tier=paper",
    # By itself, since what is stopped in the middle is lost.
    "timing": "-m snakemake time_prediction --config tier=paper",
    "paper": "-m snakemake reproduce --config tier=paper",
    "pack": "-m skipfold.replication pack logs/paper.jsonl.gz --tier paper",
    "verify": "-m snakemake verify --config tier=paper",
}


def main(parts: list[str], seconds: float | None = None) -> int:
    """Run `parts`, all of them where none is named, each for at most `seconds`; gives the number that failed."""
    if not torch.cuda.is_available():
        print("error: no CUDA device is there; run this where a GPU and its driver are, or make reproduce TIER=quick")
        return 1
    LOG.parent.mkdir(exist_ok=True)
    ends = []
    with LOG.open("a") as log:
        for name in parts or PARTS:
            start = time.perf_counter()
            end = run(log, PARTS[name].split(), seconds)
            ends.append(f"{name}: {end} in {time.perf_counter() - start:.0f} s")
        _say(log, "\n".join([f"{torch.cuda.get_device_name()}, torch {torch.__version__}", *ends]))
    return sum(": done" not in end for end in ends)


def run(log, arguments: list[str], seconds: float | None) -> str:
    """How Python with `arguments` ended; what it prints goes to the terminal and to `log`."""
    _say(log, f"$ python {' '.join(arguments)}")
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JUPYTER_PREFER_ENV_PATH": "1"},
        start_new_session=True,
    ) as process:
        timers = [
            # As Ctrl-C, to all that it started: Snakemake and the trials in training then end in order.
            threading.Timer(seconds + later, os.killpg, (process.pid, sign))
            for later, sign in ((0, signal.SIGINT), (GRACE, signal.SIGKILL))
            if seconds is not None
        ]
        for timer in timers:
            timer.start()
        try:
            for line in process.stdout:
                _say(log, line.rstrip("\n"))
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGINT)  # in a session of its own it has not seen it
            raise
        finally:
            stopped = any(not timer.is_alive() for timer in timers)
            for timer in timers:
                timer.cancel()
    return "stopped" if stopped else "failed" if process.returncode else "done"


def _say(log, text: str) -> None:
    print(text, flush=True)
    print(text, file=log, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--seconds", type=float, help="after which a part is stopped; default: never")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))} given; the parts are {', '.join(PARTS)}")
    sys.exit(main(given.parts, given.seconds))

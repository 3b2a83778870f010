"""That a part of `make gpu` ends when it is stopped, or even does not end then, and leaves what it said in the log."""

import importlib.util
import io
from pathlib import Path

import pytest

STUBBORN = """
import signal, time
signal.signal(signal.SIGINT, lambda *_: print("asked to end", flush=True))
while True:
    time.sleep(1)
"""


@pytest.fixture
def gpu(monkeypatch):
    path = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "GRACE", 0.5)
    return module


@pytest.mark.parametrize(
    ("code", "seconds", "end", "said"),
    [
        ("print('all')", 60, "done", "all"),
        ("print('some'); raise SystemExit(3)", None, "failed", "some"),
        (STUBBORN, 2, "stopped", "asked to end"),
    ],
    ids=["done", "failed", "stopped"],
)
def test_every_part_ends_and_is_logged(code, seconds, end, said, gpu, tmp_path):
    log = io.StringIO()
    (path := tmp_path / "part.py").write_text(code)
    assert gpu.run(log, [str(path)], seconds) == end
    assert log.getvalue() == f"$ python {path}\n{said}\n"

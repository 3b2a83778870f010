"""The tutorial runs as it stands, and the API reference can be made."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def snippets(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def test_every_snippet_of_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for number, snippet in enumerate(snippets("docs/tutorial.md")):
        exec(compile(snippet, f"tutorial snippet {number + 1}", "exec"), namespace)
    printed = capsys.readouterr().out
    last = re.search(r"accuracy ([\d.]+) with skips at t = 0, ([\d.]+) without", printed)
    assert float(last[1]) == float(last[2]) > 0.9
    assert (tmp_path / "digits.onnx").is_file()
    assert "relu: ReLU is not affine" in printed


def test_the_readmes_snippets_name_what_exists():
    for snippet in snippets("README.md"):
        for line in snippet.splitlines():
            if line.startswith(("from ", "import ")):
                exec(line, {})


def test_the_reference_says_what_each_public_name_is(tmp_path):
    """Made by pdoc from the docstrings; `make docs` makes all of it."""
    modules = [f"skipfold.{name}" for name in ("collapse", "homotopy", "removal", "folding", "cropping", "schedules")]
    subprocess.run([sys.executable, "-m", "pdoc", *modules, "-o", tmp_path], check=True, cwd=ROOT)
    for module in modules:
        page = (tmp_path / f"{module.replace('.', '/')}.html").read_text()
        for name, value in vars(importlib.import_module(module)).items():
            if getattr(value, "__module__", "") == module and not name.startswith("_"):
                assert value.__doc__, f"{module}.{name} has no docstring"
                assert f'id="{name}"' in page

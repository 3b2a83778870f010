import subprocess

import pytest

from skipfold.replication import provenance


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    for name in ("src", "results"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("before")
    author = ("-c", "user.name=any", "-c", "user.email=any@example.org")
    for command in (("init", "-q"), ("add", "."), (*author, "commit", "-qm", "all")):
        subprocess.run(("git", *command), cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("changed", "dirty"), [(None, False), ("results", False), ("src", True)])
def test_what_a_run_replaces_does_not_make_its_commit_dirty(checkout, changed, dirty):
    if changed:
        (checkout / changed / "file").write_text("after")
    assert provenance.commit.__wrapped__().endswith("-dirty") == dirty


def test_outside_of_a_checkout_no_commit_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert provenance.commit.__wrapped__() == "unknown"

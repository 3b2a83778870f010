import subprocess

import pytest

from skipfold.replication import provenance


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The replication's, in a larger one."""
    place = tmp_path / "studies" / "skipfold"
    for name in ("src/file", "results/file", "config/config.yaml"):
        (place / name).parent.mkdir(parents=True)
        (place / name).write_text("before")
    monkeypatch.chdir(place)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return place


def commit(place, *names):
    author = ("-c", "user.name=any", "-c", "user.email=any@example.org")
    for command in (("init", "-q"), ("add", *names), (*author, "commit", "-qm", "all")):
        subprocess.run(("git", *command), cwd=place, check=True)


@pytest.mark.parametrize("above", [0, 1], ids=["its own checkout", "part of a larger one"])
@pytest.mark.parametrize(("changed", "dirty"), [(None, False), ("results", False), ("src", True)])
def test_what_a_run_replaces_does_not_make_its_commit_dirty(folder, changed, dirty, above):
    commit([folder, *folder.parents][above], ".")
    if changed:
        (folder / changed / "file").write_text("after")
    found = provenance.commit.__wrapped__()
    assert found != "unknown" and found.endswith("-dirty") == dirty


def test_outside_of_a_checkout_no_commit_is_known(folder):
    assert provenance.commit.__wrapped__() == "unknown"


def test_in_the_checkout_of_something_else_no_commit_is_known(folder):
    (folder.parent / "other").touch()
    commit(folder.parent, "other")
    assert provenance.commit.__wrapped__() == "unknown"

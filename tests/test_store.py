"""store: records are whole or not there, and travel as one file."""

import errno
import gzip
import json
from pathlib import Path

import pytest

from skipfold.errors import StoreError
from skipfold.replication.store import Store
from skipfold.replication.trial import Trial

TRIALS = [Trial(experiment="e", arm="a", index=index, network="perceptron") for index in range(3)]


def record(index):
    return {"epochs": [{"epoch": 1, "val_accuracy": 0.1 * index}, {"epoch": 2, "val_accuracy": 0.2}], "final": {}}


@pytest.fixture
def store(tmp_path):
    held = Store(tmp_path / "trials")
    for index, trial in enumerate(TRIALS):
        held.put(trial, record(index))
    return held


def test_a_record_is_read_as_it_was_written(store):
    found = store.get(TRIALS[1])
    assert found["epochs"] == record(1)["epochs"]
    assert found["trial"] == TRIALS[1].description()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"digest": "other", "epochs": []}', '{"epochs": 3}'])
def test_a_corrupt_record_is_set_aside_and_told(store, capsys, text):
    store.path(TRIALS[0]).write_text(text)
    assert store.get(TRIALS[0]) is None
    assert "corrupt" in capsys.readouterr().out
    assert store.path(TRIALS[0]).with_suffix(".corrupt").read_text() == text
    assert TRIALS[0] not in store


def test_a_record_with_an_epoch_missing_is_corrupt(store):
    cut = json.loads(store.path(TRIALS[0]).read_text())
    cut["epochs"].pop()
    store.path(TRIALS[0]).write_text(json.dumps(cut))
    assert store.get(TRIALS[0]) is None


def test_a_failed_write_leaves_nothing(store):
    before = sorted(store.folder.iterdir())
    with pytest.raises(TypeError):
        store.put(TRIALS[0], {"epochs": [object()]})
    assert sorted(store.folder.iterdir()) == before


def test_a_full_disk_is_one_line_and_leaves_the_record_as_it_was(store, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    held, before = sorted(store.folder.iterdir()), store.get(TRIALS[0])
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StoreError, match=r"\.json: cannot be written \(No space left on device\)"):
        store.put(TRIALS[0], record(2))
    assert sorted(store.folder.iterdir()) == held and store.get(TRIALS[0]) == before


def test_packed_records_are_unpacked_elsewhere(store, tmp_path):
    archive = tmp_path / "trials.jsonl.gz"
    assert store.pack(archive, TRIALS[:2]) == 2
    other = Store(tmp_path / "other")
    assert other.unpack(archive) == 2
    assert other.unpack(archive) == 0
    assert other.get(TRIALS[1]) == store.get(TRIALS[1])
    again = tmp_path / "again.gz"
    other.pack(again, TRIALS)  # of which it holds two
    assert again.read_bytes() == archive.read_bytes()


BAD_ARCHIVES = {
    "no gzip": b"no gzip",
    "no record": gzip.compress(b"no record", mtime=0),
    "cut": gzip.compress(b"{}" * 99, mtime=0)[:-9],
    "overwritten": gzip.compress(bytes(range(256)), mtime=0)[:10] + b"\xff" * 99,
}


@pytest.mark.parametrize("content", BAD_ARCHIVES.values(), ids=BAD_ARCHIVES)
def test_an_unreadable_archive_is_one_line(store, tmp_path, content):
    (tmp_path / "bad.gz").write_bytes(content)
    with pytest.raises(StoreError, match=r"bad\.gz: not a readable archive .* pack it again"):
        store.unpack(tmp_path / "bad.gz")


@pytest.mark.parametrize("change", [{"trial": {}}, {"trial": 3}, {"digest": "other"}, {"epochs": []}, {"epochs": None}])
def test_an_archive_with_a_bad_record_is_refused_whole(store, tmp_path, change):
    archive, other = tmp_path / "trials.jsonl.gz", Store(tmp_path / "other")
    records = [store.get(trial) for trial in TRIALS[:2]]
    records[1] |= change
    archive.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    with pytest.raises(StoreError, match="line 2: not the whole record"):
        other.unpack(archive)
    assert list(other.folder.iterdir()) == []


def test_an_archive_that_cannot_be_written_is_one_line(store, tmp_path):
    with pytest.raises(StoreError, match=r"missing/trials\.jsonl\.gz: cannot be written"):
        store.pack(tmp_path / "missing" / "trials.jsonl.gz", TRIALS)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="writable folder"):
        Store(tmp_path / "file" / "trials")

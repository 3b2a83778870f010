"""Finished trials' records on disk, one JSON file each, named by the digest of the trial's description."""

import gzip
import json
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from skipfold.errors import SkipfoldError, StoreError
from skipfold.files import written
from skipfold.replication.trial import Trial

Record = dict[str, Any]


class Store:
    """Records under `folder`; a record is either whole or not there.

    Raises StoreError where the folder cannot be written.
    """

    def __init__(self, folder: str | Path = "trials"):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise StoreError(
                f"store: {self.folder} cannot be written ({error.strerror}); give a writable folder"
            ) from error

    def path(self, trial: Trial) -> Path:
        """Where the record of `trial` lies, whether it is there or not."""
        return self.folder / f"{trial.digest}.json"

    def __contains__(self, trial: Trial) -> bool:
        return self.path(trial).is_file()

    def get(self, trial: Trial) -> Record | None:
        """The record, or None where there is none. A corrupt one is set aside as *.corrupt, told, and None."""
        path = self.path(trial)
        try:
            record = json.loads(path.read_text())
            whole = _belongs(record, trial)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            whole = False
        if whole:
            return record
        aside = path.with_suffix(".corrupt")
        path.replace(aside)
        print(f"store: {path} is corrupt; set aside as {aside.name}, the trial runs again", flush=True)
        return None

    def put(self, trial: Trial, record: Record) -> Record:
        """Write the record of `trial` atomically and give it back as it will be read.

        Raises StoreError where it cannot be written.
        """
        record = {"digest": trial.digest, "trial": trial.description(), **record}
        text = json.dumps(record, indent=1)
        with written(self.path(trial), StoreError) as part:
            part.write_text(text)
        return json.loads(text)

    def pack(self, archive: str | Path, trials: Iterable[Trial]) -> int:
        """Write those records of `trials` that are held as one gzipped JSON-lines file; gives their number.

        Raises StoreError where the file cannot be written.
        """
        records = [record for trial in trials if (record := self.get(trial))]
        records.sort(key=lambda record: record["digest"])
        lines = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records)
        with written(archive, StoreError) as part:
            part.write_bytes(gzip.compress(lines.encode(), mtime=0))
        return len(records)

    def unpack(self, archive: str | Path) -> int:
        """Put the records of an archive that are not yet held; gives the number of those put.

        Raises StoreError, before any is put, where one cannot be read or does not belong to its trial.
        """
        missing = {}
        for number, record in enumerate(read_archive(archive), start=1):
            try:
                trial = Trial.from_description(record.pop("trial"))
                whole = _belongs(record, trial)
            except (ValueError, KeyError, TypeError, AttributeError, SkipfoldError):
                whole = False
            if not whole:
                raise StoreError(
                    f"{archive}, line {number}: not the whole record of a trial; nothing was unpacked, pack it again"
                )
            if trial not in self:
                missing[trial] = record
        for trial, record in missing.items():
            self.put(trial, record)
        return len(missing)


def read_archive(archive: str | Path) -> list[Record]:
    """The records of a file that `Store.pack` wrote, unchecked; raises StoreError where it cannot be read."""
    try:
        lines = gzip.decompress(Path(archive).read_bytes()).decode().splitlines()
        return [json.loads(line) for line in lines]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise StoreError(f"{archive}: not a readable archive of records ({error}); pack it again") from error


def _belongs(record: Record, trial: Trial) -> bool:
    """Whether `record` is of `trial`, with all of its epochs."""
    return record["digest"] == trial.digest and len(record["epochs"]) == trial.epochs

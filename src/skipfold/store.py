"""Finished trials' records on disk, one JSON file each, named by the digest of the trial's description."""

import gzip
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from skipfold.errors import StoreError
from skipfold.trial import Trial

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
            whole = record["digest"] == trial.digest and len(record["epochs"]) == trial.epochs
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
        """Write the record of `trial` atomically and give it back as it will be read."""
        record = {"digest": trial.digest, "trial": trial.description(), **record}
        text = json.dumps(record, indent=1)
        handle, name = tempfile.mkstemp(dir=self.folder, suffix=".part")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
            os.replace(name, self.path(trial))
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return json.loads(text)

    def pack(self, archive: str | Path, trials: Iterable[Trial] | None = None) -> int:
        """Write the records of `trials` (all where None) as one gzipped JSON-lines file; gives their number."""
        if trials is None:
            texts = [path.read_text() for path in sorted(self.folder.glob("*.json"))]
            records = [json.loads(text) for text in texts]
        else:
            records = [record for trial in trials if (record := self.get(trial))]
            records.sort(key=lambda record: record["digest"])
        lines = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records)
        Path(archive).write_bytes(gzip.compress(lines.encode(), mtime=0))
        return len(records)

    def unpack(self, archive: str | Path) -> int:
        """Put the records of an archive that are not yet held; gives the number of those put."""
        added = 0
        try:
            lines = gzip.decompress(Path(archive).read_bytes()).decode().splitlines()
            records = [json.loads(line) for line in lines]
        except (OSError, EOFError, ValueError) as error:
            raise StoreError(f"{archive}: not a readable archive of records ({error})") from error
        for record in records:
            trial = Trial.from_description(record["trial"])
            if record["digest"] == trial.digest and trial not in self:
                self.put(trial, {k: v for k, v in record.items() if k not in ("digest", "trial")})
                added += 1
        return added

"""Places on disk: asked for before anything expensive, and filled whole or not at all."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from skipfold.errors import SkipfoldError, StoreError


def writable(folder: Path) -> None:
    """Raise StoreError unless `folder` can be written or made."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise StoreError(f"results: {folder} cannot be written (see {nearest}); give a writable folder")


@contextlib.contextmanager
def written(path: str | Path, error: type[SkipfoldError]) -> Iterator[Path]:
    """A file beside `path` to write, which takes its place at the end and is gone after an exception.

    Raises `error` where it cannot be written; where no file can be made, at once.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        part.touch()
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)  # safetensors makes files that others cannot read, whatever the umask is
        part.replace(path)
    except OSError as cause:
        raise error(f"{path}: cannot be written ({cause.strerror or cause}); is its folder there, and room?") from cause
    finally:
        part.unlink(missing_ok=True)

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
    if not path.name:
        raise error(f"{str(path)!r} names no file; give the name of one")
    part = path.with_name(f".{uuid.uuid4().hex}.part")  # short, so that any name that the disk takes can be given
    try:
        with contextlib.suppress(FileNotFoundError):
            path.lstat()  # a name that the disk does not take is said before the work
        part.touch()
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)  # safetensors makes files that others cannot read, whatever the umask is
        part.replace(path)
    except OSError as cause:
        raise error(f"{path}: cannot be written ({cause.strerror or cause}); is its folder there, and room?") from cause
    finally:
        with contextlib.suppress(OSError):  # what is raised already says what is wrong
            part.unlink()

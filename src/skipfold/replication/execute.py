"""Runs a notebook through papermill, so that a failure is one line and a half-run notebook is no result."""

import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skipfold.errors import ConfigError, NotebookError, StoreError
from skipfold.files import writable, written


def execute(notebook: Path, output: Path, parameters: Mapping[str, Any], log: Path) -> None:
    """Run `notebook` with `parameters` in folder `log`, then copy it to `output`; a failed one stays in `log`.

    Raises ConfigError on a parameter that the notebook does not have and on what is no notebook, StoreError where
    `output` cannot be written, both before it runs where that can be known, NotebookError where it fails.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from nbformat.reader import NotJSONError

    # The kernel must be this environment's, not one that the user has at home.
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    logging.getLogger("papermill").setLevel(logging.ERROR)
    if not notebook.is_file():
        raise ConfigError(f"notebook: {notebook} is not a file")
    if output.is_dir():
        raise ConfigError(f"output: {output} is a folder; name a file in it, for example {output / notebook.name}")
    writable(output.parent)
    try:
        known = papermill.inspect_notebook(str(notebook))
    except NotJSONError as error:
        raise ConfigError(f"notebook: {notebook} is no notebook; name a file that Jupyter wrote") from error
    for name in parameters:
        if name not in known:
            allowed = ", ".join(known) or "those of its cell with the tag `parameters`, which it lacks"
            raise ConfigError(f"parameter: {name!r} is not one of {notebook}; allowed are {allowed}")
    log.mkdir(parents=True, exist_ok=True)
    failed = log / output.name
    # A folder of its own: notebooks of one name may run at once, of another tier or of a second run of this one.
    with tempfile.TemporaryDirectory(dir=log) as place:
        running = Path(place) / output.name
        try:
            papermill.execute_notebook(
                str(notebook),
                str(running),
                dict(parameters),
                kernel_name="python3",
                progress_bar=False,
                # Else kernels warn that they talk to this process, on this machine, without encryption, and call it an
                # error that they are stopped when they are done. What a cell raises comes another way.
                extra_arguments=["--IPKernelApp.log_level=50"],
            )
        except (papermill.PapermillExecutionError, DeadKernelError) as error:
            running.replace(failed)
            said = "the kernel died, out of memory perhaps"
            if isinstance(error, papermill.PapermillExecutionError):
                said = f"{error.ename}: {error.evalue}"
            raise NotebookError(f"{said} ({notebook}; run so far: {failed})") from error
        output.parent.mkdir(parents=True, exist_ok=True)
        with written(output, StoreError) as part:
            shutil.copyfile(running, part)  # since it may lie on another file system

"""Find a run's index, or make it: once, under a lock, and again when the run or its scores have changed."""

import contextlib
import errno
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

from wsae.core.artifact import record
from wsae.core.errors import UserError
from wsae.core.files import as_user_error, locked_file, seal, write_json
from wsae.core.progress import Progress, quiet
from wsae.serve import schema
from wsae.serve.build import Reopen, build, identity
from wsae.serve.config import IndexConfig
from wsae.serve.index import Index
from wsae.serve.schema import seal_of, sealed_identity


def ensure_index(
    run: Path,
    place: Path | None,
    cfg: IndexConfig,
    reopen: Reopen | None = None,
    progress: Progress = quiet,
) -> tuple[Path, bool]:
    """Return the path of a run's current index, and whether it was made just now.

    `place`: the file, instead of RUN/browser.sqlite; `reopen`: see `build`. Raises UserError when the run is not
    whole or evaluated, or nothing can be written there. A second process waits for the first one's index.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such run directory; give the --out of a `wsae train`")
    path = place or run / schema.NAME
    key = identity(run, cfg)
    if is_current(path, key):
        return path, False
    try:
        with alone(path):
            if is_current(path, key):  # made by another process in the meantime
                return path, False
            build(run, path, cfg, reopen, progress)
            write_json(seal_of(path), seal({"identity": key, "file": record(path).to_dict()}))
    except UserError as error:
        if "cannot write here" in str(error) and place is None:
            raise UserError(
                f"{run}: cannot write its index here; give a directory with --out"
            ) from error
        raise
    return path, True


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process makes this index; raises UserError where its place cannot be written or is full."""
    lock = path.with_name(f".{path.name}.lock")
    try:
        with locked_file(lock, wait=True):
            yield
    except OSError as error:
        raise as_user_error(error, path) from error
    except sqlite3.OperationalError as error:
        number = _REFUSALS.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
        if number is None:
            raise
        raise as_user_error(_refusal(path) or OSError(number, str(error)), path) from error


def _refusal(path: Path) -> OSError | None:
    """Return what the operating system says to a small write beside a file: SQLite keeps its reasons to itself."""
    try:
        with tempfile.TemporaryFile(dir=path.parent) as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


_REFUSALS = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR: errno.ENOSPC,  # what a write past the disk's or the user's limit becomes
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
}
"""SQLite's result code without the details -> errno, for where a second, small write is not refused."""


def is_current(path: Path, key: str) -> bool:
    """Whether a file is a whole index of this identity, unaltered since it was made."""
    try:
        return sealed_identity(path) == key == Index(path).identity
    except UserError:  # damaged: made again
        return False

"""Files on disk that are whole or not there.

A file is written under a temporary name, flushed and renamed. A JSON file that no manifest lists (a manifest itself,
the state of unfinished work) carries its own checksum: `seal`. A directory is held by one process at a time: `locked`.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from wsae.core.errors import UserError

SEAL = "checksum"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk, rename it over `path` and flush the name.

    A failure removes the temporary file; a full disk or a read-only place becomes a one-line UserError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_leftovers(path)
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)  # the name too, before anything is written that counts on it
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise as_user_error(error, path) from error
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def flush(path: Path) -> None:
    """Have the system write a file, or the names in a directory, to the disk; raises OSError when it cannot."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # some network file systems have no such call for directories
        if not (path.is_dir() and error.errno == errno.EINVAL):
            raise
    finally:
        os.close(handle)


def _drop_leftovers(path: Path) -> None:
    """Remove the temporary files of this name whose writers were killed."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        number = leftover.name.split(".")[-2]
        if number.isdecimal() and int(number) != os.getpid() and not _is_alive(int(number)):
            leftover.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def as_user_error(error: OSError, path: Path) -> Exception:
    """Translate the operating system's refusals a user can mend; anything else stays what it is."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"{path}: the disk is full; free some space and run the same command again"
        )
    if error.errno == errno.EFBIG:
        return UserError(
            f"{path}: larger than this system lets a file be; raise the limit (ulimit -f)"
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return UserError(
            f"{path}: cannot write here ({os.strerror(error.errno)}); choose another --out"
        )
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return UserError(f"{path}: a file is in the way of this directory; choose another --out")
    return error


@contextlib.contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Raise what the operating system refuses inside as a UserError that names `path`, where a user can mend it."""
    try:
        yield
    except OSError as error:
        raise as_user_error(error, path) from error


def is_temporary(path: Path) -> bool:
    """Whether a name is one of those that `writing` gives to files that are not finished."""
    return re.fullmatch(r"\..+\.\d+\.tmp", path.name) is not None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; raises UserError when it is missing or damaged."""
    if path.exists() and not path.is_file():  # a pipe would never end
        raise UserError(f"{path}: not a regular file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, not JSON ({error})") from error


def digest(value: object) -> str:
    """Return the SHA-256 of a JSON-ready value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON-ready object with its own checksum beside its keys."""
    return value | {SEAL: digest(json.loads(json.dumps(value)))}


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what `seal` made, without the checksum; raises UserError when the file is missing, damaged or altered."""
    value = read_json(path)
    if isinstance(value, dict) and SEAL not in value:
        raise UserError(f"{path}: altered, it has no checksum; remove it and make it again")
    return unsealed(value, path)


def unsealed(value: Any, path: Path) -> dict[str, Any]:
    """Return a sealed object without its checksum; raises UserError naming `path` when they do not fit.

    One without a checksum is taken as it is: a manifest of before there were any, whose keys are all known, so that
    no altered name of the checksum's key looks like that.
    """
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged, a {type(value).__name__} where an object belongs")
    rest = {key: item for key, item in value.items() if key != SEAL}
    try:
        sealed = SEAL not in value or value[SEAL] == digest(rest)
    except (ValueError, RecursionError) as error:  # half a character; nested too deep
        raise UserError(f"{path}: damaged, not JSON that wsae writes ({error})") from error
    if not sealed:
        raise UserError(f"{path}: altered, its checksum differs; remove it and make it again")
    return rest


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory for this process; a second process is refused with a UserError."""
    path = directory / ".lock"
    while True:
        with refusals(directory):
            directory.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(f"{directory}: another wsae process is writing here") from error
            if not _is_still(path, file):
                continue  # another process removed the directory in between
            yield
            return


def _is_still(path: Path, file: IO[str]) -> bool:
    """Whether the open file is still the one at this path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False

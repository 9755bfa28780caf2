"""Files on disk that are whole or not there, and that are what their names say.

All that wsae writes goes through this module. A file is written under a new name that nothing else has, flushed and
renamed; one that grows is opened without following links; a directory is held by one process at a time (`locked`), and
no folder in it may be a link that leads out. What is read must be a regular file (`opened`). A JSON file that no
manifest lists (a manifest itself, the state of unfinished work) carries its own checksum: `seal`.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from io import BufferedReader, FileIO
from pathlib import Path
from typing import IO, Any

from wsae.core.errors import UserError

Json = dict[str, Any]
"""A parsed JSON object."""
SEAL = "checksum"
CONFIG_BYTES = 64 << 20
"""The largest manifest or config that is read."""
RECORD_BYTES = 256 << 20
"""The largest other JSON file of wsae that is written and read: in memory it takes some ten times as much."""
LINE_BYTES = 1 << 20
"""The longest line of a file of JSON lines that wsae wrote."""
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)
_TEMPORARY = re.compile(r"\.(.+?)\.(\d+)(?:\.[0-9a-f]{8})?\.tmp")
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_KINDS = {
    stat.S_IFIFO: "a pipe; write what comes out of it to a file first, and give that",
    stat.S_IFDIR: "a folder, where a file belongs",
    stat.S_IFSOCK: "a socket, not a file",
    stat.S_IFCHR: "a device, not a file",
    stat.S_IFBLK: "a device, not a file",
}
_log = logging.getLogger(__name__)


class GivenTwice(ValueError):
    """A JSON object has two values for one key: readers would not agree on what it says."""


def whole(path: Path) -> str:
    """Return a path from the root. A link stays one: what a cache keeps behind it has no name that says what it is."""
    return str(path.parent.resolve() / path.name)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a new, empty file beside `path`; when done flush it to disk, rename it over `path` and flush the name.

    A failure removes that file; a full disk or a read-only place becomes a one-line UserError.
    """
    temporary = path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_leftovers(path)
        temporary = _new_beside(path)
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)  # the name too, before anything is written that counts on it
    except OSError as error:
        _discard(temporary, path)
        raise as_user_error(error, path) from error
    except BaseException:
        _discard(temporary, path)
        raise


def _new_beside(path: Path) -> Path:
    """Make an empty file under a name that nothing had, not even a link that somebody has laid there."""
    while True:
        name = f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        with contextlib.suppress(FileExistsError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            os.close(os.open(path.with_name(name), flags, 0o666))
            return path.with_name(name)


def _discard(temporary: Path, path: Path) -> None:
    if temporary != path:
        with contextlib.suppress(OSError):
            temporary.unlink()


def flush(path: Path) -> None:
    """Have the system write a file, or the names in a directory, to the disk; raises OSError when it cannot."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
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
        found = _TEMPORARY.fullmatch(leftover.name)
        process = int(found[2]) if found and found[1] == path.name else os.getpid()
        if process != os.getpid() and not _is_alive(process):
            drop(leftover)


def drop(temporary: Path) -> None:
    """Remove a temporary file of ours; a link or a file with another name is left alone, since we make none."""
    with contextlib.suppress(FileNotFoundError):
        if _is_plain(temporary.lstat()):
            temporary.unlink()


def _is_plain(known: os.stat_result) -> bool:
    """Return whether a file is regular and has no second name (a hard link)."""
    return stat.S_ISREG(known.st_mode) and known.st_nlink <= 1


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


_FULL = "the disk is full; free some space and run the same command again"
_DENIED = "cannot write here ({}); choose another --out"
_BLOCKED = "a file is in the way of this directory; choose another --out"
_REFUSED = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "larger than this system lets a file be; raise the limit (ulimit -f)",
    errno.EACCES: _DENIED,
    errno.EROFS: _DENIED,
    errno.EPERM: _DENIED,
    errno.ENOTDIR: _BLOCKED,
    errno.EEXIST: _BLOCKED,
    errno.EISDIR: "a directory is in the way of this file; choose another --out",
    errno.ELOOP: "a link that leads to itself; remove it, or choose another --out",
}
"""What the operating system refuses and a user can fix."""


def as_user_error(error: OSError, path: Path) -> Exception:
    """Translate the operating system's refusals a user can fix; anything else stays what it is."""
    said = _REFUSED.get(error.errno or 0)
    return (
        error
        if said is None
        else UserError(f"{path}: {said.format(os.strerror(error.errno or 0))}")
    )


@contextlib.contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Raise what the operating system refuses inside as a UserError that names `path`, where a user can fix it."""
    try:
        yield
    except OSError as error:
        raise as_user_error(error, path) from error


def check_writable(path: Path) -> None:
    """Raise UserError, or OSError, where no file can be written at `path`: before the work that it is to hold."""
    if path.is_dir():
        raise UserError(f"{path}: {_REFUSED[errno.EISDIR]}")
    near = path.parent
    with refusals(path):
        while not near.exists():
            near = near.parent
        drop(_new_beside(near / path.name))


def is_temporary(path: Path) -> bool:
    """Return whether a name is one of those that `writing` gives to files that are not finished."""
    return _TEMPORARY.fullmatch(path.name) is not None


def opened(path: Path) -> BufferedReader:
    """Open a regular file for reading; raises UserError for anything else, such as a pipe, which might never end.

    Raises OSError as `open` does.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError as error:
        if str(path) == "-":
            message = "-: standard input is not read; write it to a file, and give that"
            raise UserError(message) from error
        raise
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise UserError(f"{path}: is {_KINDS[stat.S_IFSOCK]}") from error
        raise
    kind = stat.S_IFMT(os.fstat(handle).st_mode)
    if kind != stat.S_IFREG:
        os.close(handle)
        raise UserError(f"{path}: is {_KINDS.get(kind, 'not a file')}")
    return os.fdopen(handle, "rb")


def growing(path: Path) -> FileIO:
    """Open one of our files, unbuffered, for adding to its end and for cutting it; made when it is not there.

    Raises UserError for a link, a file with a second name, and anything but a regular file: it would be another's.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise UserError(_not_ours(path)) from error
        raise
    if not _is_plain(os.fstat(handle)):
        os.close(handle)
        raise UserError(_not_ours(path))
    return os.fdopen(handle, "ab", buffering=0)


def _not_ours(path: Path) -> str:
    return (
        f"{path}: is a link or has a second name, so that another file would be written; "
        "put a copy of the file in its place"
    )


def finite(value: Any) -> Any:
    """Return a JSON-ready value with NaN and infinities as null, which JSON has no words for."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; what UTF-8 cannot carry (part of a file's name) is written as JSON would."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically; raises UserError when it would be larger than what is read back."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    if len(text) > RECORD_BYTES:
        raise UserError(
            f"{path}: {len(text):,} characters, more than the {RECORD_BYTES:,} bytes that are read back; "
            "ask for fewer latents, contexts or members"
        )
    write_text(path, text)


def read_bytes(path: Path, most: int, as_what: str = "") -> bytes:
    """Return a regular file's content; raises UserError when it is missing or larger than `most` bytes."""
    try:
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise UserError(
                    f"{path}: {size:,} bytes, and no such file of wsae has more than {most:,}"
                )
            return file.read(most + 1)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{path}: cannot be read{as_what} ({why})") from error


def read_json(path: Path, most: int = RECORD_BYTES) -> Any:
    """Read a JSON file; raises UserError when it is missing, damaged, no regular file, or larger than `most` bytes."""
    data = read_bytes(path, most)
    try:
        return parse_json(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, not JSON ({error})") from error


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text; raises GivenTwice, ValueError or RecursionError."""
    plain = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    return json.loads(plain, object_pairs_hook=unique)


def read_lines(path: Path, longest: int = LINE_BYTES) -> Iterator[bytes]:
    """Yield the lines of a file of ours; raises UserError when it is no regular file or a line has too many bytes."""
    with opened(path) as file:
        while line := file.readline(longest + 1):
            if len(line) > longest:
                raise UserError(f"{path}: damaged, a line of more than {longest:,} bytes")
            yield line


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these pairs (for a JSON decoder); raises GivenTwice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise GivenTwice(f"key {twice[:80]!r} is given twice")
    return found


def digest(value: object) -> str:
    """Return the SHA-256 of a JSON-ready value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file, read in chunks; raises UserError when it is not a regular file."""
    with opened(path) as file:
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
    except (ValueError, RecursionError) as error:  # nested too deep
        raise UserError(f"{path}: damaged, not JSON that wsae writes ({error})") from error
    if not sealed:
        raise UserError(f"{path}: altered, its checksum differs; remove it and make it again")
    return rest


@contextlib.contextmanager
def locked(directory: Path, top: Path | None = None) -> Iterator[None]:
    """Hold the directory for this process; a second process is refused with a UserError.

    A directory made for it in which nothing was written goes again. `top`: the directory of the user's that this one is
    a part of. It may be a link; below it none is written through: raises UserError for a folder that is a link.
    """
    _refuse_links(directory, top or directory)
    made = not directory.exists()
    with refusals(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with locked_file(directory / ".lock") as held:
        if not held:
            raise UserError(f"{directory}: another wsae process is writing here")
        try:
            yield
        finally:
            if made and directory.is_dir() and os.listdir(directory) == [".lock"]:
                shutil.rmtree(directory)


def _refuse_links(directory: Path, top: Path) -> None:
    """Raise UserError when a folder between `top` and `directory` is a link, or one below leads out of it."""
    between = directory.relative_to(top).parts
    for depth in range(1, len(between) + 1):
        folder = top.joinpath(*between[:depth])
        if folder.is_symlink():
            raise UserError(_leads_out(folder, top))
    if directory.is_dir():
        home = os.path.realpath(directory)
        for folder in _linked_folders(directory):
            if not Path(os.path.realpath(folder)).is_relative_to(home):
                raise UserError(_leads_out(folder, directory))


def _linked_folders(directory: Path | str) -> Iterator[str]:
    """Yield every link to a folder in a directory and in its folders."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_symlink():
                if entry.is_dir():
                    yield entry.path
            elif entry.is_dir():
                yield from _linked_folders(entry.path)


def _leads_out(folder: Path | str, top: Path) -> str:
    return (
        f"{folder}: is a link to a folder, and nothing is written through links in {top}; "
        "put the folder itself in its place, or work on a copy (cp -rL)"
    )


@contextlib.contextmanager
def locked_file(path: Path, wait: bool = False) -> Iterator[bool]:
    """Yield whether this process holds the lock on a file, made when it is not there; `wait` for it or not.

    Where the file system has no locks the file counts as held, with one note: processes are not kept apart there.
    """
    while True:
        with refusals(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = _lock_file(path)
        with file:
            held = _lock(file, path, wait)
            if held and not _is_still(path, file):
                continue  # another process removed the directory in between
            yield held
            return


def _lock_file(path: Path) -> IO[bytes]:
    """Open a lock file, which is never written."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise UserError(f"{path}: is not a lock that wsae made; remove it") from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(f"{path}: is not a lock that wsae made; remove it")
    return os.fdopen(handle, "rb")


def _lock(file: IO[bytes], path: Path, wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno not in _NO_LOCKS:
            raise as_user_error(error, path) from error
        if path.parent not in _told:
            _told.add(path.parent)
            _log.warning(
                "%s: this file system has no locks; let no second wsae write here at the same time",
                path.parent,
            )
    return True


_told: set[Path] = set()
"""Places without locks that were noted."""


def _is_still(path: Path, file: IO[bytes]) -> bool:
    """Return whether the open file is still the one at this path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False

"""What can be made again is kept in one folder, and nothing that lies there is believed before it is looked at.

An entry is a folder `part/key` with a list of its files' digests. It is used where everything in it belongs to this
user, nobody else can write to it, and every file is the one listed; otherwise it is made again. Where the cache folder
itself cannot be used (no home, read only, another user's, open to everybody) a private temporary folder serves.
"""

import atexit
import contextlib
import errno
import fcntl
import functools
import json
import logging
import os
import pwd
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from wsae.core.files import digest, flush, sha256_file

LIST = "files.json"
"""The list of an entry: {name: sha256}."""
_log = logging.getLogger(__name__)


def cache_root() -> Path:
    """Return the folder of all caches: $WSAE_CACHE, else $XDG_CACHE_HOME/wsae, else ~/.cache/wsae.

    Raises OSError where the user has no home.
    """
    chosen, base = os.environ.get("WSAE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if chosen:
        return Path(os.path.expanduser(chosen)).absolute()
    below = Path(base) if base and Path(base).is_absolute() else _home() / ".cache"
    return below / "wsae"


def _home() -> Path:
    try:
        home = os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir
    except KeyError as error:
        raise OSError(errno.ENOENT, "this user has no home") from error
    if not Path(home).is_dir():  # made here, it would be nobody's
        raise NotADirectoryError(errno.ENOTDIR, "the home is no directory", home)
    return Path(home)


def cached(part: str, key: str, make: Callable[[Path], None]) -> Path:
    """Return the folder of `key` in the cache's folder `part`; `make(folder)` fills it where there is none.

    Raises what `make` raises, and OSError where not even a temporary folder can be written.
    """
    try:
        return _entry(_own_folder(part), key, make)
    except OSError as error:
        reason = _told(error)
    return cached_privately(part, key, make, reason)


SMALL_BYTES, _SHA256 = 1 << 22, "sha256"


def content_digest(path: Path) -> str:
    """Return a file's SHA-256; that of a large file is kept until its place, size or one of its times is another.

    The time of its last change is the system's own: neither a copy nor a program that sets times brings it back.
    """
    found = path.stat()
    if found.st_size <= SMALL_BYTES:
        return sha256_file(path)
    times = found.st_mtime_ns, found.st_ctime_ns

    def make(entry: Path) -> None:
        (entry / _SHA256).write_text(sha256_file(path))

    key = digest([os.fsencode(path.resolve()).hex(), found.st_ino, found.st_size, *times])
    try:
        entry = _entry(_own_folder("digests"), key, make)
        return (entry / _SHA256).read_text()
    except OSError:  # a cache that cannot be used, or a full disk, costs time alone
        return sha256_file(path)


def kept(part: str, key: str) -> Path:
    """Return the path of what its user goes on writing to, in the cache's folder `part`; made and checked by others.

    Raises OSError where not even a temporary folder can be written.
    """
    try:
        return _own_folder(part) / key
    except OSError as error:
        return _private_folder(_told(error)) / f"{part}-{key}"


def _told(error: OSError) -> str:
    what = error.strerror or str(error)
    return f"{error.filename}: {what}" if error.filename else what


def cached_privately(part: str, key: str, make: Callable[[Path], None], reason: str) -> Path:
    """Return the entry in a temporary folder of this process; a warning tells the reason once."""
    return _entry(_private_folder(reason), f"{part}-{key}", make)


@functools.cache
def _private_folder(reason: str) -> Path:
    """Return a temporary folder that only this user can enter, removed when the process ends; says why it is used."""
    folder = Path(tempfile.mkdtemp(prefix="wsae-"))
    _log.warning(
        "the cache cannot be used (%s); what is made now is kept until this process ends. "
        "Set WSAE_CACHE to a folder of your own to keep it",
        reason,
    )
    owner = os.getpid()
    atexit.register(lambda: owner == os.getpid() and shutil.rmtree(folder, ignore_errors=True))
    return folder


def _own_folder(part: str) -> Path:
    """Return the folder of one kind of entry, made where there is none; raises OSError where it is not ours alone."""
    root = cache_root()
    for folder in (*reversed(root.parents), root):
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    root = root.resolve()
    for folder in (root, *root.parents):
        _check_above(folder)
    shared = PermissionError(errno.EACCES, "belongs to another user", str(root / part))
    for name in (part, f"{part}-{os.geteuid()}"):  # the second where several users share the root
        folder = root / name
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
            if stat.S_IMODE(found.st_mode) & 0o077:
                folder.chmod(0o700)
            return folder
    raise shared


def _check_above(folder: Path) -> None:
    """Raise OSError where another user could put another folder in the place of one in this folder."""
    found = folder.stat()
    mine = found.st_uid == os.geteuid()
    if not mine and found.st_uid not in (0, Path("/").stat().st_uid):
        raise PermissionError(errno.EACCES, "belongs to another user", str(folder))
    # a user's own group is taken for nobody else: many systems make folders writable for it
    others = stat.S_IWOTH if mine else stat.S_IWOTH | stat.S_IWGRP
    if found.st_mode & others and not found.st_mode & stat.S_ISVTX:
        raise PermissionError(errno.EACCES, "other users can write there", str(folder))


def _entry(folder: Path, key: str, make: Callable[[Path], None]) -> Path:
    target = folder / key
    if is_whole(target):
        return target
    scratch = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=folder))
    try:
        make(scratch)
        _seal(scratch)
        _put(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _seal(scratch: Path) -> None:
    """Close the files to others, list their digests, and have all of it on the disk before it gets its name."""
    files = sorted(path for path in scratch.rglob("*") if path.is_file())
    for path in scratch.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    listed = {str(path.relative_to(scratch)): sha256_file(path) for path in files}
    (scratch / LIST).write_text(json.dumps(listed), encoding="utf-8")
    (scratch / LIST).chmod(0o600)
    for path in (*scratch.rglob("*"), scratch):
        flush(path)


def _put(scratch: Path, target: Path) -> None:
    """Give the finished folder its name, unless another process was first; what is damaged there makes way."""
    with _alone(target.parent):
        if is_whole(target):
            return
        if target.is_dir() and not target.is_symlink():
            aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            os.replace(target, aside / "damaged")
            shutil.rmtree(aside, ignore_errors=True)
        else:
            target.unlink(missing_ok=True)
        os.replace(scratch, target)
        flush(target.parent)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from changing what has a name here, where the file system has locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def is_whole(folder: Path) -> bool:
    """Return whether an entry is there, ours alone, and every file in it is the one that was listed."""
    try:
        _check_ours(folder, stat.S_ISDIR)
        _check_ours(folder / LIST, stat.S_ISREG)
        listed = json.loads((folder / LIST).read_bytes())
        there = {path for path in folder.rglob("*") if path != folder / LIST}
        for path in there:
            kind = stat.S_ISDIR if stat.S_ISDIR(path.lstat().st_mode) else stat.S_ISREG
            _check_ours(path, kind)
        files = {str(path.relative_to(folder)): path for path in there if path.is_file()}
        return {name: sha256_file(path) for name, path in files.items()} == listed
    except (OSError, ValueError, RecursionError):
        return False


def _check_ours(path: Path, kind: Callable[[int], bool]) -> None:
    found = path.lstat()  # a link is neither a file nor a folder
    loose = stat.S_IMODE(found.st_mode) & (stat.S_IWGRP | stat.S_IWOTH)
    if not kind(found.st_mode) or found.st_uid != os.geteuid() or loose:
        raise PermissionError(errno.EACCES, "not a file of this user alone", str(path))

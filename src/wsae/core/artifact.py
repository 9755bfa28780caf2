"""Directories on disk that are either whole or refused.

A stage writes its files under temporary names, renames them, and writes `manifest.json` last. A reader refuses a
directory without a manifest, of another kind or schema, or whose files differ from the recorded size and SHA-256. A
JSON file that no manifest lists yet (the manifest itself, the state of unfinished work) carries its own: `seal`.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from wsae.core.config import Config
from wsae.core.errors import UserError
from wsae.core.version import __version__

SCHEMA = 1
MANIFEST = "manifest.json"
SEAL = "checksum"


class FileRecord(Config):
    """Size and checksum of one file of an artifact."""

    bytes: int
    sha256: str


class Manifest(Config):
    """What an artifact directory is and holds; `files` maps relative paths to their records."""

    schema_version: int
    kind: str
    wsae_version: str
    config: dict[str, Any]
    inputs: dict[str, str]
    """Digests of what this artifact was made from, by name."""
    info: dict[str, Any]
    """Results a reader wants without opening the files (widths, row counts, ...)."""
    files: dict[str, FileRecord]

    def digest(self) -> str:
        """Return the SHA-256 of the manifest: names this artifact's content wherever it lies."""
        return digest(self.to_dict())


def digest(value: object) -> str:
    """Return the SHA-256 of a JSON-ready value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it over `path`.

    A failure removes the temporary file; a full disk or a read-only place becomes a one-line UserError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_leftovers(path)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise as_user_error(error, path) from error
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


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


def write_manifest(
    directory: Path,
    kind: str,
    config: dict[str, Any],
    files: Iterable[str] | Mapping[str, FileRecord],
    inputs: dict[str, str] | None = None,
    info: dict[str, Any] | None = None,
) -> Manifest:
    """Write `manifest.json`, the last act of a stage. `files` may bring records made while writing."""
    known = files if isinstance(files, Mapping) else {}
    records = {name: known.get(name) or record(directory / name) for name in sorted(files)}
    manifest = Manifest(
        schema_version=SCHEMA,
        kind=kind,
        wsae_version=__version__,
        config=config,
        inputs=inputs or {},
        info=info or {},
        files=records,
    )
    write_json(directory / MANIFEST, seal(manifest.to_dict()))
    return manifest


def record(path: Path) -> FileRecord:
    """Return size and checksum of a file."""
    return FileRecord(bytes=path.stat().st_size, sha256=sha256_file(path))


def read_manifest(directory: Path | str, kind: str, verify: bool = True) -> Manifest:
    """Read and check an artifact directory; raises UserError naming the file that is missing, cut or altered.

    `verify=False` checks names and sizes only (for very large stores).
    """
    directory = Path(directory)
    path = directory / MANIFEST
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    if not path.exists():
        raise UserError(
            f"{directory}: has no {MANIFEST}, so it is not a finished wsae {kind}; make it again"
        )
    data = read_json(path)
    if not isinstance(data, dict) or data.get("schema_version") != SCHEMA:
        found = data.get("schema_version") if isinstance(data, dict) else None
        raise UserError(
            f"{path}: schema version {found!r} is not {SCHEMA}; it was not written by this wsae"
        )
    manifest = Manifest.parse(unsealed(data, path), where=str(path))
    if manifest.kind != kind:
        raise UserError(f"{directory}: this is a wsae {manifest.kind}, but a {kind} is needed here")
    for name, expected in manifest.files.items():
        check_file(directory, name, expected, verify)
    return manifest


def check_file(directory: Path, name: str, expected: FileRecord, verify: bool = True) -> None:
    """Compare one file with its record; raises UserError when it is missing, cut, altered or outside."""
    path = contained(directory, name)
    if not path.is_file():
        raise UserError(f"{path}: listed in the manifest but missing")
    size = path.stat().st_size
    if size != expected.bytes:
        raise UserError(
            f"{path}: {size} bytes where {expected.bytes} were written (cut or altered)"
        )
    if verify and sha256_file(path) != expected.sha256:
        raise UserError(f"{path}: checksum differs from the manifest (altered); make it again")


def contained(directory: Path, name: str) -> Path:
    """Return a file or folder of a directory; raises UserError when that lies outside, by "..", a root or a link."""
    path = directory / name
    try:
        inside = path.resolve().is_relative_to(_home(directory.resolve()))
        path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, not text, a circle of links
        reason = " ".join(str(error).split())[:80]
        raise UserError(
            f"{directory / MANIFEST}: names no possible file: {name[:80]!r} ({reason})"
        ) from error
    if not inside:
        raise UserError(f"{directory / MANIFEST}: names a file outside the directory: {name!r}")
    return path


def _home(directory: Path) -> Path:
    """Return the directory; for a snapshot in the hub's cache, whose files are links to blobs, the repository's."""
    for place in (directory, *directory.parents):
        if place.parent.name == "snapshots" and (place.parents[1] / "blobs").is_dir():
            return place.parents[1]
    return directory


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory for this process; a second process is refused with a UserError."""
    path = directory / ".lock"
    while True:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except OSError as error:
            raise as_user_error(error, directory) from error
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

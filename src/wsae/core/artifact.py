"""Directories on disk that are either whole or refused.

A stage writes its files (`wsae.core.files`) and `manifest.json` last. A reader refuses a directory without a manifest,
of another kind or schema, or whose files differ from the recorded size and SHA-256.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from wsae.core import __version__
from wsae.core.config import Config
from wsae.core.errors import UserError
from wsae.core.files import (
    CONFIG_BYTES,
    digest,
    flush,
    growing,
    locked,
    read_json,
    refusals,
    seal,
    sha256_file,
    unsealed,
    write_json,
)

SCHEMA = 1
MANIFEST = "manifest.json"
TINY_MODEL = "tiny-model"
"""The kind of a folder that is a model of transformers too, with a manifest of ours."""

# The files of a run, which its stages write and `wsae.run.Run` reads.

CONFIG, GAMMA_FILE, PROVENANCE = "config.json", "gamma.json", "provenance.json"
METRICS_FILE, SPEED = "metrics.jsonl", "speed.jsonl"
NAMES_FILE = "names.json"
"""What users call latents, and which they starred: no part of what the run's digest names."""
MEMBERS, CHECKPOINTS = "members", "checkpoints"
EVALUATION_PART, INTERPRETATION_PART, CLASSES_PART = "evaluation", "interpretation", "classes"
PROBING_PART = "probing"
PARTS = (EVALUATION_PART, INTERPRETATION_PART, CLASSES_PART, PROBING_PART)
"""What later commands add to a run: a folder of its own each, whole or without a manifest."""
EVALUATION, INTERPRETATION, CLASSES = "evaluation.json", "interpretation.json", "classes.json"
PROBING = "probing.json"
ARRAYS, CONTEXTS_FILE, THUMBNAILS_FILE = "arrays.safetensors", "contexts.json", "thumbnails.json"

_HINT = " (an SAE of another tool is read by wsae import)"
_NO_RUN = {
    "sae": "; one SAE alone can be measured: wsae evaluate SAE --source DATA, and given away: wsae export SAE",
    "export": "; wsae import makes it an SAE of wsae, which wsae evaluate SAE --source DATA measures",
}
"""What to do with another artifact where a run is needed."""


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
    records = {}
    for name in sorted(files):
        path = directory / name
        with refusals(path):
            if name not in known:
                flush(path)  # no power cut can take it back any more
        records[name] = known.get(name) or record(path)
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


def kind_of(directory: Path) -> str | None:
    """Return what kind of artifact a directory says it is; None where no manifest does, or none is there."""
    path = directory / MANIFEST
    data = read_json(path) if path.is_file() else None
    kind = data.get("kind") if isinstance(data, dict) else None
    return kind if isinstance(kind, str) else None


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
            f"{_HINT if kind in ('run', 'sae') else ''}"
        )
    data = read_json(path, CONFIG_BYTES)
    if not isinstance(data, dict) or data.get("schema_version") != SCHEMA:
        found = data.get("schema_version") if isinstance(data, dict) else None
        raise UserError(
            f"{path}: schema version {found!r} is not {SCHEMA}; it was not written by this wsae"
        )
    manifest = Manifest.parse(unsealed(data, path), where=str(path))
    if manifest.kind != kind:
        raise UserError(
            f"{directory}: this is a wsae {manifest.kind}, but a {kind} is needed here"
            f"{_NO_RUN.get(manifest.kind, '') if kind == 'run' else ''}"
        )
    for name, expected in manifest.files.items():
        check_file(directory, name, expected, verify)
    return manifest


# Folders that are given away (exports, SAEs, hub folders): what may lie there already, and how one is written.
#
# While a folder is written it holds an empty file that says so, so that the same command goes on
# after a kill or a full disk, and a folder of somebody else is never taken for one.

_UNFINISHED = ".unfinished-"


def free(out: Path, kind: str, force: bool) -> None:
    """Raise UserError unless an artifact may be written to `out`.

    It may where nothing is, where the same kind was begun and not finished, and over one of the same kind with `force`.
    """
    others = out.iterdir() if out.is_dir() else [out] if out.exists() else []
    ours = (p.name == ".lock" or p.name.startswith(_UNFINISHED) for p in others)
    if begun(out, kind) or all(ours):
        return
    data = read_json(out / MANIFEST) if (out / MANIFEST).is_file() else {}
    if not isinstance(data, dict) or data.get("kind") != kind:
        raise UserError(f"{out}: is not empty and holds no wsae {kind}; use another --out")
    if not force:
        raise UserError(
            f"{out}: holds another {kind}; add --force to write over it, or use another --out"
        )


@contextlib.contextmanager
def replacing(out: Path, kind: str) -> Iterator[None]:
    """Hold a folder that is `free` while an artifact is written to it; what a former one's manifest lists goes first.

    Raises UserError when another process writes there, or nothing can be written.
    """
    with locked(out), unfinished(out, kind):
        former = read_json(out / MANIFEST) if (out / MANIFEST).is_file() else {}
        for name in former.get("files", {}) if isinstance(former, dict) else ():
            inside = out / str(name)
            if inside.resolve().is_relative_to(out.resolve()) and inside.is_file():
                inside.unlink()
        (out / MANIFEST).unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def unfinished(out: Path, kind: str) -> Iterator[None]:
    """Mark a folder as being written; the mark stays where the work inside fails."""
    mark = _mark(out, kind)
    with refusals(out):
        mark.parent.mkdir(parents=True, exist_ok=True)
        growing(mark).close()
        yield
        mark.unlink()


def begun(out: Path, kind: str) -> bool:
    """Return whether an artifact of this kind was begun in a folder and not finished."""
    return _mark(out, kind).exists()


def _mark(out: Path, kind: str) -> Path:
    return out / f"{_UNFINISHED}{kind.replace(' ', '-')}"


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

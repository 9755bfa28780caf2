"""Folders that are given away (exports, SAEs, hub folders): what may lie there already, and how one is written.

While a folder is written it holds an empty file that says so, so that the same command goes on after a kill or a full
disk, and a folder of somebody else is never taken for one.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from wsae.core.artifact import MANIFEST, read_manifest
from wsae.core.errors import UserError
from wsae.core.files import growing, locked, read_json, refusals

_UNFINISHED = ".unfinished-"


def same(out: Path, kind: str, format: str, inputs: dict[str, str]) -> bool:
    """Whether `out` holds, whole, the artifact that would be written from these inputs."""
    if not (out / MANIFEST).is_file() or begun(out, kind):
        return False
    data = read_json(out / MANIFEST)
    if not isinstance(data, dict) or data.get("kind") != kind or data.get("inputs") != inputs:
        return False
    found = read_manifest(out, kind)
    return found.config.get("format", format) == format


def free(out: Path, kind: str, force: bool) -> None:
    """Raise UserError unless an artifact may be written to `out`.

    It may where nothing is, where the same kind was begun and not finished, and over one of the same kind with `force`.
    """
    if not _others(out) or begun(out, kind):
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
    """Whether an artifact of this kind was begun in a folder and not finished."""
    return _mark(out, kind).exists()


def _mark(out: Path, kind: str) -> Path:
    return out / f"{_UNFINISHED}{kind.replace(' ', '-')}"


def _others(out: Path) -> bool:
    """Whether anything but a lock and marks lies in a folder, or a file is in its place."""
    if not out.is_dir():
        return out.exists()
    return any(p.name != ".lock" and not p.name.startswith(_UNFINISHED) for p in out.iterdir())

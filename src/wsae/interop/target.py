"""Folders about to be written: what may lie there already."""

from pathlib import Path

from wsae.core.artifact import MANIFEST, read_json, read_manifest
from wsae.core.errors import UserError


def same(out: Path, kind: str, format: str, inputs: dict[str, str]) -> bool:
    """Whether `out` holds, whole, the artifact that would be written from these inputs."""
    if not (out / MANIFEST).is_file():
        return False
    data = read_json(out / MANIFEST)
    if not isinstance(data, dict) or data.get("kind") != kind or data.get("inputs") != inputs:
        return False
    found = read_manifest(out, kind)
    return found.config.get("format", format) == format


def free(out: Path, kind: str, force: bool) -> None:
    """Make room for an artifact: an empty or new folder is free, one of the same kind is emptied with `force`.

    Raises UserError for anything else.
    """
    if not out.exists() or (
        out.is_dir() and not any(p for p in out.iterdir() if p.name != ".lock")
    ):
        return
    data = read_json(out / MANIFEST) if (out / MANIFEST).is_file() else {}
    if not isinstance(data, dict) or data.get("kind") != kind:
        raise UserError(f"{out}: is not empty and holds no wsae {kind}; use another --out")
    if not force:
        raise UserError(
            f"{out}: holds another {kind}; add --force to write over it, or use another --out"
        )
    (out / MANIFEST).unlink()
    for name in data.get("files", {}):
        inside = out / str(name)
        if inside.resolve().is_relative_to(out.resolve()) and inside.is_file():
            inside.unlink()

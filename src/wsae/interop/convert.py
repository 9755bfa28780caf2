"""Load an SAE from any format here, save one to any: `load`, `save`.

Beside another tool's files an export has two of ours, which the tools ignore: `wsae.safetensors` (gamma and whatever
the format cannot hold to the bit) and `manifest.json` (the SAE's config, its provenance, every checksum), written last.
With them the way back is exact to the bit; without them gamma is 1 and the files alone speak.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from wsae.core.artifact import (
    CONFIG,
    MANIFEST,
    MEMBERS,
    PROVENANCE,
    Manifest,
    begun,
    free,
    read_manifest,
    replacing,
    write_manifest,
)
from wsae.core.errors import UserError, nearest
from wsae.core.files import read_json, sha256_file
from wsae.core.hub import local_folder, snapshot
from wsae.core.tensors import load_tensors, save_tensors
from wsae.interop.circuit_tracer import CIRCUIT_TRACER, LAYER
from wsae.interop.circuit_tracer import CONFIG as SET
from wsae.interop.config import FormatName, SourceName
from wsae.interop.dictionary_learning import CROSSCODER, DICTIONARY_LEARNING
from wsae.interop.format import THROUGH_SAELENS, Format, NamedTensors, Reader
from wsae.interop.published import GEMMA_SCOPE, LLAMA_SCOPE, LLAMA_SCOPE_R1, TORCH, beside
from wsae.interop.releases import LOADERS, Published, hub_model, named, of_repository, published
from wsae.interop.saelens import SAELENS, SCALER, as_registered
from wsae.interop.sparsify import SPARSIFY
from wsae.sae.config import Provenance, SAEConfig
from wsae.sae.model import SAE, WEIGHTS

SIDE = "wsae.safetensors"
"""What an export holds that the other tool's files cannot, to the bit."""
KINDS: dict[FormatName, Format] = {
    f.name: f for f in (SAELENS, SPARSIFY, DICTIONARY_LEARNING, CIRCUIT_TRACER, CROSSCODER)
}
"""What can be written, too."""
READERS: dict[SourceName, Reader] = {
    reader.name: reader
    for reader in (*KINDS.values(), GEMMA_SCOPE, LLAMA_SCOPE, LLAMA_SCOPE_R1, TORCH)
}


_SHARED = ("W_enc", "W_dec", "b_enc", "b_dec", "W_skip")
"""Tensors that other tools' files may hold to the bit."""
_MODULE = re.compile(r"(?:[A-Za-z_]+\.)*(?:layers|h|blocks|layer)\.\d+(?:\.\w+)*", flags=re.ASCII)
R = TypeVar("R", bound=Reader)


def same(out: Path, kind: str, format: str, inputs: dict[str, str]) -> bool:
    """Return whether `out` holds, whole, the artifact that would be written from these inputs."""
    if not (out / MANIFEST).is_file() or begun(out, kind):
        return False
    data = read_json(out / MANIFEST)
    if not isinstance(data, dict) or data.get("kind") != kind or data.get("inputs") != inputs:
        return False
    found = read_manifest(out, kind)
    return found.config.get("format", format) == format


class Loaded(NamedTuple):
    """An SAE, what is known about it, and the format it was read from ("wsae" for our own)."""

    sae: SAE
    about: Provenance
    format: str


def find(name: str, kinds: Mapping[Any, R]) -> R:
    """Return the format called `name`; raises UserError for another name."""
    if name not in kinds:
        raise UserError(
            f"format '{name}' is unknown{nearest(name, kinds)}; choose {', '.join(kinds)}"
        )
    return kinds[name]


def save(
    sae: SAE,
    path: Path | str,
    format: str = "saelens",
    about: Provenance = Provenance(),  # noqa: B008  (frozen)
    inputs: dict[str, str] | None = None,
    force: bool = False,
) -> Path:
    """Write an SAE as another tool's folder, with its gamma beside it; returns the folder.

    Raises UserError, before anything is written, when the format has no equal for this SAE, or the folder holds
    something else (with `force` another export gives way).
    """
    kind, path, sae = find(format, KINDS), Path(path), sae.plain()
    packed = kind.pack(sae, about)
    named = kind.rename(packed, format)
    held = {name: getattr(named, name) for name in _SHARED}
    side = {
        name: tensor
        for name, tensor in sae.tensors().items()
        if held.get(name) is None or not torch.equal(held[name], tensor.cpu())
    }
    config = {"format": kind.name, "sae": sae.cfg.to_dict(), "provenance": about.to_dict()}
    free(path, "export", force)
    with replacing(path, "export"):
        files = kind.write(packed, path)
        save_tensors(path / SIDE, side)
        write_manifest(path, "export", config, [*files, SIDE], inputs=inputs)
    return path


def load(path: Path | str, format: str = "auto") -> Loaded:
    """Read an SAE of any format here, or our own, from a folder, a file in one, `hub:owner/name` or `RELEASE:ID`.

    Raises UserError naming what is missing, damaged or without an equal here.
    """
    if (found := named(path)) is not None:
        return _released(found, fetched(found))
    place = _folder(local_folder(path))
    manifest = None if place.is_file() else _manifest(place)
    if manifest is not None and manifest.kind == "sae":
        return Loaded(SAE.load(place), Provenance.of(place), "wsae")
    kind = detect(place) if format == "auto" else find(format, READERS)
    foreign = kind.read(place)
    where = str(place)
    if manifest is None or not isinstance(kind, Format):
        sae, about = kind.sae(foreign, where), kind.about(foreign)
        name = place.absolute().name
        if about.hook is None and _MODULE.fullmatch(name):  # only the folder says it, as sparsify's
            about = about.model_copy(update={"hook": name})
        return Loaded(sae, about, kind.name)
    if manifest.config.get("format") != kind.name:
        raise UserError(f"{place}: its manifest says format {manifest.config.get('format')!r}")
    sae = _restored(manifest, kind.rename(foreign, where), place)
    told = manifest.config.get("provenance")
    if not isinstance(told, dict):
        raise UserError(f"{place / MANIFEST}: lacks the provenance (altered); export it again")
    return Loaded(sae, Provenance.parse(told, where=str(place / MANIFEST)), kind.name)


def from_pretrained(release: str, sae_id: str) -> Loaded:
    """Read the SAE of a release (`wsae releases`); `release` may be a repository of the hub, `sae_id` a folder in it.

    Raises UserError for unknown names, and as `load` does.
    """
    if "/" in release and of_repository(release, sae_id) is None:
        return load(f"hub:{release}/{sae_id}")
    found = published(release, sae_id)
    return _released(found, fetched(found))


def fetched(found: Published) -> Path:
    """Return the folder, or the file, of a published SAE, fetched from the hub; UserError where it cannot be had."""
    kind, where = READERS[LOADERS[found.loader]], f"{found.release}:{found.sae_id}"
    file = kind in (TORCH, CIRCUIT_TRACER)
    if kind is CIRCUIT_TRACER:
        wanted = [found.path, str(Path(found.path).with_name(SET))]
    elif kind is TORCH:
        wanted = [found.path, str(beside(Path(found.path)))]
    else:
        wanted = [f"{found.path}/{name}" for name in (*kind.files, SCALER)]
    root = snapshot(found.repo, wanted, [], None, where)
    place = root / found.path
    if not (place.is_file() if file else kind.detect(place)):
        raise UserError(
            f"{where}: {found.repo} has no such files, or the hub cannot be reached and they are not in the cache "
            f"({', '.join(wanted[:3])})"
        )
    return place


def _released(found: Published, place: Path) -> Loaded:
    """Return a published SAE with what the registry says beside its files."""
    kind, where = READERS[LOADERS[found.loader]], f"{found.release}:{found.sae_id}"
    foreign = kind.read(place)
    if kind is SAELENS:
        foreign = as_registered(foreign, found.overrides, found.scale)
    elif kind is TORCH:
        foreign = foreign._replace(config={**foreign.config, "loader": found.loader})
    elif foreign.scale is None:
        foreign = foreign._replace(scale=found.scale)
    sae, about = kind.sae(foreign, where), kind.about(foreign)
    known = {
        "model": about.model or hub_model(found.model),
        "origin": {**about.origin, "release": found.release, "sae_id": found.sae_id},
    }
    return Loaded(sae, about.model_copy(update=known), kind.name)


def identity(place: Path) -> dict[str, Any]:
    """Return what decides what `load` makes of a folder or a file: where it lies, and the digest of each file."""
    folder = _folder(place)
    if folder.is_file():
        aside = folder.with_name(SET) if LAYER.fullmatch(folder.name) else beside(folder)
        files = [file for file in (folder, aside) if file.is_file()]
    else:
        names = {MANIFEST, SIDE, WEIGHTS, PROVENANCE, CONFIG, SCALER}
        names |= {name for kind in READERS.values() for name in kind.files if name}
        files = [folder / name for name in sorted(names) if (folder / name).is_file()]
    digests = {str(file.relative_to(folder.parent)): sha256_file(file) for file in files}
    return {"path": str(folder.absolute()), "files": digests}


def readable(place: Path) -> bool:
    """Return whether a folder, or a file in it, holds what some reader takes for an SAE."""
    folder = _folder(place)
    if folder.is_file():
        return folder.suffix in (".pt", ".pth") or bool(LAYER.fullmatch(folder.name))
    return any(kind.detect(folder) for kind in READERS.values())


def _folder(place: Path) -> Path:
    """Return the folder of a config or weights that were named in place of it, and the one .pt file of a folder."""
    if place.is_file() and LAYER.fullmatch(place.name):
        return place
    if not place.is_file():
        alone = [*place.glob("*.pt"), *place.glob("*.pth")] if place.is_dir() else []
        known = any(kind.detect(place) for kind in READERS.values()) or (place / MANIFEST).exists()
        return alone[0] if len(alone) == 1 and not known else place
    names = (MANIFEST, WEIGHTS, *(name for kind in READERS.values() for name in kind.files if name))
    for name in dict.fromkeys(names):
        parts = Path(name).parts
        if place.parts[-len(parts) :] == parts:
            return Path(*place.parts[: -len(parts)])
    return place


def detect(place: Path) -> Reader:
    """Return the reader of a folder's weights, or of one file of torch.save; raises UserError when there are none."""
    if place.is_file() and readable(place):
        return CIRCUIT_TRACER if LAYER.fullmatch(place.name) else TORCH
    if not place.is_dir():
        what = "holds no SAE that this reads" if place.exists() else "no such file or directory"
        raise UserError(f"{place}: {what}; give the folder that holds an SAE")
    for kind in READERS.values():
        if kind.detect(place):
            return kind
    listed = (name for kind in READERS.values() for name in kind.files[1:] if name)
    names = list(dict.fromkeys(listed))
    inside = [p for p in sorted({p for n in names for p in place.glob(f"*/{n}")}) if readable(p)]
    inside += sorted([*place.glob("*.pt"), *place.glob("*.pth")])
    hint = f"; there is one in {_folder(inside[0])}" if inside else ""
    raise UserError(
        f"{place}: holds no SAE that this reads ({', '.join(names)}, a .pt)"
        + (hint or f"; if SAELens reads it, {THROUGH_SAELENS}")
    )


def _manifest(folder: Path) -> Manifest | None:
    """Return the verified manifest of an export or an SAE of ours, or None."""
    if not (folder / MANIFEST).is_file():
        return None
    data = read_json(folder / MANIFEST)
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind == "run":
        members = sorted(folder.glob(f"{MEMBERS}/*/*/{MANIFEST}"))
        hint = f", for example {members[0].parent}" if members else ""
        raise UserError(f"{folder}: is a wsae run; give one of its SAEs{hint}")
    return read_manifest(folder, "sae" if kind == "sae" else "export")


def _restored(manifest: Manifest, named: NamedTensors, folder: Path) -> SAE:
    """Return the SAE an export was made from, bit for bit."""
    config: Any = manifest.config.get("sae")
    if not isinstance(config, dict) or SIDE not in manifest.files:
        raise UserError(f"{folder / MANIFEST}: lacks the SAE's config or {SIDE}; export it again")
    cfg = SAEConfig.parse(config, where=str(folder / MANIFEST))
    found = named.widths(cfg.transcoder)
    if found != {name: getattr(cfg, name) or None for name in found}:
        raise UserError(
            f"{folder / MANIFEST}: its widths are not those of the weights; export it again"
        )
    sae = SAE(cfg)
    side = load_tensors(folder / SIDE)
    wanted = {name: getattr(named, name) for name in sae.tensors() if name in _SHARED}
    sae.set_tensors({**wanted, **side}, str(folder / SIDE))
    return sae

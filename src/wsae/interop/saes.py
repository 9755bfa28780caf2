"""SAEs on disk or on the hub: which of them a path names, read from any format here, written to any.

A path names a directory of one SAE, a run's members, or what lies on the hub; what the run knows about them comes with
them. Beside another tool's files an export has two of ours, which the tools ignore: `wsae.safetensors` (gamma and
whatever the format cannot hold to the bit) and `manifest.json` (the SAE's config, its provenance, every checksum),
written last. With them the way back is exact to the bit; without them gamma is 1 and the files alone speak.
"""

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from wsae.acts.hooknames import among
from wsae.acts.store import Store
from wsae.core import __version__
from wsae.core.artifact import (
    CONFIG,
    EVALUATION_PART,
    MANIFEST,
    MEMBERS,
    PROVENANCE,
    Manifest,
    begun,
    free,
    kind_of,
    read_manifest,
    replacing,
    write_manifest,
)
from wsae.core.cache import kept
from wsae.core.errors import UserError, nearest, understood
from wsae.core.files import digest, locked_file, read_json, sha256_file
from wsae.core.hub import hub_place, local_folder, snapshot
from wsae.core.tensors import load_tensors, save_tensors
from wsae.evals.glossary import HEADLINES
from wsae.interop.circuit_tracer import CIRCUIT_TRACER, LAYER
from wsae.interop.circuit_tracer import CONFIG as SET
from wsae.interop.config import INDEX, FormatName, SourceName
from wsae.interop.dictionary_learning import CROSSCODER, DICTIONARY_LEARNING
from wsae.interop.format import (
    THROUGH_SAELENS,
    Format,
    NamedTensors,
    NoEqual,
    Reader,
    as_known,
)
from wsae.interop.published import GEMMA_SCOPE, LLAMA_SCOPE, LLAMA_SCOPE_R1, TORCH, beside
from wsae.interop.releases import LOADERS, Published, hub_model, named, of_repository, published
from wsae.interop.saelens import SAELENS, SCALER, as_registered
from wsae.interop.sparsify import SPARSIFY
from wsae.run import Run
from wsae.sae.config import Provenance, SAEConfig
from wsae.sae.model import SAE, WEIGHTS, an_sae

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
    kind, path, sae = find(format, KINDS), Path(path), as_known(an_sae(sae, "save"))
    try:
        packed = kind.pack(sae, about)
    except NoEqual as error:
        others = " or ".join(takers(sae, about))
        alone = "no format has: `wsae push` shares it as it is"
        raise NoEqual(
            f"{error}; {f'it has one with --format {others}' if others else alone}"
        ) from None
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


def takers(sae: SAE, about: Provenance) -> list[str]:
    """Return the names of the formats that have an equal for this SAE, found by asking them."""
    found = []
    for kind in KINDS.values():
        with contextlib.suppress(UserError):
            kind.pack(as_known(sae), about)
            found.append(kind.name)
    return found


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
    if manifest is None or not isinstance(kind, Format) or "layers" in manifest.config:  # a set's
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


# Which SAEs a path names, and what the run knows about them.

_GAMMA = (
    *("rule", "alpha", "normalise", "robust", "quantile", "ridge"),
    *("effective_dimensions", "max_over_median", "tokens", "precondition"),
)
_FILES = re.compile(r"\.(jsonl|txt|parquet|npz|npy|gz|safetensors)$")


def open_run(target: Path | str) -> Run:
    """Return the run that a path or an address names: everything that a command takes is opened here.

    A run's directory and one of ours that holds one SAE are themselves. Anything else that `wsae.interop.load` reads
    (another tool's folder, an export, `hub:owner/name`, `RELEASE:ID`), and an SAE that lies where nothing can be
    written, becomes a run of one member in the cache: what is measured of it is found there again as long as its files
    are the same. Raises UserError in one line for what is neither.
    """
    if (found := named(target)) is not None:
        return _converted(target, fetched(found))
    place = local_folder(target)
    kind = kind_of(place) if place.is_dir() else None
    here = hub_place(target) is None and os.access(place, os.W_OK)
    if kind == "run" or (kind == "sae" and here):
        return Run(place)
    if kind in ("sae", "export") or (kind is None and readable(place)):
        return _converted(target, place)
    plain = read_json(place / CONFIG) if kind is None and (place / CONFIG).is_file() else None
    what = f"wsae {kind}" if kind else "model" if "model_type" in (plain or {}) else None
    if what is not None:
        raise UserError(f"{target}: this is a {what}; an SAE or a finished run is needed here")
    if place.is_dir() and not (place / CONFIG).is_file():
        if hint := _members(place):
            raise UserError(f"{target}: an SAE or a finished run is needed here{hint}")
        detect(place)  # says what would be read
    return Run(place)


def _converted(target: Path | str, place: Path) -> Run:
    """Return the run in the cache that an SAE of this content is, made where there is none yet."""
    found = {"wsae": __version__, "release": str(named(target) or ""), **identity(place)}
    name = re.sub(r"[^\w.-]+", "-", str(target), flags=re.ASCII).strip("-.")[-60:].lstrip("-.")
    folder = kept("saes", f"{name}-{digest(found)[:12]}")
    with locked_file(folder.with_name(f".{folder.name}.lock"), wait=True):
        if kind_of(folder) != "sae" or begun(folder, "sae"):
            loaded = load(target)
            return Run.of_sae(loaded.sae, folder, loaded.about)
    return Run(folder)


class Chosen(NamedTuple):
    """One SAE directory of ours: where it lies, its place in its run ("hook/name", "" for one alone), what is known."""

    path: Path
    place: str
    about: Provenance
    model: str | None
    """The model to load: of a local one the whole path, where what is shared has the last name."""


def choose(
    path: Path | str, member: str | None = None, hook: str | None = None, every: bool | None = None
) -> list[Chosen]:
    """Return the SAEs that a path, a member's name and a hook's name; `every` takes all a run has, where asked for.

    Raises UserError when that is none, or several without `every`.
    """
    run = open_run(path)
    if run.single:
        about = about_sae(run.path)
        if member or every or (hook and about.hook and not among(hook, [about.hook])):
            raise UserError(
                f"{path}: is a single SAE{f' of {about.hook}' if about.hook else ''}; --member, --all and another "
                "--hook belong to runs"
            )
        known = {} if about.hook or not hook else {"hook": hook}
        return [Chosen(run.path, "", about.model_copy(update=known), model_behind(run.path))]
    members = run.members
    if not members:
        raise UserError(
            f"{run.path / MANIFEST}: does not list the run's members (altered); train it again"
        )
    hook = among(hook, members) or hook if hook else None
    found = [
        (h, name)
        for h, names in members.items()
        for name in names
        if hook in (None, h) and member in (None, name)
    ]
    if not found:
        names = list(dict.fromkeys(n for h in members.values() for n in h))
        wrong, known = (hook, list(members)) if hook and hook not in members else (member, names)
        raise UserError(
            f"{path}: has no '{wrong}'{nearest(str(wrong), known)}; it has {', '.join(known)}"
        )
    if len(found) > 1 and not every:
        shown = ", ".join(f"{h}/{n}" for h, n in found[:6]) + (", ..." if len(found) > 6 else "")
        raise UserError(
            f"{path}: {len(found)} SAEs fit ({shown}); choose with --member NAME and --hook HOOK"
            f"{'' if every is None else ', or take --all'}"
        )
    model = model_behind(run.path)
    return [Chosen(run.place(h, n), f"{h}/{n}", about_member(run, h, n), model) for h, n in found]


def _members(folder: Path) -> str:
    """Return a hint at the SAEs of a shared folder, where its index is there."""
    index = read_json(folder / INDEX) if (folder / INDEX).is_file() else {}
    names = index.get("saes") if isinstance(index, dict) else None
    return f"; it holds {', '.join(map(str, names))}: add one to the address" if names else ""


def about_sae(folder: Path) -> Provenance:
    """Return what is known about one SAE: its own words, else those of the run it lies in."""
    alone = Run(folder)
    if alone.provenance != Provenance():
        measured = _scores(alone, *next((h, n) for h, (n,) in alone.members.items()))
        known = {"metrics": measured} if measured else {}
        return alone.provenance.model_copy(update=known)
    run = _home(folder)
    if run is not None:
        hook, *name = folder.resolve().relative_to(run.path / MEMBERS).parts
        return about_member(run, hook, "/".join(name))
    return alone.provenance


def _home(folder: Path) -> Run | None:
    """Return the run that an SAE's folder lies in."""
    around = folder.resolve().parents[1:]  # a label may have a folder of its own
    places = (p.parent for p in around if p.name == MEMBERS and (p.parent / MANIFEST).is_file())
    return next(map(Run, places), None)


def model_behind(folder: Path) -> str | None:
    """Return the model to load for a run, or for an SAE by itself: a local one by the path that was given for it."""
    opened = Run(folder)
    if opened.single and opened.provenance != Provenance():
        return opened.provenance.model
    run = _home(folder) if opened.single else opened
    return None if run is None else _model(run.source)


def about_member(run: Run | Path, hook: str, name: str) -> Provenance:
    """Return what a finished run records about one member: model, text, tokens, gamma, scores, digests."""
    opened = run if isinstance(run, Run) else Run(run)
    manifest = opened.manifest
    gamma = opened.gamma_record.get(hook, {}).get(name) or {}
    with understood(opened.path / CONFIG):
        return Provenance(
            hook=hook,
            hook_out=getattr(opened.config, "given", {}.get)(hook),
            member=name,
            tokens=getattr(opened.config, "trained", opened.config.tokens),
            gamma={key: gamma[key] for key in _GAMMA if gamma.get(key) is not None},
            metrics=_scores(opened, hook, name),
            inputs={**manifest.inputs, "run": manifest.digest()},
            wsae_version=manifest.wsae_version,
            **_source(opened.source),
        )


def _source(source: dict[str, Any]) -> dict[str, Any]:
    """Return model, context and dataset of a run's source; of a store that is still there also what only it knows."""
    if source.get("kind") == "joined":
        return _source(source["of"])
    if source.get("kind") == "live":
        return _language(source["harvest"], _model(source))
    if source.get("kind") != "store":
        path = source.get("path")
        return {"dataset": dataset_name(path)} if path else {}
    manifest = Path(source["path"]) / MANIFEST
    if not manifest.is_file():  # the store has moved; the run knows its model
        return {"model": _shared(_model(source))}
    store = Store(manifest.parent, verify=False)
    model = store.info.get("model") or _model(source)
    return {**_language(store.manifest.config, model), "prepend_bos": _begins_alike(store)}


def _model(source: dict[str, Any]) -> str | None:
    """Return the model behind a run's source, as it was named when the activations were made."""
    if source.get("kind") == "joined":
        return _model(source["of"])
    if source.get("kind") == "live":
        return source["harvest"]["model"]
    return source.get("model")


def _shared(model: str | None) -> str | None:
    """Return a model's name without the path of a local one."""
    return Path(model).name if model and Path(model).is_absolute() else model


def _begins_alike(store: Store) -> bool | None:
    """Return whether every held-out sequence begins with the same token; None where there are too few to tell."""
    table = store.tokens()
    if table is None or len(table.ids) < 8:
        return None
    return bool((table.ids[:, 0] == table.ids[0, 0]).all())


def _language(harvest: dict[str, Any], model: str | None) -> dict[str, Any]:
    text = harvest.get("text") or harvest.get("images") or {}
    path = text.get("path") if isinstance(text, dict) else text
    return {
        "model": _shared(model),
        "context": harvest.get("seq_len"),
        "dataset": dataset_name(path) if isinstance(path, str) else None,
    }


def dataset_name(path: str) -> str:
    """Return a hub dataset's name as it is, and of a local path its last part: what is shared names no machine."""
    local = path.startswith((".", "/", "~", "\\")) or _FILES.search(path) or Path(path).exists()
    return Path(path).name if local else path


def _scores(run: Run, hook: str, name: str) -> dict[str, Any]:
    """Return a member's scores, where the run was evaluated."""
    found = run.evaluation_record.get("hooks", {}) if run.has(EVALUATION_PART) else {}
    metrics = found.get(hook, {}).get("members", {}).get(name, {}).get("metrics", {})
    return {key: metrics[key] for key in HEADLINES if key in metrics}

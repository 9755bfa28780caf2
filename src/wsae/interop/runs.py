"""Which SAEs a path names (a directory of one, a run's members, the hub), and what the run knows about them."""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from wsae.acts.hooknames import among
from wsae.acts.store import Store
from wsae.core import __version__
from wsae.core.artifact import CONFIG, EVALUATION_PART, MANIFEST, MEMBERS, begun, kind_of
from wsae.core.cache import kept
from wsae.core.errors import UserError, nearest, understood
from wsae.core.files import digest, locked_file, read_json
from wsae.core.hub import hub_place, local_folder
from wsae.interop.config import INDEX
from wsae.interop.convert import detect, fetched, identity, load, readable
from wsae.interop.releases import named
from wsae.run import Run
from wsae.sae.config import Provenance

SCORES = ("fvu", "fvu_weighted", "l0", "dead_frac", "ce_loss_recovered_zero")
"""The scores of an evaluation that travel with an SAE."""
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
    if kind is not None:
        raise UserError(f"{target}: this is a wsae {kind}; an SAE or a finished run is needed here")
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
        return [Chosen(run.path, "", about.model_copy(update=known))]
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
    return [Chosen(run.place(h, n), f"{h}/{n}", about_member(run, h, n)) for h, n in found]


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
    members = folder.resolve().parents[1] if len(folder.resolve().parents) > 2 else folder
    run = members.parent
    if members.name == MEMBERS and (run / MANIFEST).is_file():
        return about_member(run, folder.resolve().parent.name, folder.resolve().name)
    return alone.provenance


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
            tokens=opened.config.tokens,
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
        harvest = source["harvest"]
        return _language(harvest, harvest["model"])
    if source.get("kind") != "store":
        path = source.get("path")
        return {"dataset": dataset_name(path)} if path else {}
    manifest = Path(source["path"]) / MANIFEST
    if not manifest.is_file():  # the store has moved; the run knows its model
        return {"model": source.get("model")}
    store = Store(manifest.parent, verify=False)
    model = str(store.info.get("model") or source.get("model"))
    return {**_language(store.manifest.config, model), "prepend_bos": _begins_alike(store)}


def _begins_alike(store: Store) -> bool | None:
    """Return whether every held-out sequence begins with the same token; None where there are too few to tell."""
    table = store.tokens()
    if table is None or len(table.ids) < 8:
        return None
    return bool((table.ids[:, 0] == table.ids[0, 0]).all())


def _language(harvest: dict[str, Any], model: str) -> dict[str, Any]:
    text = harvest.get("text") or harvest.get("images") or {}
    path = text.get("path") if isinstance(text, dict) else text
    return {
        "model": Path(model).name if Path(model).is_absolute() else model,
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
    return {key: metrics[key] for key in SCORES if key in metrics}

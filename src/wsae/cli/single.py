"""`wsae evaluate` of one SAE's directory (imported, exported and back, or from the hub) instead of a run's."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsae.acts.names import among
from wsae.core.artifact import MANIFEST
from wsae.core.errors import UserError
from wsae.core.files import read_json
from wsae.core.hub import local_folder
from wsae.core.progress import Progress
from wsae.evals.config import EvalConfig

if TYPE_CHECKING:
    from wsae.acts.stream import ActivationSource


def is_sae(path: Path) -> bool:
    """Whether a path, or an address on the hub, is one SAE: a directory of ours, an export, or another tool's files."""
    folder = local_folder(path)
    if (folder / MANIFEST).is_file():
        data = read_json(folder / MANIFEST)
        return isinstance(data, dict) and data.get("kind") in ("sae", "export")
    from wsae.interop.convert import readable

    return readable(folder)


def evaluate_sae(
    path: Path, source: str | None, cfg: EvalConfig, device: str, progress: Progress
) -> dict[str, Any]:
    """Measure one SAE on a store's or an array's held-out rows, beside random directions.

    Returns {"sae": path, "hooks": {hook: {"members": {name: {"metrics": ...}}}}, "notes": [...]}; notes say what speaks
    against the scores. Raises UserError without a source, or for one that does not fit.
    """
    from wsae.evals.run import doubts, evaluate
    from wsae.interop.convert import load

    if source is None:
        raise UserError(
            f"{path}: a single SAE knows no data; name a store or an array with --source"
        )
    loaded = load(path)
    data = _of_hook(source, loaded.about.hook)
    ((hook, width),) = data.hooks.items()
    if width != loaded.sae.cfg.d_in:
        trained = f" (trained at {loaded.about.hook})" if loaded.about.hook else ""
        raise UserError(
            f"{path}: takes activations of width {loaded.sae.cfg.d_in}{trained}, and {source} has {width} at {hook}; "
            "give activations of the SAE's model and hook"
        )
    found = evaluate(loaded.sae.to(device), data, cfg, progress)
    names = {"metrics": "sae", "control": "random"}
    members = {name: {"metrics": found[key]} for key, name in names.items() if key in found}
    record = {hook: {"members": members}}
    notes = [*loaded.about.notes, *strangers(loaded.about.model, loaded.about.hook, data)]
    return {"sae": str(path), "hooks": record, "notes": [*notes, *doubts(record)]}


def _of_hook(source: str, hook: str | None) -> "ActivationSource":
    """Return the source with one hook: the SAE's own where there are several."""
    from wsae.acts.source import open_source

    data = open_source(source)
    if len(data.hooks) == 1:
        return data
    mine = among(hook, data.hooks) if hook else None
    if mine is None:
        raise UserError(
            f"{source}: has hooks {', '.join(data.hooks)}, and the SAE is of {hook or 'a hook it does not name'}; "
            "harvest that hook alone, or give an array"
        )
    return open_source(source, hooks=(mine,))


def strangers(model: str | None, hook: str | None, data: "ActivationSource") -> list[str]:
    """Return what speaks against an SAE of this model and hook on these activations; nothing for arrays."""
    place = data.describe()
    theirs = place.get("model") or place.get("harvest", {}).get("model")
    if theirs is None:
        return []
    notes = []
    (here, *_) = data.hooks
    if hook is not None and among(hook, [here]) is None:
        notes.append(
            f"the SAE was trained at {hook}, these activations are of {here}: unless that is the same place in the "
            "model, the scores say nothing of the SAE"
        )
    if model is not None and _model(model) != _model(str(theirs)):
        notes.append(
            f"the SAE was trained on {model}, these activations are of {theirs}: unless that is the same model, the "
            "scores say nothing of the SAE"
        )
    return notes


def _model(name: str) -> str:
    """Return a model's name without owner and place, in the words of the hub where TransformerLens has others."""
    last = name.rstrip("/").rsplit("/", 1)[-1].lower()
    return "gpt2" if last == "gpt2-small" else last

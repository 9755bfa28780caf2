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
    """Whether a path, or an address on the hub, is one SAE's directory."""
    folder = local_folder(path)
    data = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    return isinstance(data, dict) and data.get("kind") == "sae"


def evaluate_sae(
    path: Path, source: str | None, cfg: EvalConfig, device: str, progress: Progress
) -> dict[str, Any]:
    """Measure one SAE on a store's or an array's held-out rows, beside random directions.

    Returns {"sae": path, "hooks": {hook: {"members": {name: {"metrics": ...}}}}}. Raises UserError without a source, or
    for one that does not fit.
    """
    from wsae.evals.run import evaluate
    from wsae.interop.convert import load

    if source is None:
        raise UserError(
            f"{path}: a single SAE knows no data; name a store or an array with --source"
        )
    loaded = load(path)
    data = _of_hook(source, loaded.about.hook)
    found = evaluate(loaded.sae.to(device), data, cfg, progress)
    names = {"metrics": "sae", "control": "random"}
    members = {name: {"metrics": found[key]} for key, name in names.items() if key in found}
    (hook,) = data.hooks
    return {"sae": str(path), "hooks": {hook: {"members": members}}}


def _of_hook(source: str, hook: str | None) -> "ActivationSource":
    """Return the source with one hook: the SAE's own where there are several."""
    from wsae.acts.source import open_source

    data = open_source(source)
    if len(data.hooks) == 1:
        return data
    known = among(hook, data.hooks) if hook else None
    if known is None:
        raise UserError(
            f"{source}: has hooks {', '.join(data.hooks)}, and the SAE is of {hook or 'a hook it does not name'}; "
            "harvest that hook alone, or give an array"
        )
    return open_source(source, hooks=(known,))

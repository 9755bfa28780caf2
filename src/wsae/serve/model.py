"""The language model behind a run, if it is on this machine: nothing is downloaded for a browser."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from wsae.core.errors import UserError
from wsae.core.files import read_json
from wsae.run import MANIFEST, Run

if TYPE_CHECKING:
    from wsae.acts.language import LanguageModel

Json = dict[str, Any]


class ModelName(NamedTuple):
    """A model's name as the run gives it, or why there is none: one of the two is empty."""

    name: str
    why_not: str


def model_of(run: Path) -> ModelName:
    """Name the language model that the activations are of, when it can be loaded without a network."""
    source: Json = Run(run).source
    harvest = source.get("harvest") or _store_config(source)
    name = harvest.get("model") or source.get("model")
    if not isinstance(name, str):
        return ModelName("", "the run's data are arrays, not the activations of a known model")
    if harvest.get("images") is not None or (harvest and "text" not in harvest):
        return ModelName("", "the run's data are of images")
    return (
        ModelName(name, "")
        if is_local(name)
        else ModelName("", f"the model {name} is not on this machine")
    )


def is_local(name: str) -> bool:
    """Whether a model is a file or directory here, comes with a package, or lies in the hub's cache."""
    from wsae.acts.language import BUILTIN, locate

    if importlib.util.find_spec("transformers") is None:
        return False
    try:
        place = locate(name)
    except UserError:
        return False
    if name in BUILTIN or isinstance(place, Path):
        return True
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def fingerprint_of(name: str) -> str:
    """Return a digest of a local model's files: an index made with another model is made again."""
    from wsae.acts.language import fingerprint, locate

    return fingerprint(locate(name))


def load(name: str, device: str) -> "LanguageModel":
    """Load a local model; raises UserError when that fails."""
    from wsae.acts.language import load_language

    return load_language(name, device=device)


def _store_config(source: Json) -> Json:
    path = source.get("path")
    manifest = Path(path) / MANIFEST if isinstance(path, str) else None
    if manifest is None or source.get("kind") != "store" or not manifest.is_file():
        return {}
    found = read_json(manifest)
    config = found.get("config") if isinstance(found, dict) else None
    return config if isinstance(config, dict) else {}

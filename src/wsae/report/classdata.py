"""Scores of latents against class labels as the report shows them: as an interpretation, and by latent."""

from pathlib import Path
from typing import Any

import numpy as np

from wsae.core.artifact import MANIFEST, read_manifest
from wsae.core.errors import understood
from wsae.core.files import read_json
from wsae.core.tensors import load_tensors

Json = dict[str, Any]
"""A parsed JSON object."""

SHOWN = ("consistency_top", "consistency_corrected", "information")
"""Scores beside each latent in the browser."""


def read_classes(path: Path) -> tuple[Json, dict[str, np.ndarray]]:
    """Return RUN/classes as an interpretation and its arrays by "hook|member|name"; nothing where it is not there.

    Raises UserError when a part of it is cut or altered.
    """
    if not (path / MANIFEST).is_file():
        return {}, {}
    read_manifest(path, "classes")
    record = read_json(path / "classes.json")
    tensors = load_tensors(path / "arrays.safetensors")
    arrays = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    with understood(path / "classes.json"):
        hooks = {hook: _hook(found) for hook, found in record["hooks"].items()}
        return {"hooks": hooks, "glossary": record.get("glossary", {})}, arrays


def add_scores(contexts: Json, arrays: dict[str, np.ndarray]) -> None:
    """Add the class scores of every latent among the contexts to its other scores."""
    for hook, members in contexts.items():
        for member, latents in members.items():
            for name in SHOWN:
                values = arrays.get(f"{hook}|{member}|{name}")
                if values is None:
                    continue
                for entry in latents:
                    value = float(values[entry["latent"]])
                    known = None if np.isnan(value) else value
                    entry["scores"] = {**entry.get("scores", {}), name: known}


def _hook(found: Json) -> Json:
    least = found["config"]["min_support"]
    return {
        "members": {name: _entry(entry, least) for name, entry in found["members"].items()},
        "controls": {name: _entry(entry, least) for name, entry in found["controls"].items()},
        "comparisons": found["comparisons"],
    }


def _entry(entry: Json, least: int) -> Json:
    coverage = entry["coverage"]
    total = int(coverage["latents"])
    alive, supported = (round(total * coverage[key]) for key in ("alive", "supported"))
    skipped = {"never active": total - alive, f"active on under {least} images": alive - supported}
    counts = {"sampled": total, "scored": supported, "skipped": skipped}
    return {"summary": entry["scores"], "density": entry["density"], "counts": counts}

"""The numbers known of every latent of a member: what the evaluation and the scores say, and what the decoder says."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from wsae.report.interpretation import score_name
from wsae.report.rundata import Json, RunData
from wsae.sae import SparseAutoencoder
from wsae.serve.geometry import influence
from wsae.serve.stored import entries


class Measure(NamedTuple):
    """One number per latent: its key in addresses, its name for readers, what it means."""

    key: str
    name: str
    about: str


DENSITY = Measure("density", "density", "share of held-out rows on which the latent fires")
MATCH = Measure(
    "match", "match", "decoder cosine with the most similar live latent of the plain twin"
)
BASIC = (
    DENSITY,
    Measure("variance", "variance", "variance of the activation over all held-out rows"),
    Measure("max", "strongest", "strongest activation among the held-out rows that were kept"),
    Measure(
        "gamma",
        "γ influence",
        "‖Γd‖² / ‖d‖² of the decoder row d: what an error along it counts in the weighted loss; 1 without weights",
    ),
    MATCH,
    Measure(
        "nearest", "nearest cosine", "largest |cosine| with another decoder row of the same SAE"
    ),
)
CLASSES = ("consistency_top", "consistency_corrected", "selectivity", "information")
_ARRAYS = {
    "density": "density",
    "variance": "variance",
    "match": "match_cosine",
    "nearest": "decoder_max_cosine",
}
"""Measure -> array of the evaluation."""


@dataclass(frozen=True)
class Classes:
    """Scores against class labels by "hook|member|name", and what they mean."""

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    glossary: Json = field(default_factory=dict)


def measures(run: RunData, classes: Classes) -> list[Measure]:
    """Return the measures this run has, basic ones first."""
    told = {**run.interpretation.get("glossary", {}), **classes.glossary}
    entries = (e for named in run.contexts.values() for latents in named.values() for e in latents)
    scores = dict.fromkeys(score for entry in entries for score in entry.get("scores", {}))
    by_class = (key for key in CLASSES if any(n.endswith(f"|{key}") for n in classes.arrays))
    names = [key for key in dict.fromkeys([*scores, *by_class]) if key not in _basic_keys()]
    return [*BASIC, *(Measure(key, score_name(key), _about(told.get(key))) for key in names)]


def _basic_keys() -> set[str]:
    return {measure.key for measure in BASIC}


def _about(entry: object) -> str:
    told = entry if isinstance(entry, dict) else {}
    return "; ".join(str(told[part]) for part in ("formula", "direction") if told.get(part))


def columns(
    run: RunData, classes: Classes, who: tuple[str, str], sae: SparseAutoencoder | None
) -> dict[str, np.ndarray]:
    """Return key -> values [d_sae] of one (hook, member); NaN where a latent was not measured."""
    hook, member = who
    density = run.array(hook, member, "density")
    assert density is not None, "only members with a density are indexed"
    size = len(density)
    out = {
        key: found
        for key, name in _ARRAYS.items()
        if (found := run.array(hook, member, name)) is not None
    }
    if sae is not None:
        out["gamma"] = influence(sae.W_dec, sae.gamma).numpy()
    for key in CLASSES:
        found = classes.arrays.get(f"{hook}|{member}|{key}")
        if found is not None:
            out[key] = found
    for latent, entry in entries(run, who, size).items():
        values = {"max": entry.get("max"), **entry.get("scores", {})}
        for key, value in values.items():
            if value is not None and key not in CLASSES and key not in _ARRAYS:
                out.setdefault(key, np.full(size, np.nan))[latent] = value
    return {key: values for key, values in out.items() if len(values) == size}

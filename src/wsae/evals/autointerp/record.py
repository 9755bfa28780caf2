"""What is written: interpretation.json with every number, contexts.json with the text that a reader wants to see."""

from typing import Any

from wsae.evals.autointerp.comparing import comparisons
from wsae.evals.autointerp.glossary import glossary
from wsae.evals.autointerp.pairs import Sides
from wsae.evals.autointerp.panel import Panel
from wsae.evals.autointerp.results import entry, latent_row
from wsae.evals.autointerp.subjects import Named, Subject, Subjects
from wsae.evals.autointerp.windows import Collected, LatentContexts

Json = dict[str, Any]
SHOWN = 6
"""Contexts of a latent that are written, the strongest explaining ones."""


def record_json(panel: Panel, sides: dict[str, Sides], found: Subjects) -> Json:
    """Return the content of interpretation.json."""
    return {
        "schema": 1,
        "config": panel.cfg.to_dict(),
        "judges": panel.names(),
        "hooks": {hook: _hook(panel, sides[hook], named) for hook, named in found.items()},
        "glossary": glossary(panel.cfg.scores),
    }


def _hook(panel: Panel, sides: Sides, named: Named) -> Json:
    entries = {name: entry(subject, panel.cfg) for name, subject in named.items()}
    first = next(iter(named.values()))
    return {
        "heldout_tokens": sides.survey.moments.n,
        "windows": first.collected.counts,
        "reference": sides.reference,
        "members": {name: e for name, e in entries.items() if named[name].control is None},
        "controls": {name: e for name, e in entries.items() if named[name].control is not None},
        "matching": {
            member: {"with": sides.family.twins[member], **matching.summary()}
            for member, matching in sides.matching.items()
        },
        "comparisons": comparisons(sides, named, panel.cfg),
    }


def contexts_json(sides: dict[str, Sides], found: Subjects) -> dict[str, Json]:
    """Return the content of contexts.json: as the evaluation's, with explanation, typical tokens and scores."""
    return {
        hook: {
            name: [_latent(sides[hook], name, subject, one) for one in subject.collected.latents]
            for name, subject in named.items()
            if subject.control is None
        }
        for hook, named in found.items()
    }


def _latent(sides: Sides, name: str, subject: Subject, contexts: LatentContexts) -> Json:
    latent = contexts.latent
    row = latent_row(subject, latent, contexts)
    return {
        "latent": latent,
        "density": contexts.density,
        "variance": float(sides.survey.activity[name].variance[latent]),
        "max": contexts.peak,
        "match": _match(sides, name, latent),
        "contexts": _shown(subject.collected, contexts),
        **{key: row[key] for key in ("explanation", "tokens", "scores")},
    }


def _match(sides: Sides, name: str, latent: int) -> Json | None:
    """Return the twin's latent that this one is paired with."""
    matching = sides.matching.get(name)
    if matching is None:
        return None
    place = (matching.pair_a == latent).nonzero()[:, 0].tolist()
    if not place:
        return None
    cosine = round(float(matching.pair_cosine[place[0]]), 6)
    partner = int(matching.pair_b[place[0]])
    return {"member": sides.family.twins[name], "latent": partner, "cosine": cosine}


def _shown(collected: Collected, contexts: LatentContexts) -> list[Json]:
    """Return the strongest explaining windows: tokens, activations, the peak's place, the sequence."""
    out = []
    for window, acts in zip(
        contexts.explain.window[:SHOWN].tolist(), contexts.explain.acts, strict=False
    ):
        tokens = collected.windows.tokens(window)
        shown = [float(f"{act:.4g}") for act in acts[: len(tokens)].tolist()]
        peak = max(range(len(shown)), key=shown.__getitem__)
        seq = int(collected.windows.seq[window])
        out.append({"tokens": tokens, "acts": shown, "peak": peak, "seq": seq})
    return out

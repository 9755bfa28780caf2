"""From the measurements of every hook to one evaluation: metrics, comparisons, contexts, arrays."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from wsae.acts.hookpoints import SEES_LATER, probe
from wsae.acts.layout import tokens as token_manner
from wsae.acts.loading import PREDICTS_NOTHING, predictions
from wsae.acts.tokens import TokenTable
from wsae.core.progress import Progress, quiet
from wsae.evals.comparisons import Side, compare_members
from wsae.evals.config import EvalConfig
from wsae.evals.contexts import Context
from wsae.evals.control import CONTROL
from wsae.evals.data import HeldOut, Language, Pictures
from wsae.evals.glossary import glossary
from wsae.evals.latents import density_histogram
from wsae.evals.measure import Family, Kept, Measured, measure
from wsae.evals.scores import Arrays, member_metrics
from wsae.evals.splice import splice_arrays, splice_sequences

Json = dict[str, Any]
Show = Callable[[Context], Json]


@dataclass
class Evaluation:
    """Everything measured: `record` and `contexts` are JSON-ready, `arrays` is by "hook|member|name"."""

    record: Json
    contexts: dict[str, dict[str, list[Json]]]
    arrays: dict[str, Tensor]
    thumbnails: dict[str, str] = field(default_factory=dict)
    """Image number -> PNG in base64, of the images among the contexts."""


@dataclass(frozen=True)
class Subject:
    """What is evaluated: each hook's family, and what the results say about a member beside its metrics."""

    families: dict[str, Family]
    about: dict[str, dict[str, Json]] = field(default_factory=dict)
    """hook -> member -> fields added to the member's entry (config, gamma)."""


def evaluate_families(
    subject: Subject,
    source: HeldOut,
    cfg: EvalConfig,
    behind: Language | Pictures | None = None,
    progress: Progress = quiet,
) -> Evaluation:
    """Measure, splice, compare; everything in memory.

    `behind` is what the activations are of: a language model whose passes are spliced, or images to show.
    """
    tokens = source.tokens()
    language = behind if isinstance(behind, Language) else None
    pictures = behind if isinstance(behind, Pictures) else None
    kept, silent = None, False
    if language is not None and tokens is not None and cfg.splice_tokens > 0:
        silent = predictions(language.model) is None
        kept = None if silent else Kept(splice_sequences(tokens, cfg))
    measured = measure(source, subject.families, cfg, kept, progress)
    sees_later = False
    if language is not None and tokens is not None and kept is not None:
        for hook, found in measured.items():
            family = subject.families[hook]
            probed = probe(language.model, [hook], token_manner())
            sees_later |= probed.causal is False
            extra = splice_arrays(
                language, probed, family.saes, found.survey, (tokens, kept), cfg, progress
            )
            for name, arrays in extra.items():
                found.arrays[name] |= arrays
    first = next(iter(measured.values()))
    hooks = {hook: _hook_record(hook, m, subject, cfg) for hook, m in measured.items()}
    record = {
        "heldout_tokens": first.survey.moments.n,
        "heldout_sequences": int((first.errors.rows.sums > 0).sum()),
        "config": cfg.to_dict(),
        "hooks": hooks,
        "glossary": glossary(),
    }
    if sees_later:
        record |= {"causal": False, "notes": [SEES_LATER]}
    if silent:
        record["notes"] = [PREDICTS_NOTHING]
    contexts = {
        hook: _contexts(m, subject.families[hook], _shown_by(tokens, pictures, cfg))
        for hook, m in measured.items()
    }
    arrays = {
        f"{hook}|{name}|{key}": value.clone()  # members share some; a file may not
        for hook, m in measured.items()
        for name, named in m.arrays.items()
        for key, value in named.items()
    }
    return Evaluation(record, contexts, arrays, _thumbnails(contexts, pictures))


def _hook_record(hook: str, found: Measured, subject: Subject, cfg: EvalConfig) -> Json:
    arrays: dict[str, Arrays] = {
        name: {key: value.numpy() for key, value in named.items()}
        for name, named in found.arrays.items()
    }
    members = {}
    for name, named in arrays.items():
        members[name] = {"metrics": member_metrics(name, named, cfg)}
        members[name] |= subject.about.get(hook, {}).get(name, {})
        if "density" in named:
            members[name]["density_histogram"] = density_histogram(found.arrays[name]["density"])
    twins = subject.families[hook].twins
    pairs = [*twins.items(), *((twin, CONTROL) for twin in dict.fromkeys(twins.values()))]
    comparisons = [
        line
        for a, b in pairs
        if b in arrays
        for line in compare_members(Side(a, a, arrays[a]), Side(b, b, arrays[b]), cfg)
    ]
    matching = {name: {"with": twins[name], **m.summary()} for name, m in found.matching.items()}
    record = {"data": data_digest(found), "members": members, "comparisons": comparisons}
    return {key: _no_nan(value) for key, value in (record | {"matching": matching}).items()}


def data_digest(found: Measured) -> str:
    """Name the held-out rows by content: their exact moments and the number of rows in each sequence."""
    moments = found.survey.moments
    sha = hashlib.sha256()
    for tensor in (moments.mean, moments.second_moment, found.errors.rows.sums[:, 0]):
        sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


def _contexts(found: Measured, family: Family, show: Show | None) -> dict[str, list[Json]]:
    return {
        name: [
            _latent(latent, found, (name, family.twins.get(name)))
            | {"contexts": [] if show is None else [show(context) for context in contexts]}
            for latent, contexts in top.result().items()
        ]
        for name, top in found.contexts.items()
    }


def _shown_by(tokens: TokenTable | None, pictures: Pictures | None, cfg: EvalConfig) -> Show | None:
    """Return what makes a context JSON-ready: its tokens, or the class of its image; None for arrays."""
    if tokens is not None:
        return lambda context: _window(context, tokens, cfg)
    if pictures is not None:
        return lambda context: _image(context, pictures)
    return None


def _image(context: Context, pictures: Pictures) -> Json:
    act = float(f"{context.value:.4g}")
    return {"tokens": [pictures.label(context.seq)], "acts": [act], "peak": 0, "seq": context.seq}


def _thumbnails(
    contexts: dict[str, dict[str, list[Json]]], pictures: Pictures | None
) -> dict[str, str]:
    if pictures is None:
        return {}
    latents = (entry for named in contexts.values() for found in named.values() for entry in found)
    shown = {context["seq"] for entry in latents for context in entry["contexts"]}
    return {str(image): pictures.thumbnail(image) for image in sorted(shown)}


def _latent(latent: int, found: Measured, names: tuple[str, str | None]) -> Json:
    member, twin = names
    activity = found.survey.activity[member]
    match = None
    if twin is not None and int(found.matching[member].index[latent]) >= 0:
        matching = found.matching[member]
        cosine = round(float(matching.cosine[latent]), 6)
        match = {"member": twin, "latent": int(matching.index[latent]), "cosine": cosine}
    return {
        "latent": latent,
        "density": float(activity.density[latent]),
        "variance": float(activity.variance[latent]),
        "max": float(activity.peak[latent]),
        "match": match,
    }


def _window(context: Context, tokens: TokenTable, cfg: EvalConfig) -> Json:
    ids = tokens.ids[context.seq, : int(tokens.lengths[context.seq])].long()
    return context.window(ids, tokens.decode, cfg.window_tokens)


def _no_nan(value: object) -> object:
    """Replace NaN and infinities by null: JSON has neither."""
    if isinstance(value, dict):
        return {key: _no_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_no_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

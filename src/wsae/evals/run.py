"""Evaluate a training run on held-out data into RUN/evaluation, or one SAE on an array."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsae.acts.capture import one_hook
from wsae.acts.capture import tokens as token_manner
from wsae.acts.hooknames import sides
from wsae.acts.hookpoints import SEES_LATER, probe
from wsae.acts.loading import PREDICTS_NOTHING, predictions
from wsae.acts.source import (
    BothSides,
    JoinedSource,
    MatrixRows,
    as_path,
    is_folder_of_arrays,
    open_source,
)
from wsae.acts.stream import ActivationSource, HeldOut, Language, Pictures
from wsae.acts.tokens import TokenTable
from wsae.core.artifact import (
    ARRAYS,
    CONFIG,
    CONTEXTS_FILE,
    EVALUATION,
    EVALUATION_PART,
    GAMMA_FILE,
    MANIFEST,
    THUMBNAILS_FILE,
    write_manifest,
)
from wsae.core.calls import own_settings
from wsae.core.config import Config
from wsae.core.errors import UserError
from wsae.core.files import Json, finite, locked, write_json
from wsae.core.progress import Progress, quiet
from wsae.core.tensors import save_tensors
from wsae.evals.compare import ComparedMember, compare_members, member_metrics
from wsae.evals.config import CONTROL, EvalConfig
from wsae.evals.downstream import (
    Place,
    splice_arrays,
    splice_sequences,
    token_sequences,
    unrecovered,
)
from wsae.evals.glossary import MATCHING, METRICS, glossary
from wsae.evals.latents import RELATIVE_NORM, Context, density_histogram, whose
from wsae.evals.measure import EvaluatedSaes, HeldOutPositions, Measured, measure
from wsae.run import SINGLE, Run
from wsae.sae import SAE
from wsae.sae.model import an_sae
from wsae.train.config import TrainConfig

Show = Callable[[Context], Json]


@dataclass
class Evaluation:
    """Everything measured: `record` and `contexts` are JSON-ready, `arrays` is by "hook|member|name"."""

    record: Json
    contexts: dict[str, dict[str, list[Json]]]
    arrays: dict[str, Tensor]
    thumbnails: dict[str, str] = field(default_factory=dict)
    """Image number -> PNG in base64, of the images among the contexts."""


def evaluate_families(
    families: dict[str, EvaluatedSaes],
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
        kept = None if silent else HeldOutPositions(splice_sequences(tokens, cfg))
    measured = measure(source, families, cfg, kept, progress)
    sees_later, notes = False, []
    if language is not None and tokens is not None and kept is not None:
        sequences = token_sequences(tokens, kept, language.tokenizer.all_special_ids)
        for hook, found in measured.items():
            out = found.survey.out
            place = _place(language, hook, out, source)
            sees_later |= place.causal is False
            mean, saes = found.survey.moments.mean, families[hook].saes
            extra = splice_arrays(language, place, saes, mean, sequences, cfg, progress)
            for name, arrays in extra.items():
                found.arrays[name] |= arrays
            notes += unrecovered(out, next(iter(extra.values())))
    first = next(iter(measured.values()))
    hooks = {hook: _hook_record(m, families[hook], cfg) for hook, m in measured.items()}
    record = {
        "heldout_tokens": first.survey.moments.n,
        "heldout_sequences": int((first.errors.rows > 0).sum()),
        "config": cfg.to_dict(),
        "hooks": hooks,
        "glossary": glossary(METRICS, MATCHING) | _of_sources(hooks),
    }
    if sees_later:
        record["causal"] = False
        notes.append(SEES_LATER)
    if silent:
        notes.append(PREDICTS_NOTHING)
    record |= {"notes": notes} if notes else {}
    show = _shown_by(tokens, pictures, cfg)
    contexts = {hook: _contexts(m, families[hook], show) for hook, m in measured.items()}
    arrays = {
        f"{hook}|{name}|{key}": value.clone()  # members share some; a file may not
        for hook, m in measured.items()
        for name, named in m.arrays.items()
        for key, value in named.items()
    }
    return Evaluation(record, contexts, arrays, _thumbnails(contexts, pictures))


def _place(language: Language, hook: str, out: str, source: HeldOut) -> Place:
    """Return where SAEs are put into their model; a transcoder where its module gives, a crosscoder at all sources."""
    beside = [*source.parts] if isinstance(source, JoinedSource) else []
    probed = probe(language.model, beside or [out], token_manner())
    read = None if out == hook else one_hook(language.model, hook)
    points = {point.name: point for point in probed.hooks}
    return Place(probed.hooks[0], read, probed.causal, tuple(points[name] for name in beside))


def _hook_record(found: Measured, family: EvaluatedSaes, cfg: EvalConfig) -> Json:
    arrays = {name: _as_numpy(named) for name, named in found.arrays.items()}
    members = {}
    for name, named in arrays.items():
        members[name] = {"metrics": member_metrics(name, named, cfg), **family.about.get(name, {})}
        if "density" in named:
            members[name]["density_histogram"] = density_histogram(found.arrays[name]["density"])
            members[name] |= _by_source(found.arrays[name])
    sides = {name: ComparedMember(name, name, named) for name, named in arrays.items()}
    plain = dict.fromkeys(family.twins.values())
    pairs = [*family.twins.items(), *((twin, CONTROL) for twin in plain if CONTROL in sides)]
    lines = [line for a, b in pairs for line in compare_members(sides[a], sides[b], cfg)]
    matching = {m: {"with": family.twins[m], **f.summary()} for m, f in found.matching.items()}
    record = {"data": data_digest(found), "members": members, "comparisons": lines}
    return finite(record | {"matching": matching})


def _of_sources(hooks: Json) -> Json:
    """Return the glossary's entries of a crosscoder's metrics by source, in the order of its sources."""
    members = [member for found in hooks.values() for member in found["members"].values()]
    known = {key for member in members for key in member["metrics"]}
    names = dict.fromkeys(s for m in members for s in m.get("sources", {}).get("alone", ()))
    return {
        f"{key}[{source}]": entry._replace(name=f"{entry.name} of {source}")._asdict()
        for key, entry in METRICS.items()
        for source in names
        if f"{key}[{source}]" in known
    }


def _by_source(arrays: dict[str, Tensor]) -> Json:
    """Return whose a crosscoder's latents are; nothing of an SAE of one hook."""
    relative = {
        key.removeprefix(f"{RELATIVE_NORM}[")[:-1]: values
        for key, values in arrays.items()
        if key.startswith(RELATIVE_NORM)
    }
    return {"sources": whose(relative, arrays["density"])} if relative else {}


def data_digest(found: Measured) -> str:
    """Name the held-out rows by content: their exact moments and the number of rows in each sequence."""
    moments = found.survey.moments
    sha = hashlib.sha256()
    for tensor in (moments.mean, moments.second_moment, found.errors.rows):
        sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


def _contexts(found: Measured, family: EvaluatedSaes, show: Show | None) -> dict[str, list[Json]]:
    return {
        name: [
            _latent(latent, found, name, family.twins.get(name))
            | {"contexts": [] if show is None else [show(context) for context in contexts]}
            for latent, contexts in top.result().items()
        ]
        for name, top in found.contexts.items()
    }


def _shown_by(tokens: TokenTable | None, pictures: Pictures | None, cfg: EvalConfig) -> Show | None:
    """Return what makes a context JSON-ready: its tokens, or the class of its image; None for arrays."""

    def window(context: Context) -> Json:
        assert tokens is not None
        ids = tokens.ids[context.seq, : int(tokens.lengths[context.seq])].long()
        return context.window(ids, tokens.decode, cfg.window_tokens)

    def image(context: Context) -> Json:
        assert pictures is not None
        label, act = pictures.label(context.seq), float(f"{context.value:.4g}")
        return {"tokens": [label], "acts": [act], "peak": 0, "seq": context.seq}

    return window if tokens is not None else image if pictures is not None else None


def _thumbnails(
    contexts: dict[str, dict[str, list[Json]]], pictures: Pictures | None
) -> dict[str, str]:
    if pictures is None:
        return {}
    latents = (entry for named in contexts.values() for found in named.values() for entry in found)
    shown = {context["seq"] for entry in latents for context in entry["contexts"]}
    return {str(image): pictures.thumbnail(image) for image in sorted(shown)}


def _latent(latent: int, found: Measured, member: str, twin: str | None) -> Json:
    activity, match = found.survey.activity[member], None
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


@own_settings
def evaluate(
    sae: SAE,
    acts: object,
    cfg: EvalConfig = EvalConfig(n_latents=0),  # noqa: B008  (frozen)
    progress: Progress = quiet,
    target: object = None,
) -> Json:
    """Measure one SAE on activations it was not trained on: {"metrics": {name: {value, low, high}}, "arrays": {...}}.

    `acts` are numbers [rows, d_in] or [n, seq, d_in] in memory, in a file or a folder of files, of which all rows are
    used; or a store (or its path) or another source with one hook, of which the held-out rows are. Formulas:
    `wsae.evals.glossary`. A crosscoder takes {source: activations} too. A transcoder is measured on the `target` that
    it is to give, rows beside those of `acts`. Raises UserError for another width, NaN, infinity, no rows, or a target
    for an SAE (a transcoder without one).
    """
    sae = an_sae(sae, "evaluate")
    acts = sae.join(acts) if isinstance(acts, Mapping) and sae.cfg.sources else acts
    path = as_path(acts)
    if path is not None and path.is_dir() and not is_folder_of_arrays(path):
        source: HeldOut = open_source(path)
    else:
        source = acts if isinstance(acts, HeldOut) else MatrixRows(acts)
    if len(source.hooks) != 1:
        raise UserError(
            f"the data have {len(source.hooks)} hooks ({', '.join(source.hooks)}); give one"
        )
    if sae.cfg.transcoder == (target is None):
        wanted = "give its target" if target is None else "is for transcoders"
        raise UserError(f"target: {wanted}; this is {_kind(sae)}")
    (hook,) = source.hooks
    if target is not None:
        source = BothSides(source, MatrixRows(target, "target"))
    subject = {hook: EvaluatedSaes({"sae": sae}, out=None if target is None else "target")}
    found = measure(source, subject, cfg, progress=progress)[hook]
    arrays = _as_numpy(found.arrays["sae"])
    out: Json = {"metrics": member_metrics("sae", arrays, cfg), "arrays": arrays}
    if CONTROL in found.arrays:
        control = _as_numpy(found.arrays[CONTROL])
        out["control"] = member_metrics(CONTROL, control, cfg)
    return out


def _kind(sae: SAE) -> str:
    return "a transcoder" if sae.cfg.transcoder else "an SAE"


def _as_numpy(arrays: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Return arrays as NumPy's; it has no bfloat16, in which an SAE's own numbers may be."""
    return {
        key: (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        for key, value in arrays.items()
    }


@own_settings
def evaluate_run(
    run: Path,
    source: HeldOut,
    cfg: EvalConfig = EvalConfig(),  # noqa: B008  (frozen)
    behind: Language | Pictures | None = None,
    progress: Progress = quiet,
    device: str = "cpu",
) -> Json:
    """Measure every member of a finished run and write RUN/evaluation; return the content of evaluation.json.

    `behind` is the language model behind the activations (without it, or without tokens, nothing is spliced) or the
    images (without them no latent has pictures). The directory is whole or has no manifest. Raises UserError when `run`
    is not a finished run, or does not fit the source.
    """
    opened, subject = Run(run), run_subject(run, source)
    for family in subject.values():
        for sae in family.saes.values():
            sae.to(device)
    found = evaluate_families(subject, source, cfg, behind, progress)
    notes = [*opened.config.doubts(), *doubts(found.record["hooks"])]
    if notes:
        found.record["notes"] = [*found.record.get("notes", []), *notes]
    files = {EVALUATION: found.record, CONTEXTS_FILE: found.contexts, ARRAYS: found.arrays}
    if found.thumbnails:
        files[THUMBNAILS_FILE] = found.thumbnails
    inputs = {f"heldout/{hook}": entry["data"] for hook, entry in found.record["hooks"].items()}
    info = {}
    if opened.single:  # which knows no data of its own
        info = {"hook": next(iter(subject)), "source": {}}
        if isinstance(source, ActivationSource):
            info |= {"source": source.describe(), "data": source.digest()}
    write_part(run, EVALUATION_PART, cfg, files, inputs, info)
    return found.record


def write_part(
    run: Path,
    part: str,
    cfg: Config,
    files: Mapping[str, Any],
    inputs: dict[str, str],
    info: Json | None = None,
) -> None:
    """Write RUN/part, which is whole or has no manifest: by a file's name JSON, or of `ARRAYS` tensors."""
    out = run / part
    with locked(out, top=run):
        (out / MANIFEST).unlink(missing_ok=True)
        for name, content in files.items():
            (save_tensors if name == ARRAYS else write_json)(out / name, content)
        made_from = {"run": Run(run).manifest.digest()} | inputs
        write_manifest(out, part, cfg.to_dict(), [*files], inputs=made_from, info=info)


def run_subject(run: Path, source: HeldOut | None = None) -> dict[str, EvaluatedSaes]:
    """Return each hook's family of a finished run, each weighted member with its plain twin.

    One SAE alone is put at the source's hook.
    """
    opened = Run(run)
    train, gamma = opened.config, opened.gamma_record
    if not isinstance(train, TrainConfig):
        ((own, saes),) = opened.saes.items()
        hook, out = own, None
        if source is not None and train.sae.transcoder:
            hook, out = sides(source.hooks, own, opened.provenance.hook_out)
        elif source is not None:
            hook = next(iter(source.hooks))
        plain = {"rule": "none"} if saes[SINGLE].unweighted else {}
        about = {"config": train.to_dict(), "gamma": gamma[own][SINGLE] or plain}
        return {hook: EvaluatedSaes(saes, {}, {SINGLE: about}, out)}
    if any(set(saes) != set(train.names()) for saes in opened.saes.values()):
        raise UserError(f"{run / CONFIG}: names other members than the run has (altered)")
    if opened.saes.keys() != gamma.keys():
        raise UserError(f"{run / GAMMA_FILE}: is of other hooks than the run has (altered)")
    members = {n: m.to_dict() for n, m in zip(train.names(), train.members, strict=True)}
    out = {}
    for hook, saes in opened.saes.items():
        about = {n: {"config": members[n], "gamma": gamma[hook].get(n)} for n in saes}
        out[hook] = EvaluatedSaes(saes, find_twins(train), about, train.given(hook))
    return out


def doubts(hooks: Json) -> list[str]:
    """Return a note on every SAE that is worse than none, of {hook: {"members": {name: {"metrics": ...}}}}."""
    worse = []
    for hook, found in hooks.items():
        for name, entry in found["members"].items():
            fvu = entry["metrics"].get("fvu", {})
            least = fvu.get("value") if fvu.get("low") is None else fvu["low"]
            if name not in (CONTROL, "random") and least is not None and least > 1:
                worse.append(f"{hook}/{name} (FVU {fvu['value']:.3g})")
    if not worse:
        return []
    return [
        f"{', '.join(worse)}: worse than the mean of the data alone; the SAE is of another model, hook or scale than "
        "these activations, or is hardly trained"
    ]


def find_twins(train: TrainConfig) -> dict[str, str]:
    """Return, for each weighted or preconditioned member, the plain one that differs from it in nothing else.

    Where there is none, the first plain member; a family without one has no twins.
    """
    named = list(zip(train.names(), train.members, strict=True))
    plain = [(name, member) for name, member in named if member.plain]
    return {
        name: next((p for p, m in plain if m.shape == member.shape), plain[0][0])
        for name, member in named
        if plain and not member.plain
    }

"""Evaluate a training run on held-out data into RUN/evaluation, or one SAE on an array.

What the model loses when reconstructions stand in for its activations is measured by passes through it. The rows at
the hook are replaced at every kept position (those the SAE was trained to see); skipped ones (start of sequence,
special tokens, attention sinks) keep their true activation, as they do in training. Cross-entropy and KL(p_clean ||
p_spliced) are summed per sequence over the next tokens that are not special, in nats.

One sequence runs at a time, and its variants (clean, ablated, one per member) share the layers before the hook:
there the batch has one row, and the hook widens it to one row per variant. A model that does not take it
(`wsae.acts.capture.logits_by_row`) runs once per variant.

A crosscoder's code is that of an untouched pass. In a second one its hooks' rows are replaced by their parts of x_hat:
all of them, and each alone, as what is put in at a later place hides what an earlier one did to the rows there.
"""

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from wsae.acts.capture import Call, Capture, Swap, logits_by_row, one_hook, splice
from wsae.acts.capture import tokens as token_manner
from wsae.acts.hooknames import sides
from wsae.acts.hookpoints import SEES_LATER, HookPoint, probe
from wsae.acts.loading import PREDICTS_NOTHING, input_device, predictions, refuse_without_logits
from wsae.acts.source import (
    BothSides,
    JoinedSource,
    MatrixRows,
    as_path,
    is_folder_of_arrays,
    open_source,
)
from wsae.acts.stream import HeldOut, Language, Pictures
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
from wsae.evals.glossary import MATCHING, METRICS, glossary
from wsae.evals.latents import RELATIVE_NORM, Context, density_histogram, whose
from wsae.evals.measure import EvaluatedSaes, HeldOutPositions, Measured, measure
from wsae.run import SINGLE, Run
from wsae.sae import SAE
from wsae.train.config import TrainConfig

Replace = Callable[[Float[Tensor, "kept d_in"]], Float[Tensor, "kept d_out"]]
"""What to put in place of the kept activations (fp32 in, fp32 out), from what the SAE reads."""
Variants = list[Replace | None]

_ROWS = 128
"""Positions whose log-probabilities are held at once."""


class SplicedSequence(NamedTuple):
    """One held-out sequence: its number, tokens, which positions are replaced, which tokens are scored as targets."""

    seq: int
    ids: Int64[Tensor, " length"]
    kept: Bool[Tensor, " length"]
    target: Bool[Tensor, " length"]

    def trimmed(self) -> "SplicedSequence":
        """Cut what follows the target of the last kept position (padding, at the least)."""
        stop = int(self.kept.nonzero()[-1]) + 2
        return SplicedSequence(self.seq, self.ids[:stop], self.kept[:stop], self.target[:stop])


class SplicedLosses(NamedTuple):
    """Sums over the scored tokens of each sequence, in nats: [n_seq] for each variant."""

    seq: Int64[Tensor, " n_seq"]
    targets: Float64[Tensor, " n_seq"]
    ce_clean: Float64[Tensor, " n_seq"]
    ce: dict[str, Float64[Tensor, " n_seq"]]
    kl: dict[str, Float64[Tensor, " n_seq"]]
    shared: bool
    """Whether the variants shared the layers before the hook."""


class Place(NamedTuple):
    """Where rows are replaced, and of transcoders where those that are read come up, earlier in the pass."""

    hook: HookPoint
    read: HookPoint | None = None
    causal: bool | None = None
    """Whether nothing depends on a later token, where that is known."""
    beside: tuple[HookPoint, ...] = ()
    """Of crosscoders: the hooks whose rows they read side by side."""
    alone: HookPoint | None = None
    """The one of these that is replaced; none: all of them."""


@torch.inference_mode()
def spliced_losses(
    model: nn.Module,
    place: Place,
    sequences: list[SplicedSequence],
    variants: dict[str, Replace],
    max_logits: int,
    progress: Progress = quiet,
) -> SplicedLosses:
    """Return cross-entropy and KL of every variant spliced at a place, per sequence.

    KL(p_clean || p_spliced) = sum_v p_clean(v) (log p_clean(v) - log p_spliced(v)). Raises UserError when a variant
    makes the model's loss NaN or infinite.
    """
    refuse_without_logits(model)
    sequences = [s.trimmed() for s in sequences if s.kept.any()]
    sequences = [s for s in sequences if s.target[1:].any()]
    rows: list[Tensor] = []
    vocabulary = logits_by_row(model, place.hook, sequences[0].ids) if sequences else 0
    with progress("splice", sum(len(s.ids) for s in sequences), "tokens") as tick:
        for sequence in sequences:
            at_once = max_logits // (vocabulary * len(sequence.ids)) if vocabulary else 1
            rows.append(_losses(model, place, sequence, [*variants.values()], max(1, at_once)))
            tick(len(sequence.ids))
    sums = torch.stack(rows) if rows else torch.zeros(0, 2, 1 + len(variants), dtype=torch.float64)
    bad = (~sums.isfinite()).any(1).any(0).nonzero()[:, 0].tolist()
    if bad:
        raise UserError(
            f"the model's loss is NaN or infinite with {['clean', *variants][bad[0]]} in place; "
            "run the model in float32 or bfloat16"
        )
    names = list(enumerate(variants, start=1))
    return SplicedLosses(
        torch.tensor([s.seq for s in sequences], dtype=torch.int64),
        torch.tensor([int(s.target[1:].sum()) for s in sequences], dtype=torch.float64),
        sums[:, 0, 0],
        {name: sums[:, 0, i] for i, name in names},
        {name: sums[:, 1, i] for i, name in names},
        vocabulary > 0,
    )


def _losses(
    model: nn.Module,
    place: Place,
    sequence: SplicedSequence,
    variants: list[Replace],
    at_once: int,
) -> Float64[Tensor, "2 variants_and_clean"]:
    """Return [cross-entropy; KL from the clean pass] of one sequence, untouched and under each variant."""
    device = input_device(model)
    ids, kept = sequence.ids.to(device), sequence.kept.to(device)
    scored = sequence.target[1:].nonzero()[:, 0].to(device)
    targets = ids[scored + 1]
    columns: list[Tensor] = []
    clean: Tensor | None = None
    for start in range(0, 1 + len(variants), at_once):
        group = [None, *variants][start : start + at_once]
        logits = run_variants(model, place, ids, kept, group)
        clean = logits[0, scored] if clean is None else clean
        columns += [_compare(clean, row[scored], targets) for row in logits]
    return torch.stack(columns, dim=1)


def _compare(
    clean: Float[Tensor, "scored vocabulary"],
    other: Float[Tensor, "scored vocabulary"],
    targets: Int64[Tensor, " scored"],
) -> Float64[Tensor, " 2"]:
    """Return the sums over the scored tokens of cross-entropy and KL(p_clean || p_other)."""
    total = torch.zeros(2, dtype=torch.float64)
    for span in (slice(at, at + _ROWS) for at in range(0, len(targets), _ROWS)):
        log_q = other[span].float().log_softmax(-1)
        log_p = clean[span].float().log_softmax(-1)
        ce = -log_q.gather(1, targets[span, None])
        kl = (log_p.exp() * (log_p - log_q)).sum(1)
        total += torch.stack([ce.double().sum(), kl.double().sum()]).cpu()
    return total


def run_variants(
    model: nn.Module,
    place: Place,
    ids: Int64[Tensor, " length"],
    kept: Bool[Tensor, " length"],
    variants: Variants,
) -> Float[Tensor, "variants length vocabulary"]:
    """Return the logits with each variant in place at `kept` of the hook's rows; None leaves them untouched."""
    batch, swaps = ids[None], [(place.hook, _widened(kept, variants))]
    if place.beside:
        batch = ids.expand(len(variants), -1)
        parts = _by_hook(model, place.beside, ids, kept, variants)
        swaps = [
            (hook, _widened(kept, here))
            for hook, here in zip(place.beside, parts, strict=True)
            if place.alone in (None, hook)
        ]
    with contextlib.ExitStack() as stack:
        for hook, swap in swaps:
            stack.enter_context(splice(model, hook, swap, place.read))
        logits = model(input_ids=batch, use_cache=False).logits
    if len(logits) != len(variants):
        raise RuntimeError("the hooked module's output does not reach the logits by batch row")
    return logits


def _widened(kept: Bool[Tensor, " length"], variants: Variants) -> Swap:
    """Return what makes of a hook's rows, of one sequence, those of each variant."""

    def widened(hidden: Float[Tensor, "_ length d_out"], call: Call) -> Tensor:
        wide = hidden.expand(len(variants), *hidden.shape[1:]).clone()
        at = kept.to(hidden.device)
        read = hidden if call.read is None else call.read.to(hidden.device)
        x = read[0, at].float()
        for row, replace in zip(wide, variants, strict=True):
            if replace is not None:
                row[at] = replace(x).to(row)
        return wide

    return widened


def _by_hook(
    model: nn.Module,
    hooks: tuple[HookPoint, ...],
    ids: Int64[Tensor, " length"],
    kept: Bool[Tensor, " length"],
    variants: Variants,
) -> list[Variants]:
    """Return each hook's part of what the variants make of the rows side by side in an untouched pass."""
    seen = Capture(model, hooks)(ids[None])
    x = torch.cat([rows[0].to(ids.device)[kept].float() for rows in seen.values()], 1)
    made = [None if v is None else v(x).split([h.d_in for h in hooks], 1) for v in variants]
    return [
        [None if parts is None else _constant(parts[number]) for parts in made]
        for number in range(len(hooks))
    ]


def _constant(rows: Float[Tensor, "kept d_out"]) -> Replace:
    return lambda _: rows


def splice_sequences(tokens: TokenTable, cfg: EvalConfig) -> list[int]:
    """Return the sequences to splice: about splice_tokens tokens, evenly spread over the held-out data."""
    n_seq, seq_len = tokens.ids.shape
    wanted = min(n_seq, -(-cfg.splice_tokens // seq_len))
    return [i * n_seq // wanted for i in range(wanted)]


def splice_arrays(
    language: Language,
    place: Place,
    saes: dict[str, SAE],
    mean: Float64[Tensor, " d_out"],
    sequences: list[SplicedSequence],
    cfg: EvalConfig,
    progress: Progress = quiet,
) -> dict[str, dict[str, Tensor]]:
    """Return, for each member, sums over the scored tokens of each spliced sequence (nats) and their number.

    Beside the members, kept positions are set to zero and to the held-out mean: the two ablations. Of a model that sees
    later tokens there is no cross-entropy of the next token, which it reads; only KL.
    """

    def reconstruction(sae: SAE) -> Replace:
        return lambda x: sae(x.to(sae.W_dec.device)).to(x.device)

    constant = mean.float()
    variants: dict[str, Replace] = {
        "zero": lambda x: x.new_zeros(len(x), len(constant)),
        "mean": lambda x: constant.to(x.device).expand(len(x), -1),
    }
    variants |= {f"sae {name}": reconstruction(sae) for name, sae in saes.items()}
    out: dict[str, dict[str, Tensor]] = {name: {} for name in saes}
    sources = next((sae.cfg.sources for sae in saes.values()), None) or ()
    ends = ["", *(f"[{source.name}]" for source in sources)]
    for alone, end in zip((None, *place.beside), ends, strict=True):
        where = place._replace(alone=alone)
        args = (sequences, variants, cfg.splice_logits, progress)
        losses = spliced_losses(language.model, where, *args)
        common = {"splice_seq": losses.seq, "splice_targets": losses.targets}
        if place.causal is not False:
            common |= {
                "splice_ce_clean": losses.ce_clean,  # the same wherever is spliced
                f"splice_ce_zero{end}": losses.ce["zero"],
                f"splice_ce_mean{end}": losses.ce["mean"],
            }
        for name, arrays in out.items():
            arrays |= {**common, f"splice_kl{end}": losses.kl[f"sae {name}"]}
            if place.causal is not False:
                arrays[f"splice_ce{end}"] = losses.ce[f"sae {name}"]
    return out


def unrecovered(hook: str, arrays: dict[str, Tensor]) -> list[str]:
    """Return why there is no share of recovered cross-entropy: an ablation that costs the model nothing."""
    found = []
    for end in (key.removeprefix("splice_ce_zero") for key in arrays if "ce_zero" in key):
        keys = {"clean": "clean", "zero": f"zero{end}", "mean": f"mean{end}"}
        per_token = {
            name: float(arrays[f"splice_ce_{key}"].sum() / arrays["splice_targets"].sum())
            for name, key in keys.items()
        }
        found += [
            f"{end[1:-1] or hook}: cross-entropy recovered ({name}) is not defined, as the model predicts no worse "
            f"with the {what} in place of its activations ({per_token[name]:.4g} nats a token, untouched "
            f"{per_token['clean']:.4g})"
            for name, what in (("zero", "value 0"), ("mean", "mean"))
            if per_token[name] <= per_token["clean"]
        ]
    return found


def token_sequences(
    tokens: TokenTable, kept: HeldOutPositions, special: list[int]
) -> list[SplicedSequence]:
    """Return the chosen sequences without padding; special tokens are not scored as targets."""
    out = []
    for seq in kept.sequences:
        ids = tokens.ids[seq, : int(tokens.lengths[seq])].long()
        target = ~torch.isin(ids, torch.tensor(special, dtype=torch.int64))
        out.append(SplicedSequence(seq, ids, kept.mask(seq, len(ids)), target))
    return out


# Measured, spliced and compared.

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


@own_settings()
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
    if not isinstance(sae, SAE):
        raise UserError(f"evaluate: given {type(sae).__name__} in place of an SAE; SAE.load(path)")
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
        kind = "a transcoder" if sae.cfg.transcoder else "an SAE"
        raise UserError(f"target: {wanted}; this is {kind}")
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


def _as_numpy(arrays: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Return arrays as NumPy's; it has no bfloat16, in which an SAE's own numbers may be."""
    return {
        key: (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        for key, value in arrays.items()
    }


@own_settings()
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
        described = getattr(source, "describe", dict)()
        info = {"hook": next(iter(subject)), "source": described}
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
            fvu = entry["metrics"].get("fvu", {}).get("value")
            if name not in (CONTROL, "random") and fvu is not None and fvu > 1:
                worse.append(f"{hook}/{name} (FVU {fvu:.3g})")
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

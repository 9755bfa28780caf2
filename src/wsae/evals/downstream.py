"""What the model loses when reconstructions stand in for its activations.

The rows at the hook are replaced at every kept position (those the SAE was trained to see); skipped ones
(start of sequence, special tokens, attention sinks) keep their true activation, as they do in training. Cross-entropy
and KL(p_clean || p_spliced) are summed per sequence over the next tokens that are not special, in nats.

One sequence runs at a time, and its variants (clean, ablated, one per member) share the layers before the hook:
there the batch has one row, and the hook widens it to one row per variant. A model that does not take it
(`wsae.acts.capture.logits_by_row`) runs once per variant.

A crosscoder's code is that of an untouched pass. In a second one its hooks' rows are replaced by their parts of x_hat:
all of them, and each alone, as what is put in at a later place hides what an earlier one did to the rows there.
"""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from wsae.acts.capture import Call, Capture, Swap, logits_by_row, splice
from wsae.acts.hookpoints import HookPoint
from wsae.acts.loading import input_device, refuse_without_logits
from wsae.acts.stream import Language
from wsae.acts.tokens import TokenTable
from wsae.core.errors import UserError
from wsae.core.progress import Progress, quiet
from wsae.evals.config import EvalConfig
from wsae.evals.measure import HeldOutPositions
from wsae.sae import SAE

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

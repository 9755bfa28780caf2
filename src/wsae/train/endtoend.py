"""Training through the model: reconstructions stand in for its activations, and its own loss is what is minimised.

    ce = mean over scored tokens t of -log q_t(token t)       kl = the mean of sum_v p_t(v) (log p_t(v) - log q_t(v))

with p_t the untouched model's prediction of token t and q_t that with x_hat in place of x at the hook (Braun et al.
2024). Rows that training leaves out (first, special, padding, attention sinks) keep their activations; special tokens
and padding are not scored. The model's parameters have no gradients; the SAE's penalties and revival stay as they are.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from wsae.acts.capture import Call, splice
from wsae.acts.flow import KEPT, TokenBatch, running
from wsae.acts.hookpoints import HookPoint
from wsae.acts.live import LiveSource, SequenceStream
from wsae.acts.loading import refuse_without_logits
from wsae.core.errors import UserError
from wsae.core.progress import Tick
from wsae.sae.forward import Forward, training_forward
from wsae.train.config import TrainConfig
from wsae.train.family import FamilyState
from wsae.train.state import Batch, MemberState, make_batch
from wsae.train.step import after_step, descend, look, lr_factor


def live(cfg: TrainConfig, source: object) -> LiveSource:
    """Return the source as the live model that a loss through it needs; raises UserError where it is none."""
    if not isinstance(source, LiveSource):
        raise UserError(
            f"loss {cfg.loss}: runs through the model, and these data are stored activations; give the model itself, "
            "with --text and --hook"
        )
    refuse_without_logits(source.language.model)
    if cfg.loss == "ce" and source.flow.probed.causal is False:
        raise UserError("loss ce: this model sees the tokens it would predict; use kl")
    return source


class Targets(NamedTuple):
    """A batch of sequences on the model's device, and which of its tokens are scored."""

    tokens: TokenBatch
    target: Bool[Tensor, "batch seq-1"]
    """Whether the token after each one is scored: neither special nor padding."""
    clean: Float[Tensor, "scored vocabulary"] | None
    """The untouched model's log-probabilities of the scored tokens, for kl."""


@dataclass
class Spliced:
    """What one pass with reconstructions in place gave."""

    loss: Float[Tensor, ""]
    """In nats; differentiable in the SAE's parameters."""
    forward: Forward
    batch: Batch
    """The rows that were replaced."""


def run_spliced(
    cfg: TrainConfig,
    family: FamilyState,
    stream: SequenceStream,
    first: int,
    tick: Tick,
    on_step: Callable[[int], None],
) -> None:
    """Train on a stream of sequences from step `first` to the end, each member spliced in alone at its hook.

    Raises UserError where the loss is not finite, or the text has no token to score.
    """
    source = stream.source
    source.forget()
    points = {point.name: point for point in source.flow.probed.hooks}
    with frozen(source.language.model):
        for step in range(first, cfg.steps):
            scored = scored_batch(cfg, source, _next(source, stream))
            for hook, member in family.all():
                out = cfg.given(hook)
                read = None if out is None else points[hook]
                _step(cfg, source, points[out or hook], member, scored, step, read)
            on_step(step + 1)
            tick(cfg.batch_size)


def _step(
    cfg: TrainConfig,
    source: LiveSource,
    point: HookPoint,
    member: MemberState,
    scored: Targets,
    step: int,
    read: HookPoint | None = None,
) -> None:
    rate = member.cfg.learning_rate(member.sae.cfg.d_in)
    rate *= lr_factor(step, cfg.steps, cfg.warmup, cfg.decay)
    found = spliced(cfg, source, point, member, scored, read)
    if found is None:
        return
    if not bool(found.loss.isfinite()):
        raise UserError(
            f"loss {cfg.loss}: NaN or infinite with {member.name} in place of {point.name} at step {step + 1}; lower "
            "--lr, or run the model in float32"
        )
    code = descend(member, found.batch, found.forward, found.loss, rate, cfg, step)
    after_step(member, code, step, cfg)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the context the model's parameters take no gradients."""
    learned = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in learned:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


def _next(source: LiveSource, stream: SequenceStream) -> TokenBatch:
    """Return the next batch that has a token to score and a row that its token does not leave out."""
    begun = stream.state()["epoch"]
    while True:
        tokens = stream.next()
        kept = source.flow.rule.by_token(*tokens) == KEPT
        if bool(kept.any()) and bool(_scored(source, tokens).any()):
            return tokens
        epoch = stream.state()["epoch"]
        if isinstance(begun, int) and isinstance(epoch, int) and epoch > begun + 1:
            raise UserError(
                f"text {source.cfg.text.path}: no sequence has a row to replace and a token to score; give longer "
                "documents"
            )


def _scored(source: LiveSource, tokens: TokenBatch) -> Bool[Tensor, "batch nexts"]:
    """Return whether the token after each one is scored."""
    special = torch.tensor(source.language.tokenizer.all_special_ids, device=tokens.ids.device)
    return ((tokens.positions >= 0) & ~torch.isin(tokens.ids, special))[:, 1:]


def scored_batch(cfg: TrainConfig, source: LiveSource, tokens: TokenBatch) -> Targets:
    """Return a batch on the model's device with its targets, for kl also what the untouched model predicts there."""
    device = source.language.device
    said = None if tokens.said is None else tokens.said.to(device)
    tokens = TokenBatch(tokens.ids.to(device), tokens.positions.to(device), said)
    scored = Targets(tokens, _scored(source, tokens), None)
    if cfg.loss == "ce":
        return scored
    with torch.no_grad():
        return scored._replace(clean=_predicted(source, scored))


def spliced(
    cfg: TrainConfig,
    source: LiveSource,
    point: HookPoint,
    member: MemberState,
    scored: Targets,
    read: HookPoint | None = None,
) -> Spliced | None:
    """Return the loss of a batch with a member's reconstructions in place at its hook; None where all rows are sinks.

    The rows of its batch are those that training keeps; what is spliced in is back in their own units. A transcoder
    reads those of `read`, earlier in the pass.
    """
    passed: list[tuple[Batch, Forward]] = []

    def swap(x: Float[Tensor, "batch seq d_out"], call: Call) -> Tensor:
        rows = x.flatten(0, 1).float()
        given = rows if call.read is None else call.read.flatten(0, 1).float()
        seen = {point.name: rows} | ({} if read is None else {read.name: given})
        kept, device = _kept(source, scored.tokens, seen), member.mean.device
        if not len(kept):
            return x
        y = None if read is None else rows[kept].to(device)
        batch = make_batch(given[kept].to(device), member, y)
        if not member.optimizer.state:
            look(member, batch)
        forward = training_forward(member.sae, batch.x, cfg.dtype == "bfloat16", member.part)
        passed.append((batch, forward))
        x_hat = forward.x_hat * member.scale
        x_hat = x_hat if member.back is None else member.back.undo(x_hat)
        return rows.index_copy(0, kept, x_hat.to(rows)).view(x.shape)

    with splice(source.language.model, point, swap, read):
        log_q = _predicted(source, scored)
    if not passed:
        return None
    ((batch, forward),) = passed
    if scored.clean is None:
        loss = F.nll_loss(log_q, scored.tokens.ids[:, 1:][scored.target])
    else:
        loss = F.kl_div(log_q, scored.clean, reduction="sum", log_target=True) / len(log_q)
    return Spliced(loss, forward, batch)


def _kept(
    source: LiveSource, tokens: TokenBatch, rows: dict[str, Float[Tensor, "tokens _"]]
) -> Int64[Tensor, " kept"]:
    """Return which of a batch's rows training keeps at some hooks."""
    rule = source.flow.rule
    reasons = rule.by_token(*tokens).flatten()
    norms = {hook: torch.linalg.vector_norm(x, dim=1) for hook, x in rows.items()}
    return (rule.by_norm(norms, reasons) == KEPT).nonzero()[:, 0]


def _predicted(source: LiveSource, scored: Targets) -> Float[Tensor, "scored vocabulary"]:
    """Return the model's log-probabilities of the scored tokens."""
    ids, positions, _ = scored.tokens
    mask = positions >= 0
    with running(source.hooks, ids.numel(), "--batch-size"):
        attention = None if bool(mask.all()) else mask.long()
        logits = source.language.model(
            input_ids=ids, attention_mask=attention, use_cache=False
        ).logits
    return logits[:, :-1][scored.target].float().log_softmax(-1)

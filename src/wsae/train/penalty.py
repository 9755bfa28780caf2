"""What the penalties of a step cost a member, and how its sparsity is steered: warm-up, p-annealing, a target L0."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from wsae.kernels import CodeSums, SparseCode
from wsae.sae.forward import Coded
from wsae.sae.loss import Price
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.state import MemberState

ANNEALS, QUEUE = 10, 10
"""Times at which p-annealing changes p (the first and the last change nothing), and steps before each one whose
penalties tell the new coefficient (dictionary_learning's PAnnealTrainer)."""


REACH = 4.0
"""How far a run can carry a threshold at least, in units of the scaled activations (whose dimensions have variance 1 on
average): most pre-activations are smaller."""


def threshold_pace(cfg: MemberConfig, d_in: int, steps: int) -> float:
    """Return how many times the others' the learning rate of thresholds is: max(1, 4 / (steps * lr)).

    Adam moves a number by its learning rate a step, whatever the gradient, so that in a short run, or at a small rate,
    thresholds would stay near where they start, and no penalty could make a code sparse. Those held at a target are
    carried by that, and need no more than 1.
    """
    if cfg.target_l0 is not None:
        return 1.0
    return max(1.0, REACH / (steps * cfg.learning_rate(d_in)))


@contextmanager
def at_own_pace(thresholds: Mapping[str, Tensor], pace: float) -> Iterator[None]:
    """Let what moves thresholds while inside move them `pace` times as far."""
    before = [threshold.clone() for threshold in thresholds.values()]
    yield
    for threshold, start in zip(thresholds.values(), before, strict=True):
        threshold.sub_(start).mul_(pace).add_(start)


HALVINGS = 24


@torch.no_grad()
def start_thresholds(member: MemberState, x: Float[Tensor, "batch d_in"]) -> None:
    """Set all thresholds to what target_l0 pre-activations of a row exceed in the first batch, on average.

    From a code that is not sparse the first steps would learn an encoder for such a code. Thresholds that something has
    moved already, as those of a trained SAE, stay.
    """
    cfg, sae, part = member.cfg, member.sae, member.part
    threshold = sae.own["threshold"].detach()
    start = sae.arch.parameters["threshold"].start(cfg.activation)
    assert cfg.target_l0 is not None
    if not bool((threshold == threshold.new_tensor(start)).all()):
        return
    pre = sae.pre(sae.centre(x)).relu()
    low, high = pre.new_zeros(()), -part.least(-pre.max())
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        above = part.over_latents(part.over_rows(torch.count_nonzero(pre > middle).double()))
        more = above > cfg.target_l0 * (part.batch or len(x))
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    threshold.copy_(high)


HOLD = 0.3
"""By how much of L0 / target - 1 thresholds rise after a step."""


@torch.no_grad()
def hold_l0(member: MemberState, code: SparseCode | CodeSums, pace: float) -> None:
    """Multiply all thresholds by 1 + 0.3 sqrt(pace) (L0 / target - 1), with a batch's L0, twice the target at most.

    L0 falls where thresholds rise, whatever the learning rate, so this holds it where penalties alone leave it to how
    far they come; which latents get a larger share is left to the gradient. `pace` is the share of the peak learning
    rate. As that falls, what the weights' steps add to L0 falls as fast, the answer to it more slowly: both the offset
    and the noise of single batches go.
    """
    assert member.cfg.target_l0 is not None
    count, part = code.active().double(), member.part
    L0 = part.over_latents(part.over_rows(count)) / (part.batch or code.batch)
    off = (L0 / member.cfg.target_l0 - 1).clamp_max(1)
    threshold = member.sae.own["threshold"]
    threshold.mul_((1 + HOLD * pace**0.5 * off).to(threshold))


class Annealing(NamedTuple):
    """Where p-annealing is at a step."""

    p: float
    following: float | None
    """The p after the next change; None before the first one."""
    change: int
    """The last step before that change."""


def annealing(cfg: MemberConfig, step: int, steps: int) -> Annealing:
    """Return p at a step, which falls from 1 to p_end in equal parts at 10 times, evenly from `anneal_from` to the end.

    The last of them is the end of training, so p_end itself is never reached.
    """
    assert cfg.p_end is not None
    first = cfg.anneal_start(steps)
    times = [first + (steps - first) * i // (ANNEALS - 1) for i in range(ANNEALS)]
    done = sum(time < step for time in times)
    values = [1 + (cfg.p_end - 1) * i / (ANNEALS - 1) for i in range(ANNEALS)]
    if not done:
        return Annealing(1.0, None, times[0])
    return Annealing(values[done - 1], values[done], times[done])


def price_at(member: MemberState, run: TrainConfig, step: int) -> Price:
    """Return what the penalties of a step cost: their coefficients rise from 0 during the penalties' warm-up."""
    cfg = member.cfg
    rise = 1.0
    if cfg.penalty_warmup:
        rise = min(1.0, step / (cfg.penalty_warmup * run.steps))
    l1: float | Tensor = cfg.l1 * rise
    p = None
    if member.annealed is not None:
        p = annealing(cfg, step, run.steps).p
        l1 = l1 * member.annealed[0].float()
    return Price(
        l1,
        cfg.l0 * rise,
        cfg.l0_penalty or "step",
        cfg.target_l0 or 1.0,
        p,
        cfg.pre_act or 0.0,
    )


@torch.no_grad()
def anneal(member: MemberState, entries: Coded, run: TrainConfig, step: int) -> None:
    """Follow what the penalty was and what it would be with the next p, and at a change of p keep its size.

    The coefficient is multiplied by the ratio of the means of both over the last 10 steps.
    """
    cfg, part = member.cfg, member.part
    if cfg.p_end is None or member.annealed is None:
        return
    now = annealing(cfg, step, run.steps)
    if now.following is None or step <= now.change - QUEUE:
        return
    sums = torch.stack([entries.l1(p).sum() for p in (now.p, now.following)]).double()
    member.annealed[1:] += part.over_latents(part.over_rows(sums))
    if step == now.change:
        factor, before, after = member.annealed.unbind()
        ratio = torch.where(after > 0, before / after, 1.0)
        member.annealed = torch.stack([factor * ratio, 0 * before, 0 * after])

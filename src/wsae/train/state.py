"""One member of a family in training: its SAE, optimiser and counters, its batches, and how its sparsity is steered.

What penalties cost it: warm-up, p-annealing, a target L0.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from wsae.core.errors import UserError
from wsae.kernels.eager import Adam, CodeSums, SparseCode, limit_of, rescale_
from wsae.kernels.native.weights import Weights
from wsae.sae.architectures import PerBatch
from wsae.sae.forward import WHOLE, Coded, Price, Whole, weigh
from wsae.sae.gamma import gamma_from_proxy, latent_variance_proxy
from wsae.sae.model import SAE
from wsae.sae.precondition import Preconditioner
from wsae.train.config import MemberConfig, TrainConfig

SUMS = (
    "loss",
    "reconstruction",
    "auxk",
    "sse",
    "variance",
    "weighted_variance",
    "l0",
    "rows",
    "steps",
)


@dataclass
class MemberState:
    """Everything of a member that changes during training; `wsae.train.loop` keeps it."""

    name: str
    cfg: MemberConfig
    sae: SAE
    optimizer: Adam
    mean: Float[Tensor, " d_out"]
    """Mean of what it is to give, in scaled units: FVU is taken about it."""
    scale: float
    """What it is to give is divided by this power of two for training."""
    scale_in: float
    """What it reads is divided by this one; of an SAE it is the same."""
    since_fired: Int64[Tensor, " d_sae"]
    """Tokens since each latent last fired."""
    dead: Bool[Tensor, " d_sae"]
    latent_moments: Float64[Tensor, "2 d_sae"]
    """Running mean of z and z^2, for the rule latent_variance."""
    window: Float64[Tensor, " sums"]
    """Sums since the last row of metrics, in the order of SUMS."""
    spread: Float[Tensor, " d_in"]
    """Standard deviation per dimension, in scaled units: the compiled kernels round by it."""
    sparse: Bool[Tensor, ""]
    """Whether few enough latents are active for the compiled kernels (kinds without a k; Top-k always)."""
    annealed: Float64[Tensor, "3"] | None = None
    """With p-annealing: the factor of l1 by now, and the sums behind the next one (`wsae.train.state`)."""
    norm: Float64[Tensor, ""] | None = None
    """Norm of the gradient of the step before, 0 before the first; None where `max_grad_norm` limits nothing."""
    inside: Preconditioner | None = None
    """The map P where the SAE is trained on P x; all other vectors of x here are then of P x too."""
    weights: Weights | None = None
    """The large tensors while the compiled kernels train them; the SAE's own are empty then."""
    part: Whole = WHOLE
    """Which of its rows and latents are here."""

    @property
    def back(self) -> Preconditioner | None:
        """The map that its errors are taken back by: P, unless it gives other activations than it reads."""
        return None if self.sae.cfg.transcoder else self.inside

    @property
    def sums(self) -> dict[str, Float64[Tensor, ""]]:
        """The sums since the last row of metrics by name (views of `window`)."""
        return dict(zip(SUMS, self.window.unbind(), strict=True))


def make_member(
    name: str,
    cfg: MemberConfig,
    run: TrainConfig,
    mean: Float[Tensor, " d_in"],
    scale: float,
    spread: Float[Tensor, " d_in"] | None = None,
    sae: SAE | None = None,
    target: "Target | None" = None,
) -> MemberState:
    """Return a member at its start: b_dec at the data's mean, encoder along the decoder, gamma all 1.

    `mean` and `spread` (standard deviations; by default equal ones) are in the activations' own units. An `sae` is
    taken as it is, in place of a new one (`centred`). A transcoder has a `target`.
    """
    d_in = len(mean)
    scale_in, centre_in = scale, (mean / scale).float()
    centre = centre_in
    if target is not None:
        scale, centre = target.scale, (target.mean / target.scale).float()
    if sae is None:
        seed = run.seed if cfg.seed is None else cfg.seed
        d_out = None if target is None else len(target.mean)
        shape = cfg.sae_config(d_in, d_out, run.crosscoder)
        sae = centred(SAE(shape, seed, cfg.start_scale(d_in)), centre_in, centre)
    d_sae = sae.cfg.d_sae
    parameters = [p for p in sae.parameters() if p.requires_grad]
    return MemberState(
        name=name,
        cfg=cfg,
        sae=sae,
        optimizer=Adam(parameters, cfg.learning_rate(d_in)),
        mean=centre,
        scale=scale,
        scale_in=scale_in,
        since_fired=torch.zeros(d_sae, dtype=torch.int64),
        dead=torch.zeros(d_sae, dtype=torch.bool),
        latent_moments=torch.zeros(2, d_sae, dtype=torch.float64),
        window=torch.zeros(len(SUMS), dtype=torch.float64),
        spread=(spread / scale_in if spread is not None else torch.ones_like(mean)).float(),
        sparse=torch.tensor(sae.arch.sparse),
        annealed=None if cfg.p_end is None else torch.tensor([1.0, 0, 0], dtype=torch.float64),
        norm=None if run.max_grad_norm is None else torch.zeros((), dtype=torch.float64),
    )


def centred(sae: SAE, read: Float[Tensor, " d_in"], given: Float[Tensor, " d_out"]) -> SAE:
    """Return a new SAE with its biases at the means, in scaled units, of what it reads and what it is to give.

    b_dec of an SAE is its mean. A transcoder's b_dec starts at the mean of what it is to give, its b_enc at
    -mean @ W_enc, as if the mean had been subtracted from its inputs, and its decoder at 0, until its first batch says
    more (`wsae.train.step.start_decoder`).
    """
    if sae.cfg.transcoder:
        assert sae.b_enc is not None
        sae.b_enc.data.copy_(-read @ sae.W_enc)
        sae.W_dec.data.zero_()
    if sae.b_dec is not None:
        sae.b_dec.data.copy_(given)
    return sae


class Target(NamedTuple):
    """The moments of what a transcoder is to give, as `make_member` takes those of what it reads."""

    mean: Float[Tensor, " d_out"]
    scale: float


class Batch(NamedTuple):
    """One step's activations as a member sees them: mapped by its preconditioner, scaled."""

    x: Float[Tensor, "batch d_in"]
    deviation: Float[Tensor, " d_out"]
    """Sum over the rows of the target's squared deviation from the data's mean, per dimension."""
    given: Float[Tensor, "batch d_in"]
    """The activations as they were."""
    target: Float[Tensor, "batch d_out"]
    """What it is to give, scaled: x itself, or the output of a transcoder's module."""


def make_batch(
    x: Float[Tensor, "batch d_in"],
    member: MemberState,
    y: Float[Tensor, "batch d_out"] | None = None,
) -> Batch:
    """Map and scale activations as a member is trained on them; `y` is what a transcoder is to give."""
    inside = member.inside
    mapped = (x if inside is None else inside.rows(x)) / member.scale_in
    target = mapped if y is None else y / member.scale
    return Batch(mapped, (target - member.mean).square_().sum(0), x, target)


def make_batches(
    x: Float[Tensor, "batch d_in"],
    members: list[MemberState],
    y: Float[Tensor, "batch d_out"] | None = None,
) -> list[Batch]:
    """Return each member's batch; those of one hook with the same preconditioner share it."""
    made: dict[int, Batch] = {}
    for member in members:
        if id(member.inside) not in made:
            made[id(member.inside)] = make_batch(x, member, y)
    return [made[id(member.inside)] for member in members]


def gradient_scale(member: MemberState, run: TrainConfig) -> Float[Tensor, ""] | None:
    """Return what a step's gradient is multiplied by: min(1, max_grad_norm / norm of the step before's); None: nothing.

    Adam remembers squares for a thousand steps, and gradients fall several times over in the first of them: unlimited,
    later steps would be divided by what the first were.
    """
    if member.norm is None or run.max_grad_norm is None:
        return None
    return limit_of(run.max_grad_norm, member.norm)


def note_gradient(
    member: MemberState,
    run: TrainConfig,
    step: int,
    of_latents: Float64[Tensor, ""],
    of_all: Float64[Tensor, ""],
) -> None:
    """Take notice, for the next step, of the sums of squares of the latents' gradients and of what all latents share.

    The first step's moments are made what they would be had its norm been known: what Adam did then is the same.
    """
    if member.norm is None:
        return
    part = member.part
    member.norm = part.over_latents(of_latents + part.once(of_all)).sqrt()
    if step == 0 and (scale := gradient_scale(member, run)) is not None:
        weights = member.weights
        matrices = [] if weights is None else [weights.decoder, weights.encoder]
        elsewhere = [(matrix.m, matrix.v) for matrix in matrices if matrix is not None]
        rescale_([*member.optimizer.pairs(), *elsewhere], scale)


LOOKED_AT = 16
"""With a preconditioner the fast kernels take the error of one row in so many back to x, for the fraction of variance
unexplained: to take every row's back costs as much as the map."""


GAMMA_EVERY = 10
"""Steps between refreshes of a latent_variance gamma and of the set of dead latents."""
THRESHOLD_DECAY = 0.95
"""Per-step decay of batch Top-k's running threshold."""


class StepResult(NamedTuple):
    """What one step found, detached."""

    code: SparseCode | CodeSums
    loss: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]
    revival: Float[Tensor, ""]
    sse: Float[Tensor, ""]
    """Sum over the batch of |x_hat - x|^2, in scaled units."""
    error: Float[Tensor, "rows d_in"] | None = None
    """x_hat - x of all or the first rows (`looked_at`), where errors are of P x."""


def record(
    member: MemberState,
    batch: Batch,
    result: StepResult,
    step: int,
    run: TrainConfig,
    W_dec: Callable[[], Float[Tensor, "d_sae d_in"]] | None = None,
) -> None:
    """Note what a step found: which latents fired, thresholds, sums for the metrics, a latent_variance gamma.

    `W_dec` gives the decoder after the step; by default the SAE's.
    """
    sae, code, part = member.sae, result.code, member.part
    rows = part.batch or len(batch.x)
    varies = member.cfg.gamma.rule == "latent_variance"
    fired, moments = code.sums(len(member.dead), varies)[1:]
    member.since_fired.add_(rows).masked_fill_(part.over_rows(fired) > 0, 0)
    if isinstance(sae.choice, PerBatch) and isinstance(code, SparseCode):
        positive = torch.where(code.values > 0, code.values, torch.inf)
        least = positive.min() if len(positive) else positive.new_tensor(torch.inf)
        follow_threshold(sae.threshold, part.least(least))
    add_sums(member, batch, result)
    if moments is None:
        return
    decay = run.latent_variance_decay
    member.latent_moments.lerp_(part.over_rows(moments) / rows, 1 - decay)
    if (step + 1) % GAMMA_EVERY == 0:
        variance = latent_variance(member.latent_moments, step, decay) * member.scale**2
        decoder = sae.W_dec.detach() if W_dec is None else W_dec()
        proxy = part.over_latents(latent_variance_proxy(variance, decoder.double()))
        sae.gamma.copy_(gamma_from_proxy(member.cfg.gamma, proxy))


def follow_threshold(
    threshold: Float64[Tensor, "*members"], smallest: Float[Tensor, "*members"]
) -> None:
    """Move batch Top-k's threshold of inference to a batch's smallest active value, where it has one."""
    smallest = smallest.double()
    moved = torch.lerp(smallest, threshold, THRESHOLD_DECAY)
    moved = torch.where(threshold == 0, smallest, moved)
    threshold.copy_(torch.where(smallest.isfinite(), moved, threshold))


def add_sums(member: MemberState, batch: Batch, result: StepResult) -> None:
    """Add a step to the window of metrics, in the activations' own units."""
    gamma, deviation, zero = member.sae.gamma, batch.deviation, result.loss.new_zeros(())
    # the sum over rows of ||Gamma (x - mean)||^2: a vector needs only the sums per dimension
    weighted = (deviation * gamma.square()).sum() if gamma.ndim == 1 else None
    if weighted is None:
        weighted = weigh(batch.target - member.mean, gamma).square().sum()
    sse, variance = result.sse, deviation.sum()
    if member.back is not None and result.error is not None:
        undo = member.back.undo
        here = batch.given[: len(result.error)] / member.scale - undo(member.mean)
        sse, variance = undo(result.error).square().sum(), here.square().sum()
    losses = (result.loss, result.reconstruction, result.revival, sse)
    scaled = torch.stack([value.double() for value in (*losses, variance, weighted)])
    counts = [result.code.active(), zero + len(batch.x), zero + 1]
    sums = torch.cat([scaled * member.scale**2, torch.stack([n.double() for n in counts])])
    member.window += member.part.window(sums)


def looked_at(member: MemberState, batch: Batch) -> int:
    """Return how many of a batch's first rows tell the fast kernels the error in x; 0 where errors are of x."""
    return 0 if member.back is None else -(-len(batch.x) // LOOKED_AT)


def latent_variance(
    moments: Float64[Tensor, "2 *latents"], step: int, decay: float
) -> Float64[Tensor, "*latents"]:
    """Return Var(z_j) from the running means of z and z^2 after step `step`, which began at 0."""
    mean, square = moments / (1 - decay ** (step + 1))
    return (square - mean * mean).clamp_min(0)


def refuse_lost(member: MemberState, step: int) -> None:
    """Raise UserError where a member's loss is not finite any more: nothing brings it back."""
    loss = float(member.sums["loss"])
    if not math.isfinite(loss):
        rate = member.cfg.learning_rate(member.sae.cfg.d_in)
        raise UserError(
            f"{member.name}: its loss is {loss} by step {step}; lower its learning rate ({rate:g})"
        )


def metrics_row(member: MemberState) -> dict[str, float]:
    """Return the means of the window of metrics, in the activations' own units."""
    s = dict(zip(SUMS, member.window.tolist(), strict=True))
    steps, rows = max(s["steps"], 1.0), max(s["rows"], 1.0)
    weighted = s["reconstruction"] * rows / steps  # reconstruction is a mean per row
    return {
        "loss": s["loss"] / steps,
        "reconstruction": s["reconstruction"] / steps,
        "auxk": s["auxk"] / steps,
        "fvu": s["sse"] / s["variance"] if s["variance"] else 0.0,
        "fvu_weighted": weighted / s["weighted_variance"] if s["weighted_variance"] else 0.0,
        "l0": s["l0"] / rows,
        "dead_frac": member.part.dead_share(member.dead),
    }


# What penalties cost a member, and how its sparsity is steered.

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

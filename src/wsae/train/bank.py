"""A bank: hundreds of small SAEs in one batched computation, each trained exactly as if alone.

Members may differ in world (the data they see), gamma, learning rate, penalties, seed, activation and shape. Those
of one shape and kind are stacked, in chunks whose codes fit the cache; nothing is summed across members.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from wsae.acts.stream import ActivationSource
from wsae.core.calls import one_thread
from wsae.core.errors import UserError
from wsae.core.progress import Progress, quiet
from wsae.kernels.eager import SGD, Adam, limit_of, rescale_
from wsae.sae.architectures import PerBatch
from wsae.sae.config import ReLU
from wsae.sae.forward import (
    Price,
    Stack,
    StackForward,
    keep_positive_,
    penalty,
    stack_forward,
    stack_saes,
    stackable,
    thresholds,
    training_forward,
    weighted_reconstruction_loss,
)
from wsae.sae.gamma import gamma_from_proxy, latent_variance_proxy
from wsae.sae.model import SAE
from wsae.train.config import BankConfig, MemberConfig, TrainConfig
from wsae.train.family import FamilyState
from wsae.train.state import (
    GAMMA_EVERY,
    MemberState,
    StepResult,
    add_sums,
    at_own_pace,
    follow_threshold,
    latent_variance,
    make_batch,
    threshold_pace,
)
from wsae.train.step import lr_factor, remove_radial_gradient, revival_loss, unit_rows_


@dataclass
class Entry:
    """One SAE to train: it is changed in place. Its gamma is set, its b_dec at the data's mean (untied)."""

    sae: SAE
    cfg: MemberConfig
    world: int = 0
    """Which of the batches' worlds it sees."""
    dead: Bool[Tensor, " d_sae"] | None = None
    """Set by training: the latents that are dead at its end, where they are followed."""


def make_entry(
    cfg: MemberConfig,
    gamma: Float[Tensor, "..."],
    mean: Float[Tensor, " d_in"] | None = None,
    world: int = 0,
    seed: int = 0,
) -> Entry:
    """Return a member at its start, as a lone run would have it; `seed` serves where the member names none."""
    d_in = gamma.shape[-1]
    seed = seed if cfg.seed is None else cfg.seed
    sae = SAE(cfg.sae_config(d_in), seed, cfg.start_scale(d_in))
    sae.set_gamma(gamma.detach().float())
    if sae.b_dec is not None and mean is not None:
        sae.b_dec.data.copy_(mean)
    return Entry(sae, cfg, world)


@dataclass
class Scratch:
    """Buffers of one chunk, reused every step."""

    z: Float[Tensor, "members d_sae batch"]
    dz: Float[Tensor, "members d_sae batch"]

    @classmethod
    def like(cls, stack: Stack, batch: int) -> "Scratch":
        """Return buffers for a stack and a batch size."""
        members, d_sae, _ = stack.W_dec.shape
        z = stack.W_dec.new_empty(members, d_sae, batch, requires_grad=False)
        return cls(z, torch.empty_like(z))


@torch.no_grad()
def relu_gradients(
    stack: Stack,
    x: Float[Tensor, "members batch d_in"],
    gamma: Float[Tensor, "members rows d_in"],
    l1: Float[Tensor, " members"] | None,
    scratch: Scratch,
) -> Float[Tensor, " members"]:
    """Set every parameter's gradient of E||Gamma (x - x_hat)||^2 + l1 E sum_j z_j ||W_dec[j]||; returns the first term.

    The gradients of a ReLU stack that autograd would give through `stack_forward`, several times faster for small SAEs:
    the code is held latent-major, z [members, d_sae, batch], so that all five products run along the batch, which small
    widths (d_in = 20) need. `gamma` holds one row of weights per member, or a matrix [d_in, d_in].
    """
    batch, z, dz = x.shape[1], scratch.z, scratch.dz
    centred = x.mT if stack.b_dec is None else x.mT - stack.b_dec.mT
    W_enc, W_dec = stack.encoder_rows, stack.W_dec
    if stack.b_enc is None:
        torch.bmm(W_enc, centred, out=z).relu_()
    else:
        torch.baddbmm(stack.b_enc.mT, W_enc, centred, out=z).relu_()
    residual = torch.baddbmm(centred, W_dec.mT, z, alpha=-1)
    if gamma.shape[1] == 1:
        weights = gamma.mT
        weighed = residual * weights
        g = weighed * (weights * (-2 / batch))
    else:
        weighed = torch.bmm(gamma, residual)
        g = torch.bmm(gamma.mT, weighed).mul_(-2 / batch)
    loss = weighed.square_().sum((1, 2)) / batch
    # g is the loss's gradient with respect to x_hat, [members, d_in, batch]
    torch.bmm(W_dec, g, out=dz)
    norms = None
    if l1 is not None:
        rate = l1[:, None, None] / batch
        tied = stack.cfg.tied
        norms = W_dec.norm(dim=2, keepdim=True) if tied else torch.ones_like(W_dec[..., :1])
        dz.add_(norms * rate)
    torch.ops.aten.threshold_backward.grad_input(dz, z, 0, grad_input=dz)
    decoder = torch.bmm(g, z.mT)
    if stack.W_enc_t is None:
        W_dec.grad = decoder.baddbmm_(centred, dz.mT).mT.contiguous()
        if l1 is not None and norms is not None:
            pushed = z.sum(2, keepdim=True) * (l1[:, None, None] / batch)
            W_dec.grad.addcmul_(W_dec, pushed / norms.clamp_min(1e-12))
        return loss
    W_dec.grad = decoder.mT.contiguous()
    stack.W_enc_t.grad = torch.bmm(centred, dz.mT).mT.contiguous()
    if stack.b_enc is not None and stack.b_dec is not None:
        summed = dz.sum(2, keepdim=True)
        stack.b_enc.grad = summed.mT
        stack.b_dec.grad = (g.sum(2, keepdim=True) - torch.bmm(W_enc.mT, summed)).mT
    return loss


Batches = Callable[[int], Float[Tensor, "worlds batch d_in"]]
"""Step -> activations of some worlds, valid until the next call; a pure function of the step."""


class Chunk:
    """Stacked members and everything of them that changes; coefficients have one entry per member.

    `members` are their places among the bank's entries, `worlds` the numbers of the batches' worlds in order, `batch`
    the rows per step.
    """

    def __init__(
        self,
        members: list[int],
        entries: Sequence[Entry],
        worlds: list[int],
        batch: int,
        batches: Batches,
        cfg: BankConfig,
        device: str,
    ) -> None:
        dtype = torch.float32 if cfg.dtype == "float32" else torch.float64
        first = entries[0].cfg
        self.members, self.batches, self.cfg = members, batches, cfg
        self.stack = stack_saes([entry.sae for entry in entries], device, dtype)
        self.world = torch.tensor([worlds.index(e.world) for e in entries], device=device)
        self.lr = first.learning_rate(self.stack.cfg.d_in)
        self.pace = 1.0
        """How many times that the learning rate of thresholds is."""
        self.optimizer = {"adam": Adam, "sgd": SGD}[cfg.optimizer](self.stack.parameters(), self.lr)
        if cfg.optimizer == "adam":
            self.pace = threshold_pace(first, self.stack.cfg.d_in, cfg.steps)
        gammas = [g if g.ndim == 2 else g[None] for g in (entry.sae.gamma for entry in entries)]
        self.gamma = torch.stack(gammas).to(device, dtype)
        """[members, rows, d_in]; rows is 1 for weights per dimension, d_in for a matrix."""
        numbers = [[entry.cfg.auxk, entry.cfg.l1, entry.cfg.l0] for entry in entries]
        self.coefficients = torch.tensor(numbers, dtype=dtype, device=device)
        self.active = (first.auxk > 0, first.l1 > 0, first.l0 > 0)
        """Which of the three penalties the members have: all of a chunk or none, known without asking the device."""
        self.k_aux = first.revived(self.stack.cfg.d_in)
        self.rule = first.gamma if first.gamma.rule == "latent_variance" else None
        """The latent_variance rule whose gamma moves, if that is the members' rule."""
        shape = (len(entries), self.stack.cfg.d_sae)
        self.follows_dead, self.any_dead = first.auxk > 0 or cfg.count_dead, False
        self.dead_rows = cfg.dead_after or max(batch, cfg.steps * batch // 5)
        self.since_fired = torch.zeros(shape, dtype=torch.int64, device=device)
        self.dead = torch.zeros(shape, dtype=torch.bool, device=device)
        self.latent_moments = torch.zeros(2, *shape, dtype=torch.float64, device=device)
        self.norms = torch.zeros(len(entries), dtype=torch.float64, device=device)
        """Norm of each member's gradient in the step before."""
        self.loss_sum = torch.zeros(len(entries), dtype=torch.float64, device=device)
        """Sum over steps of the weighted reconstruction loss."""
        by_hand = isinstance(self.stack.cfg.activation, ReLU) and not first.auxk and not first.l0
        self.scratch = Scratch.like(self.stack, batch) if by_hand else None

    def write_back(self, saes: list[SAE]) -> None:
        """Copy the trained tensors, and gamma where training moved it, into the members' SAEs."""
        self.stack.write_back(saes)
        if self.rule is not None:
            for sae, gamma in zip(saes, self.gamma, strict=True):
                sae.gamma.copy_(gamma[0])


def run_chunk(chunk: Chunk, steps: range) -> None:
    """Train every member of a chunk for a stretch of steps."""
    weights = chunk.stack.W_dec
    for step in steps:
        chunk_step(chunk, chunk.batches(step).to(weights.device, weights.dtype), step)


def chunk_step(chunk: Chunk, x: Float[Tensor, "worlds batch d_in"], step: int) -> None:
    """One optimiser step of every member on its world's batch.

    The members' losses are added, so each gets its own gradient; Adam and gradient descent work entry by entry.
    """
    stack, x, cfg = chunk.stack, x.index_select(0, chunk.world), chunk.cfg
    if chunk.scratch is not None:
        l1 = chunk.coefficients[:, 1] if chunk.active[1] else None
        reconstruction = relu_gradients(stack, x, chunk.gamma, l1, chunk.scratch)
        z = chunk.scratch.z.mT
    else:
        forward = stack_forward(stack, x)
        residual, z = x - forward.x_hat, forward.entries.z.detach()
        weighted = _weighted(residual, chunk.gamma)
        loss, reconstruction = weighted + _penalties(chunk, residual, forward), weighted.detach()
        for parameter in stack.parameters():
            parameter.grad = None
        loss.sum().backward()
    rate = chunk.lr * lr_factor(step, cfg.steps, cfg.warmup, cfg.decay)
    chunk.optimizer.lr = rate
    with torch.no_grad():
        remove_radial_gradient(stack)
        _limit_gradients(chunk)
        with at_own_pace(thresholds(stack), chunk.pace):
            chunk.optimizer.step()
        if cfg.max_grad_norm is not None and step == 0 and isinstance(chunk.optimizer, Adam):
            first = limit_of(cfg.max_grad_norm, chunk.norms)[:, None, None]
            rescale_(chunk.optimizer.pairs(), first.to(x))
        unit_rows_(stack)
        keep_positive_(stack)
        chunk.loss_sum += reconstruction
        if chunk.follows_dead:
            chunk.since_fired.add_(z.shape[1]).masked_fill_((z != 0).any(1), 0)
        if chunk.follows_dead and (step + 1) % GAMMA_EVERY == 0:
            chunk.dead = chunk.since_fired > chunk.dead_rows
            chunk.any_dead = bool(chunk.dead.any())
        if isinstance(stack.choice, PerBatch):
            follow_threshold(stack.threshold, torch.where(z > 0, z, torch.inf).amin((1, 2)))
        _track_latents(chunk, z, step, cfg.latent_variance_decay)


def _limit_gradients(chunk: Chunk) -> None:
    """Scale each member's gradient as `wsae.train.state.gradient_scale` says, and take notice of its norm."""
    if chunk.cfg.max_grad_norm is None:
        return
    scale = limit_of(chunk.cfg.max_grad_norm, chunk.norms)[:, None, None]
    square = torch.zeros_like(chunk.norms)
    for parameter in chunk.stack.parameters():
        assert parameter.grad is not None
        square += parameter.grad.flatten(1).double().square().sum(1)
        parameter.grad.mul_(scale.to(parameter.grad))
    chunk.norms = square.sqrt()


def _weighted(residual: Tensor, gamma: Tensor) -> Tensor:
    """Return the mean over the batch of ||Gamma r||^2, one number per member (Eq. 12)."""
    weighed = residual * gamma if gamma.shape[1] == 1 else torch.bmm(residual, gamma.mT)
    return weighed.square().sum((1, 2)) / residual.shape[1]


def _penalties(chunk: Chunk, residual: Tensor, forward: StackForward) -> Tensor:
    auxk, l1, l0 = chunk.coefficients.unbind(1)
    has_auxk, has_l1, has_l0 = chunk.active
    total = torch.zeros_like(auxk)
    if has_l1:
        total = total + l1 * forward.l1
    if has_l0:
        total = total + l0 * forward.l0
    if has_auxk and chunk.any_dead:
        total = total + auxk * _revival(chunk, residual.detach(), forward)
    return total


def _revival(chunk: Chunk, residual: Tensor, forward: StackForward) -> Tensor:
    """AuxK of every member (see `auxk_loss`): its dead latents model its residual."""
    count = min(chunk.k_aux, chunk.stack.cfg.d_sae)
    pre = forward.entries.pre
    dead = chunk.dead[:, None].expand_as(pre)
    candidates = pre.detach().masked_fill(~dead, -torch.inf)
    index = candidates.topk(count, dim=2, sorted=False).indices
    values = pre.gather(2, index).relu() * dead.gather(2, index)
    z = torch.zeros_like(pre).scatter(2, index, values)
    loss = _weighted(residual - torch.bmm(z, chunk.stack.W_dec), chunk.gamma)
    return loss * chunk.dead.any(1)


def _track_latents(chunk: Chunk, z: Tensor, step: int, decay: float) -> None:
    """Refresh a latent_variance gamma from the running variances of the latents."""
    if chunk.rule is None:
        return
    moments = torch.stack([z.mean(1), z.square().mean(1)]).double()
    chunk.latent_moments.lerp_(moments, 1 - decay)
    if (step + 1) % GAMMA_EVERY == 0:
        variance = latent_variance(chunk.latent_moments, step, decay)
        for i, W_dec in enumerate(chunk.stack.W_dec.detach().double()):
            proxy = latent_variance_proxy(variance[i], W_dec)
            chunk.gamma[i, 0] = gamma_from_proxy(chunk.rule, proxy).to(chunk.gamma)


CHUNK_BYTES = 1 << 21
"""Size of one [members, batch, d_sae] tensor that a chunk may reach: a few of them stay in a core's caches."""

Data = Callable[[list[int]], Batches]
"""World numbers -> their activations by step. Called once per chunk, whose thread alone uses the result."""


def train_bank(
    entries: Sequence[Entry],
    data: Data,
    cfg: BankConfig,
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress = quiet,
) -> Float[np.ndarray, "rows members"]:
    """Train every entry's SAE in place; returns the mean weighted reconstruction loss per `log_every` steps.

    On the CPU chunks are spread over `threads` (default: torch's number), each with one core to itself; they meet only
    where losses are recorded. Raises UserError for no entries, or naming the first member whose loss is not finite.
    """
    if not entries:
        raise UserError("no members to train; give at least one")
    threads = threads or torch.get_num_threads()
    chunks = make_chunks(entries, data, cfg, device, threads)
    record = np.zeros((-(-cfg.steps // cfg.log_every), len(entries)))
    with (
        _workers(device, min(threads, len(chunks))) as run_all,
        progress("train", cfg.steps, "steps") as tick,
    ):
        for row, first in zip(record, range(0, cfg.steps, cfg.log_every), strict=True):
            last = min(first + cfg.log_every, cfg.steps)
            run_all([(chunk, range(first, last)) for chunk in chunks])
            _record(row, chunks, entries, last - first)
            tick(last - first)
    for chunk in chunks:
        chunk.write_back([entries[i].sae for i in chunk.members])
        if chunk.follows_dead:
            for i, dead in zip(chunk.members, chunk.dead.cpu(), strict=True):
                entries[i].dead = dead
    return record


def make_chunks(
    entries: Sequence[Entry], data: Data, cfg: BankConfig, device: str = "cpu", threads: int = 1
) -> list[Chunk]:
    """Return the entries grouped by what one batched computation must share, in chunks of bounded size."""
    for entry in entries:
        if lacks := unbanked(entry.cfg):
            raise UserError(
                f"{lacks}: a bank of SAEs has no such thing; train it alone (wsae train)"
            )
    batch = data([entries[0].world])(0).shape[1]
    cohorts: dict[tuple, list[int]] = {}
    for i, entry in enumerate(entries):
        cohorts.setdefault(shared(entry.sae, entry.cfg), []).append(i)
    chunks = []
    for members in cohorts.values():
        size = len(members)
        if device == "cpu":
            fits = CHUNK_BYTES // (4 * batch * entries[members[0]].sae.cfg.d_sae)
            size = max(1, min(fits, -(-size // threads)))
        for start in range(0, len(members), size):
            part = members[start : start + size]
            worlds = sorted({entries[i].world for i in part})
            own = [entries[i] for i in part]
            chunks.append(Chunk(part, own, worlds, batch, data(worlds), cfg, device))
    return chunks


def unbanked(cfg: MemberConfig) -> str | None:
    """Return the name of what a member has that banks lack, or None."""
    names = ("l0_penalty", "target_l0", "penalty_warmup", "pre_act", "p_end")
    return next((name for name in names if getattr(cfg, name) is not None), None)


def shared(sae: SAE, cfg: MemberConfig) -> tuple:
    """Return what members of one batched computation must have in common."""
    kinds = (cfg.l1 > 0, cfg.l0 > 0, cfg.auxk > 0, cfg.k_aux, sae.gamma.ndim)
    tracked = cfg.gamma if cfg.gamma.rule == "latent_variance" else None
    return (sae.cfg, cfg.learning_rate(sae.cfg.d_in), *kinds, tracked)


def _record(row: np.ndarray, chunks: list[Chunk], entries: Sequence[Entry], steps: int) -> None:
    for chunk in chunks:
        loss = chunk.loss_sum.cpu().numpy() / steps
        bad = np.flatnonzero(~np.isfinite(loss))
        if len(bad):
            member = chunk.members[int(bad[0])]
            name = entries[member].cfg.label or entries[member].cfg.gamma.label
            raise UserError(
                f"member {member} ({name}): its loss is {loss[bad[0]]}; lower its learning rate ({chunk.lr:g})"
            )
        row[chunk.members] = loss
        chunk.loss_sum.zero_()


@contextmanager
def _workers(device: str, count: int):
    """Yield a function that runs stretches of chunks: side by side on a CPU, in turn elsewhere."""
    if device != "cpu":
        yield lambda jobs: [run_chunk(*job) for job in jobs]
        return
    each = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with one_thread(), ThreadPoolExecutor(count, "wsae-bank", **each) as pool:
        if count == 1:
            yield lambda jobs: [run_chunk(*job) for job in jobs]
        else:
            yield lambda jobs: list(pool.map(lambda job: run_chunk(*job), jobs))


TOGETHER = 8
"""A bank gains where so many members have the same kind, shape and learning rate (on average); with 4 it lost."""
ROOM = 4
"""And where so many share a core's cache."""


def fits_a_bank(cfg: TrainConfig, family: FamilyState, source: ActivationSource) -> bool:
    """Return whether the members are many and small enough to train in one batched computation on a CPU.

    Most must be alike but for their weights, gamma and seed, each must leave room in the cache for others, and none
    may ask for what a bank lacks: bfloat16, chosen kernels, transcoders, or a latent_variance gamma on the paper's raw
    scale. Every
    group reads the data for itself, so a live model does not serve.
    """
    members = [member for _, member in family.all()]
    codes = [4 * cfg.batch_size * member.sae.cfg.d_sae for member in members]
    return (
        source.n_rows is not None
        and len(family.members) == 1
        and len(members) >= TOGETHER * len({shared(m.sae, m.cfg) for m in members})
        and max(codes) * ROOM <= CHUNK_BYTES
        and (cfg.dtype, cfg.kernels, cfg.hook_out) == ("float32", "auto", None)
        and all(member.mean.device.type == "cpu" for member in members)
        and all(member.inside is None and stackable(member.sae.arch) for member in members)
        and not any(unbanked(member.cfg) for member in members)
        and all(
            m.cfg.gamma.rule != "latent_variance" or m.cfg.gamma.normalise != "none"
            for m in members
        )
    )


def train_batched(
    cfg: TrainConfig, family: FamilyState, source: ActivationSource, progress: Progress
) -> None:
    """Train every member in place on the batches that the loop would give; their sums are those of the last batch."""
    ((hook, members),) = family.members.items()
    scale = members[0].scale
    final: list[Tensor] = []

    def data(worlds: list[int]) -> Callable[[int], Float[Tensor, "worlds batch d_in"]]:
        assert worlds == [0]
        stream, last = source.stream(cfg.batch_size, cfg.seed), -1
        x = torch.empty(0, dtype=torch.float32)

        def batches(step: int) -> Tensor:
            nonlocal x, last
            while last < step:  # a chunk asks in order, and for a step again if at all
                x, last = stream.next()[hook][None] / scale, last + 1
                if last == cfg.steps - 1:
                    final[:] = [x]  # the same whoever comes last
            return x

        return batches

    bank = BankConfig(
        steps=cfg.steps,
        warmup=cfg.warmup,
        decay=cfg.decay,
        dead_after=cfg.dead_tokens,
        latent_variance_decay=cfg.latent_variance_decay,
        log_every=cfg.log_every,
        max_grad_norm=cfg.max_grad_norm,
        count_dead=True,
    )
    entries = [Entry(member.sae, member.cfg) for member in members]
    train_bank(entries, data, bank, progress=progress)
    x = final[0][0] * scale
    for member, entry in zip(members, entries, strict=True):
        assert entry.dead is not None
        member.dead.copy_(entry.dead)
        _measure(member, x)


@torch.no_grad()
def _measure(member: MemberState, x: Float[Tensor, "batch d_in"]) -> None:
    """Put one batch, seen by the trained member, into its sums."""
    batch = make_batch(x, member)
    forward = training_forward(member.sae, batch.x)
    reconstruction = weighted_reconstruction_loss(batch.target, forward.x_hat, member.sae.gamma)
    revival = revival_loss(member, batch.target, forward)
    cfg = member.cfg
    price = penalty(forward.entries, Price(cfg.l1, cfg.l0), len(x))
    loss = reconstruction + cfg.auxk * revival + price
    sse = F.mse_loss(forward.x_hat, batch.target, reduction="sum")
    member.window.zero_()
    add_sums(member, batch, StepResult(forward.code, loss, reconstruction, revival, sse))

"""One training step of a member whose rows or latents are shared out over ranks: `eager_step`, with its sums global."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor
from torch.autograd import Function

from wsae.core.errors import UserError
from wsae.core.seeds import seed_for
from wsae.losses.gamma import gamma_from_proxy, latent_variance_proxy
from wsae.losses.reconstruction import weighted_reconstruction_loss
from wsae.ops import SparseCode, code_from_dense, decode, encode_at, select_batch_topk
from wsae.ops.codes import offsets_of
from wsae.ops.sparse import Plan
from wsae.sae.config import BatchTopK, GroupTopK, JumpReLU, ReLU, TopK
from wsae.sae.forward import Forward, jumprelu, step
from wsae.sae.model import SparseAutoencoder
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.family import to_device
from wsae.train.parallel.config import chunk_part
from wsae.train.parallel.world import MAX, MIN, Axis, Place, World
from wsae.train.state import (
    GAMMA_EVERY,
    SUMS,
    Batch,
    MemberState,
    StepResult,
    add_sums,
    follow_threshold,
    latent_variance,
    moment_sums,
    smallest_active,
)
from wsae.train.step import lr_factor, remove_radial_gradient, unit_rows_

# Which latents are active when they lie on several ranks: exactly those that one process could
# choose.
#
# Each rank sees the pre-activations of its own latents and returns the pairs (row, column) that are
# active among these. Ties at the last place go to the lower rank, then to the earlier entry. No
# gradient passes here.

Pairs = tuple[Int64[Tensor, " nnz"], Int64[Tensor, " nnz"]]
"""Rows and this rank's columns, sorted by row."""
Mask = Bool[Tensor, "batch own"]
_FEW = 2048
"""Candidates of other ranks per row that are gathered at most; beyond it, counting moves fewer bytes."""
_SHIFTS = (24, 16, 8, 0)
"""The digits of 8 bits that make up a float's pattern, the highest first."""


def choose_topk(pre: Float[Tensor, "batch own"], k: int, latents: Axis) -> Pairs:
    """Return the pairs among the k largest of each row over all ranks.

    Each rank's k best per row are enough. Their values are gathered (batch * k numbers from each rank), or where that
    is much counted (`_by_counting`); column numbers stay here.
    """
    values, columns = pre.topk(min(k, pre.shape[1]), dim=1)
    values = values.float()
    if (latents.size - 1) * k <= _FEW:
        kept = _by_gathering(values, k, latents)
    else:
        kept = _by_counting(values, k, Place(latents=latents))
    rows, place = kept.nonzero(as_tuple=True)
    return rows, columns[rows, place]


def _by_gathering(values: Float[Tensor, "batch own"], k: int, latents: Axis) -> Mask:
    """Say which values are among the k largest of their row over all ranks, from all of them."""
    short = k - values.shape[1]
    everyone = latents.gather(F.pad(values, (0, short), value=-math.inf))  # [ranks, batch, k]
    flat = everyone.permute(1, 0, 2).flatten(1)
    last = flat.topk(k, dim=1).values[:, -1:]
    above, equal = flat > last, flat == last
    room = k - above.sum(1, keepdim=True)
    kept = above | (equal & (equal.cumsum(1) <= room))
    first = latents.index * k
    return kept[:, first : first + values.shape[1]]


def _by_counting(values: Float[Tensor, "batch own"], k: int, place: Place) -> Mask:
    """Say the same of rows with k values or more in all, from counts alone: a radix selection.

    Floats are ordered as their bit patterns are (negative ones turned round), so counting the values with each next
    digit among those still in question finds the pattern of the last one kept, exactly. Four sums of 256 counts a row.
    """
    bits = values.contiguous().view(torch.int32).long()
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + 2**31
    prefix = order.new_zeros(len(order), 1)
    room = torch.full_like(prefix, k)
    for shift in _SHIFTS:
        inside = (order >> (shift + 8)) == prefix
        counts = torch.zeros(len(order), 256, dtype=torch.int32, device=order.device)
        counts.scatter_add_(1, (order >> shift) & 255, inside.int())
        down = place.reduce_(counts).flip(1).cumsum(1)
        skipped = (down < room).sum(1, keepdim=True)
        passed = down.gather(1, (skipped - 1).clamp_min(0))
        room = torch.where(skipped > 0, room - passed, room)
        prefix = prefix * 256 + 255 - skipped
    equal = order == prefix
    before = place.before(equal.sum(1))[:, None]
    return (order > prefix) | (equal & (before + equal.cumsum(1) <= room))


def choose_groups(
    pre: Float[Tensor, "batch own"], first: int, size: int, k: int, latents: Axis
) -> Pairs:
    """Return the pairs that are the largest of their group; group g holds latents g * size to (g + 1) * size - 1.

    This rank's columns are the latents from `first` on; a group may lie on several ranks. The groups' best values are
    gathered (batch * k numbers from each rank).
    """
    batch, own = pre.shape
    low, high = first // size, (first + own - 1) // size + 1
    whole = F.pad(pre, (first - low * size, high * size - first - own), value=-math.inf)
    values, place = whole.view(batch, high - low, size).max(2)
    best = F.pad(values.float(), (low, k - high), value=-math.inf)
    everyone = latents.gather(best)
    top = everyone == everyone.amax(0)
    wins = top[latents.index] & ~top[: latents.index].any(0)
    rows, groups = wins[:, low:high].nonzero(as_tuple=True)
    return rows, place[rows, groups] + (groups + low) * size - first


def choose_batch_topk(pre: Float[Tensor, "batch own"], wanted: int, place: Place) -> Pairs:
    """Return the pairs among the `wanted` largest positive entries of the whole batch over all ranks."""
    share = min(pre.shape[1], math.ceil(wanted / len(pre)))
    rows, columns = select_batch_topk(pre, share)
    kept = among_largest(pre[rows, columns].float(), wanted, place)
    return rows[kept], columns[kept]


def among_largest(values: Float[Tensor, " n"], wanted: int, place: Place) -> Bool[Tensor, " n"]:
    """Say which of this rank's values are among the `wanted` largest of all ranks together."""
    total = place.reduce_(torch.tensor(len(values), device=values.device))
    if int(total) <= wanted:
        return torch.ones_like(values, dtype=torch.bool)
    return _by_counting(values[None], wanted, place)[0]


# The training forward pass of an SAE whose rows or latents are shared out over ranks.
#
# x_hat = sum over ranks of z_r @ W_dec_r + b_dec z_r: this rank's latents, chosen among those of
# all ranks Every rank then holds the whole x_hat of its rows, so the loss and its gradient need
# nothing more. Only b_dec, which all ranks read in the encoder, has a gradient made of parts. The
# layers of DTensor do not cover sparse selection, so local tensors are computed with here, and the
# collectives stand where the equations have sums.


class _Sum(Function):
    """Sum over ranks; each rank's part has the gradient of the sum."""

    @staticmethod
    def forward(ctx, part, axis):  # noqa: ARG004
        return axis.reduce_(part.clone())

    @staticmethod
    def backward(ctx, *grads):  # noqa: ARG004
        return grads[0], None


class _Shared(Function):
    """A tensor all ranks read; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, whole, axis):
        ctx.axis = axis
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx, *grads):
        return ctx.axis.reduce_(grads[0].clone()), None


def sum_over(part: Float[Tensor, "..."], axis: Axis) -> Float[Tensor, "..."]:
    """Return the sum of the ranks' parts, differentiable in each."""
    return part if axis.size == 1 else _Sum.apply(part, axis)


def shared_over(whole: Float[Tensor, "..."], axis: Axis) -> Float[Tensor, "..."]:
    """Return the same tensor; gradients that reach it on the ranks are summed."""
    return whole if axis.size == 1 else _Shared.apply(whole, axis)


class Piece(NamedTuple):
    """The latents of an SAE that lie on this rank, as an SAE of their own, and where they belong."""

    sae: SparseAutoencoder
    """Its k and groups are those of the whole SAE."""
    first: int
    """Number of its first latent in the whole SAE."""
    d_sae: int
    """Latents of the whole SAE."""
    place: Place


def shared_forward(
    piece: Piece, x: Float[Tensor, "rows d_in"], batch: int, bf16: bool = False
) -> Forward:
    """Run this rank's latents on this rank's rows of a batch of `batch` rows; see `wsae.sae.forward`.

    `x_hat` is whole; `code`, `pre`, `l1` and `l0` are this rank's part, l1 and l0 divided by the rows of the batch.
    """
    sae, place = piece.sae, piece.place
    if isinstance(sae.cfg.activation, ReLU | JumpReLU):
        return _dense_forward(sae, x, batch, place, bf16)
    with torch.no_grad():
        centred = sae.centre(x)
        pre = _product(sae, centred, bf16)
        rows, columns = _choose(piece, pre, batch)
        offsets = offsets_of(rows, len(x))
        plan = Plan.build(columns, offsets, len(sae.W_dec))
    values = encode_at(centred, sae.encoder_rows, _biases(sae, place.latents), plan, pre).relu()
    x_hat = _with_bias(sae, sum_over(decode(values, sae.W_dec, plan), place.latents))
    norms = sae.W_dec.norm(dim=1)[columns] if sae.cfg.tied else 1.0
    code = SparseCode(values.detach(), columns, offsets)
    active = torch.count_nonzero(code.values) / batch
    return Forward(x_hat, (values * norms).sum() / batch, active, code, pre, centred)


def _choose(piece: Piece, pre: Tensor, batch: int) -> Pairs:
    latents = piece.place.latents
    match piece.sae.cfg.activation:
        case TopK(k=k):
            return choose_topk(pre, k, latents)
        case GroupTopK(k=k):
            return choose_groups(pre, piece.first, piece.d_sae // k, k, latents)
        case BatchTopK(k=k):
            return choose_batch_topk(pre, batch * k, piece.place)
        case _:
            raise AssertionError(piece.sae.cfg.activation)


def _dense_forward(
    sae: SparseAutoencoder, x: Tensor, batch: int, place: Place, bf16: bool
) -> Forward:
    centred = x if sae.b_dec is None else x - shared_over(sae.b_dec, place.latents)
    pre = _product(sae, centred, bf16).to(x.dtype)
    if isinstance(sae.cfg.activation, JumpReLU):
        assert sae.log_threshold is not None
        threshold, width = sae.log_threshold.exp(), sae.cfg.activation.bandwidth
        z = jumprelu(pre, threshold, width)
        l0 = step(pre, threshold, width).sum() / batch
    else:
        z = pre.relu()
        l0 = torch.count_nonzero(z.detach()) / batch
    norms = sae.W_dec.norm(dim=1) if sae.cfg.tied else z.new_ones(len(sae.W_dec))
    x_hat = _with_bias(sae, sum_over(z @ sae.W_dec, place.latents))
    code = code_from_dense(z.detach())
    return Forward(x_hat, (z @ norms).sum() / batch, l0, code, pre.detach(), centred.detach())


def shared_revival(
    piece: Piece,
    residual: Float[Tensor, "rows d_in"],
    forward: Forward,
    dead: Bool[Tensor, " own"],
    wanted: tuple[int, int],
) -> Float[Tensor, ""]:
    """Return `wsae.losses.reconstruction.auxk_loss` over this rank's rows, the dead latents lying on several ranks.

    `wanted` is (k_aux, number of dead latents on all ranks). Where every dead latent is wanted nothing is gathered.
    """
    sae, latents, (k_aux, total) = piece.sae, piece.place.latents, wanted
    if total == 0:
        return residual.new_zeros(())
    with torch.no_grad():
        own = dead.nonzero()[:, 0]
        if total <= k_aux:
            rows = torch.arange(len(residual), device=own.device).repeat_interleave(len(own))
            columns = own.repeat(len(residual))
        else:
            rows, columns = choose_topk(forward.pre.index_select(1, own), k_aux, latents)
            columns = own[columns]
        plan = Plan.build(columns, offsets_of(rows, len(residual)), len(sae.W_dec))
    biases = _biases(sae, latents)
    values = encode_at(forward.centred, sae.encoder_rows, biases, plan, forward.pre).relu()
    e_hat = sum_over(decode(values, sae.W_dec, plan), latents)
    return weighted_reconstruction_loss(residual.detach(), e_hat, sae.gamma)


def _biases(sae: SparseAutoencoder, latents: Axis) -> tuple[Tensor, Tensor] | None:
    if sae.biases is None:
        return None
    b_enc, b_dec = sae.biases
    return b_enc, shared_over(b_dec, latents)


def _with_bias(sae: SparseAutoencoder, x_hat: Tensor) -> Tensor:
    return x_hat if sae.b_dec is None else x_hat + sae.b_dec


def _product(sae: SparseAutoencoder, centred: Tensor, bf16: bool) -> Tensor:
    if not bf16:
        return sae.pre(centred)
    low = centred.bfloat16() @ sae.W_enc.bfloat16()
    return low if sae.b_enc is None else low + sae.b_enc.bfloat16()


# What one rank keeps of a member: its latents, its part of the counters, and how its gradients meet
# the others'.

BLOCK = 1 << 14
"""Latents drawn at a time at the start: nobody holds all the random numbers."""


@dataclass
class Shard:
    """One member on one rank."""

    hook: str
    member: MemberState
    """Its tensors hold this rank's latents; b_dec, gamma and the threshold are the same on all ranks."""
    piece: Piece
    window: Float64[Tensor, " sums"]
    """The sums of `member.sums` over all ranks, the same on each."""
    dead: int = 0
    """Dead latents on all ranks."""
    pending: list[dist.Work] = field(default_factory=list)
    """Sums of gradients under way."""

    @property
    def key(self) -> str:
        """The member's name in checkpoints."""
        return f"{self.hook}|{self.member.name}"

    def count_dead(self) -> None:
        """Count the dead latents of all ranks."""
        total = self.member.dead.sum()
        self.dead = int(self.piece.place.latents.reduce_(total))

    def show_sums(self) -> None:
        """Put the window where metrics and checkpoints look for it."""
        self.member.sums = dict(zip(SUMS, self.window.cpu().clone(), strict=True))

    def take_sums(self) -> None:
        """Take the window from where a checkpoint put it."""
        sums = torch.stack([self.member.sums[name] for name in SUMS])
        self.window = sums.to(self.window.device)


class Start(NamedTuple):
    """What a hook's members have in common at the start, in the activations' own units."""

    mean: Float[Tensor, " d_in"]
    spread: Float[Tensor, " d_in"]
    scale: float


def make_shard(
    hook: str, name: str, cfg: MemberConfig, run: TrainConfig, start: Start, world: World
) -> Shard:
    """Return this rank's part of the member that `make_member` would make; gamma is left at 1.

    Raises UserError when there are more ranks than latents, or more than rows in a batch.
    """
    d_in, place = len(start.mean), world.place
    whole = cfg.sae_config(d_in)
    part = chunk_part(whole.d_sae, place.latents.size, place.latents.index)
    if chunk_part(whole.d_sae, place.latents.size, place.latents.size - 1).start >= whole.d_sae:
        raise UserError(
            f"--mesh latents={place.latents.size}: {whole.d_sae} latents of {name} leave a rank without; use fewer"
        )
    own = part.stop - part.start
    # a copy of a valid config: k counts over all ranks, so it may exceed the latents here
    sae = SparseAutoencoder(whole.model_copy(update={"d_sae": own}))
    rows = initial_rows(whole.d_sae, d_in, run.seed if cfg.seed is None else cfg.seed, part)
    sae.W_dec.data.copy_(rows)
    if sae.W_enc_t is not None:
        sae.W_enc_t.data.copy_(rows).mul_(cfg.start_scale())
    centre = (start.mean / start.scale).float()
    if sae.b_dec is not None:
        sae.b_dec.data.copy_(centre)
    member = MemberState(
        name=name,
        cfg=cfg,
        sae=sae,
        optimizer=torch.optim.Adam(sae.parameters(), lr=cfg.learning_rate(d_in), fused=True),
        mean=centre,
        scale=start.scale,
        since_fired=torch.zeros(own, dtype=torch.int64),
        dead=torch.zeros(own, dtype=torch.bool),
        latent_moments=torch.zeros(2, own, dtype=torch.float64),
        spread=(start.spread / start.scale).float(),
        sparse=torch.tensor(hasattr(cfg.activation, "k")),
    )
    to_device(member, world.device)
    _start_adam(member.optimizer)
    window = torch.zeros(len(SUMS), dtype=torch.float64, device=world.device)
    shard = Shard(hook, member, Piece(sae, part.start, whole.d_sae, place), window)
    _sum_gradients(shard)
    return shard


def initial_rows(
    d_sae: int, d_in: int, seed: int, part: slice, block: int = BLOCK
) -> Float[Tensor, "own d_in"]:
    """Return rows `part` of the decoder with which `SparseAutoencoder(cfg, seed)` starts, drawn block by block.

    Blocks are whole multiples of the 16 numbers that PyTorch draws at a time, the last one takes the rest, so the
    stream of random numbers is that of one draw.
    """
    generator = torch.Generator().manual_seed(seed_for(seed, "sae-init"))
    found = torch.empty(part.stop - part.start, d_in, dtype=torch.float32)
    blocks = max(1, d_sae // block)
    for number in range(blocks):
        first = number * block
        last = d_sae if number == blocks - 1 else first + block
        if first >= part.stop:
            break
        rows = torch.randn(last - first, d_in, generator=generator, dtype=torch.float32)
        low, high = max(first, part.start), min(last, part.stop)
        if high > low:
            found[low - part.start : high - part.start] = rows[low - first : high - first]
    return F.normalize(found, dim=1)


def _start_adam(optimizer: torch.optim.Adam) -> None:
    """Make Adam's state now rather than at the first step, so that a checkpoint finds tensors to fill."""
    for parameter in optimizer.param_groups[0]["params"]:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def _sum_gradients(shard: Shard) -> None:
    """Sum each gradient over the ranks that share the batch as soon as it is there, while others are computed.

    One sum a parameter, always in the same order: DistributedDataParallel regroups its buckets after the first step,
    so a resumed run would add in another order than an undisturbed one.
    """
    data = shard.piece.place.data
    if data.size == 1:
        return

    def send(parameter: Tensor) -> None:
        assert parameter.grad is not None
        work = dist.all_reduce(parameter.grad, group=data.group, async_op=True)
        assert work is not None
        shard.pending.append(work)

    for parameter in shard.member.sae.parameters():
        parameter.register_post_accumulate_grad_hook(send)


def shared_step(shard: Shard, batch: Batch, step: int, run: TrainConfig) -> None:
    """One optimiser step on this rank's rows and latents; every sum over rows or latents is over all ranks.

    loss = (1 / batch) sum over all rows of (||Gamma e||^2 + auxk ||Gamma (e - e_hat)||^2) + l1 L1 + l0 L0.
    """
    member, x = shard.member, batch.x
    sae, cfg, share = member.sae, member.cfg, len(x) / run.batch_size
    forward = shared_forward(shard.piece, x, run.batch_size, run.dtype == "bfloat16")
    reconstruction = share * weighted_reconstruction_loss(x, forward.x_hat, sae.gamma)
    revival = share * _revival(shard, x, forward)
    penalty = cfg.l1 * forward.l1 + cfg.l0 * forward.l0
    loss = reconstruction + cfg.auxk * revival + penalty
    member.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for work in shard.pending:
        work.wait()
    shard.pending.clear()
    rate = cfg.learning_rate(sae.cfg.d_in) * lr_factor(step, run.steps, run.warmup, run.decay)
    for group in member.optimizer.param_groups:
        group["lr"] = rate
    with torch.no_grad():
        remove_radial_gradient(sae)
        member.optimizer.step()
        unit_rows_(sae)
        _count(shard, forward.code, run.batch_size)
        sse = F.mse_loss(forward.x_hat.detach(), x, reduction="sum")
        # the loss's penalty is a part, all else of it is whole on every rank that shares the latents
        own = loss if shard.piece.place.latents.index == 0 else penalty + torch.zeros_like(loss)
        losses = (own.detach(), reconstruction.detach(), revival.detach())
        _add_sums(shard, batch, StepResult(forward.code, *losses, sse))
        _follow_latents(shard, forward.code, step, run)
        if (step + 1) % GAMMA_EVERY == 0:
            member.dead = member.since_fired > run.dead_tokens
            shard.count_dead()


def _revival(shard: Shard, x: Tensor, forward: Forward) -> Tensor:
    cfg = shard.member.cfg
    if cfg.auxk == 0:
        return x.new_zeros(())
    wanted = (cfg.revived(x.shape[1]), shard.dead)
    residual = x - forward.x_hat.detach()
    return shared_revival(shard.piece, residual, forward, shard.member.dead, wanted)


def _count(shard: Shard, code: SparseCode, batch: int) -> None:
    """Note which latents fired in any row and, for batch Top-k, move the threshold of inference."""
    member, place = shard.member, shard.piece.place
    fired = torch.zeros_like(member.dead, dtype=torch.uint8)
    fired[code.indices[code.values > 0]] = 1
    place.data.reduce_(fired, MAX)
    member.since_fired.add_(batch).masked_fill_(fired.bool(), 0)
    if isinstance(member.sae.cfg.activation, BatchTopK):
        follow_threshold(member.sae.threshold, place.reduce_(smallest_active(code), MIN))


def _add_sums(shard: Shard, batch: Batch, result: StepResult) -> None:
    """Add this step's sums over all ranks to the window; each is counted where it is a part, or once."""
    member, place = shard.member, shard.piece.place
    device = shard.window.device
    member.sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in SUMS}
    add_sums(member, batch, result)
    if place.latents.index > 0:
        for name in SUMS:
            if name not in ("loss", "l0"):
                member.sums[name].zero_()
    if not place.leads:
        member.sums["steps"].zero_()
    shard.window += place.reduce_(torch.stack([member.sums[name] for name in SUMS]))


def _follow_latents(shard: Shard, code: SparseCode, step: int, run: TrainConfig) -> None:
    """Keep the running variances of the latents for the rule latent_variance, and refresh gamma when due."""
    member, place, decay = shard.member, shard.piece.place, run.latent_variance_decay
    if member.cfg.gamma.rule != "latent_variance":
        return
    sums = place.data.reduce_(moment_sums(code, len(member.dead)))
    member.latent_moments.lerp_(sums / run.batch_size, 1 - decay)
    if (step + 1) % GAMMA_EVERY == 0:
        member.sae.gamma.copy_(gamma_from_proxy(member.cfg.gamma, _proxy(shard, step, decay)))


def _proxy(shard: Shard, step: int, decay: float) -> Float[Tensor, " d_in"]:
    """Return sum_j Var(z_j) W_dec[j]^2 over the latents of all ranks."""
    member = shard.member
    variance = latent_variance(member.latent_moments, step, decay) * member.scale**2
    part = latent_variance_proxy(variance, member.sae.W_dec.double())
    return shard.piece.place.latents.reduce_(part)

"""What one rank has of a member whose rows or latents are shared out: `eager_step` with every sum over all ranks."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64, Num
from torch import Tensor
from torch.autograd import Function

from wsae.core.errors import UserError
from wsae.core.seeds import seed_for
from wsae.kernels.eager import SparseCode, code_from_topk, offsets_of, select_batch_topk
from wsae.kernels.native.select import LARGEST_SHARE
from wsae.sae.architectures import Choice, Nested, PerBatch, PerGroup, PerRow, architecture_of
from wsae.sae.config import SAEConfig
from wsae.sae.forward import Whole, level_by_latent
from wsae.sae.model import SAE
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.family import Inputs, to_device
from wsae.train.parallel.config import chunk_part
from wsae.train.parallel.world import MIN, Mesh, MeshAxis, MeshPlace
from wsae.train.state import SUMS, MemberState, centred, make_member

# Which latents are active when they lie on several ranks: exactly those that one process could choose. Each rank sees
# the pre-activations of its own latents and returns the pairs (row, column) that are active among these. Ties at the
# last place go to the lower rank, then to the earlier entry. No gradient passes here.

Pairs = tuple[Int64[Tensor, " nnz"], Int64[Tensor, " nnz"]]
"""Rows and this rank's columns, sorted by row."""
Mask = Bool[Tensor, "batch own"]
_FEW = 2048
"""Candidates of other ranks per row that are gathered at most; beyond it, counting moves fewer bytes."""
_SHIFTS = (24, 16, 8, 0)
"""The digits of 8 bits that make up a float's pattern, the highest first."""


def choose_topk(pre: Float[Tensor, "batch own"], k: int, latents: MeshAxis) -> Pairs:
    """Return the pairs among the k largest of each row over all ranks.

    Each rank's k best per row are enough. Their values are gathered (batch * k numbers from each rank), or where that
    is much counted (`_by_counting`); column numbers stay here.
    """
    values, columns = pre.topk(min(k, pre.shape[1]), dim=1)
    rows, place = _largest(values.float(), k, latents).nonzero(as_tuple=True)
    return rows, columns[rows, place]


def _largest(values: Float[Tensor, "batch own"], k: int, latents: MeshAxis) -> Mask:
    """Say which of at most k values a row are among the k largest of all ranks."""
    if _few(k, latents):
        return _by_gathering(values, k, latents)
    return _by_counting(values, k, MeshPlace(latents=latents))


def _few(k: int, latents: MeshAxis) -> bool:
    return (latents.size - 1) * k <= _FEW


def _by_gathering(values: Float[Tensor, "batch own"], k: int, latents: MeshAxis) -> Mask:
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


def _by_counting(values: Float[Tensor, "batch own"], k: int, place: MeshPlace) -> Mask:
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
    pre: Float[Tensor, "batch own"], first: int, size: int, k: int, latents: MeshAxis
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


def choose_batch_topk(pre: Float[Tensor, "batch own"], wanted: int, place: MeshPlace) -> Pairs:
    """Return the pairs among the `wanted` largest positive entries of the whole batch over all ranks."""
    share = min(pre.shape[1], math.ceil(wanted / len(pre)))
    rows, columns = select_batch_topk(pre, share)
    kept = among_largest(pre[rows, columns].float(), wanted, place)
    return rows[kept], columns[kept]


def among_largest(values: Float[Tensor, " n"], wanted: int, place: MeshPlace) -> Bool[Tensor, " n"]:
    """Say which of this rank's values are among the `wanted` largest of all ranks together."""
    total = place.reduce_(torch.tensor(len(values), device=values.device))
    if int(total) <= wanted:
        return torch.ones_like(values, dtype=torch.bool)
    return _by_counting(values[None], wanted, place)[0]


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


BLOCK = 1 << 14
"""Latents drawn at a time at the start: nobody holds all the random numbers."""


class Shard(Whole):
    """What one rank has of a member: some of its latents, and of every batch some rows.

    x_hat = sum over ranks of z_r @ W_dec_r + b_dec, z_r this rank's latents, chosen among those of all ranks. Every
    rank then holds the whole x_hat of its rows, so the loss and its gradient need nothing more; b_dec, which all ranks
    read in the encoder, has a gradient made of parts. The layers of DTensor do not cover sparse selection, so local
    tensors are computed with, and the collectives stand where the equations have sums.
    """

    def __init__(self, first: int, d_sae: int, place: MeshPlace, batch: int) -> None:
        self.first, self.d_sae, self.place, self.batch = first, d_sae, place, batch
        self.leads, self.part = place.leads, place.latents.index
        self.dead = 0
        """Dead latents on all ranks."""
        self.pending: list[dist.Work] = []
        """Sums of gradients under way."""

    def choose(self, choice: Choice, pre: Float[Tensor, "rows own"]) -> SparseCode:
        """Return this rank's pairs among those that a choice of Top-k makes active over all ranks."""
        latents = self.place.latents
        match choice:
            case PerRow(k=k):
                rows, columns = choose_topk(pre, k, latents)
            case PerGroup(k=k):
                rows, columns = choose_groups(pre, self.first, self.d_sae // k, k, latents)
            case PerBatch(k=k):
                rows, columns = choose_batch_topk(pre, self.batch * k, self.place)
            case _:
                raise AssertionError(choice)
        return SparseCode(pre[rows, columns], columns, offsets_of(rows, len(pre)))

    def level(
        self, nested: Nested, pre: Float[Tensor, "rows own"], code: SparseCode
    ) -> Int64[Tensor, " nnz"]:
        """Return the level of each of this rank's pairs."""
        if nested.widths is not None:
            return level_by_latent(code.indices + self.first, nested.widths)
        rows, columns = choose_topk(pre, nested.k, self.place.latents)
        top = torch.zeros_like(pre, dtype=torch.bool)
        top[rows, columns] = True
        return (~top[code.rows(), code.indices]).long()

    def choose_dead(self, pre: Float[Tensor, "rows dead"], k: int) -> SparseCode | None:
        """Return this rank's share of the k largest; where every dead latent is wanted nothing is gathered."""
        if not self.dead:
            return None
        if self.dead > k:
            rows, columns = choose_topk(pre, k, self.place.latents)
            return SparseCode(pre[rows, columns], columns, offsets_of(rows, len(pre)))
        every = torch.arange(pre.shape[1], device=pre.device)
        return code_from_topk(pre, every.expand(pre.shape))

    def gatherer(self, k: int) -> Callable[[Tensor], Tensor] | None:
        """Return what stacks the ranks' tensors of k numbers a row; None where counting moves fewer bytes."""
        latents = self.place.latents
        return latents.gather if latents.size > 1 and _few(k, latents) else None

    def among(self, choice: Choice, pre: SparseCode) -> SparseCode:
        """Return this rank's pairs among those that are active over all ranks; `pre` are those active among its own."""
        match choice:
            case PerRow(k=k):
                own = pre.values.view(pre.batch, -1)
                return pre.where(_largest(own, k, self.place.latents).flatten())
            case PerBatch(k=k):
                return pre.where(among_largest(pre.values, self.batch * k, self.place))
        return pre

    def best(self, code: SparseCode, k: int) -> Bool[Tensor, " nnz"] | None:
        """Say which pairs are among their row's k largest over all ranks; None where all are here."""
        if self.place.latents.size == 1:
            return None
        rows, counts = code.rows(), code.offsets.diff()
        place = torch.arange(len(rows)) - code.offsets[rows]
        width = max(k, int(counts.max()))
        values = code.values.new_full((code.batch, width), -math.inf)
        values[rows, place] = code.values
        own, columns = values.topk(k, dim=1)
        kept = _largest(own, k, self.place.latents)
        top = torch.zeros_like(values, dtype=torch.bool).scatter_(1, columns, kept)
        return top[rows, place]

    def among_dead(self, pre: SparseCode, k: int) -> SparseCode:
        """Return this rank's share of the k largest; `pre` are positive, at most k a row."""
        if self.dead <= k:
            return pre
        values, rows = pre.padded()[0], pre.rows()
        kept = _largest(values, k, self.place.latents)
        return pre.where(kept[rows, torch.arange(len(rows)) - pre.offsets[rows]])

    def any_dead(self, dead: Bool[Tensor, " own"]) -> bool:  # noqa: ARG002
        """Return whether a latent of any rank is dead."""
        return self.dead > 0

    def summed(self, part: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the sum of the ranks' parts, differentiable in each."""
        latents = self.place.latents
        return part if latents.size == 1 else _Sum.apply(part, latents)

    def shared(self, whole: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the same tensor; gradients that reach it on the ranks are summed."""
        latents = self.place.latents
        return whole if latents.size == 1 else _Shared.apply(whole, latents)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum each gradient over the ranks that share the batch once it is there, while others are computed.

        One sum a parameter, always in the same order: DistributedDataParallel regroups its buckets after the first
        step, so a resumed run would add in another order than an undisturbed one.
        """
        data = self.place.data

        def send(parameter: Tensor) -> None:
            assert parameter.grad is not None
            work = dist.all_reduce(parameter.grad, group=data.group, async_op=True)
            assert work is not None
            self.pending.append(work)

        for parameter in parameters if data.size > 1 else ():
            parameter.register_post_accumulate_grad_hook(send)

    def settle(self) -> None:
        """Wait until every gradient is that of the whole batch."""
        for work in self.pending:
            work.wait()
        self.pending.clear()

    def over_rows(self, tensor: Num[Tensor, "..."]) -> Num[Tensor, "..."]:
        """Replace a sum over this rank's rows by that over the whole batch."""
        return self.place.data.reduce_(tensor)

    def over_latents(self, tensor: Num[Tensor, "..."]) -> Num[Tensor, "..."]:
        """Replace a sum over this rank's latents by that over all of them."""
        return self.place.latents.reduce_(tensor)

    def least(self, value: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Replace this rank's least value by the least of all ranks."""
        return self.place.reduce_(value, MIN)

    def once(self, tensor: Num[Tensor, "..."]) -> Num[Tensor, "..."]:
        """Return the tensor, or zeros where another rank has the same and counts it."""
        return tensor if self.place.latents.index == 0 else torch.zeros_like(tensor)

    def window(self, sums: Float64[Tensor, " sums"]) -> Float64[Tensor, " sums"]:
        """Return the sums of all ranks; each is counted where it is a part, or once."""
        for i, name in enumerate(SUMS):
            here = self.place.leads if name == "steps" else self.place.latents.index == 0
            if not here and name not in ("loss", "l0"):
                sums[i] = 0
        return self.place.reduce_(sums)

    def note_dead(self, dead: Bool[Tensor, " own"]) -> None:
        """Count the dead latents of all ranks."""
        self.dead = int(self.place.latents.reduce_(dead.sum()))

    def dead_share(self, dead: Bool[Tensor, " own"]) -> float:  # noqa: ARG002
        """Return the share of all latents that is dead."""
        return self.dead / self.d_sae


def make_shard(
    name: str,
    cfg: MemberConfig,
    run: TrainConfig,
    inputs: Inputs,
    world: Mesh,
    begun: SAE | None = None,
) -> MemberState:
    """Return this rank's part of the member that `make_member` would make, or that goes on with an SAE.

    Raises UserError when there are more ranks than latents.
    """
    d_in, latents, target = len(inputs.mean), world.place.latents, inputs.target
    whole = cfg.sae_config(d_in, None if target is None else len(target.mean), run.crosscoder)
    if chunk_part(whole.d_sae, latents.size, latents.size - 1).start >= whole.d_sae:
        raise UserError(
            f"--mesh latents={latents.size}: {whole.d_sae} latents of {name} leave a rank without; use fewer"
        )
    if getattr(whole.activation, "level_auxk", False) and latents.size > 1:
        raise UserError(
            f"--mesh latents={latents.size}: the levels by which {name} revives dead latents lie on several ranks; "
            "leave level_auxk out, or use --mesh data"
        )
    part = chunk_part(whole.d_sae, latents.size, latents.index)
    # a copy of a valid config: k counts over all ranks, so it may exceed the latents here
    sae = SAE(whole.model_copy(update={"d_sae": part.stop - part.start}))
    if begun is None:
        seed = run.seed if cfg.seed is None else cfg.seed
        rows = initial_rows(whole.d_sae, d_in, seed, part, transcoder=whole.transcoder)
        if not whole.transcoder:
            sae.W_dec.data.copy_(rows)
        if sae.W_enc_t is not None:
            sae.W_enc_t.data.copy_(rows).mul_(cfg.start_scale(d_in))
        read = (inputs.mean / inputs.scale).float()
        centred(sae, read, read if target is None else (target.mean / target.scale).float())
    else:
        for key, mine in sae.state_dict().items():
            value = begun.state_dict()[key]
            of_latents = key in ("W_dec", "W_enc_t", "b_enc") or key in sae.arch.parameters
            mine.copy_(value[part] if of_latents else value)
    spread = inputs.variance.sqrt()
    member = make_member(name, cfg, run, inputs.mean, inputs.scale, spread, sae, target)
    member = to_device(member, world.device)
    for parameter in member.optimizer.parameters:  # now: a checkpoint finds tensors to fill
        member.optimizer.moments(parameter)
    member.part = shard = Shard(part.start, whole.d_sae, world.place, run.batch_size)
    shard.unfit = world.unfit or unfit_shard(whole, latents.size)
    if world.place.data.size > 1:
        shard.unfit = "its rows lie on several processes"
    shard.sum_gradients(member.sae.parameters())
    return member


def unfit_shard(whole: SAEConfig, parts: int) -> str | None:
    """Return why the compiled kernels cannot train an SAE cut into so many parts, or None; the same on all ranks."""
    if parts == 1:
        return None
    last, arch = chunk_part(whole.d_sae, parts, parts - 1), architecture_of(whole.activation)
    names = [*arch.parameters, "threshold", "b_enc"]
    choice = arch.choose(
        whole.activation, dict.fromkeys(names, torch.zeros((), dtype=torch.float32))
    )
    groups, k = isinstance(choice, PerGroup), getattr(choice, "k", 1)
    # groups are shared out, a row's k are not
    fewest = whole.d_sae if groups else last.stop - last.start
    nested = None if arch.nested is None else arch.nested(whole.activation, whole.d_sae)
    if nested is not None and nested.level_auxk:
        return "the levels by which it revives dead latents lie on several processes"
    size = whole.d_sae // k if groups else 1
    if any(chunk_part(whole.d_sae, parts, i).start % size for i in range(parts)):
        return f"a group of {size} latents lies on several processes"
    if k * LARGEST_SHARE > fewest:
        return f"k = {k} of the {fewest} latents of a process is not sparse"
    return None


def initial_rows(
    d_sae: int, d_in: int, seed: int, part: slice, block: int = BLOCK, transcoder: bool = False
) -> Float[Tensor, "own d_in"]:
    """Return rows `part` of the encoder with which `SAE(cfg, seed)` starts, at scale 1, drawn block by block.

    Blocks are whole multiples of the 16 numbers that PyTorch draws at a time, the last one takes the rest, so the
    stream of random numbers is that of one draw.
    """
    draw, name = (torch.rand, "transcoder-init") if transcoder else (torch.randn, "sae-init")
    generator = torch.Generator().manual_seed(seed_for(seed, name))
    found = torch.empty(part.stop - part.start, d_in, dtype=torch.float32)
    blocks = max(1, d_sae // block)
    for number in range(blocks):
        first = number * block
        last = d_sae if number == blocks - 1 else first + block
        if first >= part.stop:
            break
        rows = draw(last - first, d_in, generator=generator, dtype=torch.float32)
        low, high = max(first, part.start), min(last, part.stop)
        if high > low:
            found[low - part.start : high - part.start] = rows[low - first : high - first]
    return (2 * found - 1) * math.sqrt(3 / d_in) if transcoder else F.normalize(found, dim=1)

"""What one rank keeps of a member: its latents, its part of the counters, and how its gradients meet the others'."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Float64
from torch import Tensor

from wsae.core.errors import UserError
from wsae.core.seeds import seed_for
from wsae.sae.model import SparseAutoencoder
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.family import to_device
from wsae.train.parallel.config import chunk_part
from wsae.train.parallel.forward import Piece
from wsae.train.parallel.world import World
from wsae.train.state import SUMS, MemberState

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

"""Many small members of a family in one batched computation (`wsae.train.bank`) in place of one after another."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from wsae.acts.stream import ActivationSource
from wsae.core.progress import Progress
from wsae.losses.reconstruction import weighted_reconstruction_loss
from wsae.sae.forward import training_forward
from wsae.train.bank.config import BankConfig
from wsae.train.bank.entry import Entry
from wsae.train.bank.run import CHUNK_BYTES, shared, train_bank
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.counters import StepResult, add_sums
from wsae.train.eager import revival_loss
from wsae.train.family import Family
from wsae.train.state import MemberState, make_batch

TOGETHER = 8
"""A bank gains where so many members have the same kind, shape and learning rate (on average); with 4 it lost."""
ROOM = 4
"""And where so many share a core's cache."""


def fits_a_bank(cfg: TrainConfig, family: Family, source: ActivationSource) -> bool:
    """Say whether the members are many and small enough to train in one batched computation on a CPU.

    Most must be alike but for their weights, gamma and seed, each must leave room in the cache for others, and none
    may ask for what a bank lacks: bfloat16, chosen kernels, or a latent_variance gamma on the paper's raw scale. Every
    group reads the data for itself, so a live model does not serve.
    """
    members = [member for _, member in family.all()]
    codes = [4 * cfg.batch_size * member.sae.cfg.d_sae for member in members]
    return (
        source.n_rows is not None
        and len(family.members) == 1
        and len(members) >= TOGETHER * len({shared(m.sae, m.cfg) for m in members})
        and max(codes) * ROOM <= CHUNK_BYTES
        and (cfg.dtype, cfg.kernels) == ("float32", "auto")
        and all(member.mean.device.type == "cpu" and _plain(member.cfg) for member in members)
    )


def _plain(cfg: MemberConfig) -> bool:
    return cfg.gamma.rule != "latent_variance" or cfg.gamma.normalise != "none"


def train_batched(
    cfg: TrainConfig, family: Family, source: ActivationSource, progress: Progress
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
    reconstruction = weighted_reconstruction_loss(batch.x, forward.x_hat, member.sae.gamma)
    revival = revival_loss(member, batch.x, forward)
    cfg = member.cfg
    loss = reconstruction + cfg.auxk * revival + cfg.l1 * forward.l1 + cfg.l0 * forward.l0
    sse = F.mse_loss(forward.x_hat, batch.x, reduction="sum")
    member.reset_sums()
    add_sums(member, batch, StepResult(forward.code, loss, reconstruction, revival, sse))

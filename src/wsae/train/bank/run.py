"""A bank: hundreds of small SAEs in one batched computation, each trained exactly as if alone.

Members may differ in world (the data they see), gamma, learning rate, penalties, seed, activation and shape. Those
of one shape and kind are stacked, in chunks whose codes fit the cache; nothing is summed across members.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from wsae.acts.stream import ActivationSource
from wsae.core.errors import UserError
from wsae.core.progress import Progress, quiet
from wsae.losses.reconstruction import weighted_reconstruction_loss
from wsae.sae.forward import training_forward
from wsae.sae.model import SparseAutoencoder
from wsae.train.bank.chunk import Batches, Chunk, Entry, Source, make_chunk, run_chunk
from wsae.train.bank.config import BankConfig
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.family import Family
from wsae.train.state import MemberState, StepResult, add_sums, make_batch
from wsae.train.step import revival_loss

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
            run_all([(chunk, range(first, last), cfg) for chunk in chunks])
            _record(row, chunks, entries, last - first)
            tick(last - first)
    for chunk in chunks:
        chunk.stack.write_back([entries[i].sae for i in chunk.members])
        chunk.write_gamma([entries[i].sae for i in chunk.members])
        if chunk.follows_dead:
            for i, dead in zip(chunk.members, chunk.dead.cpu(), strict=True):
                entries[i].dead = dead
    return record


def make_chunks(
    entries: Sequence[Entry], data: Data, cfg: BankConfig, device: str = "cpu", threads: int = 1
) -> list[Chunk]:
    """Return the entries grouped by what one batched computation must share, in chunks of bounded size."""
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
            source = Source(worlds, batch, data(worlds))
            chunks.append(make_chunk(part, [entries[i] for i in part], source, cfg, device))
    return chunks


def shared(sae: SparseAutoencoder, cfg: MemberConfig) -> tuple:
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
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(count, "wsae-bank", initializer=torch.set_num_threads, initargs=(1,))
    try:
        if count == 1:
            yield lambda jobs: [run_chunk(*job) for job in jobs]
        else:
            yield lambda jobs: list(pool.map(lambda job: run_chunk(*job), jobs))
    finally:
        pool.shutdown()
        torch.set_num_threads(before)


# Many small members of a family in one batched computation (`wsae.train.bank`) in place of one
# after another.

TOGETHER = 8
"""A bank gains where so many members have the same kind, shape and learning rate (on average); with 4 it lost."""
ROOM = 4
"""And where so many share a core's cache."""


def fits_a_bank(cfg: TrainConfig, family: Family, source: ActivationSource) -> bool:
    """Return whether the members are many and small enough to train in one batched computation on a CPU.

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

"""A bank: hundreds of small SAEs in one batched computation, each trained exactly as if alone.

Members may differ in world (the data they see), gamma, learning rate, penalties, seed, activation and shape. Those
of one shape and kind are stacked, in chunks whose codes fit the cache; nothing is summed across members.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float

from wsae.core.errors import UserError
from wsae.core.progress import Progress, quiet
from wsae.sae.model import SparseAutoencoder
from wsae.train.bank.chunk import Batches, Chunk, Source, make_chunk, run_chunk
from wsae.train.bank.config import BankConfig
from wsae.train.bank.entry import Entry
from wsae.train.config import MemberConfig

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

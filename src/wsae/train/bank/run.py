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
from torch import Tensor

from wsae.core.errors import UserError
from wsae.core.progress import Progress, quiet
from wsae.train.bank.chunk import Chunk, chunk_step, make_chunk
from wsae.train.bank.config import BankConfig
from wsae.train.bank.entry import Entry

CHUNK_BYTES = 1 << 21
"""Size of one [members, batch, d_sae] tensor that a chunk may reach: a few of them stay in a core's caches."""

Batches = Callable[[int], Float[Tensor, "worlds batch d_in"]]
"""Step -> every world's activations; a pure function of the step."""


def train_bank(
    entries: Sequence[Entry],
    batches: Batches,
    cfg: BankConfig,
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress = quiet,
) -> Float[np.ndarray, "rows members"]:
    """Train every entry's SAE in place; returns the mean weighted reconstruction loss per `log_every` steps.

    On the CPU chunks are spread over `threads` (default: torch's number), each with one core to itself.
    Raises UserError for no entries, or naming the first member whose loss is not finite at a record.
    """
    if not entries:
        raise UserError("no members to train; give at least one")
    first = batches(0)
    chunks = make_chunks(entries, first.shape[1], cfg, device)
    rows = -(-cfg.steps // cfg.log_every)
    record = np.zeros((rows, len(entries)))
    with _workers(device, threads, len(chunks)) as run_all, progress("train", cfg.steps, "steps") as tick:
        for step in range(cfg.steps):
            x = batches(step).to(device=device, dtype=chunks[0].dtype)
            run_all([(chunk, x, step, cfg) for chunk in chunks])
            if (step + 1) % cfg.log_every == 0 or step + 1 == cfg.steps:
                _record(record[step // cfg.log_every], chunks, step, cfg)
            tick(1)
    for chunk in chunks:
        chunk.stack.write_back([entries[i].sae for i in chunk.members])
        chunk.write_gamma([entries[i].sae for i in chunk.members])
    return record


def make_chunks(
    entries: Sequence[Entry], batch: int, cfg: BankConfig, device: str = "cpu"
) -> list[Chunk]:
    """Return the entries grouped by what one batched computation must share, in chunks of bounded size."""
    cohorts: dict[tuple, list[int]] = {}
    for i, entry in enumerate(entries):
        cohorts.setdefault(_key(entry), []).append(i)
    chunks = []
    for members in cohorts.values():
        shape = entries[members[0]].sae.cfg
        size = len(members)
        if device == "cpu":
            fits = CHUNK_BYTES // (4 * batch * shape.d_sae)
            size = max(1, min(fits, -(-size // torch.get_num_threads())))
        for start in range(0, len(members), size):
            part = members[start : start + size]
            chunks.append(make_chunk(part, [entries[i] for i in part], batch, cfg, device))
    return chunks


def _key(entry: Entry) -> tuple:
    """Return what members of one batched computation must have in common."""
    sae, cfg = entry.sae, entry.cfg
    kinds = (cfg.l1 > 0, cfg.l0 > 0, cfg.auxk > 0, cfg.k_aux, sae.gamma.ndim)
    tracked = cfg.gamma if cfg.gamma.rule == "latent_variance" else None
    return (sae.cfg, cfg.learning_rate(sae.cfg.d_in), *kinds, tracked)


def _record(row: np.ndarray, chunks: list[Chunk], step: int, cfg: BankConfig) -> None:
    steps = step % cfg.log_every + 1
    for chunk in chunks:
        loss = chunk.loss_sum.cpu().numpy() / steps
        bad = np.flatnonzero(~np.isfinite(loss))
        if len(bad):
            member = chunk.members[int(bad[0])]
            raise UserError(
                f"member {member}: its loss is {loss[bad[0]]} at step {step + 1}; lower its learning rate"
            )
        row[chunk.members] = loss
        chunk.loss_sum.zero_()


@contextmanager
def _workers(device: str, threads: int | None, chunks: int):
    """Yield a function that runs every chunk's step: side by side on a CPU, in turn elsewhere."""
    if device != "cpu":
        yield lambda jobs: [chunk_step(*job) for job in jobs]
        return
    before = torch.get_num_threads()
    count = min(threads or before, chunks)
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(count, "wsae-bank", initializer=torch.set_num_threads, initargs=(1,))
    try:
        if count == 1:
            yield lambda jobs: [chunk_step(*job) for job in jobs]
        else:
            yield lambda jobs: list(pool.map(lambda job: chunk_step(*job), jobs))
    finally:
        pool.shutdown()
        torch.set_num_threads(before)

"""One pass over a run's held-out data: how strongly every latent fires, and where some of them fire most."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float64, Int32, Int64
from torch import Tensor

from wsae.core.errors import UserError
from wsae.core.progress import Progress
from wsae.evals.contexts import TopContexts, sample_latents
from wsae.evals.data import HeldOut
from wsae.evals.latents import Entries
from wsae.report.rundata import Json
from wsae.sae import SparseAutoencoder
from wsae.sae.encoding import Encoder
from wsae.serve.config import IndexConfig
from wsae.serve.histogram import BINS, bin_of


@runtime_checkable
class Watched(Protocol):
    """A member to be watched."""

    @property
    def hook(self) -> str:
        """Where its activations come from."""
        ...

    @property
    def name(self) -> str:
        """What it is called."""
        ...


@dataclass(frozen=True)
class Seen:
    """What one member's latents did on the held-out rows."""

    peak: Float64[Tensor, " d_sae"]
    histogram: Int32[Tensor, "d_sae bins"]
    contexts: dict[int, list[Json]]
    """Contexts of the chosen latents, strongest first."""


class _Watch:
    """One member while the rows go by."""

    def __init__(self, sae: SparseAutoencoder, chosen: Int64[Tensor, " latents"], n: int) -> None:
        d_sae = sae.cfg.d_sae
        self.encode = Encoder(sae)
        self.top = TopContexts(chosen, d_sae, n)
        self.peak = torch.zeros(d_sae, dtype=torch.float64)
        self.histogram = torch.zeros(d_sae, BINS, dtype=torch.int32)

    def update(self, x: Tensor, seq: Tensor, pos: Tensor) -> None:
        """Add some rows."""
        entries = Entries(self.encode(x))
        self.top.update(entries, seq.long(), pos.long())
        self.peak.scatter_reduce_(0, entries.indices, entries.values, "amax")
        flat = entries.indices * BINS + bin_of(entries.values)
        ones = torch.ones_like(flat, dtype=torch.int32)
        self.histogram.view(-1).scatter_add_(0, flat, ones)


Wanted = dict[Watched, tuple[SparseAutoencoder, Float64[Tensor, " d_sae"]]]
"""Member -> (its SAE, the densities of its latents)."""


def collect(
    source: HeldOut, members: Wanted, cfg: IndexConfig, progress: Progress
) -> dict[Watched, Seen]:
    """Return what every member's latents do, with contexts of `cfg.contexts` live ones each, spread over density.

    Raises UserError when the data have no text or lack a hook of the run.
    """
    if source.tokens() is None:
        raise UserError("--contexts: the run's data have no text to collect contexts from")
    missing = next((m.hook for m in members if m.hook not in source.hooks), None)
    if missing is not None:
        raise UserError(f"--contexts: the data have no hook {missing!r}")
    watched = {
        m: _Watch(
            sae, sample_latents(density, cfg.contexts, cfg.seed, m.hook, m.name), cfg.per_latent
        )
        for m, (sae, density) in members.items()
    }
    with torch.inference_mode(), progress("contexts", None, "rows") as tick:
        for chunk in source.heldout(cfg.batch_size):
            for member, watch in watched.items():
                watch.update(chunk.x[member.hook], chunk.seq, chunk.pos)
            tick(len(chunk.seq))
    return {member: _seen(source, watch, cfg) for member, watch in watched.items()}


def _seen(source: HeldOut, watch: _Watch, cfg: IndexConfig) -> Seen:
    table = source.tokens()
    assert table is not None
    contexts = {
        latent: [
            c.window(table.ids[c.seq, : int(table.lengths[c.seq])].long(), table.decode, cfg.window)
            for c in found
        ]
        for latent, found in watch.top.result().items()
    }
    return Seen(watch.peak, watch.histogram, contexts)

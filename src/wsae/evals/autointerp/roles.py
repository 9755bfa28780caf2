"""Which windows play which role for a latent: explaining, positive, negative and hard."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from wsae.core.seeds import seed_for
from wsae.evals.autointerp.config import ContextConfig
from wsae.evals.autointerp.documents import EXPLAIN, SCORE
from wsae.evals.autointerp.reservoirs import Kept, Pool, Shelf, priority
from wsae.evals.autointerp.tracking import Tracked
from wsae.evals.contexts import one_per_stratum, sample_latents
from wsae.evals.latents import unit_rows

NEIGHBOURS = 10
"""Nearest latents by decoder cosine whose windows are hard negatives."""
_COSINES = 1 << 24
"""Cosines held at once."""
SILENT, FEW, FEW_SILENT = "silent", "few windows", "few silent windows"
"""Why a latent is left out: it never fires, too few activating windows on a side, or too few without it."""


class Picked(NamedTuple):
    """Windows by their number in the text, and one latent's activations on their tokens."""

    window: Int64[np.ndarray, " n"]
    acts: Float32[np.ndarray, "n width"]


class Roles(NamedTuple):
    """One latent's windows."""

    explain: Picked
    positive: Picked
    negative: Picked
    hard: Picked


def neighbours(
    units: Float[Tensor, "d_sae d_in"],
    alive: Bool[Tensor, " d_sae"],
    latents: Int64[Tensor, " latents"],
) -> Int64[Tensor, "latents n"]:
    """Return the NEIGHBOURS live latents of largest decoder cosine with each latent, nearest first; -1 for none."""
    out = []
    for block in latents.split(max(1, _COSINES // len(units))):
        cosine = units[block] @ units.T
        cosine[:, ~alive] = -torch.inf
        cosine[torch.arange(len(block)), block] = -torch.inf
        best = cosine.topk(min(NEIGHBOURS, len(units)), dim=1)
        out.append(best.indices.masked_fill(best.values.isinf(), -1))
    return torch.cat([torch.zeros(0, min(NEIGHBOURS, len(units)), dtype=torch.int64), *out])


class Casting:
    """Gives the kept windows of one member to the roles of each latent."""

    def __init__(self, member: Tracked, pool: Pool, W_dec: Tensor, cfg: ContextConfig) -> None:
        self._member, self._pool, self._cfg = member, pool, cfg
        self._shelf: Shelf = member.reservoirs.kept(member.tracked)
        self._units = unit_rows(W_dec).cpu()

    def roles(self, given: Int64[Tensor, " latents"] | None) -> Iterator[tuple[int, Roles | str]]:
        """Yield each latent with its windows, or with why it is left out.

        Latents are those given, or one tracked latent from each stratum of density.
        """
        latents = self._sampled() if given is None else given
        alive = torch.from_numpy(self._member.count > 0)
        near = neighbours(self._units, alive, latents).numpy()
        for latent, others in zip(latents.tolist(), near, strict=True):
            yield latent, self._of(latent, others[others >= 0])

    def _sampled(self) -> Int64[Tensor, " latents"]:
        density = np.where(self._member.tracked, self._member.count, 0) / max(1, self._member.n)
        cfg = self._cfg
        return sample_latents(
            torch.from_numpy(density), cfg.n_latents, cfg.seed, "interpret", self._member.name
        )

    def _of(self, latent: int, near: Int64[np.ndarray, " neighbours"]) -> Roles | str:
        if not self._member.count[latent]:
            return SILENT
        seen = self._member.reservoirs.seen.reshape(2, -1)[:, latent]
        if seen.min() < self._cfg.min_windows:
            return FEW
        positive = self._spread(self._shelf.of(latent, SCORE), self._cfg.n_score, latent, "score")
        silent = self._silent(latent)
        if len(silent) < len(positive.window):
            return FEW_SILENT
        negative, others = silent[: len(positive.window)], silent[len(positive.window) :]
        return Roles(
            self._explain(latent),
            positive,
            self._without(negative),
            self._without(self._hard(near, others)),
        )

    def _explain(self, latent: int) -> Picked:
        kept = self._shelf.of(latent, EXPLAIN)
        rest = kept._replace(random=kept.random & ~kept.top)
        spread = self._spread(rest, self._cfg.n_quantile, latent, "explain")
        window = np.concatenate([kept.window[kept.top], spread.window])
        acts = np.concatenate([kept.acts[kept.top], spread.acts])
        order = np.lexsort((window, -acts.max(axis=1, initial=0)))
        return Picked(window[order], acts[order])

    def _spread(self, kept: Kept, n: int, latent: int, role: str) -> Picked:
        """Return one random window from each of n equal-count quantiles of peak activation, strongest first."""
        ranked = kept.random.nonzero()[0]
        ranked = ranked[np.argsort(-kept.peak[ranked], kind="stable")]
        if len(ranked) > n:
            seed = seed_for(self._cfg.seed, "interpret", role, latent)
            ranked = ranked[one_per_stratum(len(ranked), n, seed)]
        return Picked(kept.window[ranked], kept.acts[ranked])

    def _silent(self, latent: int) -> Int64[np.ndarray, " slots"]:
        """Return the pool's slots without the latent, in an order of its own."""
        active = self._active(np.array([latent]))[:, 0]
        slots = np.flatnonzero(~active)
        order = priority(self._cfg.seed, self._pool.window[slots], latent)
        return slots[np.argsort(order, kind="stable")]

    def _hard(
        self, near: Int64[np.ndarray, " neighbours"], silent: Int64[np.ndarray, " silent"]
    ) -> Int64[np.ndarray, " hard"]:
        """Return the silent slots with an active neighbour, those of the nearest neighbour first."""
        active = self._active(near)[silent]
        found = np.flatnonzero(active.any(axis=1))
        nearest = active[found].argmax(axis=1) if len(found) else found
        return silent[found[np.argsort(nearest, kind="stable")]][: self._cfg.n_hard]

    def _active(self, latents: Int64[np.ndarray, " latents"]) -> Bool[np.ndarray, "pool latents"]:
        return self._member.active_in(latents, len(self._pool.window))

    def _without(self, slots: Int64[np.ndarray, " slots"]) -> Picked:
        return Picked(
            self._pool.window[slots], np.zeros((len(slots), self._cfg.width), dtype=np.float32)
        )

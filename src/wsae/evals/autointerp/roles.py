"""Which windows play which role for a latent: explaining, positive, negative and hard."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64

from wsae.core.seeds import seed_for
from wsae.evals.autointerp.config import ContextConfig
from wsae.evals.autointerp.documents import EXPLAIN, SCORE
from wsae.evals.autointerp.reservoirs import Kept, Pool, Shelf, priority
from wsae.evals.autointerp.tracking import Tracked
from wsae.evals.contexts import one_per_stratum, sample_latents
from wsae.evals.latents import unit_rows

NEIGHBOURS = 10
"""Nearest latents by decoder cosine whose windows are hard negatives."""
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


class Casting:
    """Gives the kept windows of one member to the roles of each latent."""

    def __init__(
        self, member: Tracked, pool: Pool, W_dec: torch.Tensor, cfg: ContextConfig
    ) -> None:
        self._member, self._pool, self._cfg = member, pool, cfg
        self._shelf: Shelf = member.reservoirs.kept(member.tracked)
        self._units = unit_rows(W_dec).cpu()
        self._alive = torch.from_numpy(member.count > 0)

    def latents(self, given: Int64[torch.Tensor, " latents"] | None) -> list[int]:
        """Return the latents to show: as given, or one tracked latent from each stratum of density."""
        if given is not None:
            return given.tolist()
        density = np.where(self._member.tracked, self._member.count, 0) / max(1, self._member.n)
        cfg = self._cfg
        picked = sample_latents(
            torch.from_numpy(density), cfg.n_latents, cfg.seed, "interpret", self._member.name
        )
        return picked.tolist()

    def roles(self, latent: int) -> Roles | str:
        """Return a latent's windows, or why it is left out."""
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
            self._without(self._hard(latent, others)),
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
        slots = (~active).nonzero()[0]
        order = priority(self._cfg.seed, self._pool.window[slots], latent)
        return slots[np.argsort(order, kind="stable")]

    def _hard(
        self, latent: int, silent: Int64[np.ndarray, " silent"]
    ) -> Int64[np.ndarray, " hard"]:
        """Return the silent slots with an active neighbour, those of the nearest neighbour first."""
        near = self._neighbours(latent)
        active = self._active(near)[silent]
        found = active.any(axis=1).nonzero()[0] if len(near) else np.zeros(0, dtype=np.int64)
        nearest = active[found].argmax(axis=1) if len(found) else found
        return silent[found[np.argsort(nearest, kind="stable")]][: self._cfg.n_hard]

    def _neighbours(self, latent: int) -> Int64[np.ndarray, " neighbours"]:
        cosine = self._units @ self._units[latent]
        cosine[~self._alive] = -torch.inf
        cosine[latent] = -torch.inf
        best = cosine.topk(min(NEIGHBOURS, len(cosine)))
        return best.indices[best.values.isfinite()].numpy()

    def _active(self, latents: Int64[np.ndarray, " latents"]) -> Bool[np.ndarray, "pool latents"]:
        return self._member.active_in(latents, len(self._pool.window))

    def _without(self, slots: Int64[np.ndarray, " slots"]) -> Picked:
        return Picked(
            self._pool.window[slots], np.zeros((len(slots), self._cfg.width), dtype=np.float32)
        )

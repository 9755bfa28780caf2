"""One member while the rows go by: how often each latent fires, its windows, and the activity in the pool's windows."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, UInt8

from wsae.core.errors import UserError
from wsae.core.seeds import seed_for
from wsae.evals.autointerp.config import ContextConfig
from wsae.evals.autointerp.documents import SCORE
from wsae.evals.autointerp.reservoirs import Hits, Pool, Reservoirs, Size
from wsae.evals.autointerp.tiling import Slab
from wsae.ops import SparseCode

OVERSAMPLE = 2
"""Latents tracked per latent wanted: one of each two neighbours in density is then drawn."""
_DENSE = 1 << 24
"""Booleans held at once while the pool's activity is packed."""


class Events(NamedTuple):
    """Active entries in row order: latent, window in the slab, place in the window, value."""

    latent: Int64[np.ndarray, " n"]
    window: Int64[np.ndarray, " n"]
    offset: Int64[np.ndarray, " n"]
    value: Float32[np.ndarray, " n"]

    def take(self, keep: np.ndarray | slice) -> "Events":
        """Return those at `keep`."""
        return Events(*(column[keep] for column in self))

    def joined(self, after: "Events") -> "Events":
        """Return these and then others."""
        return Events(*(np.concatenate(pair) for pair in zip(self, after, strict=True)))


class _Entries(NamedTuple):
    """Active entries of a slab's rows, in row order."""

    latent: Int64[np.ndarray, " n"]
    row: Int64[np.ndarray, " n"]
    value: Float32[np.ndarray, " n"]

    @staticmethod
    def of(code: SparseCode) -> "_Entries":
        columns = (code.indices, code.rows(), code.values.float())
        active = code.values != 0
        if not bool(active.all()):  # only padding of the Top-k kinds is 0
            columns = tuple(column[active] for column in columns)
        return _Entries(*(column.cpu().numpy() for column in columns))

    def placed(self, at: np.ndarray | slice, slab: Slab) -> Events:
        row = self.row[at]
        return Events(self.latent[at], slab.row_window[row], slab.row_offset[row], self.value[at])


def _no_events() -> Events:
    none = np.zeros(0, dtype=np.int64)
    return Events(none, none, none, none.astype(np.float32))


def member_bytes(cfg: ContextConfig, d_sae: int, given: int | None = None) -> int:
    """Return the memory of a member's arrays while it is collected, whatever the number of tokens.

    With L = OVERSAMPLE n_latents latents tracked (or `given`), each with K = n_top + reservoir windows on 2 sides:

        1.5 * 2 L K (4 width + 28)     windows: activations, and 28 bytes of place, rank and peak
        + pool * ceil(d_sae / 8)       who is active in the pool's windows, one bit a latent
        + d_sae (2 * 20 + 8 + 4 + 8 + 1)   thresholds and counts per latent

    Beside it: one batch of activations and codes, and at the end what is handed out.
    """
    size = _size(cfg, d_sae, given)
    return size.bytes + cfg.pool * _packed(d_sae) + d_sae * 21


def _size(cfg: ContextConfig, d_sae: int, given: int | None) -> Size:
    return Size(cfg, d_sae, min(d_sae, OVERSAMPLE * cfg.n_latents) if given is None else given)


def _packed(d_sae: int) -> int:
    return -(-d_sae // 8)


class Tracked:
    """What one member's latents do: exact counts for all, windows for some, activity in the pool's windows for all.

    Without `latents` those tracked are a uniform random sample of the latents that fire at all. It is exact in one
    pass: latents have a random rank, the L lowest ranks that have fired are tracked, and a latent that joins does so
    at its first firing, so that nothing of it is missed; the latents it displaces do not return.
    """

    def __init__(
        self,
        name: str,
        d_sae: int,
        cfg: ContextConfig,
        latents: Int64[torch.Tensor, " latents"] | None = None,
    ) -> None:
        self.name, self._d_sae, self._cfg = name, d_sae, cfg
        size = _size(cfg, d_sae, None if latents is None else len(latents))
        self.reservoirs = Reservoirs(size)
        self.active: UInt8[np.ndarray, "pool packed"] = np.zeros(
            (cfg.pool, _packed(d_sae)), np.uint8
        )
        self.n = 0
        self.count = np.zeros(d_sae, dtype=np.int64)
        self.peak = torch.zeros(d_sae, dtype=torch.float32)
        self.tracked: Bool[np.ndarray, " d_sae"] = np.zeros(d_sae, dtype=bool)
        rng = np.random.default_rng(seed_for(cfg.seed, "interpret", "latents", name))
        self._rank = rng.permutation(d_sae)
        self._given, self._wanted = latents, size.latents
        if latents is not None:
            self.tracked[latents.numpy()] = True
        self._carry = _no_events()

    @property
    def bytes(self) -> int:
        """Memory of the arrays that live as long as the pass (`member_bytes` says it beforehand)."""
        own = (self.active, self.count, self.tracked, self._rank, self.peak.numpy())
        return self.reservoirs.bytes + sum(array.nbytes for array in own)

    def update(self, code: SparseCode, slab: Slab, slots: Int64[np.ndarray, " windows"]) -> None:
        """Add the codes of a slab's rows; `slots` are the places of its windows in the pool, -1 for none."""
        entries = _Entries.of(code)
        self.n += code.batch
        self.count += np.bincount(entries.latent, minlength=self._d_sae)
        latent, value = torch.from_numpy(entries.latent), torch.from_numpy(entries.value)
        self.peak.scatter_reduce_(0, latent, value, "amax")
        if not bool(torch.isfinite(self.peak).all()):
            raise UserError(f"{self.name}: NaN or infinite activations on the held-out rows")
        self._track()
        first_open = int(np.searchsorted(slab.row_window, slab.closed))
        cut = int(np.searchsorted(entries.row, first_open))
        closed = _Entries(*(column[:cut] for column in entries))
        self._add(closed, slab, slots)
        after = entries.placed(slice(cut, None), slab)
        self._carry = after if slab.closed else self._carry.joined(after)
        self._carry.window[:] = 0

    def finish(self, slab: Slab, slots: Int64[np.ndarray, " windows"]) -> None:
        """Add what is left of the last window."""
        none = np.zeros(0, dtype=np.int64)
        self._add(_Entries(none, none, none.astype(np.float32)), slab, slots)

    def _track(self) -> None:
        """Track the fired latents of the lowest ranks."""
        if self._given is not None:
            return
        fired = self.count.nonzero()[0]
        ranks = self._rank[fired]
        if len(fired) > self._wanted:
            fired = fired[ranks <= np.partition(ranks, self._wanted - 1)[self._wanted - 1]]
        self.tracked[:] = False
        self.tracked[fired] = True

    def _add(self, new: _Entries, slab: Slab, slots: Int64[np.ndarray, " windows"]) -> None:
        """Add entries of closed windows, those carried over first."""
        if not slab.closed:
            return
        self._note_pool(new, slab, slots)
        events = self._carry.take(self.tracked[self._carry.latent])
        events = events.joined(new.placed(self.tracked[new.latent].nonzero()[0], slab))
        events = events.take(slab.side[events.window] >= 0)
        events = events.take(np.argsort(events.window * self._d_sae + events.latent, kind="stable"))
        window, side = slab.number[events.window], slab.side[events.window]
        self.reservoirs.add(
            Hits(events.latent, window, side, events.offset, events.value), self.tracked
        )

    def _note_pool(self, new: _Entries, slab: Slab, slots: Int64[np.ndarray, " windows"]) -> None:
        """Write which latents are active in the windows that entered the pool."""
        entering = (slots >= 0).nonzero()[0]
        size = max(1, _DENSE // self._d_sae)
        for first in range(0, len(entering), size):
            windows = entering[first : first + size]
            place = np.full(len(slots), -1)
            place[windows] = np.arange(len(windows))
            dense = np.zeros((len(windows), self._d_sae), dtype=bool)
            at = place[slab.row_window][new.row]
            mine = (at >= 0).nonzero()[0]
            dense[at[mine], new.latent[mine]] = True
            if place[0] >= 0:
                dense[place[0], self._carry.latent] = True
            self.active[slots[windows]] = np.packbits(dense, axis=1)

    def active_in(
        self, latents: Int64[np.ndarray, " latents"], size: int
    ) -> Bool[np.ndarray, "size latents"]:
        """Return whether each latent is active anywhere in each of the pool's first `size` windows."""
        bits = self.active[:size, latents >> 3] >> (7 - (latents & 7)).astype(np.uint8)
        return (bits & 1).astype(bool)


def entering(pool: Pool, slab: Slab) -> Int64[np.ndarray, " windows"]:
    """Offer a slab's complete scoring windows to the pool; return the slot of every window, -1 for none."""
    slots = np.full(len(slab.number), -1)
    offered = (slab.side[: slab.closed] == SCORE).nonzero()[0]
    slots[offered] = pool.admit(slab.number[offered])
    return slots

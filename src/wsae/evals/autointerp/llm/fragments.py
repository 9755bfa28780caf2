"""Fragments for simulation, as in the paper's Appendix B.4: one random stretch of 64 tokens from each document.

A document's fragment lies in its first part of a sequence that is long enough; shorter documents have none. Tokens
whose rows were left out of the data (attention sinks, special tokens) count as silent. Memory: per member
latents x (20 + 15) x width activations, and those of the fragments in one batch, whatever the number of tokens.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from wsae.acts.tokens import TokenTable
from wsae.core.errors import UserError
from wsae.core.progress import Progress, quiet
from wsae.evals.autointerp.documents import documents_of
from wsae.evals.autointerp.llm.config import FragmentConfig
from wsae.evals.autointerp.llm.placing import Placer
from wsae.evals.autointerp.reservoirs import priority
from wsae.evals.autointerp.windows import Shown, Windows
from wsae.evals.data import HeldOut
from wsae.evals.latents import Entries
from wsae.sae import SparseAutoencoder

N_TOP = 20
"""Fragments of largest activation, from which explaining and top scoring ones are dealt; fewer varying: skipped."""
EXPLAIN, TOP = slice(0, N_TOP, 4), slice(2, N_TOP, 4)
"""Their ranks: 0, 4, 8, 12, 16 explain, 2, 6, 10, 14, 18 are scored (Cunningham et al.'s code)."""
N_RANDOM = 5
"""Random varying fragments scored, none of the ten above."""
_RESERVOIR = N_RANDOM + 2 * N_RANDOM
FEW = "fewer than 20 varying fragments"


@dataclass(frozen=True)
class LatentFragments:
    """One latent's fragments by role, all from different documents."""

    latent: int
    density: float
    """Share of the fragments' tokens on which it fires."""
    explain: Shown
    top: Shown
    random: Shown


@dataclass(frozen=True)
class Fragments:
    """One member's latents with their fragments, and those skipped."""

    windows: Windows
    latents: list[LatentFragments]
    skipped: dict[str, int] = field(default_factory=dict)
    """Reason -> latents skipped for it."""
    n_fragments: int = 0


def fragments(
    source: HeldOut,
    members: dict[str, dict[str, SparseAutoencoder]],
    latents: dict[str, dict[str, Int64[Tensor, " latents"]]],
    cfg: FragmentConfig,
    progress: Progress = quiet,
) -> dict[str, dict[str, Fragments]]:
    """Return the fragments of some latents of every member, from one pass: hook -> member -> fragments.

    Raises UserError when the data have no text, no such hook, or no document of `width` tokens.
    """
    for hook in members:
        if hook not in source.hooks:
            raise UserError(f"the data have no hook {hook!r}; they have {', '.join(source.hooks)}")
    placer = Placer(documents_of(source), cfg)
    keepers = {
        (hook, name): _Keeper(sae, latents[hook][name], cfg)
        for hook, saes in members.items()
        for name, sae in saes.items()
    }
    with torch.inference_mode(), progress("fragments", None, "rows") as tick:
        for chunk in source.heldout(cfg.batch_size):
            seq, pos = chunk.seq.numpy().astype(np.int64), chunk.pos.numpy().astype(np.int64)
            placed = placer.place(seq, pos)
            rows = torch.from_numpy(placed.rows)
            for (hook, _), keeper in keepers.items():
                keeper.update(chunk.x[hook][rows], placed.fragment, placed.offset)
            _close(keepers, placer, placed.closed)
            tick(len(seq))
            if placer.full:
                break
    _close(keepers, placer, placer.last())
    if not placer.n:
        raise UserError(
            f"no held-out document has {cfg.width} tokens in one sequence; lower the fragments' width"
        )
    table = source.tokens()
    assert table is not None
    return _results(members, keepers, placer, table)


def _close(
    keepers: dict[tuple[str, str], "_Keeper"], placer: Placer, closed: Int64[np.ndarray, " n"]
) -> None:
    for keeper in keepers.values():
        keeper.close(closed, placer.document)


class _Kept(NamedTuple):
    """A fragment's rank (larger is better), number, and activations; compared by rank and number only."""

    rank: tuple[float | int, int]
    fragment: int
    acts: Float32[np.ndarray, " width"]


class _Keeper:
    """The strongest and some random varying fragments of each of a member's latents."""

    def __init__(
        self, sae: SparseAutoencoder, latents: Int64[Tensor, " latents"], cfg: FragmentConfig
    ) -> None:
        self._sae, self._cfg = sae, cfg
        self.latents = latents.tolist()
        self._slot = np.full(sae.cfg.d_sae, -1)
        self._slot[latents.numpy()] = np.arange(len(latents))
        self._open: dict[int, Float32[np.ndarray, "width latents"]] = {}
        self.top: list[list[_Kept]] = [[] for _ in self.latents]
        self.random: list[list[_Kept]] = [[] for _ in self.latents]
        self.varying = np.zeros(len(latents), dtype=np.int64)
        self.active = np.zeros(len(latents), dtype=np.int64)

    def update(
        self,
        x: Tensor,
        fragment: Int64[np.ndarray, " rows"],
        offset: Int64[np.ndarray, " rows"],
    ) -> None:
        """Add rows that lie in fragments."""
        if not len(fragment):
            return
        entries = Entries(self._sae.encode_code(x.to(self._sae.W_dec.device)))
        slot = self._slot[entries.indices.numpy()]
        known = slot >= 0
        row, slot = entries.rows.numpy()[known], slot[known]
        value = entries.values.numpy()[known].astype(np.float32)
        shape = (self._cfg.width, len(self.latents))
        for number in np.unique(fragment).tolist():
            acts = self._open.setdefault(number, np.zeros(shape, dtype=np.float32))
            here = fragment[row] == number
            acts[offset[row[here]], slot[here]] = value[here]

    def close(self, closed: Int64[np.ndarray, " n"], document: Callable[[int], int]) -> None:
        """Offer complete fragments to every latent."""
        for number in closed.tolist():
            acts = self._open.pop(number, None)
            if acts is None:
                continue  # every row of it was left out of the data
            peak = acts.max(0)
            self.active += (acts > 0).sum(0)
            slots = (peak != acts.min(0)).nonzero()[0]
            self.varying[slots] += 1
            hashes = priority(
                self._cfg.seed,
                np.full(len(slots), document(number), dtype=np.int64),
                np.array(self.latents, dtype=np.int64)[slots],
            )
            for slot, rank in zip(slots.tolist(), hashes.tolist(), strict=True):
                column = acts[:, slot]
                _offer(self.top[slot], (float(peak[slot]), -number), number, column, N_TOP)
                _offer(self.random[slot], (-rank, -number), number, column, _RESERVOIR)


def _offer(
    heap: list[_Kept], rank: tuple[float | int, int], number: int, acts: np.ndarray, size: int
) -> None:
    """Keep a fragment if it is among the `size` best so far."""
    if len(heap) < size:
        heapq.heappush(heap, _Kept(rank, number, acts.copy()))
    elif rank > heap[0].rank:
        heapq.heapreplace(heap, _Kept(rank, number, acts.copy()))


def _dealt(keeper: _Keeper, slot: int) -> tuple[list[_Kept], ...]:
    """Return a latent's explaining, top and random fragments."""
    top = sorted(keeper.top[slot], key=lambda kept: kept.rank, reverse=True)
    explain, scored = top[EXPLAIN], top[TOP]
    used = {kept.fragment for kept in (*explain, *scored)}
    ranked = sorted(keeper.random[slot], key=lambda kept: kept.rank, reverse=True)
    random = [kept for kept in ranked if kept.fragment not in used]
    return explain, scored, random[:N_RANDOM]


def _results(
    members: dict[str, dict[str, SparseAutoencoder]],
    keepers: dict[tuple[str, str], _Keeper],
    placer: Placer,
    table: TokenTable,
) -> dict[str, dict[str, Fragments]]:
    dealt = {
        key: {j: _dealt(k, i) for i, j in enumerate(k.latents) if k.varying[i] >= N_TOP}
        for key, k in keepers.items()
    }
    parts = [p for roles in dealt.values() for role in roles.values() for p in role]
    number = np.unique(np.array([k.fragment for part in parts for k in part], dtype=np.int64))
    windows = placer.windows(number, table)
    out: dict[str, dict[str, Fragments]] = {hook: {} for hook in members}
    for (hook, name), keeper in keepers.items():
        tokens = placer.n * placer.width
        found = [
            LatentFragments(
                j,
                float(keeper.active[keeper.latents.index(j)]) / tokens,
                *(_shown(part, number, placer.width) for part in roles),
            )
            for j, roles in dealt[hook, name].items()
        ]
        few = len(keeper.latents) - len(found)
        out[hook][name] = Fragments(windows, found, {FEW: few} if few else {}, placer.n)
    return out


def _shown(kept: list[_Kept], number: Int64[np.ndarray, " n"], width: int) -> Shown:
    window = np.searchsorted(number, np.array([k.fragment for k in kept], dtype=np.int64))
    acts = np.array([k.acts for k in kept], dtype=np.float32).reshape(len(kept), width)
    return Shown(window, acts)

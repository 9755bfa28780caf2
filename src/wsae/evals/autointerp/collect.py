"""Contexts of latents from one pass over the held-out rows, for all hooks and members together."""

from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64

from wsae.acts.tokens import TokenTable
from wsae.core.errors import UserError, nearest
from wsae.core.progress import Progress, quiet
from wsae.core.seeds import seed_for
from wsae.evals.autointerp.config import ContextConfig
from wsae.evals.autointerp.documents import (
    SIDES,
    STRADDLING,
    Documents,
    Slab,
    Tiling,
    blocks,
    documents_of,
)
from wsae.evals.autointerp.reservoirs import Picked, Pool, RoleAssignment, Roles, Tracked, entering
from wsae.evals.autointerp.windows import (
    Collected,
    LatentContexts,
    Shown,
    Windows,
    cut_windows,
)
from wsae.evals.data import HeldOut
from wsae.sae import SparseAutoencoder
from wsae.sae.encoding import Encoder

Members = dict[str, dict[str, SparseAutoencoder]]
"""Hook -> member name -> SAE."""
Latents = dict[str, dict[str, Int64[torch.Tensor, " latents"]]]
"""Hook -> member name -> latents."""


def collect(
    source: HeldOut,
    members: Members,
    cfg: ContextConfig,
    batch_size: int = 2048,
    latents: Latents | None = None,
    progress: Progress = quiet,
) -> dict[str, dict[str, Collected]]:
    """Return the contexts of some latents of every member: hook -> member -> windows by latent and role.

    Each row is encoded once per member. Latents are those given, in their order; for the other members they are one
    from each of n_latents equal-count strata of density, drawn from twice as many random live latents. All members
    share one `Windows`. The same rows give the same windows however they are split. Raises UserError when the data
    have no text, no held-out rows, no such hook, one document only, or sequences shorter than a window.
    """
    chosen = latents or {}
    _check(source, members, chosen)
    run = _CollectingPass(source, members, cfg, chosen)
    with torch.inference_mode(), progress("contexts", None, "rows") as tick:
        for chunk in source.heldout(batch_size):
            run.update(chunk.x, chunk.seq.numpy(), chunk.pos.numpy())
            tick(len(chunk.seq))
        run.finish()
    _check_sides(run.tiling)
    table = source.tokens()
    assert table is not None
    return run.collected(table, chosen)


class _CollectingPass:
    """Everything that sees the rows go by."""

    def __init__(
        self, source: HeldOut, members: Members, cfg: ContextConfig, latents: Latents
    ) -> None:
        self.cfg, self.members = cfg, members
        self._encoders = {
            (hook, name): Encoder(sae)
            for hook, saes in members.items()
            for name, sae in saes.items()
        }
        self.tiling = Tiling(documents_of(source), cfg.width, seed_for(cfg.seed, "sides"))
        self.pool = Pool(cfg.pool, cfg.seed)
        self.tracked = {
            (hook, name): Tracked(
                f"{hook}/{name}", sae.cfg.d_sae, cfg, latents.get(hook, {}).get(name)
            )
            for hook, saes in members.items()
            for name, sae in saes.items()
        }

    def update(self, x: dict[str, torch.Tensor], seq: np.ndarray, pos: np.ndarray) -> None:
        """Add some rows."""
        if not len(seq):
            return
        slab = self.tiling.slab(seq.astype(np.int64), pos.astype(np.int64))
        slots = entering(self.pool, slab)
        for hook, saes in self.members.items():
            for name, sae in saes.items():
                code = self._encoders[hook, name](x[hook].to(sae.W_dec.device))
                self.tracked[hook, name].update(code, slab, slots)

    def finish(self) -> None:
        """Add the last window."""
        slab: Slab = self.tiling.last()
        slots = entering(self.pool, slab)
        for member in self.tracked.values():
            member.finish(slab, slots)

    def collected(self, table: TokenTable, latents: Latents) -> dict[str, dict[str, Collected]]:
        """Return what was asked for."""
        cast: dict[tuple[str, str], _Cast] = {}
        for (hook, name), member in self.tracked.items():
            casting = RoleAssignment(member, self.pool, self.members[hook][name].W_dec, self.cfg)
            cast[hook, name] = _cast(casting, latents.get(hook, {}).get(name))
        shown = [p.window for c in cast.values() for roles in c.roles.values() for p in roles]
        number = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *shown]))
        windows = _windows(number, self.tiling, table)
        out: dict[str, dict[str, Collected]] = {hook: {} for hook in self.members}
        for (hook, name), found in cast.items():
            member = self.tracked[hook, name]
            contexts = [_contexts(j, roles, member, number) for j, roles in found.roles.items()]
            skipped = dict(Counter(found.left_out.values()))
            counts = dict(self.tiling.counts)
            out[hook][name] = Collected(windows, contexts, skipped, counts, found.left_out)
        return out


class _Cast(NamedTuple):
    roles: dict[int, Roles]
    left_out: dict[int, str]


def _cast(casting: RoleAssignment, given: Int64[torch.Tensor, " latents"] | None) -> _Cast:
    out = _Cast({}, {})
    for latent, roles in casting.roles(given):
        if isinstance(roles, str):
            out.left_out[latent] = roles
        else:
            out.roles[latent] = roles
    return out


def _contexts(
    latent: int, roles: Roles, member: Tracked, number: Int64[np.ndarray, " windows"]
) -> LatentContexts:
    def shown(picked: Picked) -> Shown:
        return Shown(np.searchsorted(number, picked.window), picked.acts)

    density = float(member.count[latent]) / member.n
    return LatentContexts(
        latent, density, float(member.peak[latent]), *(shown(picked) for picked in roles)
    )


def _windows(number: Int64[np.ndarray, " windows"], tiling: Tiling, table: TokenTable) -> Windows:
    seq, start = number // tiling.per_seq, number % tiling.per_seq * tiling.width
    document = Documents(blocks(table)).of(seq, start, tiling.width).first
    return cut_windows(table, seq, start, document, tiling.width)


def _check(source: HeldOut, members: Members, latents: Latents) -> None:
    for hook in members:
        if hook not in source.hooks:
            raise UserError(f"the data have no hook {hook!r}; they have {', '.join(source.hooks)}")
    for hook, chosen in latents.items():
        for name, wanted in chosen.items():
            if name not in members.get(hook, {}):
                names = members.get(hook, {})
                raise UserError(f"latents of {hook}/{name}: no such member{nearest(name, names)}")
            d_sae = members[hook][name].cfg.d_sae
            if len(wanted.unique()) != len(wanted) or not all(
                0 <= j < d_sae for j in wanted.tolist()
            ):
                raise UserError(
                    f"latents of {hook}/{name}: give different numbers from 0 to {d_sae - 1}"
                )


def _check_sides(tiling: Tiling) -> None:
    explain, score = (tiling.counts[side] for side in SIDES)
    if explain and score:
        return
    straddling = tiling.counts[STRADDLING]
    if not explain + score + straddling:
        raise UserError("there are no held-out rows to collect windows from; hold out more data")
    if not explain + score:
        raise UserError(
            f"all {straddling} windows of {tiling.width} tokens lie across two documents; lower the width"
        )
    raise UserError(
        f"all {explain + score} windows are from documents on one side, and explaining and scoring need different "
        "documents; hold out more documents"
    )

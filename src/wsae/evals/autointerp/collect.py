"""Contexts of latents from one pass over the held-out rows, for all hooks and members together.

Contexts are windows that tile the text. Fragments, for simulation, are as in the paper's Appendix B.4: one random
stretch of 64 tokens from each document; shorter documents have none, and tokens whose rows were left out of the data
(attention sinks, special tokens) count as silent.
"""

from collections import Counter
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from wsae.core.errors import UserError, nearest
from wsae.core.progress import Progress, quiet
from wsae.core.seeds import seed_for
from wsae.evals.autointerp.config import ContextConfig, FragmentConfig
from wsae.evals.autointerp.documents import (
    EXPLAIN,
    SIDES,
    STRADDLING,
    FragmentTiling,
    Tiling,
    documents_of,
)
from wsae.evals.autointerp.reservoirs import Pool, RoleAssignment, Tracked, priority
from wsae.evals.autointerp.windows import (
    Collected,
    Fragments,
    LatentContexts,
    LatentFragments,
    Shown,
)
from wsae.evals.data import HeldOut
from wsae.sae import SparseAutoencoder
from wsae.sae.encoding import Encoder

Members = dict[str, dict[str, SparseAutoencoder]]
"""Hook -> member name -> SAE."""
Latents = dict[str, dict[str, Int64[Tensor, " latents"]]]
"""Hook -> member name -> latents."""
N_TOP = 20
"""Fragments of largest activation, from which explaining and top scoring ones are dealt; fewer varying: skipped."""
RANKS_EXPLAIN, RANKS_TOP = slice(0, N_TOP, 4), slice(2, N_TOP, 4)
"""Their ranks: 0, 4, 8, 12, 16 explain, 2, 6, 10, 14, 18 are scored (Cunningham et al.'s code)."""
N_RANDOM = 5
"""Random varying fragments scored, none of the ten above."""
FEW_FRAGMENTS = "fewer than 20 varying fragments"
ByLatent = TypeVar("ByLatent", LatentContexts, LatentFragments)


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
    tiling = Tiling(documents_of(source), cfg.width, seed_for(cfg.seed, "sides"))
    pool = Pool(cfg.pool, cfg.seed)
    saes = {(hook, name): sae for hook, named in members.items() for name, sae in named.items()}
    given = {(hook, name): chosen.get(hook, {}).get(name) for hook, name in saes}
    encoders = {key: Encoder(sae) for key, sae in saes.items()}
    tracked = {
        key: Tracked("/".join(key), sae.cfg.d_sae, cfg, given[key]) for key, sae in saes.items()
    }
    with torch.inference_mode(), progress("contexts", None, "rows") as tick:
        for chunk in source.heldout(batch_size):
            if len(chunk.seq):
                slab = tiling.slab(chunk.seq.long().numpy(), chunk.pos.long().numpy())
                slots = pool.enter(slab)
                for key, sae in saes.items():
                    x = chunk.x[key[0]].to(sae.W_dec.device)
                    tracked[key].update(encoders[key](x), slab, slots)
            tick(len(chunk.seq))
        slab = tiling.last()
        slots = pool.enter(slab)
        for member in tracked.values():
            member.close(slab, slots)
    _check_sides(tiling)
    found = {
        key: RoleAssignment(tracked[key], pool, sae.W_dec, cfg).contexts(given[key])
        for key, sae in saes.items()
    }
    kept = {
        key: [one for one in named.values() if not isinstance(one, str)]
        for key, named in found.items()
    }
    number, located = _located(kept)
    table = source.tokens()
    assert table is not None
    windows = tiling.windows(number, table)
    out: dict[str, dict[str, Collected]] = {hook: {} for hook in members}
    for (hook, name), contexts in located.items():
        why = {j: one for j, one in found[hook, name].items() if isinstance(one, str)}
        skipped = dict(Counter(why.values()))
        out[hook][name] = Collected(windows, contexts, skipped, dict(tiling.counts), why)
    return out


def fragments(
    source: HeldOut,
    members: Members,
    latents: Latents,
    cfg: FragmentConfig,
    progress: Progress = quiet,
) -> dict[str, dict[str, Fragments]]:
    """Return the fragments of some latents of every member, from one pass: hook -> member -> fragments.

    Raises UserError when the data have no text, no such hook, or no document of `width` tokens.
    """
    _check(source, members, {})
    tiling = FragmentTiling(documents_of(source), cfg)
    saes = {(hook, name): sae for hook, named in members.items() for name, sae in named.items()}
    sizes = {"width": cfg.width, "n_top": N_TOP, "reservoir": 3 * N_RANDOM, "pool": 1}
    kept = ContextConfig(**sizes, seed=cfg.seed)
    tracked = {
        (hook, name): Tracked(
            f"{hook}/{name}", sae.cfg.d_sae, kept, latents[hook][name], varying=True
        )
        for (hook, name), sae in saes.items()
    }
    with torch.inference_mode(), progress("fragments", None, "rows") as tick:
        for chunk in source.heldout(cfg.batch_size):
            rows, slab = tiling.slab(chunk.seq.long().numpy(), chunk.pos.long().numpy())
            no_slots = np.full(len(slab.number), -1)
            for (hook, name), sae in saes.items():
                if len(rows):
                    code = sae.encode_code(chunk.x[hook][rows].to(sae.W_dec.device))
                    tracked[hook, name].update(code, slab, no_slots)
                else:
                    tracked[hook, name].close(slab, no_slots)
            tick(len(chunk.seq))
            if tiling.n >= cfg.limit:
                break
    if not tiling.n:
        raise UserError(
            f"no held-out document has {cfg.width} tokens in one sequence; lower the fragments' width"
        )
    number, located = _located({key: _dealt(tracked[key], tiling.n) for key in saes})
    table = source.tokens()
    assert table is not None
    windows = tiling.windows(number, table)
    out: dict[str, dict[str, Fragments]] = {hook: {} for hook in members}
    for (hook, name), found in located.items():
        few = len(latents[hook][name]) - len(found)
        skipped = {FEW_FRAGMENTS: few} if few else {}
        out[hook][name] = Fragments(windows, found, skipped, tiling.n)
    return out


def _dealt(member: Tracked, n_fragments: int) -> list[LatentFragments]:
    """Deal the kept fragments of each latent to its roles."""
    kept, cfg = member.reservoirs, member.cfg
    kept.finish(member.tracked)
    complete = member.count - np.bincount(member.carried.latent, minlength=len(member.count))
    out = []
    for latent in [] if member.given is None else member.given.tolist():
        if kept.seen[latent] < N_TOP:
            continue
        mine = kept.of(latent, EXPLAIN)
        top = np.lexsort((mine.window, -mine.peak, ~mine.top))[:N_TOP]
        dealt = [top[RANKS_EXPLAIN], top[RANKS_TOP]]
        mine.random[np.concatenate(dealt)] = False
        order = np.argsort(priority(cfg.seed, mine.window, latent), kind="stable")
        dealt.append(order[mine.random[order]][:N_RANDOM])
        roles = (Shown(mine.window[rows], mine.acts[rows]) for rows in dealt)
        density = float(complete[latent]) / (n_fragments * cfg.width)
        out.append(LatentFragments(latent, density, *roles))
    return out


def _located(
    found: dict[tuple[str, str], list[ByLatent]],
) -> tuple[Int64[np.ndarray, " windows"], dict[tuple[str, str], list[ByLatent]]]:
    """Return the numbers of all windows shown, and what was found with places in them for numbers."""

    def roles(one: ByLatent) -> dict[str, Shown]:
        return {name: shown for name, shown in vars(one).items() if isinstance(shown, Shown)}

    every = (one for latents in found.values() for one in latents)
    shown = [role.window for one in every for role in roles(one).values()]
    number = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *shown]))

    def located(one: ByLatent) -> ByLatent:
        places = {
            name: replace(role, window=np.searchsorted(number, role.window))
            for name, role in roles(one).items()
        }
        return replace(one, **places)

    return number, {key: [located(one) for one in latents] for key, latents in found.items()}


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

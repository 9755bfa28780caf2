"""Which latent of one SAE corresponds to which latent of another, by the direction of their decoder rows.

Members of a family start from the same weights, so latents that never fire keep nearly identical directions in both;
counting them would fake agreement. Only latents that fire on held-out data take part in the pairing and its statistics.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from wsae.core.seeds import seed_for
from wsae.evals.latents import nearest, unit_rows


@dataclass(frozen=True)
class LiveDecoder:
    """The decoder of one SAE and the latents of it that fired."""

    W_dec: Float[Tensor, "d_sae d_in"]
    alive: Int64[Tensor, " alive"]


@dataclass(frozen=True)
class Matching:
    """Latents of `a` against latents of `b`: the nearest for every latent, and a one-to-one pairing of live ones."""

    index: Int64[Tensor, " d_sae"]
    """Nearest live latent of b for each latent of a; -1 when b has none."""
    cosine: Float[Tensor, " d_sae"]
    """Cosine with it; NaN when b has none."""
    pair_a: Int64[Tensor, " pairs"]
    pair_b: Int64[Tensor, " pairs"]
    pair_cosine: Float[Tensor, " pairs"]
    method: str
    """assignment: the pairing of largest total cosine. mutual: pairs in which each is the other's nearest."""
    random_cosine: float
    """Mean nearest cosine of a's live latents with as many random directions as b has live latents: chance level."""

    def summary(self) -> dict[str, float | int | str | None]:
        """Return the statistics over pairs, JSON-ready."""
        n = len(self.pair_a)
        cosine = self.pair_cosine.double()
        return {
            "method": self.method,
            "n_pairs": n,
            "decoder_cosine_mean": float(cosine.mean()) if n else None,
            "frac_above_0.9": float((cosine > 0.9).double().mean()) if n else None,
            "frac_above_0.7": float((cosine > 0.7).double().mean()) if n else None,
            "random_cosine_mean": self.random_cosine if n else None,
        }


def match(a: LiveDecoder, b: LiveDecoder, assignment_max: int, seed: int = 0) -> Matching:
    """Match the latents of `a` with those of `b` by decoder cosine (signed: latents are non-negative)."""
    units_a, units_b = unit_rows(a.W_dec), unit_rows(b.W_dec).to(a.W_dec.device)
    d_sae = len(units_a)
    if len(b.alive) == 0:
        none = torch.zeros(0, dtype=torch.int64)
        index = torch.full((d_sae,), -1, dtype=torch.int64)
        nan = torch.full((d_sae,), float("nan"), dtype=torch.float32)
        return Matching(
            index, nan, none, none, torch.zeros(0, dtype=torch.float32), "none", float("nan")
        )
    cosine, where = nearest(units_a, units_b[b.alive])
    live_a, live_b = units_a[a.alive], units_b[b.alive]
    pair = _assignment if max(len(a.alive), len(b.alive)) <= assignment_max else _mutual
    rows, columns = pair(live_a, live_b)
    pair_cosine = (live_a[rows] * live_b[columns]).sum(1).cpu()
    chance = _random_level(live_a, live_b, seed)
    method = pair.__name__.removeprefix("_")
    pairs = (a.alive[rows], b.alive[columns], pair_cosine)
    return Matching(b.alive[where], cosine, *pairs, method, chance)


def _assignment(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Pair one-to-one with the largest total cosine (Hungarian method)."""
    from scipy.optimize import linear_sum_assignment  # takes a third of a second, needed here only

    rows, columns = linear_sum_assignment((a @ b.T).cpu().numpy(), maximize=True)
    return torch.from_numpy(np.asarray(rows)), torch.from_numpy(np.asarray(columns))


def _mutual(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Pair the latents that are each other's nearest."""
    rows = torch.arange(len(a))
    if not len(a):
        return rows, rows
    to_b, to_a = nearest(a, b)[1], nearest(b, a)[1]
    keep = to_a[to_b] == rows
    return rows[keep], to_b[keep]


def _random_level(a: Tensor, b: Tensor, seed: int) -> float:
    """Mean nearest cosine with random directions, as many as `b` has."""
    if not len(a):
        return float("nan")
    generator = torch.Generator().manual_seed(seed_for(seed, "matching", "random"))
    random = torch.randn(b.shape, generator=generator, dtype=torch.float32).to(a.device)
    return float(nearest(a, unit_rows(random))[0].double().mean())

"""Latents: what each does on held-out data, how its decoder direction lies among others, and which match which.

Members of a family start from the same weights, so latents that never fire keep nearly identical directions in both;
counting them would fake agreement. Only latents that fire on held-out data take part in the pairing and its statistics.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from wsae.core.seeds import seed_for
from wsae.kernels import SparseCode

HISTOGRAM_EDGES = [-7.0 + 0.25 * i for i in range(29)]
"""Edges of the log10-density histogram: 1e-7 to 1, four bins per decade."""
_BLOCK = 1 << 25
"""Cosines held at once (128 MB in fp32), so that a full d_sae x d_sae matrix never exists."""


class Entries:
    """The active entries of a code on the CPU in fp64: exact zeros (padding of the top-k kinds) are left out."""

    def __init__(self, code: SparseCode) -> None:
        rows, indices, values = code.rows(), code.indices, code.values
        if not bool((active := values != 0).all()):
            rows, indices, values = rows[active], indices[active], values[active]
        self.batch = code.batch
        self.rows: Int64[Tensor, " nnz"] = rows.cpu()
        self.indices: Int64[Tensor, " nnz"] = indices.cpu()
        self.values: Float64[Tensor, " nnz"] = values.double().cpu()

    def l0(self) -> Float64[Tensor, " batch"]:
        """Active latents per row."""
        return torch.bincount(self.rows, minlength=self.batch).double()


class LatentActivity:
    """Running count, sum, sum of squares and maximum of every latent, over all held-out rows (zeros included)."""

    def __init__(self, d_sae: int) -> None:
        self.n = 0
        self.count = torch.zeros(d_sae, dtype=torch.int64)
        self.peak = torch.zeros(d_sae, dtype=torch.float64)
        self._sum = torch.zeros(d_sae, dtype=torch.float64)
        self._square = torch.zeros(d_sae, dtype=torch.float64)

    def update(self, entries: Entries) -> None:
        """Add the codes of some rows."""
        size = len(self.count)
        self.n += entries.batch
        self.count += torch.bincount(entries.indices, minlength=size)
        self._sum += torch.bincount(entries.indices, entries.values, minlength=size)
        self.peak.scatter_reduce_(0, entries.indices, entries.values, "amax")
        self._square += torch.bincount(entries.indices, entries.values.square(), minlength=size)

    @property
    def l0(self) -> float:
        """Mean number of active latents per row."""
        return float(self.count.sum()) / self.n

    @property
    def alive(self) -> Int64[Tensor, " alive"]:
        """Latents that fired at least once."""
        return self.count.nonzero()[:, 0]

    @property
    def density(self) -> Float64[Tensor, " d_sae"]:
        """Share of rows on which each latent is active."""
        return self.count.double() / self.n

    @property
    def variance(self) -> Float64[Tensor, " d_sae"]:
        """E[z_j^2] - E[z_j]^2 over all rows, at least 0."""
        return (self._square / self.n - (self._sum / self.n).square()).clamp_min(0.0)


def density_histogram(
    density: Float64[Tensor, " d_sae"],
) -> dict[str, list[float] | list[int] | int]:
    """Return counts of log10(density) between `edges` for the latents that fired, and how many never did.

    Densities under the lowest edge are counted in the lowest bin.
    """
    alive = density[density > 0].log10().clamp_min(HISTOGRAM_EDGES[0])
    edges = torch.tensor(HISTOGRAM_EDGES, dtype=torch.float64)
    counts = torch.histogram(alive, edges).hist.long()
    return {
        "edges": HISTOGRAM_EDGES,
        "counts": counts.tolist(),
        "never": int((density == 0).sum()),
    }


RELATIVE_NORM = "relative_norm"
"""Array of a crosscoder's latents: their decoder rows' share in a source, named behind it in brackets."""
ALONE, EVEN = 0.9, 0.8


def whose(
    relative: dict[str, Float64[Tensor, " d_sae"]], density: Float64[Tensor, " d_sae"]
) -> dict[str, dict[str, int]]:
    """Return how many live latents of a crosscoder are one source's (r > 0.9), shared evenly by all, or neither.

    Shared evenly: no source has under 0.8 of its even share (of two: r between 0.4 and 0.6).
    """
    r = torch.stack([*relative.values()])[:, density > 0]
    alone, even = r > ALONE, r.amin(0) >= EVEN / len(r)
    found = dict(zip(relative, alone.sum(1).tolist(), strict=True))
    between = int((~even & ~alone.any(0)).sum())
    return {"alone": found, "of_all": {"evenly": int(even.sum()), "between": between}}


def unit_rows(W: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "d_sae d_in"]:
    """Scale each row to length 1 (fp32); a row of zeros stays zero."""
    return torch.nn.functional.normalize(W.detach().float(), dim=1)


def decoder_max_cosine(W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, " d_sae"]:
    """Return max over k != j of |cos(W_dec[j], W_dec[k])| for every latent j; NaN when there is only one."""
    units = unit_rows(W_dec)
    d_sae = len(units)
    if d_sae < 2:
        return torch.full((d_sae,), float("nan"), dtype=torch.float32)
    out, size = [], max(1, _BLOCK // d_sae)
    for start in range(0, d_sae, size):
        block = (units[start : start + size] @ units.T).abs_()
        block.diagonal(start).fill_(-1.0)
        out.append(block.amax(1).clamp_max(1.0))
    return torch.cat(out).cpu()


def nearest(
    a: Float[Tensor, "n_a d_in"], b: Float[Tensor, "n_b d_in"]
) -> tuple[Float[Tensor, " n_a"], Int64[Tensor, " n_a"]]:
    """Return, for each unit row of `a`, the largest signed cosine with the unit rows of `b` and where it is."""
    if not len(a):
        return torch.zeros(0, dtype=torch.float32), torch.zeros(0, dtype=torch.int64)
    size = max(1, _BLOCK // len(b))
    best = [(a[start : start + size] @ b.T).max(1) for start in range(0, len(a), size)]
    cosine = torch.cat([part.values for part in best]).clamp(-1.0, 1.0)
    return cosine.cpu(), torch.cat([part.indices for part in best]).cpu()


# Which latent of one SAE corresponds to which of another, by the direction of their decoder rows.


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

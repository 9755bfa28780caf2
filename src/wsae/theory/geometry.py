"""Superposition matrices W_p [d_in, n_features] in float64: the geometries of Section 3 and Elhage et al. 2022.

A column is one feature's direction. Interference is the cosine between two columns.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Shaped
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from wsae.core.errors import UserError
from wsae.core.seeds import seed_for

TOLERANCE = 1e-9
"""Cosines and entries this small count as zero."""


def orthogonal(n: int) -> Float64[Tensor, "n n"]:
    """Return the identity [n, n]: every feature has a dimension of its own (monosemantic)."""
    return torch.eye(_positive(n, "n"), dtype=torch.float64)


def digons(pairs: int) -> Float64[Tensor, "pairs n"]:
    """Return [pairs, 2 pairs]: the columns e_1, -e_1, e_2, -e_2, ... (two features to a dimension)."""
    return torch.kron(orthogonal(_positive(pairs, "pairs")), torch.tensor([[1.0, -1.0]]).double())


def polygon(p: int) -> Float64[Tensor, "2 p"]:
    """Return [2, p]: p unit vectors in the plane, evenly spaced, the first along the second axis (Example 2).

    Gram entries are cos(2 pi (i - j) / p). Raises UserError for p < 3.
    """
    if p < 3:
        raise UserError(f"polygon({p}): needs 3 features or more; use digons(1) for two")
    angle = torch.arange(p, dtype=torch.float64) * (2 * math.pi / p)
    return torch.stack([angle.sin(), angle.cos()])


def simplex(p: int) -> Float64[Tensor, "d_in p"]:
    """Return [p - 1, p]: p unit vectors with pairwise interference exactly -1/(p - 1), the Gram matrix of Eq. 19.

    p = 1 is one feature alone ([1, 1]); p = 2 is a digon, p = 3 the triangle of Example 2.
    """
    if _positive(p, "p") == 1:
        return orthogonal(1)
    gram = (torch.eye(p, dtype=torch.float64) * p - 1) / (p - 1)
    return _vectors(gram, p - 1)


def direct_sum(*blocks: Float[Tensor, "_ _"]) -> Float64[Tensor, "d_in n"]:
    """Return the block-diagonal matrix of the blocks: features of different blocks do not interfere."""
    if not blocks:
        raise UserError("direct_sum: needs one block or more")
    return torch.block_diag(*(block.double() for block in blocks))


def normal(seed: int, *shape: int) -> Tensor:
    """Return standard normal numbers."""
    made = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=made, dtype=torch.float64)


def orthonormal(seed: int, rows: int, columns: int) -> Float64[Tensor, "rows columns"]:
    """Return random orthonormal columns."""
    return torch.linalg.qr(normal(seed, rows, columns)).Q


def random_unit(d_in: int, n: int, seed: int) -> Float64[Tensor, "d_in n"]:
    """Return n independent directions, uniform on the unit sphere of d_in dimensions."""
    W_p = normal(seed, _positive(d_in, "d_in"), _positive(n, "n"))
    return W_p / W_p.norm(dim=0)


def nonpositive(d_in: int, n: int, seed: int) -> Float64[Tensor, "d_in n"]:
    """Return n random unit columns with pairwise non-positive interference (the assumption of Theorems 2 and 3).

    Blocks of irregular simplices (weighted graph Laplacians as Gram matrices), one block of independent obtuse
    vectors, rotated at random. Raises UserError for n > 2 d_in: in d_in dimensions at most 2 d_in non-zero vectors
    have pairwise non-positive inner products.
    """
    if _positive(n, "n") > 2 * _positive(d_in, "d_in"):
        raise UserError(
            f"nonpositive: {n} features in {d_in} dimensions; at most {2 * d_in} non-zero vectors can have pairwise "
            "non-positive inner products; use fewer features, more dimensions, or random_unit"
        )
    made = torch.Generator().manual_seed(seed)
    closed = _draw(max(0, n - d_in), n // 2, made)
    sizes = [2] * closed + [0]
    for _ in range(n - 2 * closed):
        sizes[_draw(0, closed, made)] += 1
    blocks = [_vectors(_obtuse(p, made, 0.0), p - 1) for p in sizes[:-1]]
    blocks += [_vectors(_obtuse(sizes[-1], made, 0.5), sizes[-1])] if sizes[-1] else []
    inner = torch.block_diag(*blocks)
    padded = torch.cat([inner, inner.new_zeros(d_in - len(inner), n)])
    rotation = torch.linalg.qr(torch.randn(d_in, d_in, generator=made, dtype=torch.float64)).Q
    return rotation @ padded


def gram(W_p: Tensor) -> Tensor:
    """Return W_p W_p^T: the covariance of x_p for iid features of variance 1."""
    return W_p @ W_p.T


def rotation(seed: int, number: int, d: int) -> Tensor:
    """Return a random orthogonal matrix [d, d]."""
    return orthonormal(seed_for(seed, "rotation", number, d), d, d)


def blocks(seed: int, count: int) -> list[Tensor]:
    """Return direct sums of one monosemantic dimension and two to four random blocks."""
    made = torch.Generator().manual_seed(seed_for(seed, "blocks"))
    kinds = (orthogonal(1), digons(1), polygon(3), polygon(5), simplex(4))
    worlds = []
    for _ in range(count):
        size = int(torch.randint(2, 5, (1,), generator=made))
        picks = torch.randint(1, len(kinds), (size,), generator=made).tolist()
        worlds.append(direct_sum(orthogonal(1), *(kinds[i] for i in picks)))
    return worlds


def uneven(seed: int, count: int) -> list[Tensor]:
    """Return random directions in dimensions of unequal loudness."""
    loud = torch.logspace(-0.5, 0.5, 5, dtype=torch.float64)[:, None]
    return [loud * random_unit(5, 9, seed_for(seed, "uneven", i)) for i in range(count)]


def shared_blocks() -> list[Tensor]:
    """Return a monosemantic dimension beside one or two simplices, axis by axis: interference is non-positive."""
    simplices = [(3,), (4,), (5,), (2, 3), (3, 3), (3, 4)]
    return [direct_sum(orthogonal(1), *(simplex(p) for p in sizes)) for sizes in simplices]


def interference(W_p: Float[Tensor, "d_in n"]) -> Float64[Tensor, "n n"]:
    """Return the cosines between columns with a zero diagonal: W_p^T W_p - I when columns have unit length."""
    unit = check_W_p(W_p) / W_p.double().norm(dim=0)
    cosines = unit.T @ unit
    return cosines - torch.diag(cosines.diagonal())


def check_W_p(W_p: Shaped[Tensor, "..."]) -> Float64[Tensor, "d_in n"]:
    """Return W_p in float64; raises UserError when it is not [d_in, n], not finite, or has a zero column."""
    if W_p.ndim != 2 or 0 in W_p.shape:
        raise UserError(
            f"W_p has shape {list(W_p.shape)}; it must be [d_in, n_features], each at least 1"
        )
    matrix = W_p.detach().double().cpu()
    if not bool(torch.isfinite(matrix).all()):
        row, column = (~torch.isfinite(matrix)).nonzero()[0].tolist()
        raise UserError(f"W_p[{row}, {column}] is {float(matrix[row, column])}; it must be finite")
    silent = (matrix.norm(dim=0) == 0).nonzero()
    if len(silent):
        raise UserError(
            f"W_p: column {int(silent[0, 0])} is zero, so that feature leaves no trace; drop the column"
        )
    return matrix


@dataclass(frozen=True)
class Geometry:
    """What superposition looks like in a W_p."""

    d_in: int
    n_features: int
    rank: int
    blocks: tuple[tuple[int, ...], ...]
    """Features that interfere, directly or through others: the connected components, largest first."""
    features_of: tuple[tuple[int, ...], ...]
    """For each dimension, the features with a non-zero entry there (more than one: superposed, polysemantic)."""
    interferers: tuple[int, ...]
    """For each feature, how many others it interferes with."""
    most_positive: float
    """The largest interference; at most 0 under the paper's assumption."""
    most_negative: float
    unit_norm: bool
    """Whether all columns have length 1."""

    @property
    def nonpositive(self) -> bool:
        """Return whether no pair interferes positively (Section 3's assumption)."""
        return self.most_positive <= TOLERANCE


def describe(W_p: Float[Tensor, "d_in n"]) -> Geometry:
    """Return the measures of W_p; see Geometry. Raises UserError like check_W_p."""
    matrix = check_W_p(W_p)
    cosines = interference(matrix)
    linked = cosines.abs() > TOLERANCE
    norms = matrix.norm(dim=0)
    count, block_of = connected_components(linked.numpy(), directed=False)
    blocks = [tuple(np.flatnonzero(block_of == block).tolist()) for block in range(count)]
    return Geometry(
        d_in=matrix.shape[0],
        n_features=matrix.shape[1],
        rank=int(torch.linalg.matrix_rank(matrix)),
        blocks=tuple(sorted(blocks, key=lambda block: (-len(block), block))),
        features_of=tuple(
            tuple((row.abs() > TOLERANCE * norms).nonzero()[:, 0].tolist()) for row in matrix
        ),
        interferers=tuple(linked.sum(1).tolist()),
        most_positive=float(cosines.max()),
        most_negative=float(cosines.min()),
        unit_norm=bool((norms - 1).abs().max() <= TOLERANCE),
    )


def _obtuse(p: int, made: torch.Generator, extra: float) -> Tensor:
    """Return a random unit-diagonal Gram matrix with negative off-diagonal: rank p - 1 when `extra` is 0, else p."""
    weights = torch.rand(p, p, generator=made, dtype=torch.float64) + 0.05
    weights = (weights + weights.T).fill_diagonal_(0)
    degree = weights.sum(1) + extra
    laplacian = torch.diag(degree) - weights
    return laplacian / (degree[:, None] * degree).sqrt()


def _vectors(gram: Tensor, rank: int) -> Tensor:
    """Return columns [rank, p] whose Gram matrix is `gram`."""
    values, vectors = torch.linalg.eigh(gram)
    columns = (vectors[:, -rank:] * values[-rank:].clamp_min(0).sqrt()).T
    return columns / columns.norm(dim=0)


def _draw(low: int, high: int, made: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=made))


def _positive(n: int, name: str) -> int:
    if n < 1:
        raise UserError(f"{name} = {n}; it must be at least 1")
    return n

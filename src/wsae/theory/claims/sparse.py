"""Theorem 2 and Section 4.2: what extreme sparsity gives, and what it does not."""

import torch
from torch import Tensor

from wsae.core.seeds import seed_for
from wsae.theory.claims.record import Claim
from wsae.theory.geometry import TOLERANCE, interference, nonpositive, polygon, simplex
from wsae.theory.limits import one_sparse_residuals
from wsae.theory.losses import closed_form, code, grid, sae_loss, superpose
from wsae.theory.optimise import minimise

TOWARDS_ONE = (0.5, 0.9, 0.99, 0.999)


def theorem_2(seed: int) -> Claim:
    """Theorem 2: W_p^T minimises L_SAE as S -> 1 when interference is non-positive."""
    worlds = _nonpositive_worlds(seed)
    first = max(
        float(one_sparse_residuals(closed_form(W_p, W_p.shape[1] + i % 3), W_p).max())
        for i, W_p in enumerate(worlds)
    )
    short, mended = _short_column()
    triangle = {S: _best_over_closed_form(polygon(3), 3, S, seed) for S in TOWARDS_ONE}
    spare = {S: _best_over_closed_form(simplex(4), 5, S, seed) for S in TOWARDS_ONE}
    orders = [_loss(polygon(3), S) / (1 - S) ** 2 for S in TOWARDS_ONE]
    path = ", ".join(f"{ratio:.4f}" for ratio in triangle.values())
    return Claim(
        claim="If interference is non-positive and S -> 1, W_m* = I*(W_p, 0)^T is in argmin L_SAE.",
        source="Theorem 2",
        verdict="holds if",
        condition="Columns have unit length, and only the leading order in 1 - S counts (the 1-sparse loss, which "
        "is 0). At a fixed S < 1 other W_m are better; with n_m > n that stays so in the limit.",
        evidence=f"1-sparse loss of W_p^T at most {first:.0e} over {len(worlds)} random W_p; a column of length "
        f"0.8 leaves {short:.3f} where W_m with unit rows has {mended:.0e}. Triangle: least loss found / loss of "
        f"W_p^T at S = 0.5, 0.9, 0.99, 0.999: {path}, both of order (1-S)^2. A tetrahedron with one spare latent: "
        f"{spare[0.999]:.2f} at S = 0.999.",
        instances=len(worlds) + 2 + 2 * len(TOWARDS_ONE),
        numbers={"worst_one_sparse_loss": first, "short_column": short, "short_mended": mended}
        | {f"triangle_ratio_S{S:g}": ratio for S, ratio in triangle.items()}
        | {f"tetrahedron_spare_ratio_S{S:g}": ratio for S, ratio in spare.items()}
        | {f"loss_over_square_S{S:g}": v for S, v in zip(TOWARDS_ONE, orders, strict=True)},
    )


def arbitrary_x(seed: int) -> Claim:
    """Theorem 2: accordingly sigma(W_m* x_p) = x for arbitrary x."""
    x = torch.tensor([[0.5, 1.0, 0.8]], dtype=torch.float64)
    W_p = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, -1.0]], dtype=torch.float64)
    error = float((code(closed_form(W_p), superpose(W_p, x)) - x).abs().max())
    exact = agree = points = 0
    for matrix in _nonpositive_worlds(seed, 8):
        features, _ = grid(matrix.shape[1], 0.5, 2)
        recovered = _recovered(matrix, features)
        agree += int((recovered == _no_clash(matrix, features)).sum())
        exact += int(recovered.sum())
        points += len(features)
    return Claim(
        claim="Accordingly I* sigma(W_m* x_p) = x for arbitrary x.",
        source="Theorem 2",
        verdict="counterexample",
        condition="No two active features interfere (for example x is 1-sparse); as S -> 1 such x have "
        "probability -> 1.",
        evidence=f"Example 1's own x and W_p: x_m differs from x by {error:.1f}. On {points:,} points of 8 random "
        f"W_p with unit columns, x_m = x exactly where no two active features interfere ({agree:,} agree; "
        f"{exact / points:.0%} of points are recovered).",
        instances=points + 1,
        numbers={"example_1_error": error, "agree": agree / points, "recovered": exact / points},
    )


def one_sparse_features(seed: int) -> Claim:
    """Section 4.2: feature shrinking and vanishing do not happen to 1-sparse features."""
    worlds = _nonpositive_worlds(seed)
    worst = max(_one_sparse_error(W_p) for W_p in worlds)
    pentagon = code(closed_form(polygon(5)), polygon(5).T.contiguous())
    extra = int((pentagon[0] > TOLERANCE).sum()) - 1
    spill = float(pentagon[0, 1:].max())
    short = 0.8**2
    return Claim(
        claim="Feature shrinking and vanishing do not happen to 1-sparse features.",
        source="Section 4.2",
        verdict="holds if",
        condition="Columns have unit length (else x_m = ||w||^2 x). For x_m = x interference must also be "
        "non-positive.",
        evidence=f"x = x_u e_u comes back with error {worst:.0e} at most over {len(worlds)} random non-positive "
        f"W_p. A column of length 0.8 shrinks to {short:.2f}. In a pentagon nothing shrinks, but {extra} more "
        f"latents speak, at {spill:.3f} of x.",
        instances=len(worlds) + 2,
        numbers={"worst_error": worst, "short_column_ratio": short, "pentagon_spill": spill}
        | {"pentagon_extra_latents": float(extra)},
    )


def _nonpositive_worlds(seed: int, count: int = 20) -> list[Tensor]:
    shapes = ((2, 3), (2, 4), (3, 4), (3, 5), (4, 6))
    return [
        nonpositive(*shapes[i % len(shapes)], seed_for(seed, "sparse", i)) for i in range(count)
    ]


def _loss(W_p: Tensor, S: float) -> float:
    features, probability = grid(W_p.shape[1], S, 1)
    return float(sae_loss(closed_form(W_p), W_p, features, probability))


def _best_over_closed_form(W_p: Tensor, d_sae: int, S: float, seed: int) -> float:
    """Return the least loss found over the loss of the padded closed form (x_i constant where active)."""
    features, probability = grid(W_p.shape[1], S, 1)
    start = closed_form(W_p, d_sae)
    best = minimise(W_p, d_sae, features, probability, init=start, starts=24, seed=seed, steps=200)
    return best.loss / float(sae_loss(start, W_p, features, probability))


def _short_column() -> tuple[float, float]:
    """Return the 1-sparse loss of W_p^T when one of a digon's columns has length 0.8, and with unit rows instead."""
    W_p = torch.tensor([[1.0, -0.8]], dtype=torch.float64)
    rows = closed_form(W_p / W_p.norm(dim=0))
    own, unit = (float(one_sparse_residuals(W_m, W_p).sum()) for W_m in (closed_form(W_p), rows))
    return own, unit


def _recovered(W_p: Tensor, features: Tensor) -> Tensor:
    latents = code(closed_form(W_p), superpose(W_p, features))
    return (latents - features).abs().amax(1) <= TOLERANCE


def _no_clash(W_p: Tensor, features: Tensor) -> Tensor:
    """Mark the points where no two active features interfere."""
    linked = (interference(W_p).abs() > TOLERANCE).double()
    active = (features > 0).double()
    return ((active @ linked) * active).sum(1) == 0


def _one_sparse_error(W_p: Tensor) -> float:
    latents = code(closed_form(W_p), W_p.T.contiguous())
    return float((latents - torch.eye(len(latents), dtype=torch.float64)).abs().max())


CHECKS = (theorem_2, arbitrary_x, one_sparse_features)

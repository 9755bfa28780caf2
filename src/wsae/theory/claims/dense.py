"""Theorem 1: is W_p^T the minimiser of the SAE loss at general sparsity?"""

from fractions import Fraction
from itertools import product

import torch
from torch import Tensor

from wsae.core.seeds import seed_for
from wsae.theory.claims.record import Claim
from wsae.theory.geometry import digons, direct_sum, orthogonal, polygon, simplex
from wsae.theory.losses import closed_form, grid, sae_loss
from wsae.theory.optimise import minimise
from wsae.theory.zeros import distance


def theorem_1(seed: int) -> Claim:
    """Theorem 1: W_p^T (padded, reordered) minimises L_SAE when the superposed columns form digons or polygons."""
    exact = _triangle_by_hand()
    zero, tried = _digons_reach_zero(seed)
    found = {name: _search(W_p, S, levels, seed) for name, (W_p, S, levels) in _worlds().items()}
    spare = _signed_identity_loss()
    lower = {name: 1 - best / own for name, (best, own, _) in found.items()}
    turned = found["one_and_triangle_dense"][2]
    dense = lower["one_and_triangle_dense"]
    return Claim(
        claim="W_m* = I*(W_p, 0)^T is in argmin L_SAE when the superposed columns of W_p form digons or polygons.",
        source="Theorem 1",
        verdict="counterexample",
        condition="Every block is a digon or a monosemantic dimension: then the loss is 0 for every x (any n_m >= n).",
        evidence=f"Digons: loss {zero:g} over {tried} instances. Triangle of Example 2, x in {{0, 1}}^3, S = 1/2, in "
        f"rational arithmetic: L(W_p^T) = {exact[0]}, and {exact[1]} for sqrt(6/5) W_p^T, 20 % lower. Searches: "
        f"{', '.join(f'{k} {v:.0%}' for k, v in _shown(lower).items())} lower; a monosemantic dimension beside a dense "
        f"triangle {dense:.0%} lower, with other directions (a unit row moves by {turned:.2f}).",
        instances=tried + len(found) + 2,
        numbers={
            "digons_worst_loss": zero,
            "triangle_closed_form": float(exact[0]),
            "triangle_scaled": float(exact[1]),
            "spare_latents_loss": spare,
            "farthest_row_dense": turned,
        }
        | {f"lower_{name}": share for name, share in lower.items()},
    )


def _worlds() -> dict[str, tuple[Tensor, float, int]]:
    """Return worlds of regular blocks: W_p, sparsity, levels of the exact grid."""
    return {
        "triangle": (polygon(3), 0.5, 1),
        "triangle_four_levels": (polygon(3), 0.5, 4),
        "triangle_dense": (polygon(3), 0.0, 4),
        "tetrahedron": (simplex(4), 0.5, 1),
        "simplex_of_5": (simplex(5), 0.5, 1),
        "pentagon": (polygon(5), 0.5, 1),
        "one_and_triangle_dense": (direct_sum(orthogonal(1), polygon(3)), 0.0, 4),
    }


def _shown(lower: dict[str, float]) -> dict[str, float]:
    names = ("triangle", "tetrahedron", "simplex_of_5", "pentagon")
    return {name.replace("_", " "): lower[name] for name in names}


def _search(W_p: Tensor, S: float, levels: int, seed: int) -> tuple[float, float, float]:
    """Return the lowest loss found, the closed form's, and how far the unit rows moved from W_p^T."""
    n = W_p.shape[1]
    features, probability = grid(n, S, levels)
    start = closed_form(W_p)
    best = minimise(W_p, n, features, probability, init=start, starts=8, seed=seed)
    own = float(sae_loss(start, W_p, features, probability))
    rows = best.W_m / best.W_m.norm(dim=1, keepdim=True)
    return best.loss, own, distance(rows, start)


def _triangle_by_hand() -> tuple[Fraction, Fraction]:
    """Return L(W_p^T) and L(sqrt(6/5) W_p^T) for the triangle with x in {0, 1}^3 equally likely, exactly.

    With W_m = sqrt(a) W_p^T and G = W_p^T W_p the loss is E[v^T G v], v = x - a ReLU(G x): all rational.
    """
    half = Fraction(1, 2)
    gram = [[Fraction(1) if i == j else -half for j in range(3)] for i in range(3)]

    def loss(a: Fraction) -> Fraction:
        total = Fraction(0)
        for x in product((0, 1), repeat=3):
            pre = [sum(gram[i][j] * x[j] for j in range(3)) for i in range(3)]
            v = [x[i] - a * max(Fraction(0), pre[i]) for i in range(3)]
            total += sum(v[i] * gram[i][j] * v[j] for i in range(3) for j in range(3))
        return total / 8

    return loss(Fraction(1)), loss(Fraction(6, 5))


def _digons_reach_zero(seed: int) -> tuple[float, int]:
    """Return the worst relative loss at the padded, reordered closed form over worlds of digons, and their number."""
    worst, tried = 0.0, 0
    for i in range(24):
        made = torch.Generator().manual_seed(seed_for(seed, "digons", i))
        W_p = direct_sum(digons(1 + i % 3), orthogonal(1 + i % 2))
        n = W_p.shape[1]
        features = torch.rand(64, n, generator=made, dtype=torch.float64)
        probability = torch.full((64,), 1 / 64, dtype=torch.float64)
        order = torch.randperm(n + i % 3, generator=made).tolist()
        loss = sae_loss(closed_form(W_p, n + i % 3, order), W_p, features, probability)
        worst, tried = max(worst, float(loss)), tried + 1
    return worst, tried


def _signed_identity_loss() -> float:
    """Return the loss of [I; -I; 0] on the pentagon (n_m = 5 > 2 n_p): enough latents for any x_p."""
    W_p = polygon(5)
    features, probability = grid(5, 0.5, 1)
    eye = torch.eye(2, dtype=torch.float64)
    W_m = torch.cat([eye, -eye, torch.zeros(1, 2, dtype=torch.float64)])
    return float(sae_loss(W_m, W_p, features, probability))


CHECKS = (theorem_1,)

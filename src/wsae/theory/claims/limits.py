"""Appendix A.2: the steps behind Theorems 2 and 3 (Eq. 26, Top-k and JumpReLU, Eq. 35)."""

import itertools
import math

import torch
from torch import Tensor

from wsae.core.seeds import seed_for
from wsae.theory.claims.minima import POLYSEMANTIC_IDENTITY, away_from_identity
from wsae.theory.geometry import (
    interference,
    nonpositive,
    normal,
    orthogonal,
    polygon,
    random_unit,
    simplex,
)
from wsae.theory.limits import (
    first_order,
    jumprelu_window,
    one_sparse_residuals,
    second_moment,
    topk_bound,
    topk_code,
    zero_solutions,
)
from wsae.theory.losses import (
    closed_form,
    code,
    grid,
    keep_largest,
    minimise,
    sae_loss,
    sae_residual,
    superpose,
)
from wsae.theory.record import Claim

THRESHOLD = 0.25


def jumprelu(seed: int) -> Claim:
    """Appendix A: JumpReLU(x, c) = ReLU(x - c)."""
    x = normal(seed_for(seed, "activations", "jumprelu"), 500, 6)
    true, paper = x * (x > THRESHOLD), (x - THRESHOLD).relu()
    active = true > 0
    same_support = bool((active == (paper > 0)).all())
    shift = float((true - paper)[active].mean())
    added = float((true - paper - THRESHOLD * active).abs().max())
    at_zero = float((x * (x > 0) - x.relu()).abs().max())
    return Claim(
        claim="JumpReLU(x, c) = ReLU(x - c), so results for ReLU carry over.",
        verdict="counterexample",
        slip=True,
        condition="c = 0; or ReLU(x - c) + c H(x - c) with H(0) = 0, which is JumpReLU.",
        evidence=f"A shifted ReLU: at c = {THRESHOLD} it is {shift:.2f} below JumpReLU(x) = x H(x - c) wherever it "
        f"is active, over {x.numel():,} values (same active set: {same_support}). JumpReLU exists to avoid that "
        f"shrinkage. With c H(x - c) added the difference is {added:.0e}; at c = 0 it is {at_zero:.0e}.",
        instances=x.numel(),
        numbers={"threshold": THRESHOLD, "mean_shift": shift, "with_the_step": added}
        | {"at_threshold_zero": at_zero},
    )


def top_k(seed: int) -> Claim:
    """Appendix A: Top-k(x) = ReLU(x - x_(k+1)) + x_(k+1) H(x - x_(k+1)), H(0) = 1."""
    example = torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64)
    x = normal(seed_for(seed, "activations", "topk"), 500, 6)
    sizes = range(1, x.shape[1])
    wrong = [int((_paper(x, k) != keep_largest(x, k)).any(1).sum()) for k in sizes]
    extra = [int((_paper(x, k) != 0).sum(1).max()) - k for k in sizes]
    strict = max(float((_paper(x, k, strict=True) - keep_largest(x, k)).abs().max()) for k in sizes)
    tied = _paper(torch.tensor([[2.0, 2.0, 1.0]], dtype=torch.float64), 1, strict=True)
    shown = _paper(example, 1)[0].tolist()
    return Claim(
        claim="Top-k(x) = ReLU(x - x_(k+1) 1) + x_(k+1) H(x - x_(k+1) 1) with H(x) = 1[x >= 0].",
        verdict="counterexample",
        slip=True,
        condition="H(0) = 0 (a strict step) and the k-th and (k+1)-th entries differ.",
        evidence=f"It keeps the (k+1)-th entry too: x = (3, 2, 1), k = 1 gives ({', '.join(f'{v:g}' for v in shown)}). "
        f"Wrong on {sum(wrong) / (len(x) * len(wrong)):.0%} of {len(x) * len(wrong):,} random cases, by {max(extra)} "
        f"entry each. With a strict step the difference is {strict:.0e}; a tie, x = (2, 2, 1), then keeps none "
        f"({int((tied != 0).sum())} entries).",
        instances=len(x) * len(wrong) + 2,
        numbers={"wrong_share": sum(wrong) / (len(x) * len(wrong)), "extra_entries": float(max(extra))}
        | {"strict_error": strict, "entries_at_a_tie": float((tied != 0).sum())},
    )  # fmt: skip


def _paper(x: Tensor, k: int, strict: bool = False) -> Tensor:
    """Return Appendix A's formula; `strict` takes H(0) = 0."""
    next_one = x.sort(dim=1, descending=True).values[:, k : k + 1]
    step = x > next_one if strict else x >= next_one
    return (x - next_one).relu() + next_one * step


def reordering(seed: int) -> Claim:
    """Eq. 15: reordering the rows of W_m, or padding it with zero rows, leaves L_SAE unchanged."""
    worst = 0.0
    for i in range(24):
        made = torch.Generator().manual_seed(seed_for(seed, "order", i))
        d, n, spare = 2 + i % 3, 4 + i % 3, i % 4
        W_p = random_unit(d, n, seed_for(seed, "W_p", i))
        features, probability = grid(n, 0.5, 1)
        W_m = torch.randn(n, d, generator=made, dtype=torch.float64)
        padded = torch.cat([W_m, W_m.new_zeros(spare, d)])
        padded = padded[torch.randperm(n + spare, generator=made)]
        own, other = (float(sae_loss(W, W_p, features, probability)) for W in (W_m, padded))
        worst = max(worst, abs(own - other) / own)
    return Claim(
        claim="If W_m minimises L_SAE, so does W_m with its rows reordered and zero rows added.",
        verdict="holds",
        evidence=f"Relative change of the loss at most {worst:.0e} over 24 random W_p, W_m, orders and paddings.",
        instances=24,
        numbers={"worst_relative_change": worst},
    )


def orders(seed: int) -> Claim:
    """Theorem 1: I* is formed by swapping row i with row j != i of the identity (also Theorems 2, 3, Eq. 6)."""
    W_p = nonpositive(3, 4, seed_for(seed, "orders"))
    given = (W_p, *grid(4, 0.5, 2))
    own = float(sae_loss(closed_form(W_p), *given))
    every = list(itertools.permutations(range(4)))
    worst = max(abs(float(sae_loss(closed_form(W_p, 4, order), *given)) - own) for order in every)
    swaps = sum(sum(i != at for i, at in enumerate(order)) == 2 for order in every)
    return Claim(
        claim="The minimisers are I*(W_p, 0)^T with I* formed by swapping row i with row j != i of the identity.",
        verdict="counterexample",
        slip=True,
        condition="I* is any permutation matrix, a product of swaps; Eq. 15 uses only that (I*)^T I* = I.",
        evidence=f"Of the {len(every)} orders of four rows {swaps} are one swap; W_p^T itself (no swap) and the others "
        f"have the same loss (to {worst:.0e}).",
        instances=len(every),
        numbers={"orders": float(len(every)), "swaps": float(swaps), "worst_difference": worst},
    )


def zero_mean_residual(seed: int) -> Claim:  # noqa: ARG001  (nothing random)
    """Eq. 18: the gradient of L_SAE is zero if and only if the mean residual E[x_p - W_m^T sigma(W_m x_p)] is zero."""
    triangle, tetrahedron = (
        _mean_and_gradient(closed_form(W), W) for W in (polygon(3), simplex(4))
    )
    eye = orthogonal(2)
    flat_mean, flat_slope = _mean_and_gradient(torch.zeros_like(eye), eye)
    return Claim(
        claim="The gradient of L_SAE vanishes if and only if the mean residual E[x_p - x_p_hat] does.",
        verdict="counterexample",
        condition="The residual is 0 for every x (digons, monosemantic dimensions); a zero mean is not enough, because "
        "the gradient is a correlation of the residual with the code and with x_p.",
        evidence=f"Triangle at W_p^T, S = 0.5: mean residual {triangle[0]:.0e}, gradient norm "
        f"{triangle[1]:.3f} (tetrahedron {tetrahedron[1]:.3f}). Conversely W_m = 0 for W_p = I_2 has "
        f"gradient {flat_slope:.0f} and mean residual {flat_mean:.2f}.",
        instances=3,
        numbers={
            "triangle_mean_residual": triangle[0],
            "triangle_gradient": triangle[1],
            "tetrahedron_mean_residual": tetrahedron[0],
            "tetrahedron_gradient": tetrahedron[1],
            "zero_W_m_gradient": flat_slope,
            "zero_W_m_mean_residual": flat_mean,
        },
    )


def _mean_and_gradient(W_m: Tensor, W_p: Tensor) -> tuple[float, float]:
    """Return the norms of the mean residual and of the loss's gradient, S = 0.5, uniform magnitudes on four levels."""
    features, probability = grid(W_p.shape[1], 0.5, 4)
    mean = probability @ sae_residual(W_m, superpose(W_p, features))
    at = W_m.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(sae_loss(at, W_p, features, probability), at)
    return float(mean.norm()), float(slope.norm())


def polygon_gram(seed: int) -> Claim:  # noqa: ARG001  (nothing random)
    """Eq. 19: the Gram matrix of a digon or polygon of p features is 1 on and -1/(p-1) off the diagonal."""
    away = {p: _away_from_eq_19(polygon(p)) for p in range(3, 9)}
    away[2] = _away_from_eq_19(simplex(2))
    simplices = max(_away_from_eq_19(simplex(p)) for p in range(2, 9))
    positive = math.cos(2 * math.pi / 5)
    return Claim(
        claim="The columns of a digon or polygon of p features have W_p,i . W_p,j = -1/(p-1) for i != j.",
        verdict="holds if",
        condition="p = 2 or 3. For p >= 4 this Gram matrix is the simplex in p - 1 dimensions; a planar polygon has "
        "cos(2 pi (i-j) / p) and, for p >= 5, positive interference.",
        evidence=f"Largest deviation from Eq. 19: p = 2 {away[2]:.0e}, 3 {away[3]:.0e}, 4 {away[4]:.2f}, 5 "
        f"{away[5]:.2f}, 6 {away[6]:.2f}; simplices {simplices:.0e}. Neighbours in a pentagon interfere at "
        f"+{positive:.3f}, against the non-positive interference assumed.",
        instances=len(away) + 7,
        numbers={f"deviation_{p}": v for p, v in sorted(away.items())}
        | {"simplices_worst": simplices, "pentagon_interference": positive},
    )


def _away_from_eq_19(W_p: Tensor) -> float:
    p = W_p.shape[1]
    gram = (torch.eye(p, dtype=torch.float64) * p - 1) / (p - 1)
    return float((W_p.T @ W_p - gram).abs().max())


def transposed(seed: int) -> Claim:
    """Eq. 25: at W_m = (W_p, 0)^T the loss is E ||W_p x - W_p^T sigma(W_p^T W_p x)||^2."""
    W_p = random_unit(3, 3, seed_for(seed, "eq25"))
    features, probability = grid(3, 0.5, 2)
    true = float(sae_loss(closed_form(W_p), W_p, features, probability))
    latents = code(closed_form(W_p), superpose(W_p, features))
    right, written = (
        float((superpose(W_p, features) - superpose(W, latents)).square().sum(1) @ probability)
        for W in (W_p, W_p.T)
    )
    return Claim(
        claim="At W_m = (W_p, 0)^T, L_SAE = E||W_p x - W_p^T sigma(W_p^T W_p x)||^2 (also the last line of Eq. 26).",
        verdict="counterexample",
        slip=True,
        condition="W_p sigma(W_p^T W_p x), without the second transposition: (W_p, 0) times the code.",
        evidence="W_p^T sigma(...) multiplies n x n_p by n: it has a shape only for n = n_p, which Section 3 excludes. "
        f"There, for a random W_p of three features, it gives {written:.3f} where L_SAE is {true:.3f}; W_p sigma(...) "
        f"gives {right:.3f}.",
        instances=1,
        numbers={"true": true, "as_written": written, "without_it": right},
    )


def coefficient(seed: int) -> Claim:
    """Eq. 26: the 1-sparse part of the loss is n S^(n-1) (1-S) sum_u E L(x_u e_u)."""
    ours, papers = [], {}
    for i in range(12):
        n, S = 2 + i % 4, (0.5, 0.9, 0.99)[i % 3]
        W_p = random_unit(2, n, seed_for(seed, "eq26", "W_p", i))
        W_m = normal(seed_for(seed, "eq26", i), n, 2)
        features, probability = grid(n, S, 2)
        lost = sae_residual(W_m, superpose(W_p, features)).square().sum(1)
        alone = (features > 0).sum(1) == 1
        exact = float(lost[alone] @ probability[alone])
        mine = first_order(W_m, W_p, S, second_moment(2))
        ours.append(mine / exact)
        papers[f"paper_over_exact_n{n}"] = n * mine / exact
    worst = max(abs(ratio - 1) for ratio in ours)
    return Claim(
        claim="The 1-sparse part of L_SAE is n S^(n-1) (1-S) sum_u E[L(x_u e_u)].",
        verdict="counterexample",
        slip=True,
        condition="Without the factor n: C(n, 1) and the sum over u both count the choice of u. A positive "
        "constant, so the argmin is the same.",
        evidence="Against exact enumeration for 12 random W_p and W_m (n = 2..5) the paper's expression is n "
        f"times too large; S^(n-1) (1-S) sum_u agrees to {worst:.0e}.",
        instances=12,
        numbers={"worst_relative_error_without_n": worst, **papers},
    )


def zero_gradient(seed: int) -> Claim:
    """Eq. 31: the gradient of the loss of a 1-sparse feature is 0 if and only if its residual is 0."""
    W_p = nonpositive(3, 5, seed_for(seed, "eq31"))
    none = torch.zeros(5, 3, dtype=torch.float64)
    still = _slope_of_alone(none, W_p[:, :1])
    least = math.inf
    for i in range(200):
        made = torch.Generator().manual_seed(seed_for(seed, "eq31", i))
        W_m, u = (
            torch.randn(*size, generator=made, dtype=torch.float64) for size in ((4, 3), (3, 1))
        )
        if bool((W_m @ u > 0).any()):
            residual = float(one_sparse_residuals(W_m, u).sum()) ** 0.5
            active = float((W_m @ u).relu().norm())
            least = min(least, _slope_of_alone(W_m, u) / (residual * active))
    alone = torch.eye(4, dtype=torch.float64)
    even = torch.full((4,), 0.25, dtype=torch.float64)
    found = minimise(simplex(4), 4, alone, even, starts=64, seed=seed, polished=64)
    stuck = [W for W, loss in zip(found.all_W_m, found.losses, strict=True) if loss > 1e-3]
    flat = [W for W in stuck if _slope_of_alone(W, simplex(4)) < 1e-6]
    return Claim(
        claim="dL_u / dW_m = 0 if and only if W_p,u = W_m^T sigma(W_m W_p,u) (from Eq. 30 to Eq. 31).",
        verdict="counterexample",
        condition="Some row is active on W_p,u: with r the residual and a_k = relu(w_k . u), (w_k . r) u + a_k r = 0 "
        "makes r a multiple of u, and then r = 0. For the sum over u (Eq. 28) 'if' alone is right.",
        evidence=f"W_m = 0, like any rows with w . W_p,u <= 0, has gradient {still:.0f} and residual 1. Over 200 "
        f"random W_m with an active row the gradient is at least {least:.2f} times residual times code. Summed over "
        f"a tetrahedron's features the gradient is 0 without residual 0 at the end of {len(flat)} of 64 searches.",
        instances=1 + 200 + 64,
        numbers={"gradient_at_0": still, "least_ratio": least, "stuck": float(len(flat))},
    )


def _slope_of_alone(W_m: Tensor, W_p: Tensor) -> float:
    """Return the norm of the gradient of the loss summed over features alone."""
    at = W_m.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(one_sparse_residuals(at, W_p).sum(), at)
    return float(slope.norm())


def topk_recovery(seed: int) -> Claim:
    """Appendix A.2: under positive interference Top-k(W_p^T W_p,u) = e_u for 1 < k <= n_m - p."""
    pentagon = polygon(5)
    bound = topk_bound(pentagon)
    kept = sorted(topk_code(pentagon, 2)[0].tolist(), reverse=True)[:2]
    wide = [random_unit(4, 9, seed_for(seed, "topk", i)) for i in range(12)]
    first = max(away_from_identity(topk_code(W_p, 1)) for W_p in [pentagon, *wide])
    fails = sum(away_from_identity(topk_code(W_p, 2)) > 1e-6 for W_p in [pentagon, *wide])
    allowed = sum(topk_bound(W_p) >= 2 for W_p in [pentagon, *wide])
    clean = 0.0
    for i in range(8):
        W_p = nonpositive(3, 5, seed_for(seed, "topk", "clean", i))
        for k in range(1, topk_bound(W_p) + 1):
            clean = max(clean, away_from_identity(topk_code(W_p, k)))
    return Claim(
        claim="Under positive interference Top-k with 1 < k <= n_m - p recovers 1-sparse features.",
        verdict="counterexample",
        condition="k = 1 and distinct unit columns, whatever the interference; or non-positive interference, any "
        "k up to n_m - p. With 1 < k Top-k keeps the strongest positive interferer.",
        evidence=f"Pentagon, n_m - p = {bound}: Top-2 of W_p^T W_p,u keeps {kept[0]:.0f} and {kept[1]:.3f}. Top-2 "
        f"fails for {fails} of 13 W_p ({allowed} allow k = 2), Top-1 errs by {first:.0e} at most; non-positive "
        f"W_p, all k allowed: {clean:.0e}.",
        instances=len(wide) + 9,
        numbers={"pentagon_second_kept": kept[1], "pentagon_bound": float(bound)}
        | {"top2_fails": fails / 13, "top1_worst": first, "nonpositive_worst": clean},
    )


def jumprelu_recovery(seed: int) -> Claim:
    """Appendix A.2: JumpReLU can recover 1-sparse features under positive interference."""
    pentagon = polygon(5)
    narrow = jumprelu_window(pentagon, 0.5, 1.0)
    inside = _jumprelu_error(pentagon, sum(narrow) / 2, 0.5, 1.0)
    below = _jumprelu_error(pentagon, narrow[0] * 0.9, 0.5, 1.0)
    wide = jumprelu_window(pentagon, 1e-6, 1.0)
    best = min(_jumprelu_error(pentagon, c / 100, 0.01, 1.0) for c in range(100))
    worst = max(
        float(interference(random_unit(20, 200, seed_for(seed, "jump", i))).max()) for i in range(4)
    )
    return Claim(
        claim="With JumpReLU, 1-sparse features can be recovered under positive interference.",
        verdict="holds if",
        condition="largest interference x largest x <= threshold < smallest active x; impossible for x uniform on "
        "(0, 1], which is the paper's distribution.",
        evidence=f"Pentagon, x in [0.5, 1]: thresholds in [{narrow[0]:.3f}, {narrow[1]:.1f}) recover x (error "
        f"{inside:.0e}), one below errs by {below:.2f}. x in (0, 1]: the interval [{wide[0]:.3f}, 0) is empty, the "
        f"best of 100 thresholds errs by {best:.2f}. 200 random columns in 20 dimensions would need x_min > "
        f"{worst:.2f} x_max.",
        instances=107,
        numbers={"window_low": narrow[0], "window_high": narrow[1], "error_inside": inside}
        | {
            "error_below": below,
            "best_error_uniform": best,
            "largest_interference_200_in_20": worst,
        },
    )


def _jumprelu_error(W_p: Tensor, threshold: float, low: float, high: float) -> float:
    """Return the worst error of a feature over 1-sparse x with magnitudes from low to high."""
    n = W_p.shape[1]
    sizes = torch.linspace(low, high, 101, dtype=torch.float64)
    features = (sizes[:, None, None] * torch.eye(n, dtype=torch.float64)).reshape(-1, n)
    acts = superpose(W_p, features)
    latents = code(closed_form(W_p), acts, "jumprelu", threshold=threshold)
    return float((latents - features).abs().max())


def identity_step(seed: int) -> Claim:
    """Eq. 35: W_p = I_2 has W_m = I as its only solution, because E_2^T E_1 = D^T E_1 = E_2^T D = 0."""
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    eye = orthogonal(2)
    D, E_1 = torch.diag((swap - eye).diagonal()), swap
    solves = float((swap.T @ swap.relu() - eye).abs().max())
    product = float((D.T @ E_1).abs().max())
    two = zero_solutions(eye, 256, seed)
    three = POLYSEMANTIC_IDENTITY
    third = float((three.T @ three.relu() - orthogonal(3)).abs().max())
    return Claim(
        claim="In W_m = I + E_1 - E_2 + D (E_1, E_2 off-diagonal, D diagonal) E_2^T E_1 = D^T E_1 = E_2^T D = 0, "
        "so I is the only solution for W_p = I_2, and W_p^T for all W_p.",
        verdict="counterexample",
        condition="The conclusion is right for I_2 up to order (a case distinction on the signs of W_m shows it), "
        "and does not extend to other W_p.",
        evidence=f"The swap of two rows solves I = W_m^T ReLU(W_m) (error {solves:.0f}) with D = -I, E_1 = swap "
        f"and D^T E_1 = {-product:.0f} off the diagonal. {two.reached} successful starts for I_2 found "
        f"{two.others} others up to order; I_3 has another solution (error {third:.0e}).",
        instances=258,
        numbers={"swap_error": solves, "D_E1": product, "others_I_2": float(two.others)}
        | {"reached_I_2": float(two.reached), "I_3_error": third},
    )

"""Appendix A.2: the steps behind Theorems 2 and 3 (Eq. 26, Top-k and JumpReLU, Eq. 35)."""

import torch
from torch import Tensor

from wsae.core.seeds import seed_for
from wsae.theory.claims.record import Claim
from wsae.theory.claims.unique import polysemantic_identity
from wsae.theory.geometry import interference, nonpositive, orthogonal, polygon, random_unit
from wsae.theory.limits import first_order, jumprelu_window, second_moment, topk_bound, topk_code
from wsae.theory.losses import closed_form, code, grid, sae_residual, superpose
from wsae.theory.zeros import zero_solutions


def coefficient(seed: int) -> Claim:
    """Eq. 26: the 1-sparse part of the loss is n S^(n-1) (1-S) sum_u E L(x_u e_u)."""
    ours, papers = [], {}
    for i in range(12):
        made = torch.Generator().manual_seed(seed_for(seed, "eq26", i))
        n, S = 2 + i % 4, (0.5, 0.9, 0.99)[i % 3]
        W_p = random_unit(2, n, seed_for(seed, "eq26", "W_p", i))
        W_m = torch.randn(n, 2, generator=made, dtype=torch.float64)
        exact = _one_sparse_part(W_m, W_p, S)
        mine = first_order(W_m, W_p, S, second_moment(2))
        ours.append(mine / exact)
        papers[f"paper_over_exact_n{n}"] = n * mine / exact
    worst = max(abs(ratio - 1) for ratio in ours)
    return Claim(
        claim="The 1-sparse part of L_SAE is n S^(n-1) (1-S) sum_u E[L(x_u e_u)].",
        source="Eq. 26",
        verdict="counterexample",
        condition="Without the factor n: C(n, 1) and the sum over u both count the choice of u. A positive "
        "constant, so the argmin is the same.",
        evidence="Against exact enumeration for 12 random W_p and W_m (n = 2..5) the paper's expression is n "
        f"times too large; S^(n-1) (1-S) sum_u agrees to {worst:.0e}.",
        instances=12,
        numbers={"worst_relative_error_without_n": worst, **papers},
    )


def _one_sparse_part(W_m: Tensor, W_p: Tensor, S: float) -> float:
    """Return E[loss; exactly one feature is active] by enumeration."""
    features, probability = grid(W_p.shape[1], S, 2)
    alone = (features > 0).sum(1) == 1
    lost = sae_residual(W_m, superpose(W_p, features)).square().sum(1)
    return float(lost[alone] @ probability[alone])


def topk_recovery(seed: int) -> Claim:
    """Appendix A.2: under positive interference Top-k(W_p^T W_p,u) = e_u for 1 < k <= n_m - p."""
    pentagon = polygon(5)
    bound = topk_bound(pentagon)
    kept = sorted(topk_code(pentagon, 2)[0].tolist(), reverse=True)[:2]
    wide = [random_unit(4, 9, seed_for(seed, "topk", i)) for i in range(12)]
    first = max(_away_from_identity(topk_code(W_p, 1)) for W_p in [pentagon, *wide])
    fails = sum(_away_from_identity(topk_code(W_p, 2)) > 1e-6 for W_p in [pentagon, *wide])
    allowed = sum(topk_bound(W_p) >= 2 for W_p in [pentagon, *wide])
    clean = 0.0
    for i in range(8):
        W_p = nonpositive(3, 5, seed_for(seed, "topk", "clean", i))
        for k in range(1, topk_bound(W_p) + 1):
            clean = max(clean, _away_from_identity(topk_code(W_p, k)))
    return Claim(
        claim="Under positive interference Top-k with 1 < k <= n_m - p recovers 1-sparse features.",
        source="Appendix A.2",
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
        source="Appendix A.2",
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
    three = polysemantic_identity()
    third = float((three.T @ three.relu() - orthogonal(3)).abs().max())
    return Claim(
        claim="In W_m = I + E_1 - E_2 + D (E_1, E_2 off-diagonal, D diagonal) E_2^T E_1 = D^T E_1 = E_2^T D = 0, "
        "so I is the only solution for W_p = I_2, and W_p^T for all W_p.",
        source="Eq. 35",
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


def _away_from_identity(latents: Tensor) -> float:
    return float((latents - torch.eye(len(latents), dtype=latents.dtype)).abs().max())


CHECKS = (coefficient, topk_recovery, jumprelu_recovery, identity_step)

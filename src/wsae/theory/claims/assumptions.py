"""Section 3: non-positive interference, and the minimiser of the reconstruction loss as a definition of recovery."""

import torch
from torch import Tensor

from wsae.core.seeds import seed_for
from wsae.theory.geometry import digons, interference, nonpositive, random_unit
from wsae.theory.losses import (
    closed_form,
    code,
    ground_truth_loss,
    sae_loss,
    sampled,
    signed,
    superpose,
)
from wsae.theory.record import Claim


def negative_interference(seed: int) -> Claim:
    """Section 3: the columns of W_p in superposition have pairwise non-positive interference."""
    built = [(d, nonpositive(d, 2 * d, seed_for(seed, d, i))) for d in (2, 3, 4) for i in range(4)]
    worst = max(float(interference(W_p).max()) for _, W_p in built)
    fits = {d: _least_interference(d, 2 * d, seed) for d in (2, 3, 4)}
    over = {d: _least_interference(d, 2 * d + 1, seed) for d in (2, 3, 4)}
    wide = interference(random_unit(20, 200, seed_for(seed, "wide")))
    positive = float((wide > 0).sum() / (200 * 199))
    least = _least_interference(20, 200, seed, starts=1)
    return Claim(
        claim="Superposed features interfere non-positively: W_p,i . W_p,j <= 0 for i != j (assumed by Theorems 2, 3).",
        source="Section 3",
        verdict="holds if",
        condition="n <= 2 n_p non-zero columns: no more vectors can be pairwise non-positive in n_p dimensions (Rankin "
        "1955). Section 5.1 has n = 200 and n_p = 20, so unless 160 columns are zero the theorems do not cover it.",
        evidence=f"In 2, 3 and 4 dimensions optimisation brings the largest interference of 2 n_p unit vectors to "
        f"{max(fits.values()):.4f} or less, of 2 n_p + 1 only to {', '.join(f'{v:.3f}' for v in over.values())}; 200 "
        f"in 20 dimensions keep {least:.2f} (random ones: {positive:.0%} of pairs positive).",
        instances=len(built) + 7,
        numbers={"largest_in_constructed": worst, "largest_200_in_20": least}
        | {f"largest_2d_plus_1_d{d}": v for d, v in over.items()}
        | {f"largest_2d_d{d}": v for d, v in fits.items()},
    )


def _least_interference(d: int, n: int, seed: int, starts: int = 8) -> float:
    """Return the smallest largest-interference found for n unit vectors in d dimensions, 0 if it can be avoided.

    Minimises sum relu(cos)^q for growing q, which approaches the maximum.
    """
    made = torch.Generator().manual_seed(seed_for(seed, "least", d, n))
    W = torch.randn(starts, d, n, generator=made, dtype=torch.float64)
    for step in range(360):
        power = (2, 4, 8, 16, 32, 64)[step // 60]
        W.requires_grad_(True)
        cosines = _cosines(W).relu()
        top = cosines.detach().amax((-1, -2), keepdim=True).clamp_min(1e-9)
        softmax = (cosines / top).pow(power).sum((-1, -2)).pow(1 / power) * top[:, 0, 0]
        (slope,) = torch.autograd.grad(softmax.sum(), W)
        length = slope.norm(dim=(-1, -2), keepdim=True).clamp_min(1e-12)
        W = W.detach() - 0.4 * 0.985**step * slope / length
        W = W / W.norm(dim=-2, keepdim=True)
    return max(0.0, float(_cosines(W).amax((-1, -2)).min()))


def _cosines(W: Tensor) -> Tensor:
    unit = W / W.norm(dim=-2, keepdim=True)
    own = torch.eye(W.shape[-1], dtype=W.dtype)
    return unit.mT @ unit - own


def reconstruction_identifies(seed: int) -> Claim:
    """Eq. 5: features are recovered by the minimiser of the reconstruction loss (Eq. 4) alone."""
    n, d, S = 200, 20, 0.9
    W_p = random_unit(d, n, seed_for(seed, "identify"))
    features, probability = sampled(n, S, 2000, seed_for(seed, "rows"))
    given = float(superpose(W_p, features).square().sum(1) @ probability)
    signal = float(features.square().sum(1) @ probability)
    copies = (1, 1, 2, 3, 5, 5)
    bases = []
    for i, count in enumerate(copies):
        made = torch.Generator().manual_seed(seed_for(seed, i))
        drawn = torch.randn(count, d, d, generator=made, dtype=torch.float64)
        bases.append(signed(torch.linalg.qr(drawn).Q.flatten(0, 1) / count**0.5, n))
    members = torch.stack(bases)
    losses = sae_loss(members, W_p, features, probability) / given
    truth = ground_truth_loss(members, W_p, features, probability) / signal
    acts = superpose(
        W_p, features
    )  # the best multiple of W_p^T: x_p projected on W_p ReLU(W_p^T x_p)
    x_hat = superpose(W_p, code(closed_form(W_p), acts))
    agree, power = (float((x_hat * other).sum(1) @ probability) for other in (acts, x_hat))
    own = (given - agree**2 / power) / given
    alone, quarter = digons(2).T.contiguous(), turned_digons(torch.pi / 4)
    axes, turned = (float(code(W, alone).sum(1).mean()) for W in (turned_digons(0.0), quarter))
    left = alone - code(quarter, alone, "topk", k=1) @ quarter
    top1 = float(left.square().sum(1).mean())
    return Claim(
        claim="W_m* = argmin L_SAE defines the learned features (a definition), and recovery means that it gives x.",
        source="Eq. 5",
        verdict="ill-posed",
        condition="With n_m >= 2 n_p the argmin is a continuum that ignores x. It goes with n_m < 2 n_p, with a "
        "sparsity penalty, or with Top-k and k < n_p.",
        evidence=f"n_m = n = 200, n_p = 20 (the paper's experiment), S = 0.9: stacked [Q; -Q] of random orthonormal "
        f"bases lose at most {float(losses.max()):.0e} of E||x_p||^2, for every x; the best multiple of W_p^T loses "
        f"{own:.2f}. Their L_GT is {float(truth.min()):.2f} to {float(truth.max()):.2f} times E||x||^2. On digons an "
        f"l1 penalty prefers the axes ({axes:.2f} against {turned:.2f}), and Top-1 leaves the turned basis a loss of "
        f"{top1:.2f}.",
        instances=len(members) + 2,
        numbers={
            "worst_relative_sae_loss": float(losses.max()),
            "closed_form_relative_sae_loss": own,
            "least_relative_ground_truth_loss": float(truth.min()),
            "largest_relative_ground_truth_loss": float(truth.max()),
            "l1_axes": axes,
            "l1_turned": turned,
            "top1_loss_turned": top1,
        },
    )


def turned_digons(angle: float) -> Tensor:
    """Return [R; -R], R the rotation of the plane by `angle`: rows for digons(2), zero loss for every x."""
    c, s = torch.tensor(angle).double().cos(), torch.tensor(angle).double().sin()
    return signed(torch.stack([torch.stack([c, s]), torch.stack([-s, c])]))


CHECKS = (negative_interference, reconstruction_identifies)

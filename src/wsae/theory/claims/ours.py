"""Theorems of our own: when reconstruction can fail to see the features, and which weights provably help.

Proofs are in docs/theory.md. Each check draws its worlds at random and tests the statement, not the steps of its proof.
"""

import math

import numpy as np
import torch
from scipy.optimize import linprog, root_scalar
from scipy.optimize import minimize as scipy_minimize
from scipy.stats import binom
from torch import Tensor

from wsae.core.seeds import seed_for
from wsae.theory.claims.weights import RULES, gamma_of, weights_of
from wsae.theory.geometry import (
    digons,
    direct_sum,
    nonpositive,
    normal,
    orthogonal,
    orthonormal,
    polygon,
    random_unit,
    simplex,
)
from wsae.theory.losses import (
    closed_form,
    energy,
    grid,
    minimise,
    relative_loss,
    sampled,
    scaled_gap_norm,
    squared,
)
from wsae.theory.record import Claim

ACTIVE = (1, 2, 3, 4, 5, 6, 7, 8, 10, 14)
"""Numbers of active features that the linear program is tried on; with 14 it finds none."""


def every_minimiser(seed: int) -> Claim:
    """Ours 1: where x_p takes every direction, L_SAE = 0 exactly for rows balanced along every line, whatever W_p.

    Sufficiency by construction, necessity by what a search that knows nothing of the theorem finds.
    """
    shapes = [(d, lines) for d in (2, 3, 4) for lines in (d, d + 1, 2 * d)]
    built = [
        _balanced(d, lines, seed_for(seed, "balanced", i)) for i, (d, lines) in enumerate(shapes)
    ]
    losses = [_relative_loss(W_m, seed) for W_m in built]
    broken = [_relative_loss(_unbalanced(W_m), seed) for W_m in built]
    found, left, short = [], [], []
    for i, d in enumerate((2, 2, 3)):
        W_p = _spanning(d, d + 2, seed_for(seed, "spanning", i))
        features, probability = grid(d + 2, 0.3, 2)
        given = energy(W_p, features, probability)
        enough = minimise(W_p, 2 * d, features, probability, seed=seed + i, starts=24, polished=8)
        found.append(enough.loss / given)
        left.append(imbalance(enough.W_m))
        few = minimise(W_p, 2 * d - 1, features, probability, seed=seed + i, starts=24, polished=8)
        short.append(few.loss / given)
    narrow = torch.tensor([[1.0, 0.0, 0.6], [0.0, 1.0, 0.8]], dtype=torch.float64)
    inside = _loss_of(orthogonal(2), narrow)
    return Claim(
        claim="If x_p takes every direction (the columns positively span, S < 1), a tied ReLU SAE has L_SAE = 0 if and "
        "only if along every line u the rows along +u and those along -u have the same sum of squared lengths a_u^2, "
        "and sum_u a_u^2 u u^T = I. So the minimisers do not depend on W_p, and n_m >= 2 n_p is necessary.",
        verdict="holds",
        evidence=f"{len(built)} random balanced W_m in 2 to 4 dimensions: loss at most {max(losses):.0e} of E|x_p|^2, "
        f"and {min(broken):.0e} or more when one row is 1 % longer. Searches with n_m = 2 n_p reach {max(found):.0e}, "
        f"and the rows found are balanced to {max(left):.0e}; with one row fewer the best loss found is "
        f"{min(short):.0e}. Where the columns do not span (e_1, e_2 and one between them) less is needed: the rows "
        f"e_1, e_2 have loss {inside:.0e}.",
        instances=2 * len(built) + len(found) + len(short) + 1,
        numbers={"balanced": max(losses), "broken": min(broken), "inside_a_cone": inside}
        | {"found": max(found), "imbalance": max(left), "one_fewer": min(short)},
    )


def zero_loss_of_W_p(seed: int) -> Claim:
    """Ours 2: for unit columns W_p^T has loss 0 if and only if features are alone or in digons."""
    yes = [orthogonal(3), digons(2), direct_sum(orthogonal(1), digons(1))]
    turn = orthonormal(seed_for(seed, "turn"), 3, 3)
    yes.append(turn @ direct_sum(orthogonal(2), digons(1)))
    no = [polygon(3), polygon(5), simplex(4), direct_sum(orthogonal(1), polygon(3))]
    no += [nonpositive(3, 5, seed_for(seed, "iff", i)) for i in range(10)]
    no += [random_unit(3, 4, seed_for(seed, "iff", i)) for i in range(10)]
    no = [W_p for W_p in no if not _alone_or_in_digons(W_p)]
    zero, positive = ([_loss_of(closed_form(W_p), W_p) for W_p in chosen] for chosen in (yes, no))
    return Claim(
        claim="For unit columns and 0 < S < 1, L_SAE(W_p^T) = 0 if and only if any two features are orthogonal or "
        "opposite (alone, or in a digon).",
        verdict="holds",
        evidence=f"Loss at most {max(zero):.0e} of E|x_p|^2 for {len(yes)} such W_p; {min(positive):.1e} or more for "
        f"{len(no)} others. So Theorem 1, read as 'W_p^T reconstructs without loss', is an 'if and only if'.",
        instances=len(yes) + len(no),
        numbers={"alone_or_digons": max(zero), "others": min(positive)},
    )


def noise_decides_the_weights(seed: int) -> Claim:
    """Ours 3: with noise of covariance Sigma, Gamma^T Gamma = Sigma^-1 gives the best code for every support at once.

    Least squares on drawn rows, in numpy: the formula for the error's covariance is not used.
    """
    d_in, n = 6, 10
    errors: dict[str, list[float]] = {name: [] for name in (*RULES, "noise")}
    margins = []
    for i in range(6):
        drawn = seed_for(seed, "noise", i)
        W_p = random_unit(d_in, n, drawn)
        Sigma = _noise_covariance(d_in, drawn)
        for name in RULES:
            errors[name].append(code_error(W_p, Sigma, _gram(W_p, Sigma, name), drawn))
        best = code_error(W_p, Sigma, torch.linalg.inv(Sigma), drawn)
        errors["noise"].append(best)
        for j in range(5):
            tilt = 0.3 * normal(seed_for(drawn, "tilt", j), d_in, d_in)
            root = torch.linalg.cholesky(torch.linalg.inv(Sigma)) @ (
                torch.eye(d_in, dtype=torch.float64) + tilt
            )
            margins.append(code_error(W_p, Sigma, root @ root.T, drawn) / best)
    mean = {name: float(np.mean(values)) for name, values in errors.items()}
    least = min(float(np.min(np.divide(errors[name], errors["noise"]))) for name in RULES)
    return Claim(
        claim="For x_p = W_p x + noise of covariance Sigma, and a code that is least squares under Gamma on a known "
        "support of independent columns, the mean squared error of the code is least, for every support at once, at "
        "Gamma^T Gamma = c Sigma^-1 (Gauss-Markov), and only there if n > n_p columns are in general position.",
        verdict="holds",
        evidence="Mean squared error of the code, 2 of 10 features in 6 dimensions, uneven noise: "
        + ", ".join(f"{name} {mean[name]:.3f}" for name in RULES)
        + f", the noise's inverse {mean['noise']:.3f}. It is the best in each of {len(errors['noise'])} worlds (the "
        f"next is {least:.2f} times as large or more), also against {len(margins)} random changes of it (at least "
        f"{min(margins):.2f} times).",
        instances=len(errors) * len(errors["noise"]) + len(margins),
        numbers={f"error_{name.replace(' ', '_')}": value for name, value in mean.items()}
        | {"next_best_ratio": least, "least_ratio_of_changes": min(margins)},
    )


def matched_filter(seed: int) -> Claim:
    """Ours 4: the best linear readout of a feature is C^-1 w; along C^-p w it gets steadily better up to p = 1.

    The optimum is searched for without the formula.
    """
    powers = torch.linspace(-1.0, 2.0, 31, dtype=torch.float64)
    gains, apart, worst_step, bound = [], [], -math.inf, 0.0
    for i in range(8):
        W_p, C = uneven_world(seed_for(seed, "filter", i))
        w = W_p[:, 0]
        curve = torch.stack([readout(C, w, float(p)) for p in powers])
        up = int((powers - 1).abs().argmin())
        steps = curve.diff()
        worst_step = max(worst_step, float((-steps[:up]).max()), float(steps[up:].max()))
        best = _best_readout(C, w, seed_for(seed, "search", i))
        apart.append(abs(best - float(readout(C, w, 1.0))))
        plain, whole = float(readout(C, w, 0.0)), float(readout(C, w, 1.0))
        values = torch.linalg.eigvalsh(C)
        kappa = float(values[-1] / values[0])
        gains.append(whole / plain)
        bound = max(bound, (whole / plain) ** 2 / ((kappa + 1) ** 2 / (4 * kappa)))
    half = [
        float(readout(C, W_p[:, 0], 0.5) / readout(C, W_p[:, 0], 0.0))
        for W_p, C in (uneven_world(seed_for(seed, "filter", i)) for i in range(8))
    ]
    return Claim(
        claim="Of all linear readouts of feature i the one along C^-1 w_i correlates best with it, C the covariance of "
        "x_p; along C^-p w_i the correlation never falls up to p = 1 and never rises after it. Power p = 0 is the "
        "plain readout w_i, p < 0 what weights that grow with variance favour.",
        verdict="holds",
        evidence=f"{len(gains)} uneven worlds: a search over all readouts ends within {max(apart):.0e} of C^-1 w; no "
        f"step of {len(powers)} powers goes the wrong way (worst {worst_step:.0e}). C^-1 raises the correlation "
        f"{_span(gains)} times, C^-1/2 {_span(half)} times; Kantorovich's bound (kappa + 1)^2 / (4 kappa) on its "
        f"square is used up to {bound:.0%}.",
        instances=len(gains) * (len(powers) + 1),
        numbers={"search_apart": max(apart), "worst_step": worst_step, "share_of_bound": bound}
        | {"gain_least": min(gains), "gain_most": max(gains)}
        | {"half_gain_least": min(half), "half_gain_most": max(half)},
    )


def extremely_sparse(seed: int) -> Claim:
    """Ours 5: how sparse "extremely sparse" is: about 5 of 200 features in 20 dimensions, S* = 0.97."""
    success = linear_program_success(200, 20, ACTIVE, 60, seed)
    threshold = sparsity_threshold(success, 200)
    at = {S: recovered_share(success, 200, S) for S in (0.9, 0.97, 0.99)}
    return Claim(
        claim="Even a linear program that knows W_p finds non-negative x from W_p x only below a number of active "
        "features (Donoho and Tanner's weak threshold): for n = 200 in n_p = 20 about 5, so that 'extremely sparse' "
        "means S above about 0.97.",
        verdict="holds",
        evidence="Found of 60 x with "
        + ", ".join(f"{k} active {rate:.0%}" for k, rate in success.items())
        + f"; half of all x at S* = {threshold:.3f}; "
        + ", ".join(f"{share:.0%} at S = {S:g}" for S, share in at.items())
        + ". Section 5.1 uses these sizes.",
        instances=60 * len(success),
        numbers={f"success_{k}": rate for k, rate in success.items()}
        | {"threshold": threshold}
        | {f"found_S{S:g}": share for S, share in at.items()},
    )


def top_1_identifies(seed: int) -> Claim:
    """Ours 6: on 1-sparse x, a tied Top-1 SAE with n latents has loss 0 only at W_p^T, for any distinct unit columns.

    And for ReLU, a row beside those of W_p^T costs nothing on 1-sparse x exactly when it is silent there.
    """
    worlds = [random_unit(3, 6, seed_for(seed, "top1", i)) for i in range(10)]
    worlds += [random_unit(5, 40, seed_for(seed, "top1", i)) for i in range(10)]
    own = max(_top_1_loss(W_p.T, W_p) for W_p in worlds)
    other = min(
        _top_1_loss(_nudged(W_p, size, seed_for(seed, "nudge", i)), W_p)
        for i, W_p in enumerate(worlds)
        for size in (0.01, 0.1, 1.0)
    )
    mirrored = _top_1_loss(-math.sqrt(2) * polygon(3).T, polygon(3))
    spans, opens = 0.0, 0.0
    for i in range(10):
        W_p = _spanning(3, 5, seed_for(seed, "spare", i))
        spans += _silent_direction(W_p) is None
        # all columns in a half-space: they do not positively span
        half = torch.cat([W_p[:2], W_p[2:].abs()])
        opens += _silent_direction(half) is not None
    return Claim(
        claim="For distinct unit columns, any number of them, a tied Top-1 SAE with n_m = n has loss 0 on 1-sparse x "
        "if and only if W_m = W_p^T up to order. A spare row of a ReLU SAE must satisfy w . W_p,u <= 0 for all u, and "
        "only w = 0 does if and only if the columns positively span.",
        verdict="holds",
        evidence=f"{len(worlds)} random W_p, 6 in 3 and 40 in 5 dimensions: loss {own:.0e} at W_p^T, at least "
        f"{other:.0e} of E|x_p|^2 beside it; the triangle's other ReLU solution has {mirrored:.2f}. A linear program "
        f"finds no silent row for {spans:.0f} of 10 W_p whose columns positively span, and one for {opens:.0f} of 10 "
        "in a half-space.",
        instances=4 * len(worlds) + 21,
        numbers={
            "own": own,
            "other": other,
            "mirror": mirrored,
            "spanning": spans,
            "half_space": opens,
        },
    )


def variance_is_anti_optimal(seed: int) -> Claim:
    """Ours 7: for orthogonal rows the gap's norm is least at alpha = -1/2 and grows steadily away from it."""
    alphas = torch.linspace(-1.5, 1.0, 26, dtype=torch.float64)
    wrong, at_zero, at_one = -math.inf, [], []
    for i in range(20):
        W_p = orthogonal_rows(4, 9, seed_for(seed, "rows", i))
        norms = torch.tensor([alpha_norm(W_p, float(a)) for a in alphas])
        least = int((alphas + 0.5).abs().argmin())
        steps = norms.diff()
        wrong = max(wrong, float(steps[:least].max()), float((-steps[least:]).max()))
        at_zero.append(float(norms[least] / alpha_norm(W_p, 0.0)))
        at_one.append(alpha_norm(W_p, 1.0) / alpha_norm(W_p, 0.0))
    return Claim(
        claim="For iid features and orthogonal rows of W_p the least ||c W_p^T Gamma^2 W_p - I|| under gamma = s^alpha "
        "is sqrt(n - (sum a_i)^2 / sum a_i^2), a_i = s_i^(1 + 2 alpha): least at alpha = -1/2, strictly larger the "
        "further alpha is from it, unless all variances are equal.",
        verdict="holds",
        evidence=f"20 W_p, {len(alphas)} values of alpha: no step goes the wrong way (worst {wrong:.0e}). Against "
        f"plain, alpha = -1/2 has {_span(at_zero)} times the norm, the paper's alpha = 1 {_span(at_one)} times.",
        instances=20 * len(alphas),
        numbers={"worst_step": wrong, "minus_half_most": max(at_zero), "one_least": min(at_one)},
    )


def tight_frames(seed: int) -> Claim:
    """Ours 8: where W_p W_p^T = c I no rule made from second moments can help."""
    frames = [polygon(p) for p in (3, 4, 5, 7)] + [simplex(p) for p in (3, 4, 6)]
    frames += [orthogonal_rows(4, 9, seed_for(seed, "tight", i), equal=True) for i in range(10)]
    worst = 0.0
    for i, W_p in enumerate(frames):
        d = len(W_p)
        turned = orthonormal(seed_for(seed, "turn", i), d, d) @ W_p
        for rule in RULES:
            gram = squared(weights_of(turned, rule), d)
            away = gram - gram.trace() / d * torch.eye(d, dtype=torch.float64)
            worst = max(worst, float(away.abs().max()))
    return Claim(
        claim="If W_p W_p^T = c I (polygons, simplices, any tight frame), the covariance of iid features' x_p is a "
        "multiple of I, and every rule that turns with it (variance, gap, whiten, whitening the input) is the plain "
        "loss.",
        verdict="holds",
        evidence=f"{len(frames)} tight frames, turned at random, {len(RULES)} rules: Gamma^T Gamma is a multiple of "
        f"I to {worst:.0e}.",
        instances=len(frames) * len(RULES),
        numbers={"worst": worst},
    )


def sample_size(seed: int) -> Claim:
    """Ours 9: about ln(n / delta) / (1 - S) rows let Top-1 see every feature, when about one is active at a time."""
    delta, n = 0.05, 100
    rows = {S: math.ceil(math.log(n / delta) / one_alone(n, S)) for S in (0.99, 0.995, 0.999)}
    missed, missed_half = {}, {}
    for S, count in rows.items():
        missed[S] = _missed_share(n, S, count, 2000, seed_for(seed, "samples", S))
        missed_half[S] = _missed_share(n, S, count // 2, 2000, seed_for(seed, "half", S))
    return Claim(
        claim="With N rows of iid features, all n are active alone in some row with probability 1 - delta or more if "
        "N >= ln(n / delta) / ((1 - S) S^(n-1)); on the rows of one active feature the Top-1 SAE of loss 0 is then "
        "W_p^T.",
        verdict="holds",
        evidence=f"n = {n}, delta = {delta:g}: "
        + ", ".join(
            f"S = {S:g}: {rows[S]:,} rows miss a feature in {missed[S]:.1%} of draws, half as many in "
            f"{missed_half[S]:.0%}"
            for S in rows
        )
        + ". 2,000 draws each.",
        instances=2 * 2000 * len(rows),
        numbers={f"missed_S{S:g}": share for S, share in missed.items()}
        | {f"missed_half_S{S:g}": share for S, share in missed_half.items()},
    )


def significance(seed: int) -> Claim:
    """Ours 10: the latent most likely active beside noise is the largest in y = Sigma^-1/2 x_p with rows of norm 1.

    The likelihood is searched over amplitudes, a normal density at a time.
    """
    d_in, n, rows = 6, 10, 400
    right: dict[str, list[float]] = {"significance": [], "amplitude": [], "plain": []}
    alone: dict[str, list[float]] = {name: [] for name in right}
    apart = 0
    for i in range(6):
        drawn = seed_for(seed, "significance", i)
        W_p, Sigma = random_unit(d_in, n, drawn), _noise_covariance(d_in, drawn)
        rng = np.random.default_rng(drawn)
        noise = rng.standard_normal((2, rows, d_in)) @ np.linalg.cholesky(Sigma.numpy()).T
        which, size = rng.integers(n, size=rows), rng.exponential(size=rows)
        x_p = torch.from_numpy(size[:, None] * W_p.numpy().T[which] + noise[0])
        choices = {name: latent_values(W_p, Sigma, x_p, name).argmax(1) for name in right}
        apart += int((choices["significance"] != most_likely(W_p, Sigma, x_p)).sum())
        for name, chosen in choices.items():
            right[name].append(float((chosen.numpy() == which).mean()))
            by_chance = latent_values(W_p, Sigma, torch.from_numpy(noise[1]), name).argmax(1)
            counts = by_chance.bincount(minlength=n).double() / rows
            alone[name].append(float(counts.max()))
    mean = {name: float(np.mean(values)) for name, values in right.items()}
    most = {name: float(np.mean(values)) for name, values in alone.items()}
    return Claim(
        claim="For one active feature of unknown amplitude in noise of covariance Sigma the likeliest is the one with "
        "the largest pre-activation of a unit row in y = Sigma^-1/2 x_p: an amplitude estimate in units of its own "
        "error. Loss weights Sigma^-1 alone leave Top-k to compare amplitudes, where the noisiest win by chance.",
        verdict="holds",
        evidence=f"One of {n} features active in {d_in} dimensions, uneven noise, {6 * rows:,} rows: a search of the "
        f"likelihood differs in {apart} choices. Right choices: plain rows {mean['plain']:.0%}, amplitudes under the "
        f"noise's inverse {mean['amplitude']:.0%}, in y {mean['significance']:.0%}. With noise alone the latent chosen "
        f"most often has {most['plain']:.0%}, {most['amplitude']:.0%} and {most['significance']:.0%} of the rows (a "
        f"fair share is {1 / n:.0%}).",
        instances=6 * rows,
        numbers={"apart": float(apart)}
        | {f"right_{name}": value for name, value in mean.items()}
        | {f"most_by_noise_{name}": value for name, value in most.items()},
    )


def imbalance(W_m: Tensor, tolerance: float = 1e-6) -> float:
    """Return how far rows are from Ours 1: the largest difference along a line, or of sum_u a_u^2 u u^T from I.

    Rows whose cosine is within `tolerance` of 1 or -1 lie on one line; rows of a squared length below it count as zero.
    """
    rows = W_m[W_m.square().sum(1) > tolerance]
    worst, left = 0.0, list(range(len(rows)))
    total = torch.zeros(W_m.shape[1], W_m.shape[1], dtype=torch.float64)
    while left:
        u = rows[left[0]] / rows[left[0]].norm()
        cosine = {j: float(rows[j] @ u / rows[j].norm()) for j in left}
        ahead = [j for j in left if cosine[j] > 1 - tolerance]
        behind = [j for j in left if cosine[j] < tolerance - 1]
        plus, minus = (float(rows[side].square().sum()) for side in (ahead, behind))
        worst = max(worst, abs(plus - minus))
        total += (plus + minus) / 2 * torch.outer(u, u)
        left = [j for j in left if j not in ahead and j not in behind]
    return max(worst, float((total - torch.eye(len(total), dtype=torch.float64)).abs().max()))


def code_error(
    W_p: Tensor, Sigma: Tensor, M: Tensor, seed: int, active: int = 2, rows: int = 400
) -> float:
    """Return the mean squared error of least squares under M = Gamma^T Gamma on known supports of `active` features."""
    rng = np.random.default_rng(seed)
    root = np.linalg.cholesky(M.numpy()).T
    noise_root = np.linalg.cholesky(Sigma.numpy())
    total, supports = 0.0, 12
    for _ in range(supports):
        A = rng.choice(W_p.shape[1], active, replace=False)
        x = rng.uniform(0, 1, (active, rows))
        x_p = W_p.numpy()[:, A] @ x + noise_root @ rng.standard_normal((len(W_p), rows))
        z = np.linalg.lstsq(root @ W_p.numpy()[:, A], root @ x_p, rcond=None)[0]
        total += float(((z - x) ** 2).sum(0).mean())
    return total / supports


def latent_values(W_p: Tensor, Sigma: Tensor, x_p: Tensor, how: str) -> Tensor:
    """Return what Top-k compares, one column a feature.

    plain: w . x_p; amplitude: the least-squares one under Sigma^-1; significance: that over its own standard deviation.
    """
    if how == "plain":
        return x_p @ W_p
    matched = torch.linalg.solve(Sigma, W_p)
    power = 1.0 if how == "amplitude" else 0.5
    return x_p @ matched / (W_p * matched).sum(0) ** power


def most_likely(W_p: Tensor, Sigma: Tensor, x_p: Tensor) -> Tensor:
    """Return the feature whose density, at its best amplitude >= 0, is largest: golden sections of the amplitude."""
    noise = torch.distributions.MultivariateNormal(torch.zeros(len(W_p), dtype=Sigma.dtype), Sigma)

    def density(a: Tensor) -> Tensor:
        return noise.log_prob(x_p[:, None] - a[..., None] * W_p.T)

    low = torch.zeros(len(x_p), W_p.shape[1], dtype=torch.float64)
    high, ratio = low + 20, (math.sqrt(5) - 1) / 2
    for _ in range(70):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        rising = density(left) < density(right)
        low, high = torch.where(rising, left, low), torch.where(rising, high, right)
    return density((low + high) / 2).argmax(1)


def uneven_world(seed: int) -> tuple[Tensor, Tensor]:
    """Return a W_p [8, 24] whose dimensions differ in scale by up to 30, and the covariance of x_p (iid features)."""
    scale = torch.logspace(-0.75, 0.75, 8, dtype=torch.float64)
    W_p = orthonormal(seed_for(seed, "turn"), 8, 8) @ (scale[:, None] * random_unit(8, 24, seed))
    return W_p, W_p @ W_p.T


def readout(C: Tensor, w: Tensor, power: float) -> Tensor:
    """Return the correlation of (C^-power w) . x_p with its feature, whose variance is 1."""
    values, vectors = torch.linalg.eigh(C)
    share = (vectors.T @ w).square()
    return (share @ values**-power) / (share @ values ** (1 - 2 * power)).sqrt()


def linear_program_success(
    n: int, d_in: int, active: tuple[int, ...], draws: int, seed: int
) -> dict[int, float]:
    """Return, for each number of active features, how often min sum(x), W_p x = x_p, x >= 0 gives back x."""
    rng = np.random.default_rng(seed_for(seed, "linear-program"))
    found = {}
    for k in active:
        hits = 0
        for _ in range(draws):
            W_p = rng.standard_normal((d_in, n))
            W_p /= np.linalg.norm(W_p, axis=0)
            x = np.zeros(n)
            x[rng.choice(n, k, replace=False)] = 1 - rng.random(k)
            done = linprog(np.ones(n), A_eq=W_p, b_eq=W_p @ x, bounds=(0, None), method="highs")
            hits += done.x is not None and bool(np.abs(done.x - x).max() < 1e-6)
        found[k] = hits / draws
    return found


def recovered_share(success: dict[int, float], n: int, sparsity: float) -> float:
    """Return the share of iid x that are found: success at Binomial(n, 1 - S) active, linear between the k tried."""
    k = np.arange(n + 1)
    rate = np.interp(k, [0, *success], [1.0, *success.values()])
    return float(binom.pmf(k, n, 1 - sparsity) @ rate)


def sparsity_threshold(success: dict[int, float], n: int) -> float:
    """Return S*, at which half of all x are found."""
    found = root_scalar(lambda S: recovered_share(success, n, S) - 0.5, bracket=(0.5, 1 - 1e-9))
    return float(found.root)


def alpha_norm(W_p: Tensor, alpha: float) -> float:
    """Return scaled_gap_norm of gamma = s^alpha, s the variances for iid features."""
    return scaled_gap_norm(W_p, W_p.square().sum(1) ** alpha)


def one_alone(n: int, sparsity: float) -> float:
    """Return the probability that a given feature is active and no other is: (1 - S) S^(n-1)."""
    return (1 - sparsity) * sparsity ** (n - 1)


def _span(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def _balanced(d: int, lines: int, seed: int) -> Tensor:
    """Return rows that Ours 1 calls balanced: a tight frame, each line's two sides split unevenly into rows."""
    # lines x d, orthonormal columns: sum of u u^T a_u^2 = I
    frame = orthonormal(seed, lines, d)
    share = torch.rand(lines, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    share = share / share.sum(1, keepdim=True)
    plus = share.sqrt()[:, :, None] * frame[:, None, :]  # three rows of one direction
    return torch.cat([plus.reshape(-1, d), -frame])


def _unbalanced(W_m: Tensor) -> Tensor:
    changed = W_m.clone()
    changed[int(changed.norm(dim=1).argmax())] *= 1.01
    return changed


def _relative_loss(W_m: Tensor, seed: int) -> float:
    """Return the loss of W_m over E|x_p|^2 for a W_p of its width whose columns positively span."""
    W_p = _spanning(W_m.shape[1], 2 * W_m.shape[1] + 1, seed_for(seed, "any", *W_m.shape))
    return relative_loss(W_m, W_p, *sampled(W_p.shape[1], 0.5, 2000, seed))


def _spanning(d: int, n: int, seed: int) -> Tensor:
    """Return n random unit columns that positively span: -sum of the others is among them."""
    W_p = random_unit(d, n - 1, seed)
    last = -W_p.sum(1, keepdim=True)
    return torch.cat([W_p, last / last.norm()], dim=1)


def _loss_of(W_m: Tensor, W_p: Tensor) -> float:
    """Return L_SAE / E|x_p|^2 on an exact grid at S = 1/2."""
    return relative_loss(W_m, W_p, *grid(W_p.shape[1], 0.5, 2))


def _alone_or_in_digons(W_p: Tensor) -> bool:
    gram = W_p.T @ W_p
    off = gram - torch.eye(len(gram), dtype=torch.float64)
    return bool(((off.abs() < 1e-9) | ((off + 1).abs() < 1e-9)).all())


def _noise_covariance(d_in: int, seed: int) -> Tensor:
    """Return a covariance with standard deviations from 0.03 to 0.6 along axes that are turned a little, at random."""
    turn = torch.linalg.qr(torch.eye(d_in, dtype=torch.float64) + 0.3 * normal(seed, d_in, d_in)).Q
    return turn @ torch.diag(torch.logspace(-1.5, -0.2, d_in, dtype=torch.float64) ** 2) @ turn.T


def _gram(W_p: Tensor, Sigma: Tensor, rule: str) -> Tensor:
    """Return Gamma^T Gamma of a rule of the theory, made from the covariance of x_p, noise included."""
    C = W_p @ W_p.T * (0.2 * (1 / 3 - 0.2 / 4)) + Sigma  # 2 of 10 active, uniform on (0, 1)
    return squared(gamma_of(RULES[rule], C), len(C))


def _best_readout(C: Tensor, w: Tensor, seed: int) -> float:
    """Return the largest correlation that BFGS finds over all readouts from three random starts."""
    matrix, target = C.numpy(), w.numpy()

    def negative(v: np.ndarray) -> float:
        return -float(v @ target) / math.sqrt(float(v @ matrix @ v))

    starts = np.random.default_rng(seed).standard_normal((3, len(target)))
    starts *= np.sign(starts @ target)[:, None]
    root = np.linalg.inv(np.linalg.cholesky(matrix)).T  # conditions the search, not the answer
    found = [
        scipy_minimize(lambda a: negative(root @ a), start, options={"gtol": 1e-9})
        for start in starts
    ]
    return -min(done.fun for done in found)


def _top_1_loss(W_m: Tensor, W_p: Tensor) -> float:
    """Return the mean over features of |W_p,u - x_hat|^2 for a tied Top-1 SAE on x = e_u."""
    pre = W_m @ W_p
    best, at = pre.max(dim=0)
    x_hat = W_m[at].T * best.clamp_min(0)
    return float((W_p - x_hat).square().sum(0).mean() / W_p.square().sum(0).mean())


def _nudged(W_p: Tensor, size: float, seed: int) -> Tensor:
    rows = W_p.T + size * normal(seed, *W_p.T.shape)
    return rows / rows.norm(dim=1, keepdim=True)


def _silent_direction(W_p: Tensor) -> np.ndarray | None:
    """Return a w with w . W_p,u <= 0 for all u and some < 0, None when only w = 0 remains (by linear programming)."""
    d_in, n = W_p.shape
    done = linprog(
        W_p.numpy().sum(1),
        A_ub=W_p.numpy().T,
        b_ub=np.zeros(n),
        bounds=[(-1, 1)] * d_in,
        method="highs",
    )
    return done.x if done.fun < -1e-9 else None


def orthogonal_rows(d_in: int, n: int, seed: int, equal: bool = False) -> Tensor:
    """Return a W_p with orthogonal rows of random lengths, or of equal ones (a tight frame)."""
    rows = orthonormal(seed, n, d_in).T
    return rows if equal else normal(seed_for(seed, "scale"), d_in, 1).exp() * rows


def _missed_share(n: int, sparsity: float, rows: int, draws: int, seed: int) -> float:
    """Return how often some feature is active alone in none of `rows` rows.

    Rows of one active feature are Binomial(rows, n (1 - S) S^(n-1)), and which feature it is, uniform.
    """
    rng = np.random.default_rng(seed)
    alone = rng.binomial(rows, n * one_alone(n, sparsity), draws)
    return float(np.mean([len(np.unique(rng.integers(0, n, count))) < n for count in alone]))

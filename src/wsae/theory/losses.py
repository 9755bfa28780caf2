"""The paper's losses and codes on an exact finite distribution of features, and the SAE that minimises one. In float64.

A distribution is a pair (features [points, n], probability [points]); expectations are finite sums, so identities
hold to rounding and a comparison of two losses is a proof, not an estimate. The best tied SAE for a given W_p comes
from many starts in one batched run, then a polish to a stationary point.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from scipy.optimize import linear_sum_assignment, minimize
from torch import Tensor

from wsae.core.errors import UserError
from wsae.core.seeds import seed_for
from wsae.sae.forward import Weights, weigh
from wsae.theory.geometry import check_W_p, normal

Activation = Literal["relu", "topk", "jumprelu"]
MAX_POINTS = 2_000_000
"""Largest exact grid; above it `sampled` is the way."""


def check_sparsity(sparsity: float) -> float:
    """Return S; raises UserError outside [0, 1], and at 1, where every x is 0 and there is no signal."""
    if not 0 <= sparsity <= 1:
        raise UserError(
            f"sparsity {sparsity:g}: S is the probability that a feature is 0; it must be in [0, 1]"
        )
    if sparsity == 1:
        raise UserError("sparsity 1: every feature is always 0, so there is no signal; use S < 1")
    return sparsity


def magnitudes(levels: int) -> Float64[Tensor, " levels"]:
    """Return the midpoints (i + 1/2) / levels of (0, 1]: the values an active feature takes on a grid."""
    if levels < 1:
        raise UserError(f"levels = {levels}; it must be at least 1")
    return (torch.arange(levels, dtype=torch.float64) + 0.5) / levels


def grid(
    n: int, sparsity: float, levels: int = 4
) -> tuple[Float64[Tensor, "points n"], Float64[Tensor, " points"]]:
    """Return all (levels + 1)^n values of iid features and their probabilities (Section 3's assumption, exactly).

    Each x_i is 0 with probability S, else uniform on `magnitudes(levels)`; a point with m active features has
    probability S^(n-m) ((1-S) / levels)^m. Points of probability 0 are dropped.
    """
    S = check_sparsity(sparsity)
    if n < 1 or (levels + 1) ** n > MAX_POINTS:
        raise UserError(
            f"grid of {levels + 1}^{n} points: 1 to {MAX_POINTS:,} are allowed; use sampled(), or fewer levels"
        )
    axis = torch.cat([torch.zeros(1, dtype=torch.float64), magnitudes(levels)])
    mass = torch.full_like(axis, (1 - S) / levels)
    mass[0] = S
    index = torch.cartesian_prod(*[torch.arange(levels + 1)] * n).reshape(-1, n)
    probability = mass[index].prod(1)
    there = probability > 0
    return axis[index[there]], probability[there]


def sampled(
    n: int, sparsity: float, rows: int, seed: int
) -> tuple[Float64[Tensor, "rows n"], Float64[Tensor, " rows"]]:
    """Return `rows` draws of iid features, uniform (0, 1] where active (Section 5.1), each of probability 1 / rows."""
    S = check_sparsity(sparsity)
    made = torch.Generator().manual_seed(seed)
    u = 1 - torch.rand(rows, n, generator=made, dtype=torch.float64)
    features = ((u - S) / (1 - S)).clamp_min(0)
    return features, torch.full((rows,), 1 / rows, dtype=torch.float64)


def uniform(
    n: int, sparsity: float, rows: int = 2**18
) -> tuple[Float64[Tensor, "rows n"], Float64[Tensor, " rows"]]:
    """Return iid features uniform on (0, 1] where active: each of the 2^n supports with its exact probability.

    The rows are shared evenly; a support's magnitudes are a Sobol sequence, so that expectations err by some 1e-4 and
    magnitudes never tie. Supports of probability 0 are dropped. Raises UserError for fewer rows than supports.
    """
    S = check_sparsity(sparsity)
    if n < 1 or 2**n > rows:
        raise UserError(f"2^{n} supports in {rows:,} rows; use more rows, or sampled()")
    active = torch.cartesian_prod(*[torch.arange(2)] * n).reshape(-1, 1, n).double()
    mass = (active * (1 - S) + (1 - active) * S).prod(-1)[:, 0]
    there = mass > 0
    points = rows // int(there.sum())
    engine = torch.quasirandom.SobolEngine(n, scramble=True, seed=0)
    features = active[there] * (1 - engine.draw(points, dtype=torch.float64))  # (0, 1]
    return features.flatten(0, 1), (mass[there] / points).repeat_interleave(points)


def superpose(
    W_p: Float64[Tensor, "d_in n"], features: Float64[Tensor, "*points n"]
) -> Float64[Tensor, "*points d_in"]:
    """Return x_p = W_p x (Eq. 1)."""
    return features @ W_p.T


def code(
    W_m: Float64[Tensor, "*members d_sae d_in"],
    acts: Float64[Tensor, "points d_in"],
    activation: Activation = "relu",
    k: int = 1,
    threshold: float = 0.0,
) -> Float64[Tensor, "*members points d_sae"]:
    """Return x_m = sigma(W_m x_p) (Eq. 2).

    sigma: relu; topk, the k largest pre-activations, ReLU'd; jumprelu, a where a > threshold, else 0.
    """
    pre = acts @ W_m.mT
    match activation:
        case "relu":
            return pre.relu()
        case "topk":
            if not 1 <= k <= pre.shape[-1]:
                raise UserError(f"k = {k}; it must be between 1 and d_sae = {pre.shape[-1]}")
            return keep_largest(pre, k).relu()
        case "jumprelu":
            return pre * (pre > threshold)


def keep_largest(x: Float64[Tensor, "*rows n"], k: int) -> Float64[Tensor, "*rows n"]:
    """Return the k largest entries of each row, whatever their sign; the rest are 0."""
    values, places = x.topk(k, dim=-1)
    return torch.zeros_like(x).scatter(-1, places, values)


def sae_residual(
    W_m: Float64[Tensor, "*members d_sae d_in"], acts: Float64[Tensor, "points d_in"]
) -> Float64[Tensor, "*members points d_in"]:
    """Return x_p - W_m^T sigma(W_m x_p) (Eq. 3)."""
    return acts - code(W_m, acts) @ W_m


def sae_loss(
    W_m: Float64[Tensor, "*members d_sae d_in"],
    W_p: Float64[Tensor, "d_in n"],
    features: Float64[Tensor, "points n"],
    probability: Float64[Tensor, " points"],
    gamma: Weights | None = None,
) -> Float64[Tensor, "*members"]:
    """Return E ||Gamma [x_p - W_m^T ReLU(W_m x_p)]||^2 (Eq. 4; Eq. 12 with gamma), one value per member."""
    residual = _weighed(sae_residual(W_m, superpose(W_p, features)), gamma)
    return residual.square().sum(-1) @ probability


def energy(
    W_p: Float64[Tensor, "d_in n"],
    features: Float64[Tensor, "points n"],
    probability: Float64[Tensor, " points"],
) -> float:
    """Return E ||x_p||^2."""
    return float(superpose(W_p, features).square().sum(-1) @ probability)


def relative_loss(
    W_m: Float64[Tensor, "d_sae d_in"],
    W_p: Float64[Tensor, "d_in n"],
    features: Float64[Tensor, "points n"],
    probability: Float64[Tensor, " points"],
    gamma: Weights | None = None,
) -> float:
    """Return the SAE loss over E ||x_p||^2."""
    loss = sae_loss(W_m, W_p, features, probability, gamma)
    return float(loss) / energy(W_p, features, probability)


def ground_truth_loss(
    W_m: Float64[Tensor, "*members d_sae d_in"],
    W_p: Float64[Tensor, "d_in n"],
    features: Float64[Tensor, "points n"],
    probability: Float64[Tensor, " points"],
) -> Float64[Tensor, "*members"]:
    """Return E ||(x, 0) - ReLU(W_m W_p x)||^2 (Eq. 10; latents beyond n are compared with 0, Eq. 7)."""
    latents = code(W_m, superpose(W_p, features))
    extra = latents.shape[-1] - features.shape[-1]
    if extra < 0:
        raise UserError(
            f"d_sae = {latents.shape[-1]} latents for {features.shape[-1]} features; the ground-truth loss needs "
            "a latent for each"
        )
    target = torch.nn.functional.pad(features, (0, extra))
    return (target - latents).square().sum(-1) @ probability


def matched_loss(
    W_m: Float64[Tensor, "d_sae d_in"],
    W_p: Float64[Tensor, "d_in n"],
    features: Float64[Tensor, "points n"],
    probability: Float64[Tensor, " points"],
) -> float:
    """Return L_GT (Eq. 10) under the best pairing of latents with features; spare latents are compared with 0."""
    latents = code(W_m, superpose(W_p, features))
    weighted = latents * probability[:, None]
    spare = (latents * weighted).sum(0)
    own = features.square().T @ probability
    cost = own[:, None] + spare - 2 * features.T @ weighted
    rows, columns = linear_sum_assignment((cost - spare).numpy())
    return float((cost - spare)[rows, columns].sum() + spare.sum())


def gap(
    W_p: Float64[Tensor, "d_in n"],
    features: Float64[Tensor, "points n"],
    gamma: Weights | None = None,
) -> Float64[Tensor, " points"]:
    """Return r^T (W_p^T Gamma^T Gamma W_p - I) r per point, r = x - ReLU(W_p^T W_p x) (Eq. 11; Eq. 13 with gamma).

    The difference between the SAE loss and the ground-truth loss at W_m = W_p^T.
    """
    r = features - code(W_p.T, superpose(W_p, features))
    return _weighed(r @ W_p.T, gamma).square().sum(-1) - r.square().sum(-1)


def scaled_gap_norm(W_p: Float64[Tensor, "d_in n"], gamma: Weights | None = None) -> float:
    """Return min_c ||c W_p^T Gamma^T Gamma W_p - I||_F = sqrt(n - tr(A)^2 / ||A||_F^2): the gap's size, scale aside."""
    weighted = _weighed(W_p.T, gamma)
    gram = weighted.T @ weighted  # the same trace and norm as W_p^T Gamma^T Gamma W_p
    left = W_p.shape[1] - float(gram.trace().square() / gram.square().sum())
    return max(left, 0.0) ** 0.5


def closed_form(
    W_p: Float[Tensor, "d_in n"], d_sae: int | None = None, permutation: Sequence[int] | None = None
) -> Float64[Tensor, "d_sae d_in"]:
    """Return W_m = I* (W_p, 0)^T (Theorem 1): row i of (W_p, 0)^T is row permutation[i] of it when one is given.

    Raises UserError for d_sae < n or a permutation that is not one.
    """
    matrix = check_W_p(W_p)
    d_in, n = matrix.shape
    width = n if d_sae is None else d_sae
    if width < n:
        raise UserError(
            f"d_sae = {width} for {n} features: the closed form needs a latent for each; use d_sae >= {n}"
        )
    padded = torch.cat([matrix.T, matrix.new_zeros(width - n, d_in)])
    if permutation is None:
        return padded
    order = list(permutation)
    if sorted(order) != list(range(width)):
        raise UserError(f"permutation {order}: it must hold each of 0 ... {width - 1} once")
    return padded[torch.tensor(order, dtype=torch.int64)]


def signed(
    Q: Float64[Tensor, "rows d_in"], d_sae: int | None = None
) -> Float64[Tensor, "d_sae d_in"]:
    """Return W_m = [Q; -Q; 0]: for an orthonormal Q its loss is 0 for every x, because relu(y) - relu(-y) = y."""
    rows = torch.cat([Q, -Q])
    return (
        rows if d_sae is None else torch.cat([rows, rows.new_zeros(d_sae - len(rows), Q.shape[1])])
    )


def recovers(
    latents: Float64[Tensor, "points d_sae"],
    features: Float64[Tensor, "points n"],
    tolerance: float = 1e-9,
) -> Int64[Tensor, " n"] | None:
    """Return the latent of each feature when x_m ~ (x, 0) (Eq. 6, 7), else None.

    One assignment must serve all points: every feature equals its latent, and the other latents are 0.
    """
    points, n = features.shape
    d_sae = latents.shape[1]
    if d_sae < n:
        return None
    padded = torch.nn.functional.pad(features, (0, d_sae - n))
    apart = torch.stack([(latents - padded[:, i : i + 1]).abs().amax(0) for i in range(d_sae)])
    rows, columns = linear_sum_assignment((apart > tolerance).double().numpy())
    if points and bool((apart[rows, columns] > tolerance).any()):
        return None
    return torch.as_tensor(columns[:n].copy())


def _weighed(residual: Tensor, gamma: Weights | None) -> Tensor:
    return residual if gamma is None else weigh(residual, gamma)


def squared(gamma: Weights | None, d_in: int) -> Float64[Tensor, "d_in d_in"]:
    """Return Gamma^T Gamma; I where there are no weights."""
    transposed = _weighed(torch.eye(d_in, dtype=torch.float64), gamma)
    return transposed @ transposed.T


# The best tied SAE for a given W_p.


@dataclass(frozen=True)
class Optimum:
    """The best W_m found, and every start's loss."""

    loss: float
    W_m: Float64[Tensor, "d_sae d_in"]
    losses: Float64[Tensor, " starts"]
    """Each start's own loss in order: given starts first, then random ones."""
    all_W_m: Float64[Tensor, "starts d_sae d_in"]
    """Each start's own W_m, in the same order."""


def minimise(
    W_p: Float[Tensor, "d_in n"],
    d_sae: int,
    features: Float64[Tensor, "_ _"],
    probability: Float64[Tensor, " _"],
    gamma: Weights | None = None,
    init: Float[Tensor, "*given d_sae d_in"] | None = None,
    starts: int = 16,
    seed: int = 0,
    steps: int = 400,
    lr: float = 0.05,
    polished: int = 4,
) -> Optimum:
    """Return the best of many minimisations of L_SAE (Eq. 4; Eq. 12 with gamma) over W_m [d_sae, d_in].

    `starts` random starts beside those in `init` (for example the closed form) take `steps` batched Adam steps whose
    learning rate falls from `lr` to 0 along a cosine; L-BFGS finishes the best `polished`. The result is an upper bound
    on the minimum: a loss below the closed form's refutes its optimality, the reverse proves nothing. Raises UserError
    when no start is left, shapes disagree, or there is no signal (all x_p = 0).
    """
    matrix = check_W_p(W_p)
    if features.shape[1] != matrix.shape[1] or len(features) != len(probability):
        raise UserError(
            f"features {list(features.shape)} and probability {list(probability.shape)} do not fit "
            f"W_p {list(matrix.shape)}; they must be [points, n_features] and [points]"
        )
    acts_scale = energy(matrix, features, probability)
    if acts_scale == 0:
        raise UserError("every x_p is 0, so there is no signal to reconstruct; use S < 1")

    problem = Problem.build(matrix, features, probability / acts_scale, gamma)
    found, reached = _descend(_starts(init, starts, seed, d_sae, len(matrix)), problem, steps, lr)
    for i in reached.argsort()[:polished].tolist():
        better, loss = _polish(found[i], problem)
        if loss < float(reached[i]):
            found[i], reached[i] = better, loss
    reached = reached * acts_scale
    best = int(reached.argmin())
    return Optimum(float(reached[best]), found[best].clone(), reached, found)


@dataclass(frozen=True)
class Agreement:
    """Two searches of one problem from independent random starts: do they find the same minimum?"""

    best: Optimum
    """The better of the two: an upper bound on the minimum, whether or not they agree."""
    other: Optimum
    starts: int
    """Random starts of each."""
    apart: float
    """The difference of their least losses over the larger one, or over ZERO_LOSS E ||x_p||^2 where that is more."""

    @property
    def agreed(self) -> bool:
        """Return whether both found the same least loss. Where they did not, a longer search may find less."""
        return self.apart <= SAME_LOSS


SAME_LOSS = 1e-6
"""Relative difference of two least losses that counts as none."""
ZERO_LOSS = 1e-6
"""Share of E ||x_p||^2 below which a least loss counts as 0, which searches reach slowly."""


def agree(
    W_p: Float[Tensor, "d_in n"],
    d_sae: int,
    features: Float64[Tensor, "_ _"],
    probability: Float64[Tensor, " _"],
    gamma: Weights | None = None,
    init: Float[Tensor, "*given d_sae d_in"] | None = None,
    seed: int = 0,
    starts: int = 256,
    most: int = 1024,
) -> Agreement:
    """Return two minimisations of L_SAE from independent random starts, doubled up to `most` until they agree.

    The starts of `init` belong to the first search alone, so that the second has to find what they lead to. Raises
    UserError like `minimise`.
    """
    while True:
        found = [
            minimise(W_p, d_sae, features, probability, gamma, given, starts, drawn, polished=6)
            for drawn, given in ((seed, init), (seed_for(seed, "again"), None))
        ]
        best, other = sorted(found, key=lambda one: one.loss)
        floor = ZERO_LOSS * energy(check_W_p(W_p), features, probability)
        apart = (other.loss - best.loss) / max(other.loss, floor)
        pair = Agreement(best, other, starts, apart)
        if pair.agreed or starts >= most:
            return pair
        starts *= 2


def _starts(init: Tensor | None, starts: int, seed: int, d_sae: int, d_in: int) -> Tensor:
    rows = normal(seed_for(seed, "minimise"), starts, d_sae, d_in)
    rows = rows / rows.norm(dim=-1, keepdim=True)
    given = rows[:0] if init is None else init.double().reshape(-1, *init.shape[-2:])
    if given.shape[1:] != rows.shape[1:]:
        raise UserError(
            f"init has shape {list(given.shape[1:])}; it must be [d_sae, d_in] = [{d_sae}, {d_in}]"
        )
    begun = torch.cat([given, rows])
    if len(begun) == 0:
        raise UserError("no start: give init, or starts >= 1")
    return begun


@dataclass(frozen=True)
class Problem:
    """L_SAE as a function of W_m alone, with its gradient written out: searches spend their time here."""

    acts: Float64[Tensor, "points d_in"]
    weighted: Float64[Tensor, "points d_in"]
    """probability * x_p Gamma^T Gamma."""
    probability: Float64[Tensor, "points 1"]
    gram: Float64[Tensor, "d_in d_in"]
    """Gamma^T Gamma."""

    @classmethod
    def build(
        cls,
        W_p: Float64[Tensor, "d_in n"],
        features: Float64[Tensor, "points n"],
        probability: Float64[Tensor, " points"],
        gamma: Weights | None,
    ) -> "Problem":
        """Return the problem for a world and a gamma."""
        acts, column, gram = (
            superpose(W_p, features),
            probability[:, None],
            squared(gamma, len(W_p)),
        )
        return cls(acts, column * (acts @ gram), column, gram)

    def value_and_gradient(
        self, W_m: Float64[Tensor, "*members d_sae d_in"]
    ) -> tuple[Float64[Tensor, "*members"], Float64[Tensor, "*members d_sae d_in"]]:
        """Return L and dL/dW_m = -2 [z^T E + (H(a) * (E W_m^T))^T x_p], E the weighted residual, a = W_m x_p.

        Eq. 17, with H(0) = 0.
        """
        z = (self.acts @ W_m.mT).relu_()
        x_hat = z @ W_m
        E = self.weighted - self.probability * (x_hat @ self.gram)
        loss = ((self.acts - x_hat) * E).sum((-1, -2))
        back = (E @ W_m.mT).mul_(z > 0)
        return loss, -2 * (z.mT @ E + back.mT @ self.acts)


def _descend(begun: Tensor, problem: Problem, steps: int, lr: float) -> tuple[Tensor, Tensor]:
    """Run Adam on every start at once and return the better of start and end, and its loss."""
    W_m, first, second = begun.clone(), torch.zeros_like(begun), torch.zeros_like(begun)
    fast, slow = 0.9, 0.99
    for step in range(1, steps + 1):
        slope = problem.value_and_gradient(W_m)[1]
        first.lerp_(slope, 1 - fast)
        second.mul_(slow).addcmul_(slope, slope, value=1 - slow)
        rate = lr * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        scale = (second / (1 - slow**step)).sqrt_().add_(1e-8)
        W_m.addcdiv_(first, scale, value=-rate / (1 - fast**step))
    reached, last = problem.value_and_gradient(begun)[0], problem.value_and_gradient(W_m)[0]
    better = last < reached
    return torch.where(better[:, None, None], W_m, begun), torch.where(better, last, reached)


def _polish(start: Tensor, problem: Problem) -> tuple[Tensor, float]:
    """Return what L-BFGS makes of one start, and its loss."""

    def value_and_slope(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = problem.value_and_gradient(torch.from_numpy(flat).reshape(start.shape))
        return float(value), slope.flatten().numpy()

    done = minimize(
        value_and_slope,
        start.flatten().numpy(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 500, "ftol": 1e-15, "gtol": 1e-10},
    )
    return torch.from_numpy(done.x).reshape(start.shape), float(done.fun)

"""The best tied SAE for a given W_p: many starts in one batched run, then a polish to a stationary point."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from scipy.optimize import minimize
from torch import Tensor

from wsae.core.errors import UserError
from wsae.core.seeds import seed_for
from wsae.sae.loss import Weights, weigh
from wsae.theory.geometry import check_W_p
from wsae.theory.losses import superpose


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
    acts_scale = float((features @ matrix.T).square().sum(1) @ probability)
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
        floor = ZERO_LOSS * float(superpose(check_W_p(W_p), features).square().sum(1) @ probability)
        apart = (other.loss - best.loss) / max(other.loss, floor)
        pair = Agreement(best, other, starts, apart)
        if pair.agreed or starts >= most:
            return pair
        starts *= 2


def _starts(init: Tensor | None, starts: int, seed: int, d_sae: int, d_in: int) -> Tensor:
    made = torch.Generator().manual_seed(seed_for(seed, "minimise"))
    rows = torch.randn(starts, d_sae, d_in, generator=made, dtype=torch.float64)
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
        acts = superpose(W_p, features)
        unit = torch.eye(len(W_p), dtype=torch.float64)
        root = unit if gamma is None else weigh(unit, gamma.double())
        gram = root @ root.T  # weigh(I) is Gamma^T
        column = probability[:, None]
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

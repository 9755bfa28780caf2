"""Extreme sparsity, the zeros of the 1-sparse loss, and shrinkage, each against another way of computing it."""

import itertools
import math
import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsae.core.errors import UserError
from wsae.theory.geometry import (
    digons,
    direct_sum,
    interference,
    nonpositive,
    orthogonal,
    polygon,
    random_unit,
    simplex,
)
from wsae.theory.limits import (
    distance,
    first_order,
    gauss_newton,
    jacobian,
    jumprelu_window,
    nullity,
    one_sparse_residuals,
    second_moment,
    support_terms,
    topk_bound,
    topk_code,
    zero_solutions,
)
from wsae.theory.losses import closed_form, code, grid, sae_loss, superpose
from wsae.theory.shrinkage import measure, shrinkage, simplex_shrinkage

SEEDS = st.integers(0, 2**31)


def loss_at(terms, S):
    """Return L(S) = sum_m S^(n-m) (1-S)^m T_m."""
    m = torch.arange(len(terms), dtype=torch.float64)
    return float((S ** (len(terms) - 1 - m) * (1 - S) ** m * terms).sum())


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, n=st.integers(1, 5), S=st.floats(0, 0.999))
def test_the_loss_is_the_polynomial_of_its_support_terms(seed, n, S):
    W_p, W_m = random_unit(2, n, seed), normal(3, 2, seed=seed)
    features, probability = grid(n, S, 2)
    exact = float(sae_loss(W_m, W_p, features, probability))
    assert loss_at(support_terms(W_m, W_p, 2), S) == pytest.approx(exact, rel=1e-9, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, n=st.integers(1, 5))
def test_the_first_order_term_is_what_remains_as_S_goes_to_1(seed, n):
    W_p, W_m = random_unit(2, n, seed), normal(3, 2, seed=seed)
    terms = support_terms(W_m, W_p, 2)
    S = 0.9
    assert float(terms[0]) == 0
    assert first_order(W_m, W_p, S, second_moment(2)) == pytest.approx(
        S ** (n - 1) * (1 - S) * float(terms[1]), rel=1e-9
    )
    near = 1 - 1e-7
    assert loss_at(terms, near) / (1 - near) == pytest.approx(float(terms[1]), rel=1e-4, abs=1e-5)


def test_the_second_moment_tends_to_that_of_the_uniform_law():
    assert second_moment(1) == 0.25
    assert second_moment(2000) == pytest.approx(1 / 3, abs=1e-7)


def test_top_1_recovers_and_top_2_keeps_a_positive_interferer():
    pentagon = polygon(5)
    assert topk_bound(pentagon) == 3
    assert torch.allclose(topk_code(pentagon, 1), torch.eye(5).double())
    kept = topk_code(pentagon, 2)
    assert bool(((kept > 0).sum(1) == 2).all())
    with pytest.raises(UserError, match="k = 6"):
        topk_code(pentagon, 6)


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS)
def test_top_k_recovers_up_to_the_papers_bound_when_interference_is_non_positive(seed):
    W_p = nonpositive(3, 5, seed)
    for k in range(1, topk_bound(W_p) + 1):
        assert torch.allclose(topk_code(W_p, k), torch.eye(5).double(), atol=1e-9)


@pytest.mark.parametrize("threshold", [0.1, 0.2, 0.3, 0.35, 0.45, 0.5, 0.6])
def test_the_jumprelu_window_is_where_every_size_is_recovered(threshold):
    low, high = 0.5, 1.0
    W_p = polygon(5)
    start, end = jumprelu_window(W_p, low, high)
    sizes = torch.linspace(low, high, 11).double()
    features = (sizes[:, None, None] * torch.eye(5)).reshape(-1, 5).double()
    latents = code(closed_form(W_p), superpose(W_p, features), "jumprelu", threshold=threshold)
    exact = bool((latents - features).abs().max() < 1e-9)
    assert exact == (start <= threshold < end - 1e-9)
    with pytest.raises(UserError, match="0 < low"):
        jumprelu_window(W_p, 0.0, 1.0)


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS)
def test_the_jacobian_is_autograds(seed):
    W_p, W_m = random_unit(2, 3, seed), normal(4, 2, seed=seed)

    def residual(W: torch.Tensor) -> torch.Tensor:
        return (W_p.T - (W @ W_p).relu().T @ W).flatten()

    expected = torch.autograd.functional.jacobian(residual, W_m).reshape(6, 8)
    assert torch.allclose(jacobian(W_m, W_p), expected, atol=1e-12)


@pytest.mark.parametrize("p", range(3, 8))
def test_the_mirrored_simplex_solves_eq_33(p):
    W_p = simplex(p)
    mirrored = -((p - 1) ** 0.5) * closed_form(W_p)
    assert float(one_sparse_residuals(mirrored, W_p).max()) < 1e-25
    assert distance(mirrored, closed_form(W_p)) > 0.5


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS)
def test_zeros_of_the_one_sparse_loss_have_codes_of_unit_length(seed):
    """Eq. 33 and unit columns: w . x_hat = ||x_m||^2 = 1, so the l1 norm is at least 1, and 1 only for one latent."""
    W_p = simplex(4) if seed % 2 else orthogonal(4)
    found = gauss_newton(normal(12, 4, len(W_p), seed=seed), W_p)
    for W_m in found[one_sparse_residuals(found, W_p).sum(1) < 1e-20]:
        latents = code(W_m, W_p.T.contiguous())
        assert torch.allclose(latents.norm(dim=1), torch.ones(4).double(), atol=1e-9)
        alone = (latents > 1e-6).sum(1) == 1
        assert bool((latents.sum(1) >= 1 - 1e-9).all())
        assert bool(((latents.sum(1) < 1 + 1e-9) == alone).all())


def test_two_digons_turn_freely_one_digon_does_not():
    assert nullity(closed_form(digons(1)), digons(1)) == 0
    angle = torch.tensor(0.4).double()
    R = torch.stack(
        [torch.stack([angle.cos(), angle.sin()]), torch.stack([-angle.sin(), angle.cos()])]
    )
    turned = torch.cat([R, -R])
    assert float(one_sparse_residuals(turned, digons(2)).max()) < 1e-25
    assert nullity(turned, digons(2)) == 1


def test_the_search_for_zeros_tells_unique_from_not_unique():
    assert zero_solutions(orthogonal(2), 32, 0).others == 0
    found = zero_solutions(polygon(3), 64, 0)
    assert found.others == 1
    assert distance(found.solutions[0], closed_form(polygon(3))) < 1e-9
    assert distance(found.solutions[1], -(2**0.5) * closed_form(polygon(3))) < 1e-9
    assert 0 < found.reached_closed_form < found.reached <= 64


def test_without_interference_nothing_shrinks():
    found = shrinkage(orthogonal(3), 0.4)
    assert torch.allclose(found.ratio, torch.ones(3).double())
    assert (
        float(found.vanished.max())
        == float(found.spurious.max())
        == float(found.top_lost.sum())
        == 0
    )
    assert found.latents == pytest.approx(found.features)
    assert found.latents == pytest.approx(3 * 0.6)


def test_example_1_as_a_shrinkage():
    x = torch.tensor([[0.5, 1.0, 0.8]]).double()
    found = measure(direct_sum(orthogonal(1), digons(1)), x, torch.ones(1).double())
    assert found.ratio.tolist() == pytest.approx([1, 0.2, 0])
    assert found.vanished.tolist() == [0, 0, 1]
    assert found.top_lost.tolist() == [0, 1, 0]
    assert (found.latents, found.features, found.dimensions) == (2, 3, 2)


def test_example_2_leaves_fewer_latents_than_dimensions():
    x = torch.tensor([[0.7, 0.5, 0.3]]).double()
    found = measure(polygon(3), x, torch.ones(1).double())
    assert (found.latents, found.dimensions, found.fewer_than_dimensions) == (1, 2, 1)


def of_uniforms(weights: list[float], power: int) -> float:
    """Return E[(c . u)_+^power], power 0 or 1, u uniform on (0, 1]^k: differences of a (k + power)-fold integral."""
    c = [w for w in weights if abs(w) > 1e-12]
    corners = itertools.product((0, 1), repeat=len(c))
    total = sum(
        (-1) ** (len(c) - sum(v)) * max(0.0, sum(map(operator.mul, c, v))) ** (len(c) + power)
        for v in corners
    )
    return total / math.factorial(len(c) + power) / math.prod(c)


def exactly(W_p: torch.Tensor, S: float) -> tuple[float, float]:
    """Return E[x_m,0 | x_0 > 0] / E[x_0 | x_0 > 0] and P(x_m,0 = 0 | x_0 > 0) as a sum over supports."""
    own, *others = (W_p.T @ W_p)[0].tolist()
    ratio = vanished = 0.0
    for active in itertools.product((0, 1), repeat=len(others)):
        chance = math.prod(1 - S if on else S for on in active)
        weights = [own, *itertools.compress(others, active)]
        ratio += chance * 2 * of_uniforms(weights, 1)
        vanished += chance * (1 - of_uniforms(weights, 0))
    return ratio, vanished


@pytest.mark.parametrize("S", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("p", [1, 2, 3, 4, 7])
def test_a_simplex_shrinks_by_its_rational_formula_as_by_a_sum_over_supports(p, S):
    assert simplex_shrinkage(p, S) == pytest.approx(exactly(simplex(p), S), abs=1e-9)


@pytest.mark.parametrize("W_p", [polygon(3), polygon(5), polygon(7), nonpositive(3, 5, 1)])
def test_shrinkage_is_that_of_uniform_magnitudes_not_of_a_grid(W_p):
    for S in (0.0, 0.5):
        found = shrinkage(W_p, S)
        exact = exactly(W_p, S)
        assert (float(found.ratio[0]), float(found.vanished[0])) == pytest.approx(exact, abs=1e-3)


def test_the_numbers_of_uniform_magnitudes():
    """By hand: 59/96 in a triangle; of dense x a digon loses the top place in 1/3, a triangle a dimension in 1/2."""
    assert simplex_shrinkage(3, 0.5)[0] == pytest.approx(59 / 96)
    for S in (0.0, 0.5, 0.9):
        found = shrinkage(direct_sum(orthogonal(2), digons(1)), S)
        by_hand = (1 - S) ** 2 * (2 * S * (1 - S) + (1 - S) ** 2) / 3
        assert float(found.top_lost[2:].sum()) == pytest.approx(by_hand, rel=0.005)
        assert float(found.top_lost[:2].sum()) == 0
    assert shrinkage(polygon(3), 0.0).fewer_than_dimensions == pytest.approx(0.5, abs=1e-3)


def test_positive_interference_speaks_for_silent_features():
    found = shrinkage(polygon(5), 0.9)
    assert float(interference(polygon(5)).max()) > 0
    assert float(found.spurious.min()) > 0


def test_a_feature_that_is_never_active_is_named():
    x = torch.tensor([[1.0, 0.0, 0.5]]).double()
    with pytest.raises(UserError, match="feature 1 is never active"):
        measure(polygon(3), x, torch.ones(1).double())


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS)
def test_a_penalty_of_any_size_moves_W_p_T_and_a_vanishing_one_singles_it_out(seed):
    """On 1-sparse x rows c W_p^T have (1 - c^2)^2 + penalty c, least below c = 1; the other solution has more l1."""
    W_p = simplex(3 + seed % 4)
    alone = W_p.T.contiguous()
    scales = torch.linspace(0.8, 1, 2001, dtype=torch.float64)
    members = scales[:, None, None] * closed_form(W_p)
    loss = one_sparse_residuals(members, W_p)[:, 0]
    l1 = code(members, alone)[:, 0].sum(-1)
    best = [float(scales[(loss + penalty * l1).argmin()]) for penalty in (0.1, 0.01, 0.001)]
    assert best[0] < best[1] < best[2] < 1
    assert best == pytest.approx([1 - p / 8 for p in (0.1, 0.01, 0.001)], abs=2e-3)
    mirrored = -((W_p.shape[1] - 1) ** 0.5) * closed_form(W_p)
    assert float(code(mirrored, alone).sum(1).min()) > 1.2

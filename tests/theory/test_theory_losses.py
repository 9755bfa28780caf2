"""The paper's losses on exact distributions, recomputed with plain loops; identities; the optimiser."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsae.core.errors import UserError
from wsae.theory.claims.weights import unfinished
from wsae.theory.geometry import nonpositive, orthogonal, polygon, random_unit
from wsae.theory.losses import (
    Problem,
    agree,
    closed_form,
    code,
    gap,
    grid,
    ground_truth_loss,
    minimise,
    recovers,
    sae_loss,
    sampled,
    superpose,
    uniform,
)

SEEDS = st.integers(0, 2**31)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize(("n", "S", "levels"), [(1, 0.3, 5), (3, 0.0, 2), (4, 0.9, 3)])
def test_a_grid_is_an_exact_iid_distribution(n, S, levels):
    features, probability = grid(n, S, levels)
    assert float(probability.sum()) == pytest.approx(1, abs=1e-12)
    mean = probability @ features
    assert torch.allclose(mean, torch.full_like(mean, (1 - S) / 2))
    assert torch.allclose(probability @ (features == 0).double(), torch.full_like(mean, S))
    second = features.T @ (probability[:, None] * features)
    off = second - torch.diag(second.diagonal())
    independent = torch.full((n, n), ((1 - S) / 2) ** 2).double().fill_diagonal_(0)
    assert torch.allclose(off, independent)


def test_samples_are_zero_with_probability_S_and_uniform_otherwise():
    features, probability = sampled(5, 0.75, 40_000, 3)
    active = features[features > 0]
    assert float((features == 0).double().mean()) == pytest.approx(0.75, abs=0.01)
    assert float(active.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(active.square().mean()) == pytest.approx(1 / 3, abs=0.01)
    assert 0 < float(active.min()) < 1e-3 < 0.999 < float(active.max()) <= 1
    assert float(probability.sum()) == pytest.approx(1)


@pytest.mark.parametrize("S", [0.0, 0.3])
def test_every_support_has_its_probability_and_uniform_magnitudes(S):
    features, probability = uniform(3, S, 2**14)
    assert abs(float(probability.sum()) - 1) < 1e-12
    silent = probability @ (features == 0).double()
    assert torch.allclose(silent, torch.full((3,), S, dtype=torch.float64), atol=1e-12, rtol=0)
    mean, square = probability @ features, probability @ features.square()
    assert torch.allclose(mean, torch.full((3,), (1 - S) / 2).double(), atol=1e-3)
    assert torch.allclose(square, torch.full((3,), (1 - S) / 3).double(), atol=1e-3)
    both = float(probability @ (features[:, 0] * features[:, 1]))
    assert both == pytest.approx(((1 - S) / 2) ** 2, abs=1e-3)
    with pytest.raises(UserError, match=r"2\^3 supports in 4 rows"):
        uniform(3, 0.5, 4)


@pytest.mark.parametrize("S", [-0.1, 1.1, 1.0, float("nan")])
def test_a_sparsity_without_meaning_or_signal_is_refused(S):
    with pytest.raises(UserError, match="no signal" if S == 1 else "must be in"):
        grid(2, S)


def test_a_grid_too_large_points_to_sampling():
    with pytest.raises(UserError, match="sampled"):
        grid(12, 0.5, 4)


def test_the_losses_are_what_the_equations_say():
    """Eq. 4, 10 and 12 with loops over points, dimensions and latents."""
    W_p, W_m = random_unit(2, 3, 1), normal(4, 2, seed=2)
    features, probability = grid(3, 0.4, 1)
    gamma = torch.tensor([0.5, 2.0]).double()
    sae = truth = weighted = 0.0
    for x, p in zip(features.tolist(), probability.tolist(), strict=True):
        x_p = [sum(float(W_p[q, i]) * x[i] for i in range(3)) for q in range(2)]
        x_m = [max(0.0, sum(float(W_m[s, q]) * x_p[q] for q in range(2))) for s in range(4)]
        x_hat = [sum(float(W_m[s, q]) * x_m[s] for s in range(4)) for q in range(2)]
        sae += p * sum((x_p[q] - x_hat[q]) ** 2 for q in range(2))
        weighted += p * sum((float(gamma[q]) * (x_p[q] - x_hat[q])) ** 2 for q in range(2))
        truth += p * sum((x[i] - x_m[i]) ** 2 for i in range(3)) + p * x_m[3] ** 2
    given = (W_m, W_p, features, probability)
    assert float(sae_loss(*given)) == pytest.approx(sae)
    assert float(sae_loss(*given, gamma)) == pytest.approx(weighted)
    assert float(sae_loss(*given, torch.diag(gamma))) == pytest.approx(weighted)
    assert float(ground_truth_loss(*given)) == pytest.approx(truth)


def test_members_of_a_batch_have_their_lone_losses():
    W_p, members = random_unit(2, 3, 1), normal(5, 3, 2)
    features, probability = grid(3, 0.4, 2)
    for loss in (sae_loss, ground_truth_loss):
        alone = torch.stack([loss(W_m, W_p, features, probability) for W_m in members])
        assert torch.allclose(loss(members, W_p, features, probability), alone, rtol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    seed=SEEDS,
    d=st.integers(1, 4),
    n=st.integers(1, 6),
    kind=st.sampled_from(["none", "vector", "matrix"]),
)
def test_the_gap_is_the_difference_of_the_losses(seed, d, n, kind):
    """Theorems 4 and 5, pointwise and for any W_p, unit columns or not."""
    W_p = normal(d, n, seed=seed)
    features = normal(7, n, seed=seed + 1).abs()
    gamma = {"none": None, "vector": normal(d, seed=3).abs(), "matrix": normal(d, d, seed=4)}[kind]
    for i in range(7):
        point, certain = features[i : i + 1], torch.ones(1).double()
        difference = sae_loss(W_p.T, W_p, point, certain, gamma) - ground_truth_loss(
            W_p.T, W_p, point, certain
        )
        scale = 1 + float(difference.abs())
        assert float(gap(W_p, point, gamma)) == pytest.approx(float(difference), abs=1e-9 * scale)


def test_the_ground_truth_loss_needs_a_latent_for_each_feature():
    features, probability = grid(3, 0.5, 1)
    with pytest.raises(UserError, match="2 latents for 3 features"):
        ground_truth_loss(normal(2, 2), random_unit(2, 3, 0), features, probability)


def test_sparse_activations_by_hand():
    acts, W_m = torch.tensor([[3.0, 1.0, -2.0, 2.0]]).double(), orthogonal(4)
    assert code(W_m, acts).tolist() == [[3, 1, 0, 2]]
    assert code(W_m, acts, "topk", k=2).tolist() == [[3, 0, 0, 2]]
    assert code(W_m, acts, "topk", k=4).tolist() == [[3, 1, 0, 2]]
    assert code(W_m, acts, "jumprelu", threshold=1.0).tolist() == [[3, 0, 0, 2]]
    with pytest.raises(UserError, match="k = 5"):
        code(W_m, acts, "topk", k=5)


def test_the_closed_form_is_padded_and_reordered():
    W_p = random_unit(2, 3, 0)
    found = closed_form(W_p, 4, [3, 0, 2, 1])
    assert found.tolist() == [[0, 0], W_p[:, 0].tolist(), W_p[:, 2].tolist(), W_p[:, 1].tolist()]
    with pytest.raises(UserError, match="d_sae = 2 for 3"):
        closed_form(W_p, 2)
    with pytest.raises(UserError, match="permutation"):
        closed_form(W_p, 3, [0, 0, 1])


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, n=st.integers(1, 6), spare=st.integers(0, 3))
def test_recovery_is_seen_through_order_and_padding(seed, n, spare):
    made = torch.Generator().manual_seed(seed)
    features = torch.rand(9, n, generator=made).double()
    order = torch.randperm(n + spare, generator=made)
    latents = torch.nn.functional.pad(features, (0, spare))[:, order]
    found = recovers(latents, features)
    assert found is not None
    assert torch.equal(latents[:, found], features)
    latents[0, 0] += 0.1
    assert recovers(latents, features) is None


def test_recovery_wants_one_assignment_for_all_points():
    features = torch.tensor([[1.0, 2.0], [1.0, 2.0]]).double()
    assert recovers(torch.tensor([[1.0, 2.0], [2.0, 1.0]]).double(), features) is None
    assert recovers(features[:, :1], features) is None


@pytest.mark.parametrize("S", [0.1, 0.5, 0.9])
def test_the_optimiser_finds_the_triangles_minimum(S):
    """x in {0, 1/2}^3: L(W_p^T) = 3 S (1-S)^2 / 16, and sqrt(a) W_p^T reaches 4S / (1+3S) of it (by hand)."""
    W_p = polygon(3)
    features, probability = grid(3, S, 1)
    own = float(sae_loss(closed_form(W_p), W_p, features, probability))
    assert own == pytest.approx(3 * S * (1 - S) ** 2 / 16)
    best = minimise(W_p, 3, features, probability, starts=8, init=closed_form(W_p))
    assert best.loss <= own * 4 * S / (1 + 3 * S) * (1 + 1e-9)
    assert float(sae_loss(best.W_m, W_p, features, probability)) == pytest.approx(
        best.loss, rel=1e-9
    )
    assert float(best.losses.min()) == best.loss


def test_enough_latents_reach_zero_and_no_result_is_worse_than_its_start():
    W_p = random_unit(2, 5, 7)
    features, probability = grid(5, 0.3, 1)
    given = torch.stack([closed_form(W_p), 0.5 * closed_form(W_p)])
    best = minimise(W_p, 5, features, probability, init=given, starts=6)
    begun = sae_loss(given, W_p, features, probability)
    assert best.loss < 1e-10
    assert bool((best.losses[:2] <= begun).all())
    assert len(best.losses) == 8


def test_the_optimiser_repeats_itself_and_minds_gamma():
    W_p = nonpositive(3, 4, 2)
    features, probability = grid(4, 0.5, 1)
    gamma = torch.tensor([1.0, 2.0, 0.5]).double()
    one, two = (minimise(W_p, 4, features, probability, gamma, starts=4, seed=5) for _ in range(2))
    assert torch.equal(one.W_m, two.W_m)
    assert one.loss == pytest.approx(
        float(sae_loss(one.W_m, W_p, features, probability, gamma)), rel=1e-9
    )
    for step in itertools.product((-1e-4, 1e-4), range(3)):
        moved = one.W_m.clone()
        moved[0, step[1]] += step[0]
        assert float(sae_loss(moved, W_p, features, probability, gamma)) >= one.loss * (1 - 1e-6)


def test_two_searches_find_the_minimum_that_few_starts_miss():
    """A random non-positive W_p of three dimensions, S = 0.2: twelve starts end 8 % above the minimum."""
    (W_p,) = unfinished(0, 1, 3, 4)
    features, probability = grid(4, 0.2, 1)
    few = minimise(W_p, 4, features, probability, starts=12, steps=250, polished=2)
    assert few.loss == pytest.approx(0.0051591, rel=1e-4)
    for seed in (0, 1):
        pair = agree(W_p, 4, features, probability, seed=seed)
        assert pair.agreed
        assert pair.best.loss == pytest.approx(0.00476759, rel=1e-5)
        assert pair.best.loss <= pair.other.loss <= pair.best.loss * (1 + 1e-6)


def test_searches_that_disagree_say_so_after_the_longest():
    W_p = nonpositive(4, 5, 43)
    features, probability = grid(5, 0.2, 1)
    pair = agree(W_p, 5, features, probability, starts=1, most=1, seed=3)
    assert pair.starts == 1
    assert not pair.agreed
    assert pair.apart == pytest.approx(1 - pair.best.loss / pair.other.loss)
    longer = agree(W_p, 5, features, probability, starts=1, most=64, seed=3)
    assert longer.starts > 1
    assert longer.agreed
    assert longer.best.loss <= pair.best.loss * (1 + 1e-9)


def test_zeros_that_searches_reach_slowly_agree():
    W_p = random_unit(2, 5, 7)
    assert agree(W_p, 5, *grid(5, 0.3, 1), starts=16, most=16).agreed


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"starts": 0}, "no start"),
        ({"init": torch.zeros(4, 2).double()}, r"init has shape \[4, 2\]"),
        (
            {"features": torch.zeros(1, 3).double(), "probability": torch.ones(1).double()},
            "no signal",
        ),
        (
            {"features": torch.zeros(1, 2).double(), "probability": torch.ones(1).double()},
            "do not fit",
        ),
    ],
)
def test_the_optimiser_refuses_what_it_cannot_do(change, says):
    features, probability = grid(3, 0.5, 1)
    given = {"features": features, "probability": probability, "starts": 1, **change}
    with pytest.raises(UserError, match=says):
        minimise(polygon(3), 3, **given)


def test_superposition_is_a_linear_map():
    W_p, x = random_unit(2, 4, 0), normal(3, 4)
    assert torch.allclose(superpose(W_p, x), torch.stack([W_p @ row for row in x]))


@pytest.mark.parametrize("gamma", [None, normal(2, seed=8).abs(), normal(2, 2, seed=9)])
def test_the_optimisers_gradient_is_autograds(gamma):
    W_p = random_unit(2, 3, 1)
    features, probability = grid(3, 0.4, 2)
    members = normal(3, 4, 2, seed=7).requires_grad_(True)
    loss = sae_loss(members, W_p, features, probability, gamma)
    (slope,) = torch.autograd.grad(loss.sum(), members)
    problem = Problem.build(W_p, features, probability, gamma)
    found, gradient = problem.value_and_gradient(members.detach())
    assert torch.allclose(found, loss.detach(), rtol=1e-12)
    assert torch.allclose(gradient, slope, rtol=1e-10, atol=1e-14)

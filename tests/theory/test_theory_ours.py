"""Our own theorems: the numbers that carry each, and the tools of the checks against other ways to compute them."""

import functools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsae.sae import SAE
from wsae.sae.config import SAEConfig, TopK
from wsae.sae.precondition import Preconditioner
from wsae.theory.claims import checks_in, ours
from wsae.theory.geometry import digons, direct_sum, orthogonal, polygon, random_unit
from wsae.theory.losses import code, sampled, superpose
from wsae.theory.record import Claim

DOCS = Path(__file__).resolve().parents[2] / "docs" / "theory.md"


@functools.cache
def claims(seed: int) -> dict[str, Claim]:
    """Every quick check once for a seed."""
    slow = (ours.extremely_sparse,)
    return {check.__name__: check(seed) for check in checks_in(ours) if check not in slow}


def test_every_theorem_has_its_statement_and_proof_in_the_docs_under_its_number():
    text = DOCS.read_text()
    sources = [(check.__doc__ or "").split(":")[0] for check in checks_in(ours)]
    assert re.findall(r"^### (Ours \d+):", text, re.M) == sources
    for section in text.split("### Ours ")[1:]:
        measured = "measured, not proved" in section
        assert measured or ("**Theorem.**" in section and "*Proof.*" in section), section[:40]


@pytest.mark.parametrize("seed", [0, 5])
def test_the_numbers_behind_each_theorem_carry_it(seed: int):
    n = {name: claim.numbers for name, claim in claims(seed).items()}
    assert {claim.verdict for claim in claims(seed).values()} == {"holds"}
    balanced = n["every_minimiser"]
    assert balanced["balanced"] < 1e-25 < 1e-8 < balanced["broken"]
    assert balanced["found"] < 1e-12 < 1e-4 < balanced["one_fewer"]
    assert balanced["imbalance"] < 1e-4
    assert balanced["inside_a_cone"] < 1e-30
    assert n["zero_loss_of_W_p"]["alone_or_digons"] < 1e-25 < 1e-3 < n["zero_loss_of_W_p"]["others"]
    noise = n["noise_decides_the_weights"]
    assert noise["next_best_ratio"] > 1.02
    assert noise["least_ratio_of_changes"] > 1
    assert noise["error_variance_1"] > noise["error_plain"] > noise["error_noise"]
    filters = n["matched_filter"]
    assert filters["search_apart"] < 1e-8
    assert filters["worst_step"] <= 0
    assert 1 < filters["half_gain_least"] < filters["gain_least"]
    assert filters["share_of_bound"] <= 1
    top = n["top_1_identifies"]
    assert top["own"] < 1e-25 < 1e-6 < top["other"]
    assert top["spanning"] == top["half_space"] == 10
    assert n["variance_is_anti_optimal"]["worst_step"] < 0
    assert n["variance_is_anti_optimal"]["one_least"] > 1
    assert n["tight_frames"]["worst"] < 1e-12
    for S in (0.99, 0.995, 0.999):
        assert n["sample_size"][f"missed_S{S:g}"] < 0.07
        assert n["sample_size"][f"missed_half_S{S:g}"] > 0.5
    latents = n["significance"]
    assert latents["apart"] == 0
    assert latents["right_significance"] > latents["right_plain"] + 0.05
    assert latents["right_plain"] > latents["right_amplitude"] + 0.05
    assert latents["most_by_noise_significance"] < latents["most_by_noise_amplitude"] - 0.05


def test_an_sae_folded_from_the_noises_coordinates_chooses_the_likeliest_feature():
    W_p, made = random_unit(5, 8, seed=3), torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=made, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(root @ root.T)
    P, inverse = ((vectors * values**power) @ vectors.T for power in (-0.5, 0.5))
    rows = torch.nn.functional.normalize((P @ W_p).T, dim=1)
    sae = SAE(SAEConfig(d_in=5, d_sae=8, activation=TopK(k=1))).double()
    sae.set_tensors(
        {**sae.tensors(), "W_enc": rows.T, "W_dec": rows} | {"b_enc": torch.zeros(8).double()}
    )
    x_p = torch.randn(500, 5, generator=made, dtype=torch.float64) @ root.T
    chosen = Preconditioner(P, inverse, {}).fold(sae).encode(x_p)
    likely = ours.most_likely(W_p, root @ root.T, x_p)
    some = chosen.max(1).values > 0
    assert some.double().mean() > 0.9
    assert torch.equal(chosen.argmax(1)[some], likely[some])


@given(st.integers(0, 10_000), st.integers(2, 4))
@settings(max_examples=20)
def test_the_measure_of_balance_is_0_exactly_where_the_sae_copies_every_vector(seed: int, d: int):
    made = torch.Generator().manual_seed(seed)
    frame = torch.linalg.qr(torch.randn(d + 1, d, generator=made, dtype=torch.float64)).Q
    y = torch.randn(50, d, generator=made, dtype=torch.float64)
    for W_m in (
        torch.cat([frame, -frame]),
        torch.cat([frame, -frame[:-1]]),
        torch.randn(2 * d, d, generator=made).double(),
    ):
        error = float((code(W_m, y) @ W_m - y).abs().max())
        assert (ours.imbalance(W_m) < 1e-9) == (error < 1e-9)


def test_balance_on_known_matrices():
    assert ours.imbalance(digons(2).T) == 0
    assert ours.imbalance(orthogonal(2)) == 1
    assert ours.imbalance(polygon(3).T) > 0.1
    assert ours.imbalance(direct_sum(digons(1), digons(1)).T * 1.1) == pytest.approx(0.21)


def test_a_readouts_correlation_is_that_of_drawn_rows():
    W_p, C = ours.uneven_world(3)
    made = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, W_p.shape[1], generator=made, dtype=torch.float64)
    for power in (-0.5, 0.0, 0.5, 1.0):
        values, vectors = torch.linalg.eigh(C)
        v = vectors @ (values**-power * (vectors.T @ W_p[:, 0]))
        drawn = np.corrcoef((superpose(W_p, x) @ v).numpy(), x[:, 0].numpy())[0, 1]
        assert float(ours.readout(C, W_p[:, 0], power)) == pytest.approx(drawn, abs=0.01)


def test_the_error_of_a_code_is_the_formula_of_least_squares():
    W_p, Sigma = random_unit(5, 3, 0), torch.diag(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]).double())
    M = torch.diag(torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0]).double())
    inverse = torch.linalg.inv(W_p.T @ M @ W_p) @ W_p.T @ M
    error = ours.code_error(W_p, Sigma, M, 0, active=3, rows=20_000)
    assert error == pytest.approx(float((inverse @ Sigma @ inverse.T).trace()), rel=0.02)


def test_shares_found_are_an_average_over_the_number_of_active_features():
    assert ours.recovered_share({1: 1.0, 200: 1.0}, 200, 0.97) == pytest.approx(1)
    only_single = {1: 1.0, 2: 0.0}
    S, n = 0.9, 20
    by_hand = S**n + n * (1 - S) * S ** (n - 1)
    assert ours.recovered_share(only_single, n, S) == pytest.approx(by_hand)
    threshold = ours.sparsity_threshold(only_single, n)
    assert ours.recovered_share(only_single, n, threshold) == pytest.approx(0.5)


def test_a_linear_program_finds_single_features_and_not_many():
    assert ours.linear_program_success(40, 10, (1, 9), 10, 0) == {1: 1.0, 9: 0.0}


def test_a_feature_alone_is_as_frequent_as_in_drawn_rows():
    x, _ = sampled(10, 0.9, 200_000, 0)
    alone = ((x > 0).sum(1) == 1) & (x[:, 0] > 0)
    assert float(alone.double().mean()) == pytest.approx(ours.one_alone(10, 0.9), rel=0.05)

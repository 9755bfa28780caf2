"""Recovery scores, each recomputed another way: loops, every permutation, numpy, or by hand."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsae.core.errors import UserError
from wsae.evals.recovery import Recovery, ground_truth, ground_truth_losses, score_codes, sums

PARTS = ("", "_rel", "_active", "_active_rel", "_active_entry")


def draw(rows: int, width: int, sparsity: float, seed: int) -> torch.Tensor:
    """Uniform (0, 1] where active, else 0; the first two rows keep every column alive and varying."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, width, generator=g, dtype=torch.float64)
    x *= torch.rand(rows, width, generator=g) >= sparsity
    x[0], x[1] = 0.25, 0.75
    return x


def codes(n: int, d_sae: int, seed: int, rows: int = 23, d_in: int = 3) -> tuple[torch.Tensor, ...]:
    """Features, latents that partly follow them, decoder rows and W_p, all random."""
    g = torch.Generator().manual_seed(seed + 1)
    x = draw(rows, n, 0.4, seed)
    mixed = x @ torch.randn(n, d_sae, generator=g, dtype=torch.float64)
    W_dec = torch.randn(d_sae, d_in, generator=g, dtype=torch.float64)
    W_p = torch.randn(d_in, n, generator=g, dtype=torch.float64)
    return x, mixed.relu(), W_dec, W_p


def scored(x, z, W_dec, W_p) -> Recovery:
    return score_codes(ground_truth(x, W_p=W_p), z, W_dec)


def ways(n: int, d_sae: int):
    """Every one-to-one assignment of min(n, d_sae) pairs, as {feature: latent}."""
    if n <= d_sae:
        yield from (dict(enumerate(p)) for p in permutations(range(d_sae), n))
    else:
        yield from ({i: j for j, i in enumerate(p)} for p in permutations(range(n), d_sae))


SIZES = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6))


def untied(n: int, d_sae: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Like `codes`, but no two latents are proportional (as two that fire in the same one row are): nothing ties."""
    x, z, W_dec, W_p = codes(n, d_sae, seed)
    g = torch.Generator().manual_seed(seed + 2)
    z = z + torch.rand(z.shape, generator=g, dtype=torch.float64)
    return x, z * (torch.rand(z.shape, generator=g) < 0.7), W_dec, W_p


@settings(max_examples=25, deadline=None)
@given(SIZES)
def test_matched_losses_are_the_smallest_of_all_assignments(size):
    n, d_sae, seed = size
    x, z, W_dec, W_p = codes(n, d_sae, seed)
    scores = scored(x, z, W_dec, W_p).scores
    rows = len(x)

    def error(i, j, scale):
        if j is None:
            return float(x[:, i].square().sum())
        c = (
            max(0.0, float(x[:, i] @ z[:, j]) / max(float(z[:, j] @ z[:, j]), 1e-300))
            if scale
            else 1
        )
        return float((x[:, i] - c * z[:, j]).square().sum())

    def best(padded, scale):
        totals = []
        for way in ways(n, d_sae):
            left = set(range(d_sae)) - set(way.values())
            rest = sum(float(z[:, j].square().sum()) for j in left) if padded else 0.0
            totals.append(rest + sum(error(i, way.get(i), scale) for i in range(n)))
        return min(totals) / rows

    assert scores["gt_matched"] == pytest.approx(best(False, False), abs=1e-12)
    assert scores["gt_padded"] == pytest.approx(best(True, False), abs=1e-12)
    assert scores["gt_scaled"] == pytest.approx(best(False, True), abs=1e-12)
    assert scores["gt_scaled"] <= scores["gt_zero"] + 1e-12
    assert scores["gt_matched"] <= scores["gt_padded"] + 1e-12


@settings(max_examples=20, deadline=None)
@given(SIZES)
def test_the_five_parts_are_sums_over_entries(size):
    n, d_sae, seed = size
    x, z, W_dec, W_p = codes(n, d_sae, seed)
    found = scored(x, z, W_dec, W_p)
    power, rows = float(x.square().sum()) / len(x), len(x)
    for which in ("matched", "padded"):
        latent = found.assignment[which].tolist()
        total = active = 0.0
        for t in range(rows):
            for i, j in enumerate(latent):
                e = float(x[t, i] - (z[t, j] if j >= 0 else 0)) ** 2
                total += e
                active += e if x[t, i] > 0 else 0.0
        if which == "padded":
            total += sum(float(z[:, j].square().sum()) for j in set(range(d_sae)) - set(latent))
        expected = (
            total / rows,
            total / rows / power,
            active / rows,
            active / rows / power,
            active / int((x > 0).sum()),
        )
        got = [found.scores[f"gt_{which}{part}"] for part in PARTS]
        assert got == pytest.approx(expected, abs=1e-11)


def test_the_raw_loss_is_equation_10_and_7_and_needs_a_latent_per_feature():
    x, z, W_dec, W_p = codes(4, 6, seed=3)
    by_hand = (torch.cat([x, torch.zeros(len(x), 2)], 1) - z).square().sum(1).mean()
    scores = scored(x, z, W_dec, W_p).scores
    assert scores["gt_raw"] == pytest.approx(float(by_hand))
    active = ((x - z[:, :4]).square() * (x > 0)).sum(1).mean()
    assert scores["gt_raw_active"] == pytest.approx(float(active))
    assert scores["gt_padded"] < scores["gt_raw"], "reordering helps random codes"
    few = scored(x, z[:, :3], W_dec[:3], W_p).scores
    assert not any(key.startswith("gt_raw") for key in few)


def test_the_papers_example_1_by_hand():
    """x_m = (0.5, 0.2, 0): the loss is 0.8^2 + 0.8^2, all of it on active entries."""
    x = torch.tensor([[0.5, 1.0, 0.8]] * 2, dtype=torch.float64)
    W_p = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, -1.0]], dtype=torch.float64)
    z = (x @ W_p.T @ W_p).relu()
    assert z[0].tolist() == pytest.approx([0.5, 0.2, 0.0])
    found = scored(x, z, W_p.T.contiguous(), W_p)
    assert found.scores["gt_raw"] == pytest.approx(1.28)
    assert found.scores["gt_raw_active"] == pytest.approx(1.28)
    assert found.scores["gt_raw_active_entry"] == pytest.approx(1.28 / 3)
    assert found.scores["gt_zero"] == pytest.approx(0.25 + 1.0 + 0.64)
    # Constant features have no correlation and no place in its means.
    assert found.scores["mcc_code"] == found.scores["best_correlation"] == 0.0
    assert found.per_feature["correlation"].isnan().all()


def test_reference_answers():
    x, _, _, W_p = codes(5, 5, seed=11, rows=40)
    acts = x @ W_p.T + 0.3
    reference = ground_truth(x, acts, W_p).reference
    assert reference["gt_zero"] == pytest.approx(float(x.square().sum(1).mean()))
    assert reference["gt_zero_rel"] == reference["gt_zero_active_rel"] == pytest.approx(1.0)
    assert reference["gt_constant"] == pytest.approx(float(x.var(0, correction=0).sum()))
    design = torch.cat([acts, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    answer = design @ torch.linalg.lstsq(design, x).solution
    error = (x - answer).square()
    assert reference["gt_linear"] == pytest.approx(float(error.sum(1).mean()), rel=1e-9)
    assert reference["gt_linear_active_entry"] == pytest.approx(
        float(error[x > 0].mean()), rel=1e-9
    )
    assert reference["gt_linear"] <= reference["gt_constant"] <= reference["gt_zero"]
    assert reference["true_l0"] == pytest.approx(float((x > 0).sum(1).double().mean()))
    outside = 0.09 * 3 * len(x) / float(acts.square().sum())
    assert reference["acts_unexplained"] == pytest.approx(outside)
    assert "gt_linear" not in ground_truth(x).reference


def test_a_linear_readout_survives_activations_of_lower_rank():
    x, _, _, W_p = codes(5, 5, seed=12, rows=60)
    plain = ground_truth(x, x @ W_p.T).reference
    doubled = ground_truth(x, x @ torch.cat([W_p, W_p, 0 * W_p]).T).reference
    assert doubled["gt_linear"] == pytest.approx(plain["gt_linear"], rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(SIZES)
def test_code_mcc_is_the_best_pairing_of_pearson_correlations(size):
    n, d_sae, seed = size
    x, z, W_dec, W_p = codes(n, d_sae, seed)
    z[:, 0] = 0.0  # a dead latent has no correlation
    table = np.zeros((n, d_sae))
    for i in range(n):
        for j in range(1, d_sae):
            if float(z[:, j].std()) > 1e-9:
                table[i, j] = np.corrcoef(x[:, i].numpy(), z[:, j].numpy())[0, 1]
    best = max(sum(table[i, j] for i, j in way.items()) for way in ways(n, d_sae)) / min(n, d_sae)
    found = scored(x, z, W_dec, W_p)
    assert found.scores["mcc_code"] == pytest.approx(best, abs=1e-9)
    assert found.scores["best_correlation"] == pytest.approx(table.max(1).mean(), abs=1e-9)
    assert found.scores["missing_frac"] == pytest.approx((table.max(1) < 0.5).mean())


@settings(max_examples=20, deadline=None)
@given(SIZES)
def test_detection_and_shrinkage_counted_one_by_one(size):
    n, d_sae, seed = size
    x, z, W_dec, W_p = codes(n, d_sae, seed)
    x[:, 0] = 0.0  # never active: in no mean
    if n == 1:
        with pytest.raises(UserError, match="no feature is active"):
            scored(x, z, W_dec, W_p)
        return
    found = scored(x, z, W_dec, W_p)
    rows = []
    out = into = 0.0
    for i in range(1, n):
        j = int(found.assignment["code"][i])
        on, fires = x[:, i] > 0, (z[:, j] != 0 if j >= 0 else torch.zeros(len(x), dtype=torch.bool))
        both = int((on & fires).sum())
        precision = both / int(fires.sum()) if fires.any() else 0.0
        recall = both / int(on.sum())
        f1 = 2 * precision * recall / (precision + recall) if both else 0.0
        vanished = float((~fires[on]).double().mean())
        mean_z = float(z[on, j].mean()) if j >= 0 else 0.0
        rows.append((precision, recall, f1, vanished, mean_z / float(x[on, i].mean())))
        out += mean_z * float(W_dec[j].norm()) if j >= 0 else 0.0
        into += float(x[on, i].mean()) * float(W_p[:, i].norm())
    keys = ("precision", "recall", "f1", "vanished", "shrinkage_code")
    expected = np.mean(rows, axis=0)
    assert [found.scores[key] for key in keys] == pytest.approx(expected, abs=1e-9)
    assert found.scores["shrinkage_length"] == pytest.approx(out / into, abs=1e-9)
    for k, key in enumerate(keys):
        assert found.per_feature[key][0].isnan(), "no value for a feature that never occurs"
        assert found.per_feature[key][1:].tolist() == pytest.approx([r[k] for r in rows])


@settings(max_examples=20, deadline=None)
@given(SIZES)
def test_direction_mcc_is_the_best_pairing_of_cosines(size):
    n, d_sae, seed = size
    x, z, W_dec, W_p = codes(n, d_sae, seed)
    W_p[:, 0] = 0.0  # a feature the world does not represent: cosine 0
    cos = np.zeros((n, d_sae))
    for i in range(1, n):
        for j in range(d_sae):
            cos[i, j] = float(W_p[:, i] @ W_dec[j]) / float(W_p[:, i].norm() * W_dec[j].norm())

    def best(table):
        return max(sum(table[i, j] for i, j in way.items()) for way in ways(n, d_sae)) / min(
            n, d_sae
        )

    found = scored(x, z, W_dec, W_p)
    assert found.scores["mcc_direction"] == pytest.approx(best(np.abs(cos)), abs=1e-9)
    assert found.scores["mcc_direction_signed"] == pytest.approx(best(cos), abs=1e-9)
    nearest = np.abs(cos).argmax(0)
    assert found.scores["uniqueness"] == pytest.approx(len(set(nearest.tolist())) / d_sae)
    expected = []
    for j, i in enumerate(nearest):
        on, fires = x[:, i] > 0, z[:, j] != 0
        both = int((on & fires).sum())
        precision = both / max(1, int(fires.sum()))
        recall = both / max(1, int(on.sum()))
        f1 = 2 * precision * recall / (precision + recall) if both else 0.0
        expected.append((precision, recall, f1, float((on == fires).double().mean())))
    keys = ("latent_precision", "latent_recall", "latent_f1", "latent_accuracy")
    assert [found.scores[key] for key in keys] == pytest.approx(np.mean(expected, axis=0), abs=1e-9)


def test_the_sign_tells_antipodal_features_apart():
    """Two rows along e_1 fit the digon (e_1, -e_1) in |cos|; only one of them points the right way."""
    W_p = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    W_dec = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    x = draw(20, 2, 0.5, seed=0)
    found = scored(x, (x @ W_p.T @ W_dec.T).relu(), W_dec, W_p).scores
    assert found["mcc_direction"] == pytest.approx(1.0)
    assert found["mcc_direction_signed"] == pytest.approx(0.0)
    assert found["uniqueness"] == pytest.approx(0.5)


def test_chance_is_what_random_directions_reach():
    """200 directions in 20 dimensions: chance is far above 0, and another random draw is just as good."""
    g = torch.Generator().manual_seed(4)
    W_p = torch.randn(20, 200, generator=g, dtype=torch.float64)
    W_dec = torch.randn(200, 20, generator=g, dtype=torch.float64)
    x = draw(10, 200, 0.5, seed=1)
    found = scored(x, x, W_dec, W_p).scores
    assert 0.5 < found["mcc_direction_chance"] < 0.7
    assert found["mcc_direction"] == pytest.approx(found["mcc_direction_chance"], abs=0.02)


PERFECT = {
    **{
        f"gt_{which}{part}": 0.0
        for which in ("raw", "matched", "padded", "scaled")
        for part in PARTS
    },
    **dict.fromkeys(("missing_frac", "vanished", "dead_frac"), 0.0),
    **dict.fromkeys(("mcc_code", "best_correlation", "mcc_direction", "mcc_direction_signed"), 1.0),
    **dict.fromkeys(("precision", "recall", "f1", "uniqueness"), 1.0),
    **dict.fromkeys(("shrinkage_code", "shrinkage_length", "norm_ratio"), 1.0),
    **{f"latent_{key}": 1.0 for key in ("precision", "recall", "f1", "accuracy")},
    **dict.fromkeys(("fvu", "sae_loss", "acts_unexplained"), 0.0),
}


@pytest.mark.parametrize("sparsity", [0.2, 0.9])
def test_a_perfect_code_has_perfect_scores(sparsity):
    x = draw(500, 6, sparsity, seed=8)
    W_p = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(0)).double())[
        0
    ][:, :6]
    acts = x @ W_p.T
    found = score_codes(ground_truth(x, acts, W_p), x, W_p.T, acts).scores
    assert {key: found[key] for key in PERFECT} == pytest.approx(PERFECT, abs=1e-9)
    assert found["l0"] == found["true_l0"]
    for key in ("variance_mean", "dispersion", "kurtosis"):
        assert found[f"latent_{key}"] == pytest.approx(found[f"feature_{key}"])


@settings(max_examples=20, deadline=None)
@given(SIZES)
def test_the_order_of_the_latents_does_not_matter_after_matching(size):
    n, d_sae, seed = size
    x, z, W_dec, W_p = untied(n, d_sae, seed)
    order = torch.randperm(d_sae, generator=torch.Generator().manual_seed(seed))
    before, after = scored(x, z, W_dec, W_p), scored(x, z[:, order], W_dec[order], W_p)
    kept = [key for key in before.scores if not key.startswith("gt_raw")]
    assert {k: after.scores[k] for k in kept} == pytest.approx(
        {k: before.scores[k] for k in kept}, abs=1e-9
    )
    assert {k: order[a[a >= 0]].tolist() for k, a in after.assignment.items()} == {
        k: a[a >= 0].tolist() for k, a in before.assignment.items()
    }


SCALED = ("gt_raw", "gt_matched", "gt_padded", "latent_variance_mean", "shrinkage_code")


@settings(max_examples=20, deadline=None)
@given(SIZES, st.floats(0.01, 100.0))
def test_a_scale_moved_from_the_decoder_to_the_code_changes_only_what_it_must(size, c):
    n, d_sae, seed = size
    x, z, W_dec, W_p = untied(n, d_sae, seed)
    before, after = scored(x, z, W_dec, W_p).scores, scored(x, c * z, W_dec / c, W_p).scores
    blind = [key for key in before if not key.startswith(SCALED)]
    assert {k: after[k] for k in blind} == pytest.approx({k: before[k] for k in blind}, abs=1e-8)
    assert after["latent_variance_mean"] == pytest.approx(c**2 * before["latent_variance_mean"])
    assert after["shrinkage_code"] == pytest.approx(c * before["shrinkage_code"])


def test_shrinkage_by_hand():
    """A code of 0.6 x over decoder rows of twice the length: the code shrinks, the output grows."""
    x = draw(50, 3, 0.5, seed=2)
    W_p = 2 * torch.eye(3, dtype=torch.float64)
    found = scored(x, 0.6 * x, 4 * torch.eye(3, dtype=torch.float64), W_p)
    assert found.scores["shrinkage_code"] == pytest.approx(0.6)
    assert found.scores["shrinkage_length"] == pytest.approx(1.2)
    assert found.per_feature["shrinkage_length"].tolist() == pytest.approx([1.2] * 3)
    assert found.scores["gt_scaled"] == pytest.approx(0.0, abs=1e-12)
    assert found.scores["gt_matched_rel"] == pytest.approx(0.16)
    assert found.scores["mcc_code"] == pytest.approx(1.0)


def test_spread_and_context_recomputed():
    x, z, W_dec, W_p = codes(4, 5, seed=21, rows=1500)  # more rows than one block
    z[:, 2] = 0.0
    acts = x @ W_p.T
    x_hat = z @ W_dec
    found = score_codes(ground_truth(x, acts, W_p), z.float(), W_dec, x_hat).scores
    z = z.float().double()
    mean, var = z.mean(0), z.var(0, correction=0)
    live = var > 0
    assert found["latent_variance_mean"] == pytest.approx(float(var.mean()))
    dispersion = np.median((var[live] / mean[live] ** 2).numpy())
    assert found["latent_dispersion"] == pytest.approx(dispersion)
    fourth = ((z - mean) ** 4).mean(0)
    assert found["latent_kurtosis"] == pytest.approx(
        np.median((fourth[live] / var[live] ** 2).numpy())
    )
    assert found["dead_frac"] == pytest.approx(0.2)
    assert found["l0"] == pytest.approx(float((z != 0).sum(1).double().mean()))
    error = (acts - x_hat).square().sum()
    assert found["sae_loss"] == pytest.approx(float(error) / 1500)
    assert found["fvu"] == pytest.approx(float(error / (acts - acts.mean(0)).square().sum()))
    some = acts.norm(dim=1) > 0
    assert not some.all(), "rows without any feature have no length to compare with"
    ratio = x_hat.norm(dim=1)[some] / acts.norm(dim=1)[some]
    assert found["norm_ratio"] == pytest.approx(float(ratio.mean()))


def test_constant_latents_have_no_correlation_however_large():
    """What rounding leaves of a constant must not be taken for a signal."""
    x = draw(997, 2, 0.5, seed=5)
    z = torch.full((997, 2), 0.7, dtype=torch.float64) * torch.tensor([1.0, 1e6])
    found = scored(
        x, z, torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    ).scores
    assert found["mcc_code"] == 0.0
    assert found["latent_kurtosis"] == found["latent_variance_mean"] == 0.0


def test_one_ground_truth_serves_many_codes_of_any_precision():
    x, z, W_dec, W_p = codes(4, 4, seed=30)
    truth = ground_truth(x, W_p=W_p)
    exact = score_codes(truth, z, W_dec).scores
    single = score_codes(truth, z.float(), W_dec.float()).scores
    assert single == pytest.approx(exact, rel=1e-5, abs=1e-6)
    assert ground_truth_losses(truth, sums(truth, z))[0]["gt_raw"] == exact["gt_raw"]

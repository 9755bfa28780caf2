"""Recovery of a whole SAE: features shown one at a time (Appendix B.3), the interface, errors, and the glossary."""

from pathlib import Path

import numpy as np
import pytest
import torch

import wsae
from wsae.core.errors import UserError
from wsae.evals.config import RecoveryConfig
from wsae.evals.glossary import LOSS_PARTS, LOSSES, RECOVERY
from wsae.evals.recovery import (
    Isolated,
    activated_features,
    ground_truth,
    is_homogeneous,
    isolated,
    isolated_encoded,
    isolated_homogeneous,
    recovery,
    score_codes,
)
from wsae.sae import (
    SAE,
    BatchTopK,
    GroupTopK,
    JumpReLU,
    ReLU,
    SAEConfig,
    TopK,
)

N, D_IN, D_SAE, ROWS = 7, 4, 8, 60
KINDS = [ReLU(), TopK(k=3), GroupTopK(k=4), JumpReLU(threshold=0.2), BatchTopK(k=3)]


def world(
    sparsity: float = 0.6, rows: int = ROWS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.rand(rows, N, generator=g) * (torch.rand(rows, N, generator=g) >= sparsity)
    W_p = torch.nn.functional.normalize(torch.randn(D_IN, N, generator=g), dim=0)
    return x, x @ W_p.T, W_p


def make(activation, tied: bool = True, biased: bool = False) -> SAE:
    sae = SAE(SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=activation, tied=tied), seed=5)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        if biased:
            assert sae.b_enc is not None
            assert sae.b_dec is not None
            sae.b_enc.copy_(0.3 * torch.randn(D_SAE, generator=g))
            sae.b_dec.copy_(0.3 * torch.randn(D_IN, generator=g))
        if isinstance(activation, BatchTopK):
            sae.threshold.fill_(0.15)
    return sae


def sums_by_hand(sae, x, W_p) -> tuple[torch.Tensor, torch.Tensor]:
    """B.3 word for word: for every sample and feature, encode the sample with that feature alone."""
    M, on = torch.zeros(N, D_SAE, dtype=torch.float64), torch.zeros(N, D_SAE, dtype=torch.float64)
    with torch.no_grad():
        for sample in x:
            for i in range(N):
                alone = torch.zeros(N)
                alone[i] = sample[i]
                h = sae.encode((W_p @ alone)[None])[0].double()
                M[i] += h
                on[i] += h if sample[i] > 0 else 0.0
    return M, on / (x > 0).sum(0)[:, None].clamp_min(1)


@pytest.mark.parametrize("activation", KINDS, ids=lambda a: a.kind)
@pytest.mark.parametrize("form", ["tied", "untied", "biased"])
def test_features_shown_alone_are_summed_as_the_paper_says(activation, form):
    x, acts, W_p = world()
    x[:, 0] = 0.0  # never active: its isolated input is always 0
    sae = make(activation, tied=form == "tied", biased=form == "biased")
    truth = ground_truth(x, x @ W_p.T, W_p)
    found = isolated(truth, truth.W_p, sae)
    M, R = sums_by_hand(sae, x, W_p)
    torch.testing.assert_close(found.total, M, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.response, R, rtol=1e-5, atol=1e-5)
    threshold_free = isinstance(activation, ReLU | TopK | GroupTopK)
    assert is_homogeneous(sae) == (threshold_free and form != "biased")
    if form == "biased" and activation == ReLU():
        assert found.total[0].sum() > 0, (
            "a bias answers the empty input, and the paper's sum counts it"
        )
        assert found.response[0].sum() == 0, "the mean over active samples does not"


def test_the_closed_form_equals_the_direct_encoding(monkeypatch):
    x, _, W_p = world()
    sae = make(ReLU())
    truth = ground_truth(x, None, W_p)
    assert truth.W_p is not None
    unit = (truth.W_p.T @ sae.W_dec.double().T).relu().detach()
    closed = isolated_homogeneous(truth, unit)
    monkeypatch.setattr("wsae.evals.recovery._BLOCK", 3 * D_SAE)  # blocks cut features
    direct = isolated_encoded(truth, truth.W_p, lambda v: sae.encode(v.float()).detach())
    torch.testing.assert_close(closed.total, direct.total, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(closed.response, direct.response, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        isolated(truth, truth.W_p, sae).total, closed.total, rtol=1e-5, atol=1e-6
    )


def test_features_shown_alone_to_an_sae_that_takes_the_scale_away_are_encoded():
    x, _, W_p = world()
    truth = ground_truth(x, None, W_p)
    assert truth.W_p is not None
    cfg = SAEConfig(d_in=len(W_p), d_sae=8, activation=ReLU(), input_norm="constant_norm_rescale")
    sae = SAE(cfg).requires_grad_(False)
    direct = isolated_encoded(truth, truth.W_p, lambda v: sae.encode(v.float()))
    torch.testing.assert_close(isolated(truth, truth.W_p, sae).total, direct.total)


def test_a_transcoder_is_no_reconstruction_of_what_it_reads():
    features = torch.eye(6).repeat(3, 1)
    transcoder = SAE(SAEConfig(d_in=6, d_sae=8, d_out=6, activation=ReLU()))
    with pytest.raises(UserError, match="a transcoder gives other activations than it reads"):
        recovery(transcoder, features, features)


def test_activated_features_are_counted_latent_by_latent():
    response = torch.tensor(
        [[0.5, 0.0, 0.3], [0.5, 0.0, 0.02], [0.5, 0.0, 0.04], [0.0, 0.0, 0.0]]
    ).double()
    total = 10 * response
    cfg = RecoveryConfig(threshold=1.0, mean_threshold=0.03, relative_threshold=0.1)
    scores, counts = activated_features(Isolated(total, response), cfg)
    assert counts["activated_sum"].tolist() == [3, 0, 1]
    assert counts["activated_mean"].tolist() == [3, 0, 2]
    assert counts["activated_relative"].tolist() == [3, 0, 2]
    third = 0.36**2 / (0.3**2 + 0.02**2 + 0.04**2)
    assert counts["activated_participation"].tolist() == pytest.approx([3, 0, third])
    assert scores["activated_sum"] == pytest.approx(4 / 3)
    assert scores["activated_sum_live"] == pytest.approx(2.0)
    assert scores["activated_participation_live"] == pytest.approx((3 + third) / 2)


def test_only_the_papers_sum_falls_with_sparsity_for_one_and_the_same_sae():
    """The SAE does not change, only how often features are active; the paper's score must not be read as recovery."""
    found = {}
    for sparsity in (0.0, 0.99):
        x, acts, W_p = world(sparsity, rows=4000)
        found[sparsity] = recovery(make(ReLU()), x, acts, W_p, threshold=5.0).scores
    dense, sparse = found[0.0], found[0.99]
    assert sparse["activated_sum"] < 0.75 * dense["activated_sum"]
    for key in ("activated_mean", "activated_relative", "activated_participation"):
        assert sparse[key] == pytest.approx(dense[key], rel=0.06), key


def test_an_orthogonal_world_is_recovered_by_the_transpose_of_w_p():
    """W_m = W_p^T with orthonormal columns: every score is perfect and each latent answers one feature."""
    g = torch.Generator().manual_seed(3)
    W_p = torch.linalg.qr(torch.randn(6, 6, generator=g))[0]
    x = torch.rand(300, 6, generator=g) * (torch.rand(300, 6, generator=g) >= 0.5)
    sae = SAE(SAEConfig(d_in=6, d_sae=6, activation=ReLU(), tied=True))
    with torch.no_grad():
        sae.W_dec.copy_(W_p.T)
    found = wsae.recovery(sae, x.numpy(), (x @ W_p.T).numpy(), W_p.numpy())
    assert found.scores["gt_raw"] == pytest.approx(0.0, abs=1e-10)
    assert found.scores["mcc_code"] == pytest.approx(1.0, abs=1e-6)
    assert found.scores["activated_participation"] == pytest.approx(1.0, abs=1e-5)
    assert found.scores["activated_relative"] == 1.0
    assert found.assignment["code"].tolist() == list(range(6))


def test_the_scores_of_an_sae_are_those_of_its_codes():
    x, acts, W_p = world()
    sae = make(TopK(k=3), tied=False, biased=True)
    with torch.no_grad():
        z = sae.encode(acts)
        x_hat = sae(acts)
    truth = ground_truth(x, acts, W_p)
    parts = score_codes(truth, z, sae.W_dec, x_hat, isolated(truth, truth.W_p, sae))
    whole = recovery(sae, x, acts, W_p)
    assert whole.scores == pytest.approx(parts.scores, rel=1e-5)
    assert {k: v.tolist() for k, v in whole.assignment.items()} == {
        k: v.tolist() for k, v in parts.assignment.items()
    }


def test_every_score_is_in_the_glossary_and_those_that_need_w_p_are_absent_without_it():
    x, acts, W_p = world()
    full = recovery(make(ReLU()), x, acts, W_p)
    assert list(full.scores) == list(RECOVERY), "in the glossary's order"
    assert all(np.isfinite(value) for value in full.scores.values())
    bare = recovery(make(ReLU()), x, acts)
    gone = set(full.scores) - set(bare.scores)
    assert {
        key for key in gone if not key.startswith(("activated", "mcc_direction", "latent"))
    } == {
        "shrinkage_length",
        "uniqueness",
        "acts_unexplained",
    }
    assert {key: full.scores[key] for key in bare.scores} == bare.scores
    assert not bare.per_latent
    assert set(bare.assignment) == {"code", "matched", "padded", "scaled"}
    assert all(len(value) == N for value in full.per_feature.values())
    assert all(len(value) == D_SAE for value in full.per_latent.values())


def test_the_docs_list_every_score_with_its_formula():
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text().replace("\\|", "|")
    rows = [[loss.name, f"`gt_{which}`", loss.formula] for which, loss in LOSSES.items()]
    rows += [[formula, f"`gt_*{part}`", unit] for part, (_, formula, unit) in LOSS_PARTS.items()]
    for key, (name, *cells) in RECOVERY.items():
        if not key.startswith("gt_"):
            rows.append([name, f"`{key}`", *cells])
    for row in rows:
        assert f"| {' | '.join(row)} |" in text, row


NAN = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, a, W: (x[:5], a, W), "features have 5 rows but acts have 60; rows must agree"),
        (lambda x, a, W: (x[0], a, W), r"features has shape \(7,\); give \[rows, n_features\]"),
        (lambda x, a, W: (x[:1], a[:1], W), "features have 1 rows; recovery scores need at least 2"),
        (lambda x, a, W: (x - 1, a, W), r"features\[0, 0\] is -.*; ground-truth features are >= 0"),
        (lambda x, a, W: (0 * x, 0 * a, W), r"no feature is active in any of 60 rows \(sparsity 1\?\)"),
        (lambda x, a, W: (x * NAN, a, W), r"features\[0, 0\] is nan; it must be finite"),
        (lambda x, a, W: (x, a * NAN, W), r"acts\[0, 0\] is nan; it must be finite"),
        (lambda x, a, W: (x, a, W / 0), r"W_p\[0, 0\] is -?inf; it must be finite"),
        (lambda x, a, W: (x, a, W.T), r"\[d_in, n_features\] = \(4, 7\) is needed; it looks transposed"),
        (lambda x, a, W: (x, a, W[:, :3]), r"W_p has shape \(4, 3\) where .* = \(4, 7\) is needed$"),
        (lambda x, a, _: (x, a[:, :3], None), r"input of shape \(60, 3\) where this SAE needs"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(change, message):
    with pytest.raises(UserError, match=message) as error:
        recovery(make(ReLU()), *change(*world()))
    assert "\n" not in str(error.value)


def test_bad_codes_and_options_are_one_clear_line():
    x, acts, W_p = world()
    truth, sae = ground_truth(x, acts, W_p), make(ReLU())
    z, W_dec = sae.encode(acts).detach(), sae.W_dec.detach()
    bad = [
        ((z[:9], W_dec), "latents have 9 rows but features have 60"),
        ((z, W_dec[:3]), "W_dec has 3 rows but there are 8 latents"),
        ((z, W_dec[:, :2]), "W_dec has 2 columns but acts have 4"),
        ((z * NAN, W_dec), r"latents\[0, 0\] is nan"),
        ((z, W_dec, acts[:, :2]), r"x_hat has shape \(60, 2\) where acts have \(60, 4\)"),
    ]
    for codes, message in bad:
        with pytest.raises(UserError, match=message):
            score_codes(truth, *codes)
    with pytest.raises(UserError, match="recovery: unknown key 'treshold' .nearest: threshold"):
        recovery(sae, x, acts, treshold=0.1)
    with pytest.raises(UserError, match="recovery: relative_threshold: .* less than 1"):
        recovery(sae, x, acts, relative_threshold=1.5)

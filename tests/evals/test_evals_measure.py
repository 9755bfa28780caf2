"""Fidelity metrics against a direct fp64 computation on all rows at once, for any chunking."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsae.acts.source import HeldoutRows, MatrixRows
from wsae.core.errors import UserError
from wsae.evals.compare import member_metrics
from wsae.evals.config import CONTROL, EvalConfig
from wsae.evals.control import fit_scale, random_control
from wsae.evals.glossary import COMPARED, MATCHING, METRICS, PROBES, glossary
from wsae.evals.measure import (
    EvaluatedSaes,
    HeldOutPositions,
    Replay,
    SequenceSums,
    ev_per_dim,
    measure,
)
from wsae.evals.run import evaluate
from wsae.sae import SAE, SAEConfig, make_activation

D_IN, D_SAE = 6, 20
KINDS = ["topk", "group_topk", "batch_topk", "relu", "jumprelu"]


class Sequences:
    """Held-out rows in sequences, as a store gives them."""

    def __init__(self, x, seq, pos, size=None):
        self.x, self.seq, self.pos, self.size = x, seq, pos, size
        self.hooks = {"layers.1": x.shape[1]}
        self.passes = 0

    def heldout(self, batch_size):
        self.passes += 1
        size = self.size or batch_size
        for start in range(0, len(self.x), size):
            part = slice(start, start + size)
            yield HeldoutRows({"layers.1": self.x[part]}, self.seq[part], self.pos[part])

    def tokens(self):
        return None


def rows(n=90, seed=0, offset=30.0):
    g = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-1, 1, D_IN)
    return torch.randn(n, D_IN, generator=g) * scale + offset


def places(n, length=15):
    return torch.arange(n) // length, torch.arange(n) % length


def make_sae(kind="topk", seed=0, tied=False, gamma=None):
    activation = make_activation(kind, k=4)
    sae = SAE(SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=activation, tied=tied), seed=seed)
    with torch.no_grad():
        if sae.b_dec is not None:
            sae.b_dec.fill_(30.0)
            sae.b_enc.normal_(0, 0.5, generator=torch.Generator().manual_seed(seed))
        if gamma is not None:
            sae.gamma.copy_(gamma)
    return sae.requires_grad_(False)


GAMMA = torch.tensor([0.2, 3.0, 1.0, 0.5, 2.0, 0.1])


@pytest.mark.parametrize("kind", KINDS)
def test_every_metric_equals_its_formula_on_all_rows_at_once(kind):
    x = rows()
    seq, pos = places(len(x))
    saes = {"plain": make_sae(kind), "weighted": make_sae(kind, seed=1, gamma=GAMMA)}
    cfg = EvalConfig(draws=10, n_latents=0)
    source = Sequences(x, seq, pos, size=17)
    arrays = measure(source, {"layers.1": EvaluatedSaes(saes)}, cfg)["layers.1"].arrays
    for name, sae in saes.items():
        z = sae.encode(x).double()
        error = (x.double() - sae(x).double()).square()
        spread = (x.double() - x.double().mean(0)).square()
        weight = sae.gamma.double().square()
        density = (z != 0).double().mean(0)
        cosine = torch.nn.functional.cosine_similarity(sae.W_dec[None], sae.W_dec[:, None], dim=-1)
        ev = 1 - error.sum(0) / spread.sum(0)
        direct = {
            "fvu": error.sum() / spread.sum(),
            "fvu_weighted": (error @ weight).sum() / (spread @ weight).sum(),
            "ev_dim_mean": ev.mean(),
            "ev_dim_min": ev.min(),
            "l0": (z != 0).double().sum(1).mean(),
            "dead_frac": (density == 0).double().mean(),
            "dense_frac": (density > 0.1).double().mean(),
            "density_mean": density.mean(),
            "latent_variance_mean": z.var(0, correction=0).mean(),
            "decoder_cosine_max_mean": (cosine.abs() - 2 * torch.eye(D_SAE)).amax(1).mean(),
        }
        numpy = {key: value.numpy() for key, value in arrays[name].items()}
        found = member_metrics(name, numpy, cfg)
        assert found.keys() == direct.keys()
        for metric, value in direct.items():
            assert found[metric]["value"] == pytest.approx(float(value), rel=1e-5), metric
    assert arrays["plain"]["seq_sse@plain"].tolist() == pytest.approx(
        arrays["plain"]["seq_sse"].tolist()
    ), "gamma = 1 weighs nothing"


def test_sums_per_sequence_are_about_the_global_mean_and_weighted_by_each_members_gamma():
    x = rows(40)
    seq, pos = torch.tensor([0] * 5 + [2] * 20 + [3] * 15), torch.arange(40)
    saes = {"plain": make_sae(), "weighted": make_sae(seed=1, gamma=GAMMA)}
    source = Sequences(x, seq, pos, size=7)
    found = measure(source, {"layers.1": EvaluatedSaes(saes)}, EvalConfig(n_latents=0))["layers.1"]
    weight = GAMMA.double().square()
    deviation = (x.double() - x.double().mean(0)).square()
    error = (x.double() - saes["plain"](x).double()).square()
    for number, count in ((0, 5), (1, 0), (2, 20), (3, 15)):
        mine = seq == number
        arrays = {
            key: float(value[number])
            for key, value in found.arrays["plain"].items()
            if key.startswith("seq_")
        }
        assert arrays["seq_rows"] == count
        assert arrays["seq_var"] == pytest.approx(float(deviation[mine].sum()), rel=1e-9)
        assert arrays["seq_sse"] == pytest.approx(float(error[mine].sum()), rel=1e-5)
        assert arrays["seq_var@weighted"] == pytest.approx(
            float((deviation[mine] @ weight).sum()), rel=1e-9
        )
        assert arrays["seq_sse@weighted"] == pytest.approx(
            float((error[mine] @ weight).sum()), rel=1e-5
        )


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 90), st.integers(0, 100))
def test_the_result_does_not_depend_on_the_chunks(size, seed):
    x = rows(seed=seed)
    seq, pos = places(len(x))
    family = {"layers.1": EvaluatedSaes({"plain": make_sae()})}
    cfg = EvalConfig(n_latents=3)
    whole = measure(Sequences(x, seq, pos), family, cfg)["layers.1"]
    split = measure(Sequences(x, seq, pos, size), family, cfg)["layers.1"]
    for name in ("plain", CONTROL):
        for key, value in whole.arrays[name].items():
            torch.testing.assert_close(split.arrays[name][key], value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(split.survey.moments.mean, whole.survey.moments.mean, rtol=0, atol=0)


def test_a_constant_reconstruction_at_the_mean_explains_nothing_and_a_perfect_one_everything():
    x = rows(200)
    sae = make_sae()
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_dec.copy_(x.mean(0))
    nothing = evaluate(sae, x)["metrics"]["fvu"]["value"]
    assert nothing == pytest.approx(1.0, abs=1e-6), "about zero, this SAE would look near perfect"
    identity = SAE(SAEConfig(d_in=D_IN, d_sae=2 * D_IN, activation=make_activation("relu")))
    with torch.no_grad():
        rows_ = torch.cat([torch.eye(D_IN), -torch.eye(D_IN)])
        identity.W_dec.copy_(rows_)
        identity.W_enc_t.copy_(rows_)
    assert evaluate(identity, x)["metrics"]["fvu"]["value"] < 1e-12


def test_a_constant_dimension_has_no_explained_variance_and_is_left_out():
    ev = ev_per_dim(
        torch.tensor([2.0, 0.0], dtype=torch.float64),
        torch.tensor([4.0, 0.0], dtype=torch.float64),
        2,
    )
    assert ev[0] == pytest.approx(0.75)
    assert ev[1].isnan()
    x = rows()
    x[:, 3] = 5.0
    metrics = evaluate(make_sae(), x)["metrics"]
    assert np.isfinite(metrics["ev_dim_mean"]["value"])


def test_intervals_come_by_sequence_and_contain_the_value():
    x = rows(300)
    metrics = evaluate(make_sae(), Sequences(x, *places(300)))["metrics"]
    for metric in ("fvu", "l0", "latent_variance_mean"):
        entry = metrics[metric]
        assert entry["low"] <= entry["value"] <= entry["high"], metric


def test_one_sequence_has_values_without_intervals():
    x = rows(20)
    found = evaluate(make_sae(), Sequences(x, torch.zeros(20, dtype=torch.int64), torch.arange(20)))
    fvu = found["metrics"]["fvu"]
    assert fvu["value"] > 0
    assert fvu["low"] is None
    assert fvu["high"] is None


def test_arrays_of_any_kind_give_the_same_numbers():
    x = rows()
    torch_result, numpy_result = (evaluate(make_sae(), v)["metrics"] for v in (x, x.numpy()))
    assert torch_result == numpy_result
    assert evaluate(make_sae(), x.double().numpy())["metrics"] == torch_result


def test_the_random_control_is_worse_than_an_sae_of_the_true_directions():
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(24, 32, generator=g), dim=1)
    z = torch.rand(400, 24, generator=g) * (torch.rand(400, 24, generator=g) < 0.08)
    x = z @ directions
    sae = SAE(SAEConfig(d_in=32, d_sae=24, activation=make_activation("topk", 3)))
    with torch.no_grad():
        sae.W_dec.copy_(directions)
        sae.W_enc_t.copy_(directions)
    found = evaluate(sae, x)
    control = found["control"]["fvu"]["value"]
    assert found["metrics"]["fvu"]["value"] < 0.5 * control < control < 1.5
    assert abs(found["control"]["l0"]["value"] - found["metrics"]["l0"]["value"]) < 1
    assert set(found["control"]) <= {"fvu", "l0", "ev_dim_mean", "ev_dim_min"}


def test_the_random_control_is_at_the_scale_where_it_errs_least():
    """On every row; with codes z the factor is sum z^2 / sum |z W_dec|^2, since (x - mean) . d_j is z_j."""
    x = rows(500)
    mean = x.double().mean(0)
    measured = evaluate(make_sae(), x)
    found, l0 = measured["control"]["fvu"]["value"], measured["metrics"]["l0"]["value"]
    errors = {}
    for scale in (1.0, 0.95, 1.05):
        control = random_control(make_sae(), mean, l0, EvalConfig().seed)
        codes = control.encode(x)
        by_hand = float(
            codes.double().square().sum() / (codes @ control.W_dec).double().square().sum()
        )
        assert fit_scale(control, x) == pytest.approx(by_hand, rel=1e-4)
        with torch.no_grad():
            control.W_enc_t.mul_(scale)
        error = (x - control.decode(control.encode(x))).double().square().sum()
        errors[scale] = float(error / (x.double() - mean).square().sum())
    assert by_hand < 0.95  # its directions are not orthogonal: at norm 1 they say things twice
    assert errors[1.0] < min(errors[0.95], errors[1.05])
    assert found == pytest.approx(errors[1.0], rel=1e-4)


def test_the_second_pass_is_replayed_from_memory_only_within_the_limit():
    x = rows()
    for limit, passes in ((1 << 20, 1), (100, 2)):
        source = Sequences(x, *places(len(x)), size=10)
        cfg = EvalConfig(replay_bytes=limit, n_latents=0)
        measure(source, {"layers.1": EvaluatedSaes({"plain": make_sae()})}, cfg)
        assert source.passes == passes
    replay = Replay(Sequences(x, *places(len(x)), size=10), EvalConfig())
    for _ in range(2):
        assert torch.equal(torch.cat([item.chunk.x["layers.1"] for item in replay]), x)


@pytest.mark.parametrize("limit", [1, 10, 25, 40])
def test_a_limit_measures_the_first_rows_as_if_there_were_no_others(limit):
    x, sae = rows(), make_sae()
    seq, pos = places(len(x))
    cfg = EvalConfig(rows=limit, splice_tokens=0, n_latents=0)
    family = {"layers.1": EvaluatedSaes({"plain": sae})}
    some = measure(Sequences(x, seq, pos, size=10), family, cfg)["layers.1"]
    alone = Sequences(x[:limit], seq[:limit], pos[:limit], size=7)
    whole = measure(alone, family, EvalConfig(n_latents=0))["layers.1"]
    for name, values in whole.arrays["plain"].items():
        torch.testing.assert_close(
            some.arrays["plain"][name], values, equal_nan=True, rtol=1e-5, atol=1e-6
        )
    with pytest.raises(ValueError, match="set splice_tokens to 0"):
        EvalConfig(rows=limit)


def test_kept_positions_are_those_of_the_rows():
    kept = HeldOutPositions([4, 6])
    for seq, pos in (([3, 4, 4], [0, 1, 3]), ([4, 6], [5, 2])):
        kept.update(HeldoutRows({}, torch.tensor(seq), torch.tensor(pos)))
    assert kept.mask(4, 7).tolist() == [False, True, False, True, False, True, False]
    assert kept.mask(6, 3).tolist() == [False, False, True]


def test_sequence_sums_grow_and_equal_a_loop():
    g = torch.Generator().manual_seed(0)
    sums, direct = SequenceSums(2), torch.zeros(50, 2, dtype=torch.float64)
    for high in (3, 50, 10):
        seq = torch.randint(0, high, (20,), generator=g)
        seq[0] = high - 1
        values = torch.randn(20, 2, generator=g, dtype=torch.float64)
        sums.add(seq, values)
        for s, v in zip(seq, values, strict=True):
            direct[s] += v
    torch.testing.assert_close(sums.sums, direct)


def test_bad_data_is_refused_in_one_line():
    sae, x = make_sae(), rows()
    with pytest.raises(UserError, match=r"width 6, but the data have width 9"):
        evaluate(sae, torch.zeros(4, 9))
    for bad in (float("nan"), float("inf")):
        broken = x.clone()
        broken[70, 2] = bad
        with pytest.raises(UserError, match=r"acts.*row 70.*dimension 2"):
            evaluate(sae, broken, EvalConfig(batch_size=16, n_latents=0))
    with pytest.raises(UserError, match="there are no activations in it"):
        evaluate(sae, x[:0])
    with pytest.raises(UserError, match="no hook 'layers.9'; they have acts"):
        measure(MatrixRows(x), {"layers.9": EvaluatedSaes({"a": sae})}, EvalConfig())
    with pytest.raises(UserError, match=r"must be \[rows, d_in\]"):
        evaluate(sae, x[0])
    with torch.no_grad():
        sae.W_dec[0] = float("nan")
    with pytest.raises(UserError, match="sae: its reconstruction of the held-out data has NaN"):
        evaluate(sae, x)


def test_the_glossary_names_what_is_emitted():
    assert set(COMPARED) <= set(METRICS)
    table = glossary(METRICS, MATCHING)
    assert set(table) == set(METRICS) | set(MATCHING)
    assert all(
        entry["formula"] and entry["name"] and entry["direction"] for entry in table.values()
    )


def test_the_docs_list_every_metric_with_its_formula():
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text().replace("\\|", "|")
    for key, entry in glossary(METRICS, MATCHING, PROBES).items():
        row = [
            key.join("``"),
            *(entry[field] for field in ("name", "formula", "direction", "unit")),
        ]
        assert f"| {' | '.join(row)} |" in text, key
    listed = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert listed == [*METRICS, *MATCHING, *PROBES], "nothing else is listed, in the same order"

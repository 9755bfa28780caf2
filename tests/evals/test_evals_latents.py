"""Latent statistics, decoder cosines, matching and top contexts, each recomputed directly."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsae.evals import latents
from wsae.evals.latents import (
    HISTOGRAM_EDGES,
    Entries,
    LatentActivity,
    LiveDecoder,
    TopContexts,
    Wanted,
    decoder_max_cosine,
    density_histogram,
    match,
    nearest,
    one_per_stratum,
    sample_latents,
    unit_rows,
)
from wsae.kernels.eager import SparseCode, code_from_topk


def padded_code(rows: int, d_sae: int, k: int, seed: int) -> SparseCode:
    """A top-k code in which some chosen values are exactly 0, as after a ReLU."""
    g = torch.Generator().manual_seed(seed)
    values, indices = torch.randn(rows, d_sae, generator=g).topk(k, dim=1)
    return code_from_topk(values.relu() * (torch.rand(rows, k, generator=g) > 0.3), indices)


def test_activity_equals_the_dense_computation_and_zeros_do_not_count():
    codes = [padded_code(17, 12, 5, seed) for seed in range(3)]
    activity = LatentActivity(12)
    for code in codes:
        activity.update(Entries(code))
    z = torch.cat([code.dense(12) for code in codes]).double()
    assert (torch.cat([code.values for code in codes]) == 0).any()
    torch.testing.assert_close(activity.density, (z > 0).double().mean(0))
    torch.testing.assert_close(activity.variance, z.var(0, correction=0))
    assert activity.l0 == pytest.approx(float((z > 0).sum(1).double().mean()))
    assert activity.alive.tolist() == (z > 0).any(0).nonzero()[:, 0].tolist()
    l0 = torch.cat([Entries(code).l0() for code in codes])
    torch.testing.assert_close(l0, (z > 0).sum(1).double())


def test_the_histogram_counts_every_latent_once():
    density = torch.tensor([0.0, 0.0, 1e-9, 1e-3, 2e-3, 0.5, 1.0], dtype=torch.float64)
    histogram = density_histogram(density)
    assert histogram["never"] == 2
    assert sum(histogram["counts"]) == 5
    assert histogram["counts"][0] == 1, "a density under the lowest edge is in the lowest bin"
    assert histogram["counts"][-1] == 1, "density 1 is in the last bin"
    assert len(histogram["counts"]) == len(HISTOGRAM_EDGES) - 1


@pytest.mark.parametrize("block", [1, 7 * 30, 1 << 25])
def test_decoder_cosine_is_the_largest_off_the_diagonal_for_any_block(monkeypatch, block):
    W = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    W[4] = -3 * W[9]
    W[11] = 0
    monkeypatch.setattr(latents, "_BLOCK", block)
    units = unit_rows(W).double()
    direct = (units @ units.T).abs().fill_diagonal_(-1).amax(1)
    found = decoder_max_cosine(W)
    torch.testing.assert_close(found.double(), direct, atol=1e-6, rtol=0)
    assert found[4] == pytest.approx(1.0)
    assert found[11] == 0


def test_one_latent_has_no_other():
    assert decoder_max_cosine(torch.ones(1, 4)).isnan().all()


def test_nearest_is_signed():
    a = unit_rows(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    cosine, where = nearest(a, unit_rows(torch.tensor([[-5.0, 0.0], [1.0, 1.0]])))
    torch.testing.assert_close(cosine, torch.tensor([0.5**0.5, 0.5**0.5]))
    assert where.tolist() == [1, 1]


@pytest.mark.parametrize("limit", [0, 100], ids=["mutual", "assignment"])
def test_matching_recovers_a_permutation_whatever_the_scale(limit):
    g = torch.Generator().manual_seed(1)
    W = torch.randn(20, 16, generator=g)
    order = torch.randperm(20, generator=g)
    noisy = (W + 0.05 * torch.randn(20, 16, generator=g))[order] * torch.rand(20, 1, generator=g)
    every = torch.arange(20)
    found = match(LiveDecoder(noisy, every), LiveDecoder(W, every), limit)
    assert found.index.tolist() == order.tolist()
    pairs = dict(zip(found.pair_a.tolist(), found.pair_b.tolist(), strict=True))
    assert pairs == dict(enumerate(order.tolist()))
    summary = found.summary()
    assert summary["method"] == ("assignment" if limit else "mutual")
    assert summary["frac_above_0.9"] == 1.0
    assert summary["random_cosine_mean"] < 0.9 < summary["decoder_cosine_mean"]


def test_dead_latents_that_kept_their_start_do_not_fake_agreement():
    g = torch.Generator().manual_seed(2)
    start = torch.randn(40, 64, generator=g)
    a, b = start.clone(), start.clone()
    alive = torch.arange(10)
    a[alive], b[alive] = (torch.randn(10, 64, generator=g) for _ in range(2))
    found = match(LiveDecoder(a, alive), LiveDecoder(b, alive), 100)
    assert found.summary()["n_pairs"] == 10
    assert found.summary()["frac_above_0.7"] == 0.0
    assert set(found.index.tolist()) <= set(alive.tolist())


def test_assignment_is_one_to_one_and_best():
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(7, 5, generator=g), torch.randn(4, 5, generator=g)
    found = match(LiveDecoder(a, torch.arange(7)), LiveDecoder(b, torch.arange(4)), 100)
    assert sorted(found.pair_b.tolist()) == [0, 1, 2, 3]
    cosine = (unit_rows(a) @ unit_rows(b).T).numpy()
    from itertools import permutations

    best = max(sum(cosine[list(rows), range(4)]) for rows in permutations(range(7), 4))
    assert float(found.pair_cosine.sum()) == pytest.approx(best, rel=1e-5)


def test_mutual_pairs_choose_each_other():
    g = torch.Generator().manual_seed(4)
    a, b = (unit_rows(torch.randn(30, 4, generator=g)) for _ in range(2))
    cosine = a @ b.T
    direct = [
        (i, int(cosine[i].argmax()))
        for i in range(30)
        if int(cosine[:, cosine[i].argmax()].argmax()) == i
    ]
    rows, columns = latents._mutual(a, b)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == direct


@pytest.mark.parametrize("limit", [0, 10])
def test_matching_with_nothing_alive_says_so(limit):
    W, none, every = torch.eye(3), torch.zeros(0, dtype=torch.int64), torch.arange(3)
    empty = match(LiveDecoder(W, every), LiveDecoder(W, none), limit)
    assert empty.index.tolist() == [-1, -1, -1]
    assert empty.summary()["decoder_cosine_mean"] is None
    assert match(LiveDecoder(W, none), LiveDecoder(W, every), limit).summary()["n_pairs"] == 0


def test_sampled_latents_are_alive_distinct_and_spread_over_the_densities():
    density = torch.zeros(1000, dtype=torch.float64)
    alive = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:500]
    density[alive] = torch.logspace(-5, -1, 500, dtype=torch.float64)
    picked = sample_latents(density, 50, 0, "hook", "plain")
    assert len(set(picked.tolist())) == 50
    ranks = torch.zeros(1000, dtype=torch.int64)
    ranks[alive] = torch.arange(500)
    assert sorted((ranks[picked] // 10).tolist()) == list(range(50)), "one from each stratum"
    assert picked.tolist() == sample_latents(density, 50, 0, "hook", "plain").tolist()
    assert picked.tolist() != sample_latents(density, 50, 0, "hook", "other").tolist()
    assert sample_latents(density, 5000, 0).tolist() == sorted(alive.tolist())


@given(st.integers(1, 30), st.integers(0, 70), st.integers(0, 10**6))
def test_one_place_of_each_stratum_is_drawn_and_none_twice(n, more, seed):
    places = one_per_stratum(n + more, n, seed)
    for i, place in enumerate(places.tolist()):
        assert i * (n + more) // n <= place < (i + 1) * (n + more) // n
    assert len(set(places.tolist())) == n


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.lists(st.integers(1, 12), min_size=1, max_size=12),
    st.integers(1, 5),
)
def test_top_contexts_equal_a_full_sort_for_any_split(seed, cuts, n_contexts):
    n_seq, length, d_sae = 6, 7, 8
    rows = n_seq * length
    code = padded_code(rows, d_sae, 3, seed)
    z = code.dense(d_sae)
    z = (z * 2).round() / 2  # ties
    seq = torch.arange(rows) // length
    pos = torch.arange(rows) % length
    shown = torch.tensor([1, 4, 7])
    top = TopContexts(shown, d_sae, Wanted(n_contexts, length))
    start = 0
    for size in [*cuts, rows]:
        stop = min(rows, start + size)
        values, indices = z[start:stop].topk(4, dim=1)
        top.update(Entries(code_from_topk(values, indices)), seq[start:stop], pos[start:stop])
        start = stop
    found = top.result()
    grid = z.reshape(n_seq, length, d_sae)
    for latent in shown.tolist():
        by_peak = sorted(
            (-float(grid[s, :, latent].max()), s)
            for s in range(n_seq)
            if grid[s, :, latent].max() > 0
        )[:n_contexts]
        assert [c.seq for c in found[latent]] == [s for _, s in by_peak]
        for context in found[latent]:
            acts = grid[context.seq, :, latent]
            assert context.pos == int(acts.argmax())
            assert context.acts == {p: float(a) for p, a in enumerate(acts) if a != 0}


def test_random_firings_are_the_same_for_any_split_and_uniform_over_all_of_them():
    """A latent's sample is fixed by the seed and the places; over seeds every firing is drawn equally often."""
    rows, length, n = 60, 12, 5
    code = padded_code(rows, 4, 2, 3)
    z = code.dense(4)
    seq, pos = torch.arange(rows) // length, torch.arange(rows) % length

    def drawn(seed: int, cuts: list[int]) -> set[tuple[int, int, int]]:
        top = TopContexts(torch.arange(4), 4, Wanted(2, 3, n, seed))
        for start, stop in zip([0, *cuts], [*cuts, rows], strict=True):
            values, indices = z[start:stop].topk(2, dim=1)
            entries = Entries(code_from_topk(values, indices))
            top.update(entries, seq[start:stop], pos[start:stop])
        kept = top.kept()
        assert len(kept.latent) <= 4 * (2 + n), "whatever the number of rows"
        assert (
            top.sequences
            == [(z.reshape(-1, length, 4)[..., j].amax(1) > 0).sum() for j in range(4)]
        ).all()
        columns = (kept.latent, kept.seq, kept.pos)
        return set(zip(*(column[kept.random].tolist() for column in columns), strict=True))

    assert drawn(1, []) == drawn(1, [7, 12, 40])
    counts = Counter(place for seed in range(300) for place in drawn(seed, []))
    for latent in range(4):
        firings = int((z[:, latent] > 0).sum())
        share = [
            counts[latent, i // length, i % length] / 300 for i in range(rows) if z[i, latent] > 0
        ]
        assert sum(share) == pytest.approx(min(n, firings))
        assert max(abs(s - min(1, n / firings)) for s in share) < 5 * (0.25 / 300) ** 0.5


def test_a_window_shows_the_peak_with_more_before_than_after_and_stays_inside():
    code = code_from_topk(torch.tensor([[2.0], [5.0]]), torch.tensor([[0], [0]]))
    top = TopContexts(torch.tensor([0]), 1, Wanted(3, 9))
    top.update(Entries(code), torch.tensor([3, 3]), torch.tensor([18, 20]))
    (context,) = top.result()[0]
    ids = torch.arange(100, 140)
    window = context.window(ids, lambda ids, part: [f"<{i}>" for i in ids[part]], 9)
    assert window["tokens"][window["peak"]] == "<120>"
    assert len(window["tokens"]) == len(window["acts"]) == 9
    assert window["acts"][window["peak"]] == 5.0
    assert window["acts"][window["peak"] - 2] == 2.0
    assert window["peak"] == 6
    short = context.window(ids[:22], lambda ids, part: [str(i) for i in ids[part]], 9)
    assert short["tokens"][0] == "113"
    assert short["tokens"][short["peak"]] == "120"
    whole = context.window(ids[:22], lambda ids, part: [str(i) for i in ids[part]], 60)
    assert len(whole["tokens"]) == 22

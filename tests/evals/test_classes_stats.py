"""Statistics of units against classes: against a port of the reference, by enumeration, and on worlds made by hand."""

import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score
from sklearn.metrics.cluster import expected_mutual_information

from wsae.core.errors import UserError
from wsae.stats.classes import (
    ClassTable,
    Hits,
    OverImages,
    Strongest,
    chance_levels,
    corrected_information,
    corrected_share,
    group_of,
    information,
    jackknife,
    largest_share,
    minibatch_consistency,
    ncl_summary,
    over_images,
    selectivity,
)


def table_of(x: torch.Tensor, labels: torch.Tensor, split: int = 7, **sizes: int) -> ClassTable:
    """Fill a table in batches of `split` rows."""
    table = ClassTable(x.shape[1], int(labels.max()) + 1, **sizes)
    for first in range(0, len(x), split):
        part = slice(first, first + split)
        table.update(Hits.of_dense(x[part]), labels[part], torch.arange(len(x))[part])
    return table


def cluster_acc(features: torch.Tensor, labels: torch.Tensor, eps: float = 1e-5):
    """NCL's main_eval.py, step by step: the dimensions kept, then rows to length 1, then one dimension at a time."""
    features = features[:, F.relu(features).sum(0) > 0]
    features = F.normalize(features, dim=1)
    share, entropy = [], []
    for i in range(features.shape[1]):
        mask = features.abs()[:, i] > eps
        chosen = labels[mask]
        if mask.sum() == 0:
            continue
        dist = chosen.bincount()
        dist = dist / dist.sum()
        share.append(dist.max().item())
        entropy.append(-(dist * (dist + eps).log()).sum().item())
    return torch.tensor(share), torch.tensor(entropy)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    signed=st.booleans(),
    density=st.floats(0.01, 0.6),
    n_classes=st.integers(2, 6),
)
def test_ncl_equals_a_port_of_the_reference(seed, signed, density, n_classes) -> None:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 9, generator=rng, dtype=torch.float64)
    x = (x if signed else x.abs()) * (torch.rand(60, 9, generator=rng) < density)
    x[:, 3] = -x[:, 3].abs()  # never positive: left out before rows are scaled
    x[0, :] *= 1e-7
    x[:, 5] *= 1e-6  # positive, but under the threshold beside others
    labels = torch.randint(0, n_classes, (60,), generator=rng)
    labels[0] = n_classes - 1
    share, entropy = cluster_acc(x, labels)
    positive = (x > 0).any(0)
    table = ClassTable(9, n_classes)
    table.update(Hits.of_dense(x, positive), labels, torch.arange(60))
    found = ncl_summary(table.counts, positive)
    assert found.n == len(share)
    if len(share):
        assert found.mean == pytest.approx(share.mean().item(), abs=1e-6)
        assert found.entropy == pytest.approx(entropy.mean().item(), abs=1e-6)
    if len(share) > 1:
        assert found.std == pytest.approx(share.std().item(), abs=1e-6)


def test_codes_and_their_dense_form_give_one_table() -> None:
    rng = torch.Generator().manual_seed(0)
    values = torch.rand(50, 3, generator=rng) * (torch.rand(50, 3, generator=rng) < 0.8)
    indices = torch.stack([torch.randperm(40, generator=rng)[:3] for _ in range(50)])
    dense = torch.zeros(50, 40).scatter_(1, indices, values)
    labels = torch.randint(0, 3, (50,), generator=rng)
    codes = ClassTable(40, 3, n_top=4)
    row, place = values.nonzero(as_tuple=True)
    hits = Hits(row, indices[row, place], values[row, place].double())
    codes.update(hits, labels, torch.arange(50))
    other = table_of(dense, labels, split=11, n_top=4)
    assert torch.equal(codes.counts, other.counts)
    assert torch.equal(codes.group_counts, other.group_counts)
    assert torch.equal(codes.group_counts.sum(0), codes.counts)
    assert np.array_equal(codes.strongest.place, other.strongest.place)
    assert torch.allclose(codes.sums, other.sums, atol=1e-12)
    assert codes.counts.dtype == torch.int64


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 6), split=st.integers(1, 50))
def test_the_strongest_are_a_sort_however_samples_come(seed, n, split) -> None:
    rng = np.random.default_rng(seed)
    value = np.round(rng.random((40, 3)), 1)  # many ties
    label = rng.integers(0, 4, 40)
    top = Strongest(3, n)
    order = rng.permutation(40)
    for first in range(0, 40, split):
        rows = order[first : first + split]
        row, unit = (value[rows] > 0.3).nonzero()
        top.update(unit, value[rows[row], unit], rows[row], label[rows[row]])
    for unit in range(3):
        active = (value[:, unit] > 0.3).nonzero()[0]
        wanted = active[np.lexsort((active, -value[active, unit]))][:n]
        assert top.place[unit][: len(wanted)].tolist() == wanted.tolist()
        assert (top.place[unit][len(wanted) :] == -1).all()
        share = top.share()[unit]
        if len(wanted) < n:
            assert math.isnan(share)
        else:
            assert share == pytest.approx(np.bincount(label[wanted]).max() / n)


# --- chance ----------------------------------------------------------------------------------------------


def exact_share(totals: list[int], support: int) -> float:
    """E[max / s] by enumerating every table of counts with its hypergeometric probability."""
    whole, mean = math.comb(sum(totals), support), 0.0
    for counts in product(*(range(min(n, support) + 1) for n in totals)):
        if sum(counts) == support:
            ways = math.prod(math.comb(n, c) for n, c in zip(totals, counts, strict=True))
            mean += ways / whole * max(counts) / support
    return mean


def test_chance_is_the_expectation_under_permuted_labels() -> None:
    totals = np.array([11, 6, 0, 4])
    labels = np.repeat([0, 1, 2], [11, 6, 4])
    chance = chance_levels(totals, 100, draws=5000, seed=1)
    assert len(chance.share) == 22
    assert math.isnan(chance.share[0])
    for support in (1, 2, 3, 7, 13, 20):
        wanted = exact_share(totals.tolist(), support)
        assert chance.share[support] == pytest.approx(wanted, abs=0.014)
        margins = np.zeros((2, 3), dtype=np.int64)  # any table with these margins
        np.add.at(margins, (np.repeat([0, 1], [21 - support, support]), labels), 1)
        bits = expected_mutual_information(margins, 21) / math.log(2)
        assert chance.information[support] == pytest.approx(bits, abs=0.014)
    assert chance.share[1] == 1.0
    assert chance.share[21] == pytest.approx(11 / 21, abs=1e-12)
    assert chance.information[21] == pytest.approx(0.0, abs=1e-12)


def test_long_and_short_supports_agree_where_they_meet() -> None:
    chance = chance_levels(np.array([400, 300, 500]), 1200, draws=300, seed=0)
    step = np.abs(np.diff(chance.share[200:320]))
    assert step.max() < 0.004
    assert chance.share[-1] == pytest.approx(500 / 1200)


def test_information_equals_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy((rng.random((80, 6)) < [0.0, 0.1, 0.3, 0.5, 0.9, 1.0]).astype(np.float64))
    labels = torch.from_numpy(rng.integers(0, 4, 80))
    table = table_of(x, labels)
    found = information(table.counts, table.totals)
    for i in range(6):
        bits = mutual_info_score(x[:, i].numpy() > 0, labels.numpy()) / math.log(2)
        assert float(found[i]) == pytest.approx(bits, abs=1e-12)


def test_selectivity_by_hand() -> None:
    x = torch.tensor([[3.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    labels = torch.tensor([0, 0, 1, 3])  # nobody is of class 2
    table = table_of(x, labels)
    # unit 0: means 2, 1, 0 over classes 0, 1, 3: (2 - 0.5) / (2 + 0.5)
    assert selectivity(table.sums, table.totals).tolist() == [pytest.approx(0.6), 0.0]


# --- a world made by hand ----------------------------------------------------------------------------------


def world(n: int = 3000, n_classes: int = 10) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Latents of one class, latents that know no class at many densities, and latents active on a single image."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, n_classes, n)
    one_class = np.stack(
        [(labels == c % n_classes) & (rng.random(n) < 0.5) for c in range(20)], axis=1
    )
    blind = np.stack([rng.random(n) < p for p in np.geomspace(0.01, 0.9, 400)], axis=1)
    single = np.zeros((n, 50), dtype=bool)
    single[rng.choice(n, 50, replace=False), np.arange(50)] = True
    x = np.concatenate([one_class, blind, single], axis=1) * rng.uniform(0.5, 1.5, (n, 470))
    kinds = {"one": slice(0, 20), "blind": slice(20, 420), "single": slice(420, 470)}
    return torch.from_numpy(x), torch.from_numpy(labels), kinds


def test_the_corrected_score_tells_what_the_plain_share_does_not() -> None:
    x, labels, kinds = world()
    table = table_of(x, labels, split=512)
    chance = chance_levels(table.totals.numpy(), len(x), draws=400, seed=0)
    share = largest_share(table.counts)
    corrected = corrected_share(table.counts, chance, min_support=20)
    bits = corrected_information(table.counts, table.totals, chance, min_support=20)
    # one class: 1 by both
    assert (share[kinds["one"]] == 1).all()
    assert torch.allclose(corrected[kinds["one"]], torch.ones(20).double())
    # a single image: 1 by the plain share whatever the latent means, not scored by the corrected one
    assert (share[kinds["single"]] == 1).all()
    assert corrected[kinds["single"]].isnan().all()
    # no class: the plain share depends on the support alone, the corrected one is 0 at any support
    blind, support = corrected[kinds["blind"]], table.support[kinds["blind"]]
    assert (
        share[kinds["blind"]][support < 60].mean()
        > 0.17
        > 0.13
        > share[kinds["blind"]][-50:].mean()
    )
    for low, high in ((20, 100), (100, 600), (600, 3000)):
        part = blind[(support >= low) & (support < high)]
        error = float(part.std()) / math.sqrt(len(part))
        assert len(part) > 50
        assert abs(float(part.mean())) < 2.6 * error
    known = bits[kinds["blind"]]
    assert abs(float(known.mean())) < 2.6 * float(known.std()) / math.sqrt(len(known))
    assert (bits[kinds["one"]] > 0.05).all()


def test_the_interval_over_images_covers_zero_for_blind_latents_and_not_for_others() -> None:
    x, labels, kinds = world()
    table = table_of(x, labels, split=512)
    chance = chance_levels(table.totals.numpy(), len(x), draws=400, seed=0)
    marked = torch.zeros(470, dtype=torch.bool)
    marked[kinds["blind"]] = True
    marked &= table.support >= 20
    found = over_images(table, lambda counts: corrected_share(counts, chance), marked)
    assert found is not None
    low, high = jackknife(found)
    assert low < 0 < high < 0.05
    groups = group_of(torch.arange(3000), 20)
    assert groups.unique().tolist() == list(range(20))
    kept = groups != 4
    again = table_of(x[kept], labels[kept], split=512)
    left = corrected_share(again.counts[marked], chance).nanmean()
    assert found.without[4] == pytest.approx(float(left), abs=1e-12)


def test_the_jackknife_of_a_mean_is_the_textbook_interval() -> None:
    values = np.random.default_rng(0).normal(size=20)
    without = (values.sum() - values) / 19
    low, high = jackknife(OverImages(float(values.mean()), without))
    half = 2.0930240544 * values.std(ddof=1) / math.sqrt(20)
    assert (high - low) / 2 == pytest.approx(half, rel=1e-6)
    assert (high + low) / 2 == pytest.approx(values.mean())


@pytest.mark.parametrize("groups", [1, 20])
def test_what_one_group_of_images_decides_has_no_interval(groups) -> None:
    x = torch.zeros(6, 2)
    x[0] = 1.0
    table = ClassTable(2, 2, n_top=2, n_groups=groups)
    table.update(Hits.of_dense(x), torch.tensor([0, 1] * 3), torch.arange(6))
    assert over_images(table, largest_share, table.support > 0) is None


def test_one_minibatch_overrates_consistency() -> None:
    rng = torch.Generator().manual_seed(0)
    x = (torch.rand(4096, 200, generator=rng) < 0.01).double()  # knows no class of 20
    labels = torch.randint(0, 20, (4096,), generator=rng)
    row, unit = x[:128].nonzero(as_tuple=True)
    small = minibatch_consistency(row, unit, labels[:128])
    whole = ncl_summary(table_of(x, labels, split=1024).counts).mean
    by_hand = cluster_acc(x[:128], labels[:128])[0].mean().item()
    assert small == pytest.approx(by_hand, abs=1e-6)
    assert whole is not None
    assert small > 0.7 > 0.2 > whole


def test_bad_labels_are_refused() -> None:
    with pytest.raises(UserError, match="all of one class"):
        ClassTable(3, 1)
    table = ClassTable(3, 2)
    hits = Hits.of_dense(torch.ones(2, 3))
    with pytest.raises(UserError, match="labels run from 0 to 2"):
        table.update(hits, torch.tensor([0, 2]), torch.arange(2))
    with pytest.raises(UserError, match="1 labels for 2 rows"):
        table.update(hits, torch.tensor([0]), torch.arange(2))

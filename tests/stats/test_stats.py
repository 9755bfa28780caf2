"""Statistics are exact: recomputed with rational numbers, and to the bit for any split, order and merge."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wsae.core.errors import UserError
from wsae.stats.classes import ConsistencyCounts
from wsae.stats.moments import Moments

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
matrices = hnp.arrays(np.float32, st.tuples(st.integers(1, 12), st.integers(1, 4)), elements=floats)


@settings(max_examples=150, deadline=None)
@given(x=matrices)
def test_moments_equal_rational_arithmetic_rounded_once(x: np.ndarray) -> None:
    moments = Moments(x.shape[1])
    moments.update(torch.from_numpy(x))
    for i in range(x.shape[1]):
        column, n = [Fraction(float(v)) for v in x[:, i]], len(x)
        mean = sum(column) / n
        assert float(moments.mean[i]) == float(mean)
        assert float(moments.variance[i]) == float(sum((v - mean) ** 2 for v in column) / n)
        assert float(moments.second_moment[i]) == float(sum(v * v for v in column) / n)


@settings(max_examples=60, deadline=None)
@given(x=matrices, data=st.data())
def test_any_split_order_and_merge_gives_the_same_bits(x: np.ndarray, data: st.DataObject) -> None:
    whole = Moments(x.shape[1])
    whole.update(torch.from_numpy(x))
    order = data.draw(st.permutations(range(len(x))))
    cut = data.draw(st.integers(0, len(x)))
    parts = [Moments(x.shape[1]), Moments(x.shape[1])]
    for part, rows in zip(parts, (order[:cut], order[cut:]), strict=True):
        for row in rows:
            part.update(torch.from_numpy(x[[row]]))
    parts[1].merge(Moments.from_tensors(parts[0].tensors()))
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, parts[1].tensors()[name]), name


def test_an_offset_that_ruins_naive_variance_is_harmless() -> None:
    x = torch.randn(1000, 1) + 1e6
    moments = Moments(1)
    moments.update(x)
    assert float(moments.variance[0]) == pytest.approx(
        float(x.double().var(correction=0)), rel=1e-12
    )


def test_many_rows_cross_the_inner_block_without_rounding() -> None:
    x = torch.full((20_000, 2), 0.1)
    moments = Moments(2)
    moments.update(x)
    assert moments.mean.tolist() == [float(np.float32(0.1))] * 2
    assert moments.variance.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_named_with_its_row_and_dimension(value: float) -> None:
    x = torch.zeros(300, 5)
    x[217, 3] = value
    moments = Moments(5)
    moments.update(torch.zeros(10, 5))
    with pytest.raises(UserError, match="row 227, dimension 3"):
        moments.update(x)


def test_consistency_matches_its_definition_and_merges_by_adding() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator).relu()
    x[:, 5] = 0  # never active
    labels = torch.randint(0, 4, (200,), generator=generator)
    counts = ConsistencyCounts(6, 4)
    for rows in torch.arange(200).split(37):
        counts.update(x[rows], labels[rows])
    for i in range(5):
        active = [int(c) for c, v in zip(labels, x[:, i], strict=True) if v > 0]
        expected = max(active.count(c) for c in range(4)) / len(active)
        assert float(counts.consistency()[i]) == pytest.approx(expected, abs=1e-15)
    assert float(counts.consistency()[5]) == 0.0


def test_labels_must_match_rows_and_range() -> None:
    counts = ConsistencyCounts(2, 3)
    with pytest.raises(UserError, match="2 labels for 3 rows"):
        counts.update(torch.ones(3, 2), torch.tensor([0, 1]))
    with pytest.raises(UserError, match="from 0 to 3"):
        counts.update(torch.ones(2, 2), torch.tensor([0, 3]))

"""The streaming covariance against numpy, under any split and merge, and where naive sums fail."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wsae.core.errors import UserError
from wsae.stats.moments import Covariance


def rows(n: int, d_in: int = 4, seed: int = 0, offset: float = 0.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d_in, generator=g) @ torch.randn(d_in, d_in, generator=g) + offset


def covariance_of(x: Tensor) -> Covariance:
    found = Covariance(x.shape[1])
    found.update(x)
    return found


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 200), data=st.data(), offset=st.sampled_from([0.0, 1e3]))
def test_any_split_and_merge_equals_numpy(n: int, data: st.DataObject, offset: float) -> None:
    x = rows(n, seed=n, offset=offset)
    first, second = sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n))))
    found, other = Covariance(4), Covariance(4)
    found.update(x[:first])
    other.update(x[first:second])
    other.update(x[second:])
    found.merge(other)
    assert found.n == n
    expected = np.cov(x.double().numpy().T, bias=True)
    scale = float(np.trace(expected)) / 4
    np.testing.assert_allclose(found.covariance.numpy(), expected, rtol=1e-9, atol=1e-11 * scale)
    np.testing.assert_allclose(
        found.mean.numpy(), x.double().mean(0).numpy(), rtol=1e-12, atol=1e-13
    )


def test_many_rows_cross_the_inner_block() -> None:
    x = rows(9000, seed=1, offset=50.0)
    expected = np.cov(x.double().numpy().T, bias=True)
    np.testing.assert_allclose(covariance_of(x).covariance.numpy(), expected, rtol=1e-10)


def test_a_large_mean_does_not_drown_a_small_variance() -> None:
    g = torch.Generator().manual_seed(2)
    x = (1e4 + torch.randint(0, 2, (1000, 2), generator=g)).float()  # exact in float32
    naive = float((x * x).mean() - x.mean() ** 2)
    expected = np.cov(x.double().numpy().T, bias=True)
    assert abs(naive - expected[0, 0]) > 0.1 * expected[0, 0], "the example must be hard"
    np.testing.assert_allclose(covariance_of(x).covariance.numpy(), expected, rtol=1e-9)


def test_a_constant_dimension_has_variance_zero_exactly() -> None:
    x = rows(500, seed=3)
    x[:, 2] = 0.1
    found, other = covariance_of(x[:123]), covariance_of(x[123:])
    found.merge(other)
    assert found.covariance[2].tolist() == [0.0] * 4
    assert found.covariance[:, 2].tolist() == [0.0] * 4


def test_bad_rows_are_named() -> None:
    found = covariance_of(rows(10))
    x = rows(5)
    x[3, 1] = float("inf")
    with pytest.raises(UserError, match="row 13, dimension 1"):
        found.update(x)
    with pytest.raises(UserError, match=r"where \[rows, 4\] is needed"):
        found.update(torch.ones(2, 3))
    with pytest.raises(UserError, match="width 3 cannot join one of width 4"):
        found.merge(Covariance(3))
    with pytest.raises(UserError, match="no rows were seen"):
        _ = Covariance(2).covariance

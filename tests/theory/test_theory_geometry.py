"""Superposition matrices: the geometries have the Gram matrices they promise, and the measures say what is there."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsae.core.errors import UserError
from wsae.theory.geometry import (
    check_W_p,
    describe,
    digons,
    direct_sum,
    interference,
    nonpositive,
    orthogonal,
    polygon,
    random_unit,
    simplex,
)


@pytest.mark.parametrize("p", range(2, 10))
def test_a_simplex_has_the_gram_matrix_of_eq_19_in_p_minus_1_dimensions(p):
    W_p = simplex(p)
    off = W_p.T @ W_p - torch.eye(p)
    assert W_p.shape == (p - 1, p)
    assert torch.allclose(
        off.fill_diagonal_(-1 / (p - 1)), torch.full((p, p), -1 / (p - 1)).double()
    )
    assert W_p.sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("p", range(3, 9))
def test_a_polygon_has_cosines_of_equal_angles(p):
    gram = polygon(p).T @ polygon(p)
    for i in range(p):
        for j in range(p):
            assert float(gram[i, j]) == pytest.approx(
                math.cos(2 * math.pi * (i - j) / p), abs=1e-12
            )


def test_the_triangle_is_the_one_of_example_2():
    half, root = 0.5, math.sqrt(3) / 2
    expected = torch.tensor([[0, root, -root], [1, -half, -half]]).double()
    assert torch.allclose(polygon(3), expected, atol=1e-7)


def test_digons_are_antipodal_pairs_and_nothing_else():
    assert digons(2).tolist() == [[1, -1, 0, 0], [0, 0, 1, -1]]


def test_blocks_of_a_direct_sum_do_not_interfere():
    found = describe(direct_sum(orthogonal(2), polygon(3), digons(1)))
    assert found.blocks == ((2, 3, 4), (5, 6), (0,), (1,))
    assert found.features_of == ((0,), (1,), (3, 4), (2, 3, 4), (5, 6))
    assert found.interferers == (0, 0, 2, 2, 2, 1, 1)
    assert (found.rank, found.d_in, found.n_features) == (5, 5, 7)
    assert found.unit_norm
    assert found.nonpositive
    assert found.most_negative == pytest.approx(-1)


def test_a_chain_of_interference_is_one_block():
    chain = torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]])
    assert describe(chain).blocks == ((0, 1, 2, 3),)
    assert not describe(chain).nonpositive


@settings(max_examples=40, deadline=None)
@given(d=st.integers(1, 6), share=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_nonpositive_keeps_its_promise(d, share, seed):
    n = 1 + round(share * (2 * d - 1))
    W_p = nonpositive(d, n, seed)
    assert W_p.shape == (d, n)
    assert torch.allclose(W_p.norm(dim=0), torch.ones(n).double())
    assert describe(W_p).nonpositive
    assert torch.equal(W_p, nonpositive(d, n, seed))


def test_nonpositive_refuses_more_than_twice_the_dimensions_and_says_why():
    with pytest.raises(UserError, match="7 features in 3 dimensions; at most 6"):
        nonpositive(3, 7, 0)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_interference_is_blind_to_lengths_and_rotations(seed):
    made = torch.Generator().manual_seed(seed)
    W_p = random_unit(3, 6, seed)
    lengths = torch.rand(6, generator=made).double() + 0.1
    turn = torch.linalg.qr(torch.randn(3, 3, generator=made).double()).Q
    assert torch.allclose(
        interference(turn @ W_p * lengths), W_p.T @ W_p - torch.eye(6), atol=1e-12
    )


@pytest.mark.parametrize(
    ("W_p", "says"),
    [
        (torch.zeros(3), r"shape \[3\]"),
        (torch.zeros(0, 3), r"shape \[0, 3\]"),
        (torch.tensor([[1.0, float("nan")]]), r"W_p\[0, 1\] is nan"),
        (torch.tensor([[1.0, 0.0], [1.0, 0.0]]), "column 1 is zero"),
    ],
)
def test_a_bad_W_p_gets_one_line(W_p, says):
    with pytest.raises(UserError, match=says):
        check_W_p(W_p)


@pytest.mark.parametrize(
    "call", [lambda: polygon(2), lambda: digons(0), direct_sum, lambda: simplex(0)]
)
def test_impossible_geometries_are_refused(call):
    with pytest.raises(UserError):
        call()

"""The Triton kernels under Triton's interpreter, against dense definitions. `test_gpu` runs this file."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wsae.kernels import eager
from wsae.kernels.eager import (
    AdamStep,
    Plan,
    SparseGrad,
    code_from_topk,
    offsets_of,
    select_batch_topk,
    select_group_topk,
)
from wsae.kernels.triton import encode, sums, update
from wsae.kernels.triton.support import MAX_CANDIDATES

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def integers(seed: int, *shape: int, span: int = 3) -> Tensor:
    """Small whole numbers: their products and sums are exact in every dtype and order."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-span, span + 1, shape, generator=g).float()


def problem(seed: int, batch: int, d_in: int, d_sae: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, W, b = integers(seed, batch, d_in), integers(seed + 1, d_sae, d_in), integers(seed, d_sae)
    return x, W, b, x @ W.T + b


def largest(pre: Tensor, k: int) -> Tensor:
    """The k largest in order, of equal ones the lower latents: what torch.topk leaves open is fixed."""
    return pre.sort(dim=1, descending=True, stable=True).indices[:, :k]


@pytest.mark.parametrize(
    ("batch", "d_in", "d_sae", "k", "dtype"),
    [
        (1, 1, 5, 1, FP32), (1, 7, 5, 5, BF16), (3, 7, 64, 3, BF16), (33, 33, 64, 1, BF16),
        (17, 33, 129, 1, FP32), (1, 40, 129, 129, FP32), (2, 40, 1000, 3, BF16),
        (1, 33, 1000, 31, BF16),
    ],
)  # fmt: skip
def test_topk_encode_is_topk_of_the_product(batch, d_in, d_sae, k, dtype) -> None:
    x, W, b, pre = problem(0, batch, d_in, d_sae)
    values, indices = encode.topk_encode(x, W, b, k, dtype)
    assert torch.equal(indices, largest(pre, k))
    assert torch.equal(values, pre.gather(1, indices))


@settings(max_examples=3)
@given(st.integers(0, 99), st.integers(1, 4), st.integers(1, 40), st.data())
def test_topk_encode_with_many_ties(seed, batch, d_sae, data) -> None:
    k = data.draw(st.integers(1, min(d_sae, 6)))
    x, W, b, pre = problem(seed, batch, 2, d_sae)
    assert torch.equal(encode.topk_encode(x, W, b, k, BF16)[1], largest(pre, k))
    assert torch.equal(encode.topk_encode(x, W, None, k, FP32)[1], largest(pre - b, k))


@pytest.mark.parametrize("bias", [-1e4, 0.0, 7.0])
def test_topk_encode_of_equal_and_negative_values(bias) -> None:
    """All equal: any choice is right, and it is the first. All negative: still the k largest."""
    b = torch.full((70,), bias)
    values, indices = encode.topk_encode(torch.zeros(3, 4), torch.randn(70, 4), b, 5, BF16)
    assert torch.equal(indices, torch.arange(5).expand(3, 5))
    assert torch.equal(values, torch.full((3, 5), bias))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_topk_encode_looks_again_at_crowded_buckets(dtype) -> None:
    """All k largest lie in two buckets, which show two candidates each; one has lanes past the last latent.

    What lies behind the weights in memory is large, so that reading it would show.
    """
    d_sae, k = 1000, 6
    size = encode.bucket_size(d_sae, k)
    assert size > 4
    stride = encode.BN // size
    x, W, b = integers(3, 2, 33), integers(4, d_sae + 99, 33), integers(3, d_sae + 99)
    W[d_sae:], b[d_sae:] = 1e4 * x[0], 1e6
    W, b = W[:d_sae], b[:d_sae]
    crowd = torch.cat([3 + stride * torch.arange(4), 3 * encode.BN + 1 + stride * torch.arange(3)])
    b[crowd] += torch.tensor([1000.0, 1001, 1002, 1003, 1004, 1005, 1006])
    values, indices = encode.topk_encode(x, W, b, k, dtype)
    pre = x @ W.T + b
    assert torch.equal(indices, largest(pre, k))
    assert torch.equal(values, pre.gather(1, indices))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_topk_encode_ranks_by_the_product_and_returns_fp32_values(dtype) -> None:
    g = torch.Generator().manual_seed(5)
    x, W, b = (torch.randn(*s, generator=g) for s in ((3, 40), (150, 40), (150,)))
    product = x.to(dtype).float() @ W.to(dtype).float().T + b
    values, indices = encode.topk_encode(x, W, b, 4, dtype)
    kept = product.gather(1, indices)
    torch.testing.assert_close(kept, product.topk(4).values, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(values, (x @ W.T + b).gather(1, indices))


def test_candidates_stay_few() -> None:
    for d_sae, k in ((24_576, 32), (131_072, 32), (131_072, 512), (1 << 20, 64), (4096, 4096)):
        width = 2 * d_sae // encode.bucket_size(d_sae, k)
        assert k <= width <= MAX_CANDIDATES
    assert 2 * 24_576 // encode.bucket_size(24_576, 32) < 24_576 / 16


@pytest.mark.parametrize(
    ("batch", "d_in", "d_sae", "k"),
    [(1, 1, 5, 5), (17, 33, 64, 4), (33, 7, 129, 3), (2, 40, 1000, 2), (3, 7, 1000, 8)],
)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_group_topk_is_the_first_largest_of_each_group(batch, d_in, d_sae, k, dtype) -> None:
    x, W, b, pre = problem(1, batch, d_in, d_sae)
    indices = encode.group_topk_encode(x, W, b, k, dtype)
    assert torch.equal(indices, select_group_topk(pre, k))
    without = encode.group_topk_encode(x, W, None, k, dtype)
    assert torch.equal(without, select_group_topk(pre - b, k))


@pytest.mark.parametrize(
    ("batch", "d_in", "d_sae"), [(1, 1, 5), (3, 33, 129), (33, 7, 64), (5, 40, 300)]
)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_pairs_above_a_threshold(batch, d_in, d_sae, dtype) -> None:
    x, W, b, pre = problem(2, batch, d_in, d_sae)
    for limit in (torch.tensor(1.0), integers(4, d_sae), torch.tensor(-1e9), torch.tensor(1e9)):
        found = torch.stack(encode.above(x, W, b, limit, dtype), 1)
        assert torch.equal(found, (pre > limit).nonzero())


@pytest.mark.parametrize("k", [1, 4, 200])
def test_batch_topk_is_that_of_the_product(k) -> None:
    """With k = 200 of 300 there are fewer positive entries than wanted; then all of them are chosen."""
    x, W, b, pre = problem(6, 9, 7, 300)
    for dtype in (FP32, BF16):
        rows, indices = encode.select_batch_topk(x, W, b, k, dtype)
        ours, theirs = (
            pre[pair].sort().values for pair in ((rows, indices), select_batch_topk(pre, k))
        )
        assert torch.equal(ours, theirs)
        place = rows * 300 + indices
        assert torch.equal(place, place.unique())
    none = encode.select_batch_topk(x[:0], W, b, k, BF16)
    assert [len(part) for part in none] == [0, 0]


def ragged(seed: int, batch: int, d_sae: int, dtype: torch.dtype) -> tuple[Plan, Tensor]:
    """Rows of different lengths, some empty; latent 0 fires in every row with any; the last latents never do."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 4, (batch,), generator=g)
    rows = torch.arange(batch).repeat_interleave(counts)
    indices = torch.randint(0, max(1, d_sae - 2), (len(rows),), generator=g)
    indices[torch.searchsorted(rows, rows.unique())] = 0
    weights = torch.randn(len(rows), generator=g, dtype=FP64).to(dtype)
    return Plan.build(indices, offsets_of(rows, batch), d_sae), weights


def matrix(plan: Plan, weights: Tensor) -> Tensor:
    z = torch.zeros(len(plan.offsets) - 1, len(plan.latent_offsets) - 1, dtype=weights.dtype)
    return z.index_put((plan.rows, plan.indices), weights, accumulate=True)


@pytest.mark.parametrize(
    ("batch", "d_in", "d_sae", "dtype"),
    [(1, 1, 5, FP32), (3, 300, 7, FP64), (17, 33, 65, FP32), (95, 7, 6, FP64), (9, 7, 6, FP32)],
)
def test_sums_over_pairs(batch, d_in, d_sae, dtype) -> None:
    plan, weights = ragged(batch, batch, d_sae, dtype)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, d_in, generator=g, dtype=dtype)
    W = torch.randn(d_sae, d_in, generator=g, dtype=dtype)
    z = matrix(plan, weights)
    torch.testing.assert_close(sums.decode(weights, W, plan), z @ W)
    G = sums.scatter(plan, weights, x)
    torch.testing.assert_close(G, z.T @ x)
    assert torch.equal(G, sums.scatter(plan, weights, x))
    products = sums.pair_products(x, W, plan)
    torch.testing.assert_close(products, (x @ W.T)[plan.rows, plan.indices])


def test_a_latent_in_every_row_is_summed_in_chunks() -> None:
    batch = 3 * sums.CHUNK + 3
    indices = torch.tensor([[0, 1]]).expand(batch, 2).clone()
    indices[: sums.CHUNK, 1] = 2  # exactly one full chunk
    weights = integers(0, batch, 2)
    code, x = code_from_topk(weights, indices), integers(1, batch, 5)
    plan = Plan.build(code.indices, code.offsets, 4)
    chunks = sums.sum_chunks(plan, code.values, x)
    assert chunks.offsets.diff().tolist() == [3, 2, 1, 0]
    left = (plan.latent_offsets[1:] - chunks.rest).tolist()
    assert left == [3, batch - 3 * sums.CHUNK, 0, 0]
    assert torch.equal(sums.scatter(plan, code.values, x), matrix(plan, code.values).T @ x)


def test_sums_read_bf16_weights_and_add_in_fp32() -> None:
    plan, weights = ragged(2, 9, 20, FP32)
    W, x = torch.randn(20, 33).bfloat16(), torch.randn(9, 33).bfloat16()
    decoded = sums.decode(weights, W, plan)
    torch.testing.assert_close(decoded, matrix(plan, weights) @ W.float())
    products = sums.pair_products(x, W, plan)
    torch.testing.assert_close(products, (x.float() @ W.float().T)[plan.rows, plan.indices])


def test_without_pairs_sums_are_zero() -> None:
    none, offsets = torch.zeros(0, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    plan, weights, W = Plan.build(none, offsets, 5), torch.zeros(0), torch.randn(5, 7)
    assert torch.equal(sums.decode(weights, W, plan), torch.zeros(3, 7))
    assert torch.equal(sums.scatter(plan, weights, torch.randn(3, 7)), torch.zeros(5, 7))
    assert len(sums.pair_products(torch.randn(3, 7), W, plan)) == 0


def test_gradcheck_with_the_kernels_plugged_in(monkeypatch) -> None:
    monkeypatch.setattr(eager, "_pair_products", sums.pair_products)
    monkeypatch.setattr(Plan, "scatter", sums.scatter)

    def bag(indices, W, offsets, mode, per_sample_weights):  # noqa: ARG001
        return sums.decode(per_sample_weights.detach(), W.detach(), plan)

    monkeypatch.setattr(eager, "F", SimpleNamespace(embedding_bag=bag))
    plan, values = ragged(4, 3, 5, FP64)
    x = torch.randn(3, 2, dtype=FP64)
    leaves = [torch.randn(*s, dtype=FP64, requires_grad=True) for s in ((5, 2), (5,), (2,))]
    assert torch.autograd.gradcheck(
        lambda W, b, c: eager.encode_at((x - c).detach(), W, plan, b, c), leaves, fast_mode=True
    )
    W = torch.randn(5, 2, dtype=FP64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda v, w: eager.decode(v, w, plan), (values.requires_grad_(), W), fast_mode=True
    )


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize(("batch", "d_in", "d_sae"), [(1, 1, 5), (17, 33, 16), (95, 40, 6)])
def test_updates_are_the_eager_twins(batch, d_in, d_sae, unit) -> None:
    """The gradients' terms are whole: their sum is exact, for Adam makes much of an error where it is near 0."""
    g = torch.Generator().manual_seed(8)
    W = torch.randn(d_sae, d_in, generator=g)
    W /= W.norm(dim=1, keepdim=True)
    start = [W, torch.zeros_like(W), torch.zeros_like(W)]
    expected, terms, given = ([t.clone() for t in start] for _ in range(3))
    for number in (1, 2):
        plan, weights = ragged(number, batch, d_sae, FP32)
        grad = SparseGrad(plan, (2 * weights).round(), integers(number, batch, d_in))
        scale = None if number == 1 else torch.tensor(0.25)
        adam = AdamStep(0.03 / number, number, 0.8, 0.95, 1e-6, scale)
        dense = grad.dense()
        square = eager.update_rows_(expected[0], grad, expected[1], expected[2], adam, unit)
        for found in (
            update.update_rows_(terms[0], grad, terms[1], terms[2], adam, unit),
            update.adam_rows_(given[0], dense, given[1], given[2], adam, unit),
        ):
            assert (found is None) == (scale is None)
            if found is not None and square is not None:
                torch.testing.assert_close(found, square, rtol=1e-5, atol=1e-5)
    for name, want, ours, also in zip("Wmv", expected, terms, given, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(also, want, rtol=1e-4, atol=1e-5, msg=name)
    if unit:
        torch.testing.assert_close(terms[0].norm(dim=1), torch.ones(d_sae))


def test_a_row_of_zeros_stays_finite() -> None:
    zero = torch.zeros(2, 3)
    state = [zero.clone() for _ in range(3)]
    update.adam_rows_(state[0], zero, state[1], state[2], AdamStep(0.1, 1), True)
    assert torch.equal(state[0], zero)


def test_the_benchmarks_whole_step_is_the_eager_one() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu)
    size = gpu.Size(d_in=9, d_sae=17, batch=3, k=2)
    x = torch.randn(size.batch, size.d_in, generator=torch.Generator().manual_seed(2))
    states = [gpu.make_state(size, "cpu") for _ in range(2)]
    ours, theirs = (
        gpu.step(ops, state, x, size.k, AdamStep(0.01, 1))
        for ops, state in zip((gpu.kernels(), gpu.plain()), states, strict=True)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for one, other in zip(states[0][:2], states[1][:2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

"""Adam on rows is torch.optim.Adam with the two lines that keep rows at unit norm."""

import pytest
import torch
from torch import nn

from wsae.kernels.eager import (
    SGD,
    Adam,
    AdamStep,
    Plan,
    SparseGrad,
    adam_rows_,
    code_from_topk,
    update_rows_,
)


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (64, 33)])
def test_a_run_equals_torch_adam_with_unit_rows(unit, dtype, shape) -> None:
    g = torch.Generator().manual_seed(0)
    W = torch.randn(*shape, generator=g, dtype=dtype)
    W = W / W.norm(dim=1, keepdim=True) if unit else W
    ours, m, v = W.clone(), torch.zeros_like(W), torch.zeros_like(W)
    theirs = torch.nn.Parameter(W.clone())
    optimizer = torch.optim.Adam([theirs], lr=0.1, fused=True)
    for step in range(1, 8):
        grad = torch.randn(*shape, generator=g, dtype=dtype)
        lr = 0.1 / step
        adam_rows_(ours, grad.clone(), m, v, AdamStep(lr, step), unit)
        optimizer.param_groups[0]["lr"] = lr
        theirs.grad = grad
        with torch.no_grad():
            if unit:
                along = torch.linalg.vecdot(theirs.grad, theirs, dim=1)
                theirs.grad.addcmul_(theirs, along[:, None], value=-1)
            optimizer.step()
            if unit:
                norms = torch.linalg.vector_norm(theirs, dim=1, keepdim=True)
                theirs.div_(norms.clamp_min_(1e-12))
        assert torch.equal(ours, theirs.detach())
    state = optimizer.state[theirs]
    assert torch.equal(m, state["exp_avg"])
    assert torch.equal(v, state["exp_avg_sq"])


def test_the_optimisers_are_torchs_to_the_bit() -> None:
    """Parameters of two types, one without a gradient at times, a learning rate that moves."""
    g = torch.Generator().manual_seed(0)
    shapes = {torch.float32: [(5, 7), (3,)], torch.float64: [(2, 2)]}
    starts = [torch.randn(*s, generator=g, dtype=t) for t, found in shapes.items() for s in found]
    for mine, its in ((Adam, {"fused": True}), (SGD, None)):
        ours, theirs = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
        own = mine(ours, 0.1)
        other = (
            torch.optim.SGD(theirs, 0.1) if its is None else torch.optim.Adam(theirs, 0.1, **its)
        )
        for step in range(1, 7):
            own.lr = other.param_groups[0]["lr"] = 0.1 / step
            for number, (p, q) in enumerate(zip(ours, theirs, strict=True)):
                grad = torch.randn(p.shape, generator=g, dtype=p.dtype)
                some = number != 1 or step % 2 == 0
                p.grad, q.grad = (grad.clone() if some else None for _ in range(2))
            own.step()
            other.step()
            assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
        if isinstance(own, Adam):
            for p, q in zip(ours, theirs, strict=True):
                assert own.state[p].keys() == other.state[q].keys()
                assert all(
                    torch.equal(own.state[p][key], other.state[q][key]) for key in own.state[p]
                )


def test_betas_and_eps_are_torchs() -> None:
    W, grad = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 1e-9]])
    theirs = torch.nn.Parameter(W.clone())
    theirs.grad = grad.clone()
    torch.optim.Adam([theirs], lr=0.3, betas=(0.5, 0.75), eps=1e-4).step()
    adam_rows_(
        W, grad, torch.zeros(1, 2), torch.zeros(1, 2), AdamStep(0.3, 1, 0.5, 0.75, 1e-4), False
    )
    torch.testing.assert_close(W, theirs.detach())


@pytest.mark.parametrize("unit", [False, True])
def test_a_scaled_gradient_is_measured_before_it_is_scaled(unit) -> None:
    g = torch.Generator().manual_seed(3)
    W = torch.nn.functional.normalize(torch.randn(5, 4, generator=g), dim=1)
    grad, scale = torch.randn(5, 4, generator=g), torch.tensor(0.125)
    tangent = grad - (grad * W).sum(1, keepdim=True) * W if unit else grad
    one, two = ([W.clone(), torch.zeros(5, 4), torch.zeros(5, 4)] for _ in range(2))
    square = adam_rows_(one[0], grad.clone(), one[1], one[2], AdamStep(0.1, 1, scale=scale), unit)
    assert adam_rows_(two[0], scale * grad, two[1], two[2], AdamStep(0.1, 1), unit) is None
    assert square is not None
    assert float(square) == pytest.approx(float(tangent.norm()) ** 2)
    for ours, theirs in zip(one, two, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("unit", [False, True])
def test_a_gradient_given_by_its_terms_is_their_sum(unit) -> None:
    """Latents without a pair take Adam's step with gradient zero: their momentum moves them on."""
    g = torch.Generator().manual_seed(1)
    d_sae, d_in, batch, k = 9, 4, 6, 2
    indices = torch.randint(0, d_sae - 2, (batch, k), generator=g)
    weights, rows = torch.randn(batch, k, generator=g), torch.randn(batch, d_in, generator=g)
    code = code_from_topk(weights, indices)
    W, m = torch.randn(2, d_sae, d_in, generator=g)
    v = torch.rand(d_sae, d_in, generator=g)
    dense = torch.zeros(d_sae, d_in)
    for b in range(batch):
        for i in range(k):
            dense[indices[b, i]] += weights[b, i] * rows[b]
    twin = [W.clone(), m.clone(), v.clone()]
    adam_rows_(twin[0], dense, twin[1], twin[2], AdamStep(0.1, 3), unit)
    terms = SparseGrad(Plan.build(code.indices, code.offsets, d_sae), code.values, rows)
    before = W.clone()
    update_rows_(W, terms, m, v, AdamStep(0.1, 3), unit)
    for ours, theirs in zip((W, m, v), twin, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not torch.equal(before[-1], W[-1])

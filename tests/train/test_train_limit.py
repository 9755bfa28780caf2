"""A limited gradient, recomputed by autograd, PyTorch's own Adam and the definition."""

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from wsae.acts.source import ArraySource
from wsae.kernels.native.build import why_not
from wsae.sae import SAE
from wsae.train.config import TrainConfig
from wsae.train.family import make_family
from wsae.train.loop import run_steps
from wsae.train.native import as_usual
from wsae.train.step import lr_factor

STEPS, ROWS, K = 12, 50, 4
KERNELS = ["eager", "native"] if why_not() is None else ["eager"]


def rows() -> Float[Tensor, "rows 10"]:
    """Rows whose errors, and so gradients, grow: the limit is not the same from step to step."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS * ROWS, 10, generator=g)
    return x * (1 + torch.rand(len(x), 1, generator=g))


def config(limit: float | None, kernels: str) -> TrainConfig:
    member = {"d_sae": 40, "activation": {"kind": "topk", "k": K}, "lr": 3e-2, "auxk": 0.0}
    data = {"members": (member,), "tokens": STEPS * ROWS, "batch_size": ROWS}
    return TrainConfig.parse({**data, "max_grad_norm": limit, "kernels": kernels})


def expected(limit: float | None, cfg: TrainConfig, x: ArraySource) -> dict[str, Tensor]:
    """Train by the definition: a gradient is multiplied by min(1, limit / norm of the one before)."""
    ((_, member),) = make_family(cfg, x.stats()).all()
    sae: SAE = member.sae.double()
    names, adam = dict(sae.named_parameters()), torch.optim.Adam(sae.parameters(), lr=1.0)
    stream, before = x.stream(ROWS, cfg.seed), None
    for step in range(STEPS):
        batch = stream.next()["acts"].double() / member.scale
        pre = (batch - sae.b_dec) @ sae.W_enc_t.T + sae.b_enc
        top = pre.topk(K, dim=1)
        z = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        loss = (batch - z @ sae.W_dec - sae.b_dec).square().sum(1).mean()
        adam.zero_grad()
        loss.backward()
        G = names["W_dec"].grad
        assert G is not None
        G -= (G * sae.W_dec.detach()).sum(1, keepdim=True) * sae.W_dec.detach()
        norm = torch.stack([p.grad.norm() for p in sae.parameters() if p.grad is not None]).norm()
        before = norm if before is None else before  # of the first step the one it has
        for p in sae.parameters():
            if limit is not None and p.grad is not None:
                p.grad *= min(1.0, limit / float(before))
        before = norm
        adam.param_groups[0]["lr"] = 3e-2 * lr_factor(step, STEPS, cfg.warmup, cfg.decay)
        adam.step()
        names["W_dec"].data /= names["W_dec"].data.norm(dim=1, keepdim=True)
    return {name: p.detach() for name, p in names.items()}


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("limit", [None, 1.0, 0.7])
def test_a_gradient_is_limited_by_the_norm_of_the_step_before(
    kernels: str, limit: float | None
) -> None:
    x, cfg = ArraySource(rows()), config(limit, kernels)
    family = make_family(cfg, x.stats())
    run_steps(cfg, family, x.stream(ROWS, cfg.seed), 0, lambda _: None, lambda _: None)
    ((_, member),) = family.all()
    wanted = expected(limit, cfg, x)
    with as_usual(member):
        for name, parameter in member.sae.named_parameters():
            torch.testing.assert_close(
                parameter.detach().double(), wanted[name], rtol=1e-3, atol=1e-4, msg=name
            )


def test_the_limits_differ() -> None:
    x = ArraySource(rows())
    none, tight, loose = (
        expected(limit, config(limit, "eager"), x)["W_dec"] for limit in (None, 1.0, 0.7)
    )
    assert float((none - tight).norm()) > 0.01
    assert float((loose - tight).norm()) > 0.01
    assert float((loose - none).norm()) > 0.01

"""Encoding by the compiled selection gives the latents of `encode_code`."""

import pytest
import torch

from wsae.kernels.native.build import why_not
from wsae.sae import SAE, BatchTopK, GroupTopK, ReLU, SAEConfig, TopK
from wsae.sae.model import Encoder

KINDS = [TopK(k=5), GroupTopK(k=8), BatchTopK(k=5), ReLU()]


def rows(n: int, seed: int = 0) -> torch.Tensor:
    """Rows of uneven dimensions, one of them loud and far from 0."""
    x = torch.randn(n, 24, generator=torch.Generator().manual_seed(seed))
    x *= torch.linspace(0.2, 3, 24)
    x[:, 7] = 40 * x[:, 7] + 100
    return x


@pytest.mark.parametrize("norm", [None, "layer_norm"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=[k.kind for k in KINDS])
def test_codes_are_those_of_encode_code(kind, tied, norm):
    cfg = SAEConfig(d_in=24, d_sae=160, activation=kind, tied=tied, input_norm=norm)
    sae = SAE(cfg, seed=1)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        sae.W_dec.add_(0.3 * torch.randn(160, 24, generator=g))
        if not tied:
            sae.b_enc.copy_(0.2 * torch.randn(160, generator=g))
            sae.b_dec.copy_(sae.normalised(rows(500)).rows.mean(0))
        sae.threshold.fill_(2.5)
    encode = Encoder(sae)
    for n, seed in ((300, 3), (64, 4), (5, 5), (0, 6)):
        x = rows(n, seed)
        with torch.no_grad():
            found, wanted = encode(x), sae.encode_code(x)
        torch.testing.assert_close(found.dense(160), wanted.dense(160), rtol=1e-4, atol=1e-4)
        assert found.batch == wanted.batch == n
    broken = rows(80)
    broken[3, 2] = torch.nan
    with torch.no_grad():  # what is broken is not silent
        found, wanted = (code(broken).dense(160) for code in (encode, sae.encode_code))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_the_compiled_way_is_taken_where_it_serves():
    cfg = SAEConfig(d_in=24, d_sae=160, activation=TopK(k=5))
    encode = Encoder(SAE(cfg))
    encode(rows(8))
    assert encode._rounded is None
    encode(rows(80))
    assert (encode._rounded is None) == (why_not() is not None)
    wide = Encoder(SAE(cfg.model_copy(update={"activation": TopK(k=80)})))
    wide(rows(80))
    assert wide._rounded is None

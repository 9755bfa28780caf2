"""The floor: an SAE that learned nothing, of the same shape and sparsity, measured on the same rows."""

import torch
from jaxtyping import Float64
from torch import Tensor

from wsae.core.seeds import seed_for
from wsae.sae import SAEConfig, SparseAutoencoder, TopK

CONTROL = "control-random"
"""Name of the untrained member in results."""


def random_control(
    like: SparseAutoencoder, mean: Float64[Tensor, " d_in"], l0: float, seed: int
) -> SparseAutoencoder:
    """Return an untied Top-k SAE: random unit decoder rows, encoder = transpose, b_dec = held-out mean, k = L0.

    Its seed is another than any member's start, so it shares no direction with them.
    """
    k = min(max(1, round(l0)), like.cfg.d_sae)
    cfg = SAEConfig(d_in=like.cfg.d_in, d_sae=like.cfg.d_sae, activation=TopK(k=k))
    control = SparseAutoencoder(cfg, seed=seed_for(seed, "evals", CONTROL))
    assert control.b_dec is not None
    with torch.no_grad():
        control.b_dec.copy_(mean)
    return control.to(like.W_dec.device).requires_grad_(False)

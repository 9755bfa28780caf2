"""The floor: an SAE that learned nothing, of the same shape and sparsity, measured on the same rows."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from wsae.core.seeds import seed_for
from wsae.sae import SAE, SAEConfig, TopK

CONTROL = "control-random"
"""Name of the untrained member in results."""


def random_control(like: SAE, mean: Float64[Tensor, " d_in"], l0: float, seed: int) -> SAE:
    """Return an untied Top-k SAE: random unit decoder rows, encoder = transpose, b_dec = held-out mean, k = L0.

    Its seed is another than any member's start, so it shares no direction with them. No order of activations depends on
    the scale of its encoder, but its errors do: see `fit_scale`. Of a crosscoder the rows are random at the scale at
    which its sources vary alike.
    """
    k = min(max(1, round(l0)), like.cfg.d_sae)
    widths = {"d_in": like.cfg.d_in, "d_sae": like.cfg.d_sae, "d_out": like.cfg.d_out}
    cfg = SAEConfig(**widths, activation=TopK(k=k))
    control = SAE(cfg, seed=seed_for(seed, "evals", CONTROL))
    assert control.b_dec is not None
    assert control.W_enc_t is not None
    with torch.no_grad():
        control.b_dec.copy_(mean)
        if like.cfg.sources is not None:
            scales = like.scales.to(control.W_dec)
            control.W_enc_t.mul_(scales)
            control.W_dec.div_(scales)
    return control.to(like.W_dec.device).requires_grad_(False)


FITTED_ROWS = 4096
"""Rows that set the control's scale: one number, which they give to a part in a thousand."""


def fit_scale(
    control: SAE,
    rows: Float[Tensor, "rows d_in"],
    target: Float[Tensor, "rows d_out"] | None = None,
) -> float:
    """Scale the encoder so that the squared error on the rows is least, and return the factor s.

    With codes z and y = x_hat - b_dec at the old scale, s = sum (x - b_dec) . y / sum |y|^2 >= 0, because the code of
    s W_enc is s z. Where every code is 0 nothing changes (s = 1). A transcoder is to give the `target` in place of x:
    its b_enc takes the mean of the rows off first, and s may be 0, as its directions know nothing of the target's.
    """
    assert control.b_dec is not None
    assert control.W_enc_t is not None
    assert control.b_enc is not None
    with torch.no_grad():
        x = rows.to(control.W_dec.device)
        goal = x if target is None else target.to(x.device)
        if control.cfg.transcoder:
            control.b_enc.copy_(-x.mean(0) @ control.W_enc)
        y = (control.decode(control.encode(x)) - control.b_dec).double()
        power = float(y.square().sum())
        scale = float(((goal - control.b_dec).double() * y).sum()) / power if power else 1.0
        scale = max(0.0, scale)
        control.W_enc_t.mul_(scale)
        control.b_enc.mul_(scale)
    return scale

"""Codes of many rows by the compiled selection: what `encode_code` gives, several times as fast, without gradients."""

import torch
from jaxtyping import Float
from torch import Tensor

from wsae.kernels import SparseCode
from wsae.kernels.native import why_not
from wsae.kernels.native.build import has_int8
from wsae.kernels.native.select import (
    LARGEST_SHARE,
    Centred,
    RoundedEncoder,
    dimension_scales,
    select_above,
    select_topk,
)
from wsae.kernels.native.slices import to_slices
from wsae.sae.architectures import Above, Every, PerGroup, PerRow
from wsae.sae.model import SAE, at_latents

FEW = 64
"""Batches of fewer rows are not worth the compiled way."""


class Encoder:
    """Encodes for evaluation: call it with rows [batch, d_in] in float32; the SAE must not change meanwhile.

    Latents and values are those of `SAE.encode_code` but for the order of float32 sums (near-ties at the
    k-th place may fall otherwise), and entries come in order of latent. Kinds without a threshold or a k, other devices
    and machines without the compiled kernels take `encode_code` itself.
    """

    def __init__(self, sae: SAE) -> None:
        self._sae = sae
        self._rounded: RoundedEncoder | None = None
        self._rows = sae.W_dec.new_empty(0)
        self._fast = _compiled(sae)

    def __call__(self, x: Float[Tensor, "batch d_in"]) -> SparseCode:
        """Return the latents of some rows."""
        here = x.shape[1] == self._sae.cfg.d_in and x.device.type == "cpu"
        if not (self._fast and here) or len(x) < FEW or x.dtype != torch.float32:
            return self._sae.encode_code(x)
        with torch.no_grad():
            return self._select(x)

    def _select(self, x: Tensor) -> SparseCode:
        sae, activation = self._sae, self._sae.cfg.activation
        x = sae.normalised(x).rows
        rounded = self._prepared(x)
        rows = sae.centre(x).contiguous()
        centred = Centred(rows, to_slices(rows))
        bias = None if sae.b_enc is None else sae.b_enc.detach()
        choice = sae.arch.used(activation, sae.own)
        if isinstance(choice, PerRow | PerGroup):
            pre = select_topk(rounded, self._rows, bias, centred, choice.k)
        else:
            assert isinstance(choice, Above)
            pre = select_above(rounded, self._rows, bias, centred, choice.floor)
        own = at_latents(sae.own, pre.indices)
        return pre._replace(values=sae.arch.values(pre.values, own, activation))

    def _prepared(self, x: Tensor) -> RoundedEncoder:
        """Return the 8-bit encoder, made when first needed; the spread of the rows at hand changes its speed only."""
        if self._rounded is None:
            cfg = self._sae.cfg
            choice = self._sae.arch.used(cfg.activation, self._sae.own)
            groups = choice.k if isinstance(choice, PerGroup) else 1
            scales = dimension_scales(x.std(0).nan_to_num(1.0, 1.0))
            self._rows = to_slices(self._sae.encoder_rows.detach())
            self._rounded = RoundedEncoder(cfg.d_sae, cfg.d_in, cfg.d_sae // groups, scales)
            self._rounded.measure(self._rows)
            self._rounded.pack(self._rows)
        return self._rounded


def _compiled(sae: SAE) -> bool:
    weights, choice = sae.W_dec, sae.arch.used(sae.cfg.activation, sae.own)
    if weights.device.type != "cpu" or weights.dtype != torch.float32 or why_not() is not None:
        return False
    if isinstance(choice, PerRow):
        return has_int8() and choice.k * LARGEST_SHARE <= sae.cfg.d_sae
    # above 0 a code may be dense, and then the whole product is faster
    dense = isinstance(choice, Every) or (
        isinstance(choice, Above) and isinstance(choice.floor, float)
    )
    return has_int8() and not dense

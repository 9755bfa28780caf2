"""Which latents of a batch are active, for every activation function, from the compiled selection."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from wsae.ops import SparseCode
from wsae.ops.codes import offsets_of
from wsae.ops.native.select import Centred, select_above, select_topk
from wsae.ops.native.slices import from_slices
from wsae.ops.native.weights import Weights
from wsae.sae.config import BatchTopK, GroupTopK, JumpReLU, ReLU, TopK
from wsae.sae.model import SparseAutoencoder

SAMPLE = 256
"""Rows of the batch from which a first batch Top-k threshold is guessed."""


class Codes(NamedTuple):
    """The pairs of a batch that carry values or gradients, in order of row."""

    pre: SparseCode
    """Pre-activations of the pairs."""
    z: Float[Tensor, " pairs"]
    passes: Float[Tensor, " pairs"]
    """dz / dpre: 1 where the latent is active, else 0."""


def find_codes(sae: SparseAutoencoder, weights: Weights, centred: Centred) -> Codes:
    """Choose the active latents as `wsae.sae.forward` does and compute their values in float32."""
    rounded, W, bias = weights.rounded, weights.encoder_rows, _bias(sae)
    match sae.cfg.activation:
        case TopK(k=k) | GroupTopK(k=k):
            pre = select_topk(rounded, W, bias, centred, k)
        case BatchTopK(k=k):
            pre = _batch_topk(weights, bias, centred, k)
        case ReLU():
            pre = select_above(rounded, W, bias, centred, 0.0)
        case JumpReLU(bandwidth=width):
            assert sae.log_threshold is not None
            floor = sae.log_threshold.detach().exp()
            pre = select_above(rounded, W, bias, centred, -width / 2, floor)
            on = (pre.values > floor[pre.indices]).float()
            return Codes(pre, pre.values * on, on)
    return Codes(pre, pre.values.relu(), (pre.values > 0).float())


def _bias(sae: SparseAutoencoder) -> Tensor | None:
    return None if sae.b_enc is None else sae.b_enc.detach()


def _batch_topk(weights: Weights, bias: Tensor | None, centred: Centred, k: int) -> SparseCode:
    """Return the batch * k largest positive pre-activations: a threshold from the batch before narrows them first."""
    rounded = weights.rounded
    wanted = min(len(centred[0]) * k, len(centred[0]) * weights.d_sae)
    cut, share = rounded.guess, 1.0
    while True:
        if not cut > 0:
            share *= 1.5
            cut = _sampled_cut(weights, bias, centred, share * k / weights.d_sae)
        found = select_above(rounded, weights.encoder_rows, bias, centred, max(cut, 0.0))
        if len(found.values) >= wanted or cut <= 0:
            break
        cut = 0.0 if share > 8 else -1.0
    code = _largest(found, wanted)
    smallest = float(code.values.min()) if len(code.values) else 0.0
    fall = min(1.0, smallest / rounded.trend) if rounded.trend > 0 else 1.0
    rounded.guess, rounded.trend = 0.95 * fall * smallest, smallest
    return code


def _sampled_cut(weights: Weights, bias: Tensor | None, centred: Centred, share: float) -> float:
    """Return the pre-activation that this share of a sample exceeds."""
    step = max(1, len(centred[0]) // SAMPLE)
    rows = centred[0][::step]
    pre = rows @ from_slices(weights.encoder_rows, weights.d_in).T
    pre = pre if bias is None else pre + bias
    rank = min(pre.numel(), int(share * pre.numel()) + 8)
    return float(pre.flatten().topk(rank).values[-1])


def _largest(code: SparseCode, wanted: int) -> SparseCode:
    if len(code.values) <= wanted:
        return code
    keep = code.values.topk(wanted, sorted=False).indices.sort().values
    rows = code.rows()[keep]
    return SparseCode(code.values[keep], code.indices[keep], offsets_of(rows, code.batch))

"""Which latents of a batch are active, by the Triton kernels."""

import torch
from jaxtyping import Float
from torch import Tensor

from wsae.ops import SparseCode, code_from_topk
from wsae.ops.codes import offsets_of
from wsae.ops.triton.above import above, select_batch_topk
from wsae.ops.triton.encode import topk_encode
from wsae.ops.triton.group import group_topk_encode
from wsae.ops.triton.sums import products
from wsae.ops.triton.support import BUCKETS_PER_CHOICE, MAX_CANDIDATES
from wsae.sae.config import BatchTopK, GroupTopK, JumpReLU, ReLU, TopK
from wsae.sae.model import SparseAutoencoder
from wsae.train.gpu.host import Dead
from wsae.train.handwritten import Codes, activate

ROWS = 256
"""Rows at once where the choice needs a whole product of the dead latents."""


def find_codes(
    sae: SparseAutoencoder, centred: Float[Tensor, "batch d_in"], dtype: torch.dtype
) -> Codes:
    """Choose the active latents as `wsae.sae.forward` does; the values are those of float32, whatever the dtype.

    Top-k and group Top-k do not wait for the device; the kinds without a fixed number of pairs do, to learn it.
    """
    W, bias = sae.encoder_rows.detach(), None if sae.b_enc is None else sae.b_enc.detach()
    match sae.cfg.activation:
        case TopK(k=k):
            return activate(sae, code_from_topk(*topk_encode(centred, W, bias, k, dtype)))
        case GroupTopK(k=k):
            winners = group_topk_encode(centred, W, bias, k, dtype)
            chosen = code_from_topk(winners.float(), winners)
            return activate(sae, _valued(centred, W, bias, chosen))
        case BatchTopK(k=k):
            rows, latents = select_batch_topk(centred, W, bias, k, dtype)
        case ReLU():
            rows, latents = above(centred, W, bias, centred.new_zeros(()), dtype)
        case JumpReLU(bandwidth=width):
            assert sae.log_threshold is not None
            # the thresholds' gradient reaches half the width below them
            floor = sae.log_threshold.detach().exp() - width / 2
            rows, latents = above(centred, W, bias, floor, dtype)
    chosen = SparseCode(centred.new_empty(0), latents, offsets_of(rows, len(centred)))
    return activate(sae, _valued(centred, W, bias, chosen))


def revive(
    sae: SparseAutoencoder,
    centred: Float[Tensor, "batch d_in"],
    dead: Dead,
    k: int,
    dtype: torch.dtype,
) -> Codes:
    """Choose the k largest of each row among dead latents; fused as Top-k is, unless k is too large for that kernel."""
    W = sae.encoder_rows.detach().index_select(0, dead.latents)
    bias = dead.floor if sae.b_enc is None else dead.floor + sae.b_enc.detach()[dead.latents]
    if min(2 * BUCKETS_PER_CHOICE * k, len(W)) <= MAX_CANDIDATES:
        values, picked = topk_encode(centred, W, bias, k, dtype)
        return _relu(values, dead.latents[picked])
    low = W.to(dtype).T
    parts = [(rows.to(dtype) @ low + bias).topk(k, sorted=False)[1] for rows in centred.split(ROWS)]
    picked = torch.cat(parts)
    code = _valued(centred, W, bias, code_from_topk(picked.float(), picked))
    return _relu(code.values.view(-1, k), dead.latents[picked])


def _relu(values: Tensor, latents: Tensor) -> Codes:
    pre = code_from_topk(values, latents)
    return Codes(pre, pre.values.relu(), (pre.values > 0).float())


def _valued(centred: Tensor, W: Tensor, bias: Tensor | None, chosen: SparseCode) -> SparseCode:
    """Return the pre-activations of chosen pairs."""
    values = products(centred, W, chosen.rows(), chosen.indices)
    return chosen._replace(values=values if bias is None else values + bias[chosen.indices])

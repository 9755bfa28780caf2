"""The training forward pass of an SAE whose rows or latents are shared out over ranks.

    x_hat = sum over ranks of z_r @ W_dec_r + b_dec        z_r: this rank's latents, chosen among those of all ranks
Every rank then holds the whole x_hat of its rows, so the loss and its gradient need nothing more. Only b_dec, which
all ranks read in the encoder, has a gradient made of parts. The layers of DTensor do not cover sparse selection, so
local tensors are computed with here, and the collectives stand where the equations have sums.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd import Function

from wsae.losses.reconstruction import weighted_reconstruction_loss
from wsae.ops import SparseCode, code_from_dense, decode, encode_at
from wsae.ops.codes import offsets_of
from wsae.ops.sparse import Plan
from wsae.sae.config import BatchTopK, GroupTopK, JumpReLU, ReLU, TopK
from wsae.sae.forward import Forward
from wsae.sae.jumprelu import jumprelu, step
from wsae.sae.model import SparseAutoencoder
from wsae.train.parallel.choose import Pairs, choose_batch_topk, choose_groups, choose_topk
from wsae.train.parallel.world import Axis, Place


class _Sum(Function):
    """Sum over ranks; each rank's part has the gradient of the sum."""

    @staticmethod
    def forward(ctx, part, axis):  # noqa: ARG004
        return axis.reduce_(part.clone())

    @staticmethod
    def backward(ctx, *grads):  # noqa: ARG004
        return grads[0], None


class _Shared(Function):
    """A tensor all ranks read; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, whole, axis):
        ctx.axis = axis
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx, *grads):
        return ctx.axis.reduce_(grads[0].clone()), None


def sum_over(part: Float[Tensor, "..."], axis: Axis) -> Float[Tensor, "..."]:
    """Return the sum of the ranks' parts, differentiable in each."""
    return part if axis.size == 1 else _Sum.apply(part, axis)


def shared_over(whole: Float[Tensor, "..."], axis: Axis) -> Float[Tensor, "..."]:
    """Return the same tensor; gradients that reach it on the ranks are summed."""
    return whole if axis.size == 1 else _Shared.apply(whole, axis)


class Piece(NamedTuple):
    """The latents of an SAE that lie on this rank, as an SAE of their own, and where they belong."""

    sae: SparseAutoencoder
    """Its k and groups are those of the whole SAE."""
    first: int
    """Number of its first latent in the whole SAE."""
    d_sae: int
    """Latents of the whole SAE."""
    place: Place


def shared_forward(
    piece: Piece, x: Float[Tensor, "rows d_in"], batch: int, bf16: bool = False
) -> Forward:
    """Run this rank's latents on this rank's rows of a batch of `batch` rows; see `wsae.sae.forward`.

    `x_hat` is whole; `code`, `pre`, `l1` and `l0` are this rank's part, l1 and l0 divided by the rows of the batch.
    """
    sae, place = piece.sae, piece.place
    if isinstance(sae.cfg.activation, ReLU | JumpReLU):
        return _dense_forward(sae, x, batch, place, bf16)
    with torch.no_grad():
        centred = sae.centre(x)
        pre = _product(sae, centred, bf16)
        rows, columns = _choose(piece, pre, batch)
        offsets = offsets_of(rows, len(x))
        plan = Plan.build(columns, offsets, len(sae.W_dec))
    values = encode_at(centred, sae.encoder_rows, _biases(sae, place.latents), plan, pre).relu()
    x_hat = _with_bias(sae, sum_over(decode(values, sae.W_dec, plan), place.latents))
    norms = sae.W_dec.norm(dim=1)[columns] if sae.cfg.tied else 1.0
    code = SparseCode(values.detach(), columns, offsets)
    active = torch.count_nonzero(code.values) / batch
    return Forward(x_hat, (values * norms).sum() / batch, active, code, pre, centred)


def _choose(piece: Piece, pre: Tensor, batch: int) -> Pairs:
    latents = piece.place.latents
    match piece.sae.cfg.activation:
        case TopK(k=k):
            return choose_topk(pre, k, latents)
        case GroupTopK(k=k):
            return choose_groups(pre, piece.first, piece.d_sae // k, k, latents)
        case BatchTopK(k=k):
            return choose_batch_topk(pre, batch * k, piece.place)
        case _:
            raise AssertionError(piece.sae.cfg.activation)


def _dense_forward(
    sae: SparseAutoencoder, x: Tensor, batch: int, place: Place, bf16: bool
) -> Forward:
    centred = x if sae.b_dec is None else x - shared_over(sae.b_dec, place.latents)
    pre = _product(sae, centred, bf16).to(x.dtype)
    if isinstance(sae.cfg.activation, JumpReLU):
        assert sae.log_threshold is not None
        threshold, width = sae.log_threshold.exp(), sae.cfg.activation.bandwidth
        z = jumprelu(pre, threshold, width)
        l0 = step(pre, threshold, width).sum() / batch
    else:
        z = pre.relu()
        l0 = torch.count_nonzero(z.detach()) / batch
    norms = sae.W_dec.norm(dim=1) if sae.cfg.tied else z.new_ones(len(sae.W_dec))
    x_hat = _with_bias(sae, sum_over(z @ sae.W_dec, place.latents))
    code = code_from_dense(z.detach())
    return Forward(x_hat, (z @ norms).sum() / batch, l0, code, pre.detach(), centred.detach())


def shared_revival(
    piece: Piece,
    residual: Float[Tensor, "rows d_in"],
    forward: Forward,
    dead: Bool[Tensor, " own"],
    wanted: tuple[int, int],
) -> Float[Tensor, ""]:
    """Return `wsae.losses.reconstruction.auxk_loss` over this rank's rows, the dead latents lying on several ranks.

    `wanted` is (k_aux, number of dead latents on all ranks). Where every dead latent is wanted nothing is gathered.
    """
    sae, latents, (k_aux, total) = piece.sae, piece.place.latents, wanted
    if total == 0:
        return residual.new_zeros(())
    with torch.no_grad():
        own = dead.nonzero()[:, 0]
        if total <= k_aux:
            rows = torch.arange(len(residual), device=own.device).repeat_interleave(len(own))
            columns = own.repeat(len(residual))
        else:
            rows, columns = choose_topk(forward.pre.index_select(1, own), k_aux, latents)
            columns = own[columns]
        plan = Plan.build(columns, offsets_of(rows, len(residual)), len(sae.W_dec))
    biases = _biases(sae, latents)
    values = encode_at(forward.centred, sae.encoder_rows, biases, plan, forward.pre).relu()
    e_hat = sum_over(decode(values, sae.W_dec, plan), latents)
    return weighted_reconstruction_loss(residual.detach(), e_hat, sae.gamma)


def _biases(sae: SparseAutoencoder, latents: Axis) -> tuple[Tensor, Tensor] | None:
    if sae.biases is None:
        return None
    b_enc, b_dec = sae.biases
    return b_enc, shared_over(b_dec, latents)


def _with_bias(sae: SparseAutoencoder, x_hat: Tensor) -> Tensor:
    return x_hat if sae.b_dec is None else x_hat + sae.b_dec


def _product(sae: SparseAutoencoder, centred: Tensor, bf16: bool) -> Tensor:
    if not bf16:
        return sae.pre(centred)
    low = centred.bfloat16() @ sae.W_enc.bfloat16()
    return low if sae.b_enc is None else low + sae.b_enc.bfloat16()

"""Encode and decode at chosen latents only, with gradients that touch only those.

Dense equivalents (the specification, used by the tests):
    encode_at: ((x - b_dec) @ W_enc + b_enc).gather(...)      decode: z @ W_dec
The weight gradients are products of a sparse [d_sae, batch] matrix with dense rows; one sort of the chosen latents
(`Plan`) serves both.
"""

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd import Function

with warnings.catch_warnings():  # PyTorch warns once per process that sparse CSR is in beta
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1), dtype=torch.float32)


class Plan(NamedTuple):
    """Chosen (row, latent) pairs in row order, and the same pairs sorted by latent."""

    indices: Int64[Tensor, " nnz"]
    offsets: Int64[Tensor, " batch_plus_1"]
    rows: Int64[Tensor, " nnz"]
    order: Int64[Tensor, " nnz"]
    latent_offsets: Tensor
    latent_rows: Tensor

    @staticmethod
    def build(
        indices: Int64[Tensor, " nnz"], offsets: Int64[Tensor, " batch_plus_1"], d_sae: int
    ) -> "Plan":
        """Sort the pairs by latent (stable, so sums are in row order and reproducible)."""
        rows = torch.repeat_interleave(offsets.diff(), output_size=len(indices))
        order = indices.int().argsort(stable=True)
        counts = torch.bincount(indices, minlength=d_sae)
        latent_offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        small = torch.int32 if len(indices) < 2**31 else torch.int64
        return Plan(indices, offsets, rows, order, latent_offsets.to(small), rows[order].to(small))

    def scatter(
        self, weights: Float[Tensor, " nnz"], x: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, "d_sae d_in"]:
        """Return G[j] = sum over pairs (b, j) of weight * x[b]."""
        size = (len(self.latent_offsets) - 1, len(x))
        matrix = torch.sparse_csr_tensor(
            self.latent_offsets, self.latent_rows, weights[self.order], size
        )
        return matrix @ x

    def per_latent(self, weights: Float[Tensor, " nnz"]) -> Float[Tensor, " d_sae"]:
        """Return the sum of weights per latent."""
        d_sae = len(self.latent_offsets) - 1
        return torch.bincount(self.indices, weights, minlength=d_sae).to(weights.dtype)


def encode_at(
    centred: Float[Tensor, "batch d_in"],
    W_enc_t: Float[Tensor, "d_sae d_in"],
    plan: Plan,
    b_enc: Float[Tensor, " d_sae"] | None = None,
    b_dec: Float[Tensor, " d_in"] | None = None,
    pre: Float[Tensor, "batch d_sae"] | None = None,
) -> Float[Tensor, " nnz"]:
    """Return the pre-activations at the plan's pairs, centred . W_enc[:, j] + b_enc[j], differentiably.

    `centred` is x - b_dec as a constant: the gradient to b_dec is added here as a vector product. A tied SAE has no
    biases, a transcoder no b_dec here. `pre` is used when it holds the values in full precision; otherwise (a
    lower-precision product was good enough to choose the latents) they are computed afresh.
    """
    if pre is not None and pre.dtype == W_enc_t.dtype:
        values = pre.detach()[plan.rows, plan.indices]
    else:
        values = _pair_products(centred, W_enc_t.detach(), plan)
        values = values if b_enc is None else values + b_enc.detach()[plan.indices]
    return _EncodeAt.apply(centred.detach(), W_enc_t, b_enc, b_dec, values, plan)


def decode(
    values: Float[Tensor, " nnz"], W_dec: Float[Tensor, "d_sae d_in"], plan: Plan
) -> Float[Tensor, "batch d_in"]:
    """Return sum over the row's pairs of value * W_dec[j], without b_dec."""
    return _Decode.apply(values, W_dec, plan)


def _pair_products(
    left: Float[Tensor, "batch d_in"], W: Float[Tensor, "d_sae d_in"], plan: Plan
) -> Float[Tensor, " nnz"]:
    """Return left[b] . W[j] for every pair (b, j) of the plan."""
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left, W, plan.indices, plan.offsets[:-1], plan.rows, 0
    )


class _EncodeAt(Function):
    @staticmethod
    def forward(ctx, centred, W_enc_t, b_enc, b_dec, values, plan):  # noqa: ARG004, PLR0913
        ctx.save_for_backward(centred, W_enc_t)
        ctx.plan, ctx.has_bias, ctx.centred = plan, b_enc is not None, b_dec is not None
        return values.clone()

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        centred, W_enc_t = ctx.saved_tensors
        grad_b_enc = grad_b_dec = None
        if ctx.has_bias:
            grad_b_enc = ctx.plan.per_latent(grad)
            grad_b_dec = -(grad_b_enc @ W_enc_t) if ctx.centred else None
        return None, ctx.plan.scatter(grad, centred), grad_b_enc, grad_b_dec, None, None


class _Decode(Function):
    @staticmethod
    def forward(ctx, values, W_dec, plan):
        ctx.save_for_backward(values, W_dec)
        ctx.plan = plan
        return F.embedding_bag(
            plan.indices, W_dec, plan.offsets[:-1], mode="sum", per_sample_weights=values
        )

    @staticmethod
    def backward(ctx, *grads):
        grad = grads[0].contiguous()
        values, W_dec = ctx.saved_tensors
        grad_values = _pair_products(grad, W_dec, ctx.plan)
        return grad_values, ctx.plan.scatter(values, grad), None

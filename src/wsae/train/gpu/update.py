"""The optimiser's step from the pairs of a batch: no gradient matrix, both matrices in one pass each."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from wsae.ops.sparse import Plan
from wsae.ops.triton.sums import scatter
from wsae.ops.triton.update import adam_rows_, update_rows_
from wsae.ops.update import AdamStep, SparseGrad
from wsae.train.gpu.host import next_step
from wsae.train.gpu.pairs import per_latent, twice
from wsae.train.native.state import moments
from wsae.train.state import MemberState

WIDTH = 1024
"""A vector is stepped as rows of at most this many entries, each by a program of its own."""


class Terms(NamedTuple):
    """The gradients of a step: dW_dec[j] = sum z G[b], dW_enc[j] = sum dpre centred[b mod batch] over j's pairs."""

    plan: Plan
    """The pairs (b, j) of all reconstructions, those of the first one first, sorted by latent too."""
    z: Float[Tensor, " pairs"]
    dpre: Float[Tensor, " pairs"]
    G: Float[Tensor, "rows d_in"]
    """One batch below another, a reconstruction each; the rows of `plan` count through them."""
    centred: Float[Tensor, "batch d_in"]
    first: int
    """Pairs of the first reconstruction."""


def update(
    member: MemberState, terms: Terms, slopes: Float[Tensor, " first"] | None, rate: float
) -> None:
    """Step every parameter at learning rate `rate`, decoder rows kept at unit norm where untied.

    `slopes` are the parts of the gradient in log theta, one per pair of the first reconstruction (None without).
    """
    sae = member.sae
    adam = AdamStep(rate, next_step(member))
    if sae.log_threshold is not None and slopes is not None:
        _step_vector(member, sae.log_threshold, _of_first(terms, slopes), adam)
    if sae.W_enc_t is None or sae.b_enc is None or sae.b_dec is None:
        _update_tied(member, terms, adam)
        return
    plan, batch = terms.plan, len(terms.centred)
    db_enc = per_latent(plan, terms.dpre)
    db_dec = terms.G[:batch].sum(0) - db_enc @ sae.W_enc_t
    decoder = SparseGrad(plan, terms.z, terms.G)
    encoder = SparseGrad(
        plan._replace(latent_rows=plan.latent_rows % batch), terms.dpre, terms.centred
    )
    update_rows_(sae.W_dec.detach(), decoder, *_moments(member, sae.W_dec), adam, unit=True)
    update_rows_(sae.W_enc_t.detach(), encoder, *_moments(member, sae.W_enc_t), adam, unit=False)
    _step_vector(member, sae.b_enc, db_enc, adam)
    _step_vector(member, sae.b_dec, db_dec, adam)


def _update_tied(member: MemberState, terms: Terms, adam: AdamStep) -> None:
    """Step the one matrix: both gradients are terms of one sum, and L1 pulls at the norms of the rows.

    The pull, l1 / batch * sum_b z W_j / |W_j|, is no such term: with it the gradient is made a matrix.
    """
    W, plan, batch = member.sae.W_dec.detach(), terms.plan, len(terms.centred)
    m, v = _moments(member, member.sae.W_dec)
    both = twice(plan, plan.latent_rows % batch + len(terms.G))
    weights, rows = torch.cat([terms.z, terms.dpre]), torch.cat([terms.G, terms.centred])
    if not member.cfg.l1:
        update_rows_(W, SparseGrad(both, weights, rows), m, v, adam, unit=False)
        return
    norms = torch.linalg.vector_norm(W, dim=1).clamp_min_(1e-12)
    pull = member.cfg.l1 / batch * _of_first(terms, terms.z[: terms.first]) / norms
    gradient = scatter(both, weights, rows).addcmul_(pull[:, None], W)
    adam_rows_(W, gradient, m, v, adam, unit=False)


def _of_first(terms: Terms, weights: Tensor) -> Tensor:
    """Sum weights of the first reconstruction's pairs per latent."""
    return per_latent(terms.plan, F.pad(weights, (0, len(terms.z) - len(weights))))


def _step_vector(member: MemberState, vector: nn.Parameter, grad: Tensor, adam: AdamStep) -> None:
    tensors = (vector.detach(), grad, *_moments(member, vector))
    W, grad, m, v = (tensor.view(-1, math.gcd(len(vector), WIDTH)) for tensor in tensors)
    adam_rows_(W, grad, m, v, adam, unit=False)


def _moments(member: MemberState, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
    state = moments(member, parameter)
    return state["exp_avg"], state["exp_avg_sq"]

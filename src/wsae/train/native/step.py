"""One step by hand-written gradients on the compiled kernels; `wsae.train.step` is its specification.

With G = dL/dx_hat = (2 / batch) Gamma^T Gamma (x_hat - x) and the pairs (b, j) of active latents:
    dz = W_dec[j] . G[b] + l1 |W_dec[j]| / batch      dpre = dz where z > 0
    dW_dec[j] = sum z G[b]     dW_enc[j] = sum dpre (x - b_dec)[b]     db_enc[j] = sum dpre
    db_dec = sum_b G[b] - sum_j db_enc[j] W_enc[j]
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from wsae.losses.reconstruction import weigh
from wsae.ops import SparseCode
from wsae.ops.codes import offsets_of
from wsae.ops.native.select import Centred, select_above, select_topk
from wsae.ops.native.slices import (
    Residual,
    Slices,
    decode,
    dots,
    from_slices,
    residual,
    sort_pairs,
    to_slices,
)
from wsae.ops.native.weights import Terms, Weights
from wsae.ops.update import AdamStep, adam_rows_
from wsae.sae.config import BatchTopK, GroupTopK, JumpReLU, ReLU, TopK
from wsae.sae.model import SparseAutoencoder
from wsae.train.config import TrainConfig
from wsae.train.native.state import enter, moments
from wsae.train.state import (
    Batch,
    MemberState,
    StepResult,
    add_sums,
    count,
    follow_latents,
    refresh_gamma,
)

# Which latents of a batch are active, for every activation function, from the compiled selection.

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


ROUNDING = 2.0**-23
"""A float32 product of two vectors errs by at most this share of their lengths per dimension."""


class Part(NamedTuple):
    """One reconstruction (of x, or of the residual by dead latents): its gradients and its loss."""

    terms: Terms
    code: SparseCode
    dz: Float[Tensor, " pairs"]
    """In the code's order."""
    left: Residual
    penalty: float | Float[Tensor, ""]
    """l1 * mean over the batch of sum_j z_j |W_dec[j]|, before the step."""


@torch.no_grad()
def native_step(
    member: MemberState, batch: Batch, rate: float, run: TrainConfig, step: int
) -> SparseCode:
    """One optimiser step at learning rate `rate`; metrics are summed into the member; returns the code."""
    weights, sae, x = enter(member), member.sae, batch.x.contiguous()
    b_dec = None if sae.b_dec is None else sae.b_dec.detach()
    centred = Centred((x if b_dec is None else x - b_dec, to_slices(x, b_dec)))
    codes = find_codes(sae, weights, centred)
    main = _main(member, weights, codes, x, b_dec)
    parts = [main]
    revival = _revival(member, weights, centred, x, main.left)
    if revival is not None:
        parts.append(revival)
    _update(member, weights, parts, centred[1], rate)
    _move_thresholds(member, codes, main.dz, rate)
    result = _result(member, main, revival)
    count(member, main.code, len(x))
    add_sums(member, batch, result)
    if follow_latents(member, main.code, step, run.latent_variance_decay):
        scale = None if sae.cfg.tied else weights.row_scale
        W_dec = from_slices(weights.decoder.W, weights.d_in, scale)
        refresh_gamma(member, W_dec, step, run.latent_variance_decay)
    return main.code


def _main(
    member: MemberState, weights: Weights, codes: Codes, x: Tensor, b_dec: Tensor | None
) -> Part:
    pre, (batch, d_in) = codes.pre, x.shape
    pairs = sort_pairs(pre, weights.d_sae)
    z, passes = codes.z[pairs.order], codes.passes[pairs.order]
    x_hat = decode(pairs, z, weights.decoder.W, _scale(weights), (batch, d_in), b_dec)
    left = _weighted_residual(x_hat, x, member.sae.gamma)
    along = dots(pairs, left.gradient, weights.decoder.W, _scale(weights), d_in)
    dz, penalty = along, 0.0
    if member.cfg.l1:
        norms = _norms(weights)
        price = member.cfg.l1 / batch * (1.0 if norms is None else norms[pre.indices[pairs.order]])
        dz, penalty = along + price, (z * price).sum()
    terms = Terms(pairs, z, dz * passes, along, left.gradient)
    unsorted = torch.empty_like(dz).index_copy_(0, pairs.order, dz)
    return Part(terms, SparseCode(codes.z, pre.indices, pre.offsets), unsorted, left, penalty)


def _weighted_residual(x_hat: Slices, x: Tensor, gamma: Tensor) -> Residual:
    if gamma.ndim == 1:
        return residual(x_hat, x, gamma)
    error = from_slices(x_hat, x.shape[1]) - x
    weighted = weigh(error, gamma)
    gradient = 2 / len(x) * (weighted @ gamma)
    errors = torch.stack([error.double().square().sum(1), weighted.double().square().sum(1)], dim=1)
    return Residual(to_slices(gradient), errors, gradient.sum(0), error)


def _revival(
    member: MemberState, weights: Weights, centred: Centred, x: Tensor, left: Residual
) -> Part | None:
    """Let dead latents model the residual (`wsae.losses.reconstruction.auxk_loss`)."""
    dead = member.dead.nonzero()[:, 0]
    if member.cfg.auxk == 0 or len(dead) == 0:
        return None
    code = _revived(member, weights, centred, dead)
    pairs = sort_pairs(code, weights.d_sae)
    z = code.values[pairs.order]
    e_hat = decode(pairs, z, weights.decoder.W, _scale(weights), (len(x), weights.d_in))
    target = _error(member, left, x)
    found = _weighted_residual(e_hat, target, member.sae.gamma)
    gradient = found.gradient.mul_(member.cfg.auxk)
    along = dots(pairs, gradient, weights.decoder.W, _scale(weights), weights.d_in)
    terms = Terms(pairs, z, along, along, gradient)
    return Part(terms, code, along, found._replace(gradient=gradient), 0.0)


def _revived(
    member: MemberState, weights: Weights, centred: Centred, dead: Int64[Tensor, " dead"]
) -> SparseCode:
    """Return the positive pre-activations among each row's largest ones of dead latents: the others change nothing.

    A dense product says which may be positive. Its last bits depend on the number of threads, those of the values here
    do not.
    """
    rows = from_slices(weights.encoder_rows.index_select(1, dead), weights.d_in)
    bias = None if member.sae.b_enc is None else member.sae.b_enc.detach()
    pre = centred[0] @ rows.T
    pre = pre if bias is None else pre.add_(bias[dead])
    k = min(member.cfg.revived(weights.d_in), len(dead))
    values, picked = pre.topk(k, dim=1, sorted=False)
    slack = ROUNDING * weights.d_in * centred[0].norm(dim=1, keepdim=True) * rows.norm(dim=1).max()
    row, place = (values > -slack).nonzero(as_tuple=True)
    latents, offsets = dead[picked[row, place]], offsets_of(row, len(pre))
    pairs = sort_pairs(SparseCode(values[row, place], latents, offsets), weights.d_sae)
    exact = dots(pairs, centred[1], weights.encoder_rows, None, weights.d_in)
    z = torch.empty_like(exact).index_copy_(0, pairs.order, exact)
    z = z if bias is None else z.add_(bias[latents])
    keep = z > 0
    return SparseCode(z[keep], latents[keep], offsets_of(row[keep], len(pre)))


def _error(member: MemberState, left: Residual, x: Tensor) -> Float[Tensor, "batch d_in"]:
    """Return x - x_hat, undoing G = (2 / batch) gamma^2 (x_hat - x); a matrix Gamma has kept it.

    Where gamma is 0 (or its square is, in float32) it returns 0: no loss looks there, so any finite value serves.
    """
    if left.error is not None:
        return -left.error
    square = member.sae.gamma.square()
    divisor = torch.where(square == 0, 1.0, -2 / len(x) * square)
    return from_slices(left.gradient, x.shape[1]).div_(divisor)


def _update(
    member: MemberState, weights: Weights, parts: list[Part], centred: Slices, rate: float
) -> None:
    sae = member.sae
    matrices = [p for p in (sae.W_dec, sae.W_enc_t) if p is not None]
    for parameter in matrices:
        member.optimizer.state[parameter]["step"] += 1
    number = int(member.optimizer.state[sae.W_dec]["step"])
    bias = None
    if sae.b_enc is not None:
        state = moments(member, sae.b_enc)
        state["step"] += 1
        bias = (sae.b_enc.detach(), state["exp_avg"], state["exp_avg_sq"])
    terms = [part.terms for part in parts]
    pull = _pull(member, weights, parts[0], len(parts[0].left.errors))
    through = weights.update(terms, centred, AdamStep(rate, number), bias, pull)
    if sae.b_dec is not None:
        _adam(member, sae.b_dec, parts[0].left.total - through, rate)


def _pull(
    member: MemberState, weights: Weights, main: Part, batch: int
) -> Float[Tensor, " d_sae"] | None:
    """Return the tied L1 penalty's pull on each row: l1 / batch * sum_b z / |W_j|."""
    norms = _norms(weights)
    if not member.cfg.l1 or norms is None:
        return None
    total = torch.bincount(main.code.indices, main.code.values, minlength=weights.d_sae)
    return (member.cfg.l1 / batch * total / norms.clamp_min(1e-12)).float()


def _adam(member: MemberState, parameter: nn.Parameter, grad: Tensor, rate: float) -> None:
    state = moments(member, parameter)
    state["step"] += 1
    tensors = (parameter.detach(), grad, state["exp_avg"], state["exp_avg_sq"])
    W, grad, m, v = (tensor.unsqueeze(0) for tensor in tensors)
    adam_rows_(W, grad, m, v, AdamStep(rate, int(state["step"])), unit=False)


def _move_thresholds(member: MemberState, codes: Codes, dz: Tensor, rate: float) -> None:
    """Step the thresholds of JumpReLU (`wsae.sae.forward`), through log theta."""
    sae, activation = member.sae, member.sae.cfg.activation
    if sae.log_threshold is None or not isinstance(activation, JumpReLU):
        return
    theta = sae.log_threshold.detach().exp()
    pre, latents = codes.pre.values, codes.pre.indices
    here = theta[latents]
    near = ((pre - here).abs() < activation.bandwidth / 2) / activation.bandwidth
    slope = -(dz * here + member.cfg.l0 / codes.pre.batch) * near
    grad = torch.bincount(latents, slope, minlength=len(theta)).float() * theta
    _adam(member, sae.log_threshold, grad, rate)


def _result(member: MemberState, main: Part, revival: Part | None) -> StepResult:
    cfg, batch = member.cfg, len(main.left.errors)
    sse, reconstruction = main.left.errors[:, 0].sum(), main.left.errors[:, 1].sum() / batch
    aux = reconstruction.new_zeros(())
    if revival is not None:
        aux = revival.left.errors[:, 1].sum() / batch
    loss = reconstruction + cfg.auxk * aux + main.penalty
    if cfg.l0:
        loss = loss + cfg.l0 * torch.count_nonzero(main.code.values) / batch
    return StepResult(main.code, loss, reconstruction, aux, sse)


def _scale(weights: Weights) -> Tensor | None:
    return None if weights.encoder is None else weights.row_scale


def _norms(weights: Weights) -> Tensor | None:
    """Return the norms of a tied SAE's rows; None stands for unit rows."""
    return weights.norm if weights.encoder is None else None

"""One step by hand-written gradients on the compiled kernels; `wsae.train.step` is its specification.

With G = dL/dx_hat = (2 / batch) Gamma^T Gamma (x_hat - x) and the pairs (b, j) of active latents:
    dz = W_dec[j] . G[b] + l1 |W_dec[j]| / batch      dpre = dz where z > 0
    dW_dec[j] = sum z G[b]     dW_enc[j] = sum dpre (x - b_dec)[b]     db_enc[j] = sum dpre
    db_dec = sum_b G[b] - sum_j db_enc[j] W_enc[j]
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from wsae.kernels import SparseCode, offsets_of
from wsae.kernels.native.select import (
    Centred,
    RoundedEncoder,
    dimension_scales,
    select_above,
    select_positive,
    select_topk,
)
from wsae.kernels.native.slices import (
    Residual,
    Slices,
    from_slices,
    residual,
    sort_pairs,
    to_slices,
)
from wsae.kernels.native.weights import Bias, Matrix, Terms, Weights, make_weights
from wsae.kernels.update import AdamStep, adam_rows_
from wsae.sae.config import BatchTopK, GroupTopK, JumpReLU, ReLU, TopK
from wsae.sae.forward import WHOLE
from wsae.sae.loss import weigh
from wsae.sae.model import SAE
from wsae.train.config import TrainConfig
from wsae.train.state import Batch, MemberState, StepResult, looked_at, record

# What the steps by hand-written gradients share, whatever sums over their pairs (row, active latent).


class ActivePairs(NamedTuple):
    """The pairs of a batch that carry values or gradients, in order of row."""

    pre: SparseCode
    """Pre-activations of the pairs."""
    z: Float[Tensor, " pairs"]
    passes: Float[Tensor, " pairs"]
    """dz / dpre: 1 where the latent is active, else 0."""

    @property
    def code(self) -> SparseCode:
        """The latents."""
        return SparseCode(self.z, self.pre.indices, self.pre.offsets)


class Losses(NamedTuple):
    """What a step's reconstruction came to."""

    reconstruction: Float[Tensor, ""]
    """Mean over the batch of ||Gamma e||^2."""
    sse: Float[Tensor, ""]
    """Sum over the batch of ||e||^2."""
    penalty: float | Float[Tensor, ""]
    """l1 * mean over the batch of sum_j z_j |W_dec[j]|, before the step."""
    error: Float[Tensor, "rows d_in"] | None = None
    """x_hat - x of the rows `looked_at`."""


def relu_pairs(pre: SparseCode) -> ActivePairs:
    """Apply ReLU to the pre-activations of chosen pairs."""
    return ActivePairs(pre, pre.values.relu(), (pre.values > 0).float())


def activate(sae: SAE, pre: SparseCode) -> ActivePairs:
    """Apply the SAE's activation function to the pre-activations of chosen pairs."""
    if sae.log_threshold is not None:
        on = (pre.values > sae.log_threshold.detach().exp()[pre.indices]).float()
        return ActivePairs(pre, pre.values * on, on)
    return relu_pairs(pre)


def threshold_slopes(
    member: MemberState, codes: ActivePairs, dz: Float[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    """Return each pair's part of the loss's gradient in the thresholds theta (`wsae.sae.forward`).

    -(dz theta + l0 / batch) rect((pre - theta) / width) / width, theta the latent's threshold. That in log theta is
    theta times as large.
    """
    sae, activation = member.sae, member.sae.cfg.activation
    assert sae.log_threshold is not None
    assert isinstance(activation, JumpReLU)
    pre = codes.pre
    here = sae.log_threshold.detach().exp()[pre.indices]
    near = ((pre.values - here).abs() < activation.bandwidth / 2) / activation.bandwidth
    return -(dz * here + member.cfg.l0 / pre.batch) * near


def step_result(
    member: MemberState, code: SparseCode, losses: Losses, revival: Float[Tensor, ""] | None
) -> StepResult:
    """Return the step's loss and its parts; `revival` is the mean of ||Gamma (e - e_hat)||^2, None without."""
    cfg, reconstruction = member.cfg, losses.reconstruction
    aux = reconstruction.new_zeros(()) if revival is None else revival
    loss = member.part.once(reconstruction + cfg.auxk * aux) + losses.penalty
    if cfg.l0:
        loss = loss + cfg.l0 * torch.count_nonzero(code.values) / code.batch
    return StepResult(code, loss, reconstruction, aux, losses.sse, losses.error)


# Where a member's large tensors are: in the SAE and its optimiser, or, while compiled kernels train it, in slices.


def enter(member: MemberState) -> Weights:
    """Move a member's matrices and their Adam moments into slices, if they are not there; returns them."""
    if member.weights is None:
        cfg = member.sae.cfg
        group = (
            cfg.d_sae // cfg.activation.k if isinstance(cfg.activation, GroupTopK) else cfg.d_sae
        )
        matrices = []
        for p in _matrices(member):
            state = moments(member, p)
            matrices.append(Matrix.of(p.detach(), state["exp_avg"], state["exp_avg_sq"]))
            _clear(member, p)
        encoder = matrices[1] if len(matrices) > 1 else None
        dim = dimension_scales(member.spread)
        member.weights = make_weights(matrices[0], encoder, cfg.d_in, group, dim)
    return member.weights


def leave(member: MemberState) -> None:
    """Move them back."""
    if member.weights is None:
        return
    weights, member.weights = member.weights, None
    _put(member, weights)


@contextlib.contextmanager
def as_usual(member: MemberState) -> Iterator[None]:
    """Show the SAE and its optimiser whole while inside, without disturbing compiled training."""
    weights = member.weights
    if weights is not None:
        _put(member, weights)
    try:
        yield
    finally:
        if weights is not None:
            for p in _matrices(member):
                _clear(member, p)


def moments(member: MemberState, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return a parameter's Adam state, made as torch.optim.Adam makes it where there is none."""
    state = member.optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        state["exp_avg"] = torch.zeros_like(parameter.detach())
        state["exp_avg_sq"] = torch.zeros_like(parameter.detach())
    return state


def _matrices(member: MemberState) -> list[nn.Parameter]:
    sae = member.sae
    return [sae.W_dec] if sae.W_enc_t is None else [sae.W_dec, sae.W_enc_t]


def _clear(member: MemberState, parameter: nn.Parameter) -> None:
    """Let go of the memory of a parameter and its moments; the count of steps stays."""
    parameter.data, parameter.grad = parameter.new_empty(0), None
    state = member.optimizer.state[parameter]
    state["exp_avg"] = state["exp_avg_sq"] = parameter.new_empty(0)


def _put(member: MemberState, weights: Weights) -> None:
    for parameter, matrix in zip(_matrices(member), weights.dense(), strict=True):
        parameter.data = matrix.W
        state = member.optimizer.state[parameter]
        state["exp_avg"], state["exp_avg_sq"] = matrix.m, matrix.v


SAMPLE = 256
"""Rows of the batch from which a first batch Top-k threshold is guessed."""


def find_codes(sae: SAE, weights: Weights, centred: Centred) -> ActivePairs:
    """Choose the active latents as `wsae.sae.forward` does and compute their values in float32."""
    rounded, W = weights.rounded, weights.encoder_rows
    bias = None if sae.b_enc is None else sae.b_enc.detach()
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
    return activate(sae, pre)


def _batch_topk(weights: Weights, bias: Tensor | None, centred: Centred, k: int) -> SparseCode:
    """Return the batch * k largest positive pre-activations: a threshold from the batch before narrows them first."""
    rounded, rows, W = weights.rounded, centred.rows, weights.encoder_rows
    wanted = min(len(rows) * k, len(rows) * weights.d_sae)
    cut, share = rounded.guess, 1.0
    while True:
        if not cut > 0:  # what a growing share of a sample exceeds
            share *= 1.5
            pre = rows[:: max(1, len(rows) // SAMPLE)] @ from_slices(W, weights.d_in).T
            pre = pre if bias is None else pre + bias
            rank = min(pre.numel(), int(share * k / weights.d_sae * pre.numel()) + 8)
            cut = float(pre.flatten().topk(rank).values[-1])
        code = select_above(rounded, W, bias, centred, max(cut, 0.0))
        if len(code.values) >= wanted or cut <= 0:
            break
        cut = 0.0 if share > 8 else -1.0
    if len(code.values) > wanted:
        keep = code.values.topk(wanted, sorted=False).indices.sort().values
        offsets = offsets_of(code.rows()[keep], code.batch)
        code = SparseCode(code.values[keep], code.indices[keep], offsets)
    smallest = float(code.values.min()) if len(code.values) else 0.0
    fall = min(1.0, smallest / rounded.trend) if rounded.trend > 0 else 1.0
    rounded.guess, rounded.trend = 0.95 * fall * smallest, smallest
    return code


class PairGradients(NamedTuple):
    """One reconstruction (of x, or of the residual by dead latents): its gradients and its loss."""

    terms: Terms
    dz: Float[Tensor, " pairs"]
    """Sorted by latent."""
    left: Residual
    penalty: float | Float[Tensor, ""] = 0.0
    """l1 * mean over the batch of sum_j z_j |W_dec[j]|, before the step."""
    shown: Float[Tensor, "rows d_in"] | None = None
    """x_hat - target of the first rows, where asked for."""

    @property
    def reconstruction(self) -> Float[Tensor, ""]:
        """Mean over the batch of ||Gamma e||^2."""
        return self.left.errors[:, 1].sum() / len(self.left.errors)


@torch.no_grad()
def native_step(
    member: MemberState, batch: Batch, rate: float, run: TrainConfig, step: int
) -> SparseCode:
    """One optimiser step at learning rate `rate`; metrics are summed into the member; returns the code."""
    weights, sae, cfg, x = enter(member), member.sae, member.cfg, batch.x.contiguous()
    b_dec = None if sae.b_dec is None else sae.b_dec.detach()
    centred = Centred(x if b_dec is None else x - b_dec, to_slices(x, b_dec))
    codes, part = find_codes(sae, weights, centred), member.part
    if part is not WHOLE:
        codes = activate(sae, part.among(sae, codes.pre))
    main = _reconstruct(member, weights, codes, x, start=b_dec, shown=looked_at(member, batch))
    if cfg.l1:
        order, z, norms = main.terms.pairs.order, main.terms.z, weights.norms
        price = cfg.l1 / len(x) * (1.0 if norms is None else norms[codes.pre.indices[order]])
        dz = main.dz + price
        terms = main.terms._replace(v=dz * codes.passes[order])
        main = main._replace(terms=terms, dz=dz, penalty=(z * price).sum())
    parts, aux = [main], None
    if cfg.auxk and part.any_dead(member.dead):
        chosen = relu_pairs(_revived(member, weights, centred))
        target = _error(member, main.left, x)
        parts.append(_reconstruct(member, weights, chosen, target, share=cfg.auxk))
        aux = parts[1].reconstruction
    _update(member, weights, parts, codes.code, centred.slices, rate)
    if sae.log_threshold is not None:
        dz = torch.empty_like(main.dz).index_copy_(0, main.terms.pairs.order, main.dz)
        slopes, theta = threshold_slopes(member, codes, dz), sae.log_threshold.detach().exp()
        total = torch.bincount(codes.pre.indices, slopes, minlength=len(theta))
        _adam(member, sae.log_threshold, total.float() * theta, rate)
    sse = main.left.errors[:, 0].sum()
    losses = Losses(main.reconstruction, sse, main.penalty, main.shown)
    record(member, batch, step_result(member, codes.code, losses, aux), step, run, weights.W_dec)
    return codes.code


def _reconstruct(
    member: MemberState,
    weights: Weights,
    codes: ActivePairs,
    target: Tensor,
    start: Tensor | None = None,
    share: float = 1.0,
    shown: int = 0,
) -> PairGradients:
    """Decode, starting from a vector if one is given, and take share * ||Gamma (x_hat - target)||^2 back to z."""
    pairs = sort_pairs(codes.pre, weights.d_sae)
    z, passes = codes.z[pairs.order], codes.passes[pairs.order]
    start = None if start is None else member.part.once(start)
    x_hat = member.part.over_latents(weights.decode(pairs, z, len(target), start))
    first = x_hat[:, :shown].contiguous()  # before the residual takes its place
    error = from_slices(first, target.shape[1]).sub_(target[:shown]) if shown else None
    left = _weighted_residual(x_hat, target, member.sae.gamma)
    if share != 1:
        left.gradient.mul_(share)
    along = weights.dots(pairs, left.gradient)
    terms = Terms(pairs, z, along * passes, along, left.gradient)
    return PairGradients(terms, along, left, shown=error)


def _weighted_residual(x_hat: Slices, x: Tensor, gamma: Tensor) -> Residual:
    if gamma.ndim == 1:
        return residual(x_hat, x, gamma)
    error = from_slices(x_hat, x.shape[1]) - x
    weighted = weigh(error, gamma)
    gradient = 2 / len(x) * (weighted @ gamma)
    errors = torch.stack([error.double().square().sum(1), weighted.double().square().sum(1)], dim=1)
    return Residual(to_slices(gradient), errors, gradient.sum(0), error)


def _revived(member: MemberState, weights: Weights, centred: Centred) -> SparseCode:
    """Return the positive pre-activations among each row's largest ones of dead latents: the others change nothing."""
    dead, W = member.dead.nonzero()[:, 0], weights.encoder_rows
    k = member.cfg.revived(weights.d_in)
    if not len(dead):  # other processes have some
        none = dead.new_zeros(len(centred.rows) + 1)
        return member.part.among_dead(SparseCode(member.mean.new_zeros(0), dead, none), k)
    rows = W.index_select(1, dead)
    bias = None if member.sae.b_enc is None else member.sae.b_enc.detach()[dead]
    rounded = RoundedEncoder(len(dead), weights.d_in, len(dead), weights.rounded.dim)
    rounded.measure(rows)
    rounded.pack(rows)
    found = select_positive(rounded, rows, bias, centred, min(k, len(dead)))
    return member.part.among_dead(found._replace(indices=dead[found.indices]), k)


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
    member: MemberState,
    weights: Weights,
    parts: list[PairGradients],
    code: SparseCode,
    centred: Slices,
    rate: float,
) -> None:
    sae, state, bias, pull = member.sae, member.optimizer.state, None, None
    for parameter in (sae.W_dec, sae.W_enc_t):
        if parameter is not None:
            state[parameter]["step"] += 1
    if sae.b_enc is not None:
        own = moments(member, sae.b_enc)
        own["step"] += 1
        bias = Bias(sae.b_enc.detach(), own["exp_avg"], own["exp_avg_sq"])
    if (
        member.cfg.l1 and weights.norms is not None
    ):  # tied: l1 / batch * sum_b z / |W_j| pulls at row j
        total = torch.bincount(code.indices, code.values, minlength=weights.d_sae)
        pull = (member.cfg.l1 / code.batch * total / weights.norms.clamp_min(1e-12)).float()
    adam = AdamStep(rate, int(state[sae.W_dec]["step"]))
    through = weights.update([part.terms for part in parts], centred, adam, bias, pull)
    through = member.part.over_latents(through)
    if sae.b_dec is not None:
        _adam(member, sae.b_dec, parts[0].left.total - through, rate)


def _adam(member: MemberState, parameter: nn.Parameter, grad: Tensor, rate: float) -> None:
    state = moments(member, parameter)
    state["step"] += 1
    tensors = (parameter.detach(), grad, state["exp_avg"], state["exp_avg_sq"])
    W, grad, m, v = (tensor.unsqueeze(0) for tensor in tensors)
    adam_rows_(W, grad, m, v, AdamStep(rate, int(state["step"])), unit=False)

"""One step by hand-written gradients on the Triton kernels; `wsae.train.step` is its specification.

With G = dL/dx_hat = (2 / batch) Gamma^T Gamma (x_hat - x) and the pairs (b, j) of active latents:
    dz = W_dec[j] . G[b]      dpre = dz dz/dpre, and what penalties add: by autograd at the pairs
    dW_dec[j] = sum z G[b]     dW_enc[j] = sum dpre (x - b_dec)[b]     db_enc[j] = sum dpre
    db_dec = sum_b G[b] - sum_j db_enc[j] W_enc[j]
The residual that dead latents model is a second reconstruction, whose pairs join the sums over a latent; kinds with
nested levels or a gate are not among those trained here.

The host waits for the device only where a docstring says so: `find_pairs` for batch Top-k, ReLU and JumpReLU,
`dead_latents` and `next_step` when what they read has changed, and the counters of a latent_variance gamma.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from wsae.kernels import Plan, SparseCode, code_from_topk, offsets_of
from wsae.kernels.triton.encode import above, group_topk_encode, select_batch_topk, topk_encode
from wsae.kernels.triton.sums import decode, pair_products, products, scatter
from wsae.kernels.triton.support import BUCKETS_PER_CHOICE, MAX_CANDIDATES
from wsae.kernels.triton.update import adam_rows_, update_rows_
from wsae.kernels.update import AdamStep, SparseGrad
from wsae.sae.architectures import Above, PerBatch, PerGroup, PerRow
from wsae.sae.loss import weigh
from wsae.sae.model import SAE
from wsae.sae.stack import keep_positive_, thresholds
from wsae.train.config import TrainConfig
from wsae.train.native import Losses, PairSlopes, PairValues, moments, step_result
from wsae.train.penalty import anneal, price_at, threshold_pace
from wsae.train.state import Batch, MemberState, looked_at, record

# What the host remembers of tensors on the device, so that a step need not wait for them.

_seen = WeakTensorKeyDictionary()
"""Tensor: how often it had been written to when it was read, and what was read."""


class Dead(NamedTuple):
    """The dead latents, filled up to a power of two: kernels are tuned per size, and the number changes often."""

    number: int
    latents: Int64[Tensor, " room"]
    floor: Float[Tensor, " room"]
    """0, and -inf for what only fills up: added to pre-activations it keeps those from being chosen."""


def dead_latents(mask: Bool[Tensor, " d_sae"]) -> Dead:
    """Return the dead latents; waits for the device only when the mask has changed since it was last asked."""

    def find(mask: Tensor) -> Dead:
        latents = mask.nonzero()[:, 0]
        number = len(latents)
        filling = (1 << max(4, (number - 1).bit_length())) - number
        floor = torch.zeros(number + filling, device=mask.device, dtype=torch.float32)
        floor[number:] = -torch.inf
        return Dead(number, torch.cat([latents, latents.new_zeros(filling)]), floor)

    return _remembered(mask, find)


def next_step(member: MemberState) -> int:
    """Count a step in the Adam states of all parameters, which count alike, and return its number (from 1).

    The counts are put beside the moments, where torch's fused Adam wants them. Waits for the device only when another
    optimiser or a checkpoint has written them since.
    """
    states = [moments(member, p) for p in member.optimizer.param_groups[0]["params"]]
    for state in states:
        state["step"] = state["step"].to(state["exp_avg"].device)
    counts = [state["step"] for state in states]
    number = _remembered(counts[0], int) + 1
    torch._foreach_add_(counts, 1)
    _remember(counts[0], number)
    return number


def _remembered(tensor: Tensor, read: Callable[[Tensor], Any]) -> Any:
    known = _seen.get(tensor)
    if known is not None and known[0] == tensor._version:
        return known[1]
    return _remember(tensor, read(tensor))


def _remember(tensor: Tensor, value: Any) -> Any:
    _seen[tensor] = (tensor._version, value)
    return value


# The pairs (row, latent) of a step, sorted by latent, without waiting for the device.
#
# `Plan.build` does the same where waiting costs nothing: bincount reads the largest index back.


def in_row_order(code: SparseCode) -> Plan:
    """Return a plan with its pairs in order of row alone: enough to decode and for products of pairs."""
    none = code.indices[:0]
    return Plan(code.indices, code.offsets, code.rows(), none, none, none)


def joined(plans: list[Plan]) -> Plan:
    """Return plans over the same batch as one, in order of row alone; the rows of the second follow the first's."""
    if len(plans) == 1:
        return plans[0]
    batch, pairs = 0, 0
    offsets, rows = [plans[0].offsets[:1]], []
    for plan in plans:
        offsets.append(plan.offsets[1:] + pairs)
        rows.append(plan.rows + batch)
        batch, pairs = batch + len(plan.offsets) - 1, pairs + len(plan.indices)
    indices = torch.cat([plan.indices for plan in plans])
    none = indices[:0]
    return Plan(indices, torch.cat(offsets), torch.cat(rows), none, none, none)


def sort_by_latent(plan: Plan, d_sae: int) -> Plan:
    """Return the plan with its pairs sorted by latent too (stable, so sums are in row order and reproducible)."""
    latents, order = plan.indices.int().sort(stable=True)
    bounds = torch.arange(d_sae + 1, dtype=torch.int32, device=latents.device)
    latent_offsets = torch.searchsorted(latents, bounds, out_int32=len(latents) < 2**31)
    return plan._replace(
        order=order, latent_offsets=latent_offsets, latent_rows=plan.rows[order].int()
    )


def twice(plan: Plan, rows: Int32[Tensor, " nnz"]) -> Plan:
    """Return the plan with each pair followed by a second one of the same latent, in row `rows[p]`.

    Of the weights the first half belongs to the plan's pairs, the second to the added ones. Sorted by latent only.
    """
    order = plan.order
    return plan._replace(
        indices=torch.cat([plan.indices, plan.indices]),
        order=torch.stack([order, order + len(order)], dim=1).flatten(),
        latent_offsets=2 * plan.latent_offsets,
        latent_rows=torch.stack([plan.latent_rows, rows], dim=1).flatten(),
    )


def per_latent(plan: Plan, weights: Float[Tensor, " nnz"]) -> Float[Tensor, " d_sae"]:
    """Return the sum of the weights of each latent's pairs, in order of row."""
    ordered, offsets = weights[plan.order], plan.latent_offsets
    return torch.segment_reduce(ordered, "sum", offsets=offsets, unsafe=True, initial=0)


WIDTH = 1024
"""A vector is stepped as rows of at most this many entries, each by a program of its own."""


class GradientTerms(NamedTuple):
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
    member: MemberState, terms: GradientTerms, slopes: PairSlopes, rate: float, pace: float = 1.0
) -> None:
    """Step every parameter at learning rate `rate`, decoder rows kept at unit norm where untied.

    No gradient is a matrix. `slopes` are those at the pairs of the first reconstruction; thresholds are moved `pace`
    times as far.
    """
    sae = member.sae
    adam, kept = AdamStep(rate, next_step(member)), thresholds(sae)
    for name, slope in slopes.own.items():
        own = adam._replace(lr=rate * pace) if name in kept else adam
        _step_vector(member, sae.get_parameter(name), _of_first(terms, slope), own)
    keep_positive_(sae)
    if sae.W_enc_t is None or sae.b_enc is None or sae.b_dec is None:
        _update_tied(member, terms, slopes, adam)
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


def _update_tied(
    member: MemberState, terms: GradientTerms, slopes: PairSlopes, adam: AdamStep
) -> None:
    """Step the one matrix: both gradients are terms of one sum, and penalties pull at the norms of the rows.

    The pull, that of L1 being l1 / batch * sum_b z W_j / |W_j|, is no such term: with it the gradient is made a matrix.
    """
    W, plan, batch = member.sae.W_dec.detach(), terms.plan, len(terms.centred)
    m, v = _moments(member, member.sae.W_dec)
    both = twice(plan, plan.latent_rows % batch + len(terms.G))
    weights, rows = torch.cat([terms.z, terms.dpre]), torch.cat([terms.G, terms.centred])
    if slopes.norms is None:
        update_rows_(W, SparseGrad(both, weights, rows), m, v, adam, unit=False)
        return
    norms = torch.linalg.vector_norm(W, dim=1).clamp_min_(1e-12)
    pull = _of_first(terms, slopes.norms) / norms
    gradient = scatter(both, weights, rows).addcmul_(pull[:, None], W)
    adam_rows_(W, gradient, m, v, adam, unit=False)


def _of_first(terms: GradientTerms, weights: Tensor) -> Tensor:
    """Sum weights of the first reconstruction's pairs per latent."""
    return per_latent(terms.plan, F.pad(weights, (0, len(terms.z) - len(weights))))


def _step_vector(member: MemberState, vector: nn.Parameter, grad: Tensor, adam: AdamStep) -> None:
    tensors = (vector.detach(), grad, *_moments(member, vector))
    W, grad, m, v = (tensor.view(-1, math.gcd(len(vector), WIDTH)) for tensor in tensors)
    adam_rows_(W, grad, m, v, adam, unit=False)


def _moments(member: MemberState, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
    state = moments(member, parameter)
    return state["exp_avg"], state["exp_avg_sq"]


# Which latents of a batch are active, by the Triton kernels.

ROWS = 256
"""Rows at once where the choice needs a whole product of the dead latents."""


def find_pairs(sae: SAE, centred: Float[Tensor, "batch d_in"], dtype: torch.dtype) -> SparseCode:
    """Choose the latents that may be active as `wsae.sae.forward` does; the values are those of float32 in any dtype.

    Top-k and group Top-k do not wait for the device; the kinds without a fixed number of pairs do, to learn it.
    """
    W, bias = sae.encoder_rows.detach(), None if sae.b_enc is None else sae.b_enc.detach()
    match sae.choice:
        case PerRow(k=k):
            return code_from_topk(*topk_encode(centred, W, bias, k, dtype))
        case PerGroup(k=k):
            winners = group_topk_encode(centred, W, bias, k, dtype)
            return _valued(centred, W, bias, code_from_topk(winners.float(), winners))
        case PerBatch(k=k):
            rows, latents = select_batch_topk(centred, W, bias, k, dtype)
        case Above(floor=floor):
            at = floor.detach() if isinstance(floor, Tensor) else centred.new_tensor(floor)
            rows, latents = above(centred, W, bias, at, dtype)
        case choice:
            raise AssertionError(choice)  # `wsae.train.step.unfit_triton` has refused it
    chosen = SparseCode(centred.new_empty(0), latents, offsets_of(rows, len(centred)))
    return _valued(centred, W, bias, chosen)


def revive(
    sae: SAE,
    centred: Float[Tensor, "batch d_in"],
    dead: Dead,
    k: int,
    dtype: torch.dtype,
) -> SparseCode:
    """Return ReLU of the k largest of each row among dead latents; fused as Top-k is, unless k is too large."""
    W = sae.encoder_rows.detach().index_select(0, dead.latents)
    bias = dead.floor if sae.b_enc is None else dead.floor + sae.b_enc.detach()[dead.latents]
    if min(2 * BUCKETS_PER_CHOICE * k, len(W)) <= MAX_CANDIDATES:
        values, picked = topk_encode(centred, W, bias, k, dtype)
        return code_from_topk(values.relu(), dead.latents[picked])
    low = W.to(dtype).T
    parts = [(rows.to(dtype) @ low + bias).topk(k, sorted=False)[1] for rows in centred.split(ROWS)]
    picked = torch.cat(parts)
    code = _valued(centred, W, bias, code_from_topk(picked.float(), picked))
    return code_from_topk(code.values.view(-1, k).relu(), dead.latents[picked])


def _valued(centred: Tensor, W: Tensor, bias: Tensor | None, chosen: SparseCode) -> SparseCode:
    """Return the pre-activations of chosen pairs."""
    values = products(centred, W, chosen.rows(), chosen.indices)
    return chosen._replace(values=values if bias is None else values + bias[chosen.indices])


class Reconstruction(NamedTuple):
    """One reconstruction (of x, or of the residual by dead latents): its gradients and its losses."""

    plan: Plan
    """In order of row only."""
    z: Float[Tensor, " pairs"]
    dz: Float[Tensor, " pairs"]
    G: Float[Tensor, "batch d_in"]
    error: Float[Tensor, "batch d_in"]
    """x_hat - x."""
    losses: Losses


@torch.no_grad()
def triton_step(
    member: MemberState, batch: Batch, rate: float, run: TrainConfig, step: int
) -> SparseCode:
    """One optimiser step at learning rate `rate`; metrics are summed into the member; returns the code."""
    sae, cfg, x = member.sae, member.cfg, batch.x.contiguous()
    centred = sae.centre(x)
    dtype = torch.bfloat16 if run.dtype == "bfloat16" else torch.float32
    norms = torch.linalg.vector_norm(sae.W_dec, dim=1) if sae.cfg.tied else None
    price = price_at(member, run, step)
    values = PairValues(sae, find_pairs(sae, centred, dtype), price, norms)
    main = _reconstruct(member, values.code, x, sae.b_dec)
    slopes = values.back(main.dz)
    parts, dpre = [main], [slopes.pre]
    dead = dead_latents(member.dead)
    if cfg.auxk and dead.number:
        k = min(cfg.revived(x.shape[1]), dead.number)
        revival = _reconstruct(member, revive(sae, centred, dead, k, dtype), -main.error, None)
        parts.append(revival._replace(G=cfg.auxk * revival.G))
        dpre.append(cfg.auxk * revival.dz * (revival.z > 0))
    plan = sort_by_latent(joined([part.plan for part in parts]), sae.cfg.d_sae)
    z, G = (torch.cat(each) for each in zip(*((p.z, p.G) for p in parts), strict=True))
    terms = GradientTerms(plan, z, torch.cat(dpre), G, centred, len(main.z))
    update(member, terms, slopes, rate, threshold_pace(cfg, sae.cfg.d_in, run.steps))
    code = SparseCode(main.z, main.plan.indices, main.plan.offsets)
    aux = parts[1].losses.reconstruction if len(parts) > 1 else None
    shown = looked_at(member, batch)
    losses = main.losses._replace(more=slopes.penalty, error=main.error[:shown] if shown else None)
    record(member, batch, step_result(member, code, losses, aux), step, run)
    if values.entries is not None:
        anneal(member, values.entries, run, step)
    return code


def _reconstruct(
    member: MemberState, code: SparseCode, target: Tensor, start: Tensor | None
) -> Reconstruction:
    """Decode, starting from a vector if one is given, and take the loss ||Gamma (x_hat - target)||^2 back to z."""
    sae, plan, batch = member.sae, in_row_order(code), len(target)
    W = sae.W_dec.detach()
    x_hat = decode(code.values, W, plan)
    x_hat = x_hat if start is None else x_hat.add_(start)
    error = x_hat.sub_(target)
    weighted = weigh(error, sae.gamma)
    # Gamma^T Gamma e: the transpose shows only where Gamma is a matrix
    G = weigh(weighted, sae.gamma if sae.gamma.ndim == 1 else sae.gamma.T).mul_(2 / batch)
    losses = Losses(weighted.square().sum() / batch, error.square().sum())
    return Reconstruction(plan, code.values, pair_products(G, W, plan), G, error, losses)

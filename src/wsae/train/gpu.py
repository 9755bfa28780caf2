"""One step by hand-written gradients on the Triton kernels; `wsae.train.step` is its specification.

With G = dL/dx_hat = (2 / batch) Gamma^T Gamma (x_hat - x) and the pairs (b, j) of active latents:
    dz = W_dec[j] . G[b]      dpre = dz dz/dpre, and what penalties add: by autograd at the pairs
    dW_dec[j] = sum z G[b]     dW_enc[j] = sum dpre (x - b_dec)[b]     db_enc[j] = sum dpre
    db_dec = sum_b G[b] - sum_j db_enc[j] W_enc[j], of a transcoder the first sum      dW_skip = sum_b G[b] x[b]^T
Nested levels have a G each, one batch below another: a pair of level l has the sum of those of the levels from l on.
The residual that dead latents model is a reconstruction of its own, whose pairs join the sums over a latent; that of a
gate's code, whose decoder is fixed, is only taken back to the gate.

The host waits for the device only where a docstring says so: `find_pairs` for batch Top-k, ReLU and JumpReLU,
`dead_latents` and `next_step` when what they read has changed, and the counters of a latent_variance gamma.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int32, Int64
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from wsae.kernels.eager import AdamStep, Plan, SparseCode, SparseGrad, code_from_topk, offsets_of
from wsae.kernels.triton.encode import above, group_topk_encode, select_batch_topk, topk_encode
from wsae.kernels.triton.sums import decode, products, scatter
from wsae.kernels.triton.support import BUCKETS_PER_CHOICE, MAX_CANDIDATES
from wsae.kernels.triton.update import adam_rows_, update_rows_
from wsae.sae.architectures import Above, Nested, PerBatch, PerGroup, PerRow
from wsae.sae.forward import dead_by_level, keep_positive_, level_of, thresholds, up_to, weigh
from wsae.sae.model import SAE
from wsae.train.config import TrainConfig
from wsae.train.native import (
    Losses,
    PairSlopes,
    PairValues,
    left_by_skip,
    step_result,
)
from wsae.train.state import (
    Batch,
    MemberState,
    anneal,
    gradient_scale,
    looked_at,
    note_gradient,
    price_at,
    record,
    threshold_pace,
)

# What the host remembers of tensors on the device, so that a step need not wait for them.

_seen = WeakTensorKeyDictionary()
"""Tensor: how often it had been written to when it was read, and what was read."""


class Dead(NamedTuple):
    """The dead latents, filled up to a power of two: kernels are tuned per size, and the number changes often."""

    number: int
    latents: Int64[Tensor, " room"]
    floor: Float[Tensor, " room"]
    """0, and -inf for what only fills up: added to pre-activations it keeps those from being chosen."""


def dead_latents(mask: Bool[Tensor, " d_sae"], nested: Nested | None = None) -> list[Dead]:
    """Return the dead latents, of a `nested` code those of each level.

    Waits for the device only when the mask has changed since it was last asked.
    """

    def find(mask: Tensor) -> Dead:
        latents = mask.nonzero()[:, 0]
        number = len(latents)
        filling = (1 << max(4, (number - 1).bit_length())) - number
        floor = torch.zeros(number + filling, device=mask.device, dtype=torch.float32)
        floor[number:] = -torch.inf
        return Dead(number, torch.cat([latents, latents.new_zeros(filling)]), floor)

    masks = [mask] if nested is None else dead_by_level(nested, mask)
    return _remembered(mask, lambda _: [find(each) for each in masks])


def next_step(member: MemberState) -> int:
    """Count a step in the Adam states of all parameters, which count alike, and return its number (from 1).

    The counts are put beside the moments, where torch's fused Adam wants them. Waits for the device only when another
    optimiser or a checkpoint has written them since.
    """
    states = [member.optimizer.moments(p) for p in member.optimizer.parameters]
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


# The pairs (row, latent) of a step, without waiting for the device: `Plan.build` does (bincount asks for the largest).


def in_row_order(code: SparseCode) -> Plan:
    """Return a plan of which the order by row is known alone: enough to decode."""
    none = code.indices[:0]
    return Plan(code.indices, code.offsets, none, none, none, none)


def sorted_by_latent(
    indices: Int64[Tensor, " nnz"], rows: Int64[Tensor, " nnz"], d_sae: int
) -> Plan:
    """Return a plan of which the order by latent is known alone; of one latent the pairs stay in theirs."""
    latents, order = indices.int().sort(stable=True)
    bounds = torch.arange(d_sae + 1, dtype=torch.int32, device=latents.device)
    latent_offsets = torch.searchsorted(latents, bounds, out_int32=len(latents) < 2**31)
    return Plan(indices, indices[:0], rows, order, latent_offsets, rows[order].int())


def twice(plan: Plan, rows: Int32[Tensor, " nnz"]) -> Plan:
    """Return the plan with each pair followed by a second one of the same latent, in row `rows[p]`.

    Of the weights the first half belongs to the plan's pairs, the second to the added ones.
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
    """The pairs (b, j) of all reconstructions, those of the first one first, sorted by latent."""
    z: Float[Tensor, " pairs"]
    dpre: Float[Tensor, " pairs"]
    G: Float[Tensor, "rows d_out"]
    """One batch below another, a level of a reconstruction each; the rows of `plan` count through them."""
    centred: Float[Tensor, "batch d_in"]
    first: int
    """Pairs of the first reconstruction."""


def update(
    member: MemberState,
    terms: GradientTerms,
    slopes: PairSlopes,
    rate: float,
    run: TrainConfig,
    step: int,
) -> None:
    """Step every parameter at learning rate `rate`, thresholds at their own pace; untied, decoder rows keep unit norm.

    No gradient is a matrix. `slopes` are those at the pairs of the first reconstruction.
    """
    sae, pace = member.sae, threshold_pace(member.cfg, member.sae.cfg.d_in, run.steps)
    adam = AdamStep(rate, next_step(member), scale=gradient_scale(member, run))
    kept, squares, of_all = thresholds(sae), [], []
    own = {name: _of_first(terms, slope) for name, slope in slopes.own.items()}
    for_bias = own.pop("b_enc", None)
    for name, grad in own.items():
        rates = adam._replace(lr=rate * pace) if name in kept else adam
        squares.append(_step_vector(member, sae.get_parameter(name), grad, rates))
    keep_positive_(sae)
    if sae.W_enc_t is None or sae.b_enc is None or sae.b_dec is None:
        squares.append(_update_tied(member, terms, slopes, adam))
        note_gradient(member, run, step, _sum(member, squares), _sum(member, of_all))
        return
    plan, batch = terms.plan, len(terms.centred)
    db_enc, db_dec = per_latent(plan, terms.dpre), terms.G[:batch].sum(0)
    if sae.b_in is not None:
        db_dec -= db_enc @ sae.W_enc_t
    decoder = SparseGrad(plan, terms.z, terms.G)
    encoder = SparseGrad(
        plan._replace(latent_rows=plan.latent_rows % batch), terms.dpre, terms.centred
    )
    bias = db_enc if for_bias is None else db_enc + for_bias
    squares += [
        update_rows_(sae.W_dec.detach(), decoder, *_moments(member, sae.W_dec), adam, unit=True),
        update_rows_(
            sae.W_enc_t.detach(), encoder, *_moments(member, sae.W_enc_t), adam, unit=False
        ),
        _step_vector(member, sae.b_enc, bias, adam),
    ]
    of_all.append(_step_vector(member, sae.b_dec, db_dec, adam))
    if sae.W_skip is not None:
        skip, moments = terms.G[:batch].T @ terms.centred, _moments(member, sae.W_skip)
        of_all.append(adam_rows_(sae.W_skip.detach(), skip, *moments, adam, unit=False))
    note_gradient(member, run, step, _sum(member, squares), _sum(member, of_all))


def _sum(member: MemberState, squares: list[Tensor | None]) -> Float64[Tensor, ""]:
    """Return the sum of what is known."""
    total = member.mean.new_zeros((), dtype=torch.float64)
    for square in squares:
        total = total if square is None else total + square
    return total


def _update_tied(
    member: MemberState, terms: GradientTerms, slopes: PairSlopes, adam: AdamStep
) -> Tensor | None:
    """Step the one matrix: both gradients are terms of one sum, and penalties pull at the norms of the rows.

    The pull, that of L1 being l1 / batch * sum_b z W_j / |W_j|, is no such term: with it the gradient is made a matrix.
    """
    W, plan, batch = member.sae.W_dec.detach(), terms.plan, len(terms.centred)
    m, v = _moments(member, member.sae.W_dec)
    both = twice(plan, plan.latent_rows % batch + len(terms.G))
    weights, rows = torch.cat([terms.z, terms.dpre]), torch.cat([terms.G, terms.centred])
    if slopes.norms is None:
        return update_rows_(W, SparseGrad(both, weights, rows), m, v, adam, unit=False)
    norms = torch.linalg.vector_norm(W, dim=1).clamp_min_(1e-12)
    pull = _of_first(terms, slopes.norms) / norms
    gradient = scatter(both, weights, rows).addcmul_(pull[:, None], W)
    return adam_rows_(W, gradient, m, v, adam, unit=False)


def _of_first(terms: GradientTerms, weights: Tensor) -> Tensor:
    """Sum weights of the first reconstruction's pairs per latent."""
    return per_latent(terms.plan, F.pad(weights, (0, len(terms.z) - len(weights))))


def _step_vector(
    member: MemberState, vector: nn.Parameter, grad: Tensor, adam: AdamStep
) -> Tensor | None:
    tensors = (vector.detach(), grad, *_moments(member, vector))
    W, grad, m, v = (tensor.view(-1, math.gcd(len(vector), WIDTH)) for tensor in tensors)
    return adam_rows_(W, grad, m, v, adam, unit=False)


def _moments(member: MemberState, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
    state = member.optimizer.moments(parameter)
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


ONE = Nested(None, (1.0,), 0)
"""The levels of a code without any."""


class Reconstruction(NamedTuple):
    """One reconstruction (of x, or of the residual by dead latents), level upon level: its gradients and its losses."""

    indices: Int64[Tensor, " pairs"]
    rows: Int64[Tensor, " pairs"]
    """Of G, to which each pair belongs."""
    z: Float[Tensor, " pairs"]
    dz: Float[Tensor, " pairs"]
    G: Float[Tensor, "rows d_out"]
    """dL/dx_hat, one batch below another, of what a level's pairs add: to its own x_hat and to those of the next."""
    errors: Float[Tensor, "levels batch d_out"]
    """x_hat - target of each level."""
    losses: Float[Tensor, " levels"]
    """Mean over the batch of ||Gamma e||^2."""


@torch.no_grad()
def triton_step(
    member: MemberState, batch: Batch, rate: float, run: TrainConfig, step: int
) -> SparseCode:
    """One optimiser step at learning rate `rate`; metrics are summed into the member; returns the code."""
    sae, cfg = member.sae, member.cfg
    centred, target = sae.centre(batch.x.contiguous()), left_by_skip(sae, batch)
    dtype = torch.bfloat16 if run.dtype == "bfloat16" else torch.float32
    norms = torch.linalg.vector_norm(sae.W_dec, dim=1) if sae.cfg.tied else None
    nested, price = member.part.nested(sae) or ONE, price_at(member, run, step)
    values = PairValues(sae, find_pairs(sae, centred, dtype), price, norms)
    level = None if nested is ONE else level_of(nested, values.pre)
    main = _reconstruct(sae, values.code, target, sae.b_dec, nested, level)
    gated = None
    if values.gate is not None:
        by_gate = values.pre._replace(values=values.gate.detach())
        gated = _reconstruct(sae, by_gate, target, sae.b_dec)
    slopes = values.back(main.dz, None if gated is None else gated.dz)
    parts, dpre, aux = [main], [slopes.pre], None
    for revival in _revivals(member, centred, main, nested, dtype):
        parts.append(revival._replace(G=cfg.auxk * revival.G))
        dpre.append(cfg.auxk * revival.dz * (revival.z > 0))
        aux = revival.losses[0] if aux is None else aux + revival.losses[0]
    terms = _joined(parts, dpre, centred, sae.cfg.d_sae)
    update(member, terms, slopes, rate, run, step)
    losses = _losses(main, nested, looked_at(member, batch))
    more = losses.more + slopes.penalty + (0.0 if gated is None else gated.losses[0])
    code = values.code if level is None else up_to(values.code, level, nested.main)
    record(member, batch, step_result(member, code, losses._replace(more=more), aux), step, run)
    if values.entries is not None:
        anneal(member, values.entries, run, step)
    return code


def _reconstruct(  # noqa: PLR0913
    sae: SAE,
    code: SparseCode,
    target: Float[Tensor, "batch d_out"],
    start: Tensor | None = None,
    nested: Nested = ONE,
    level: Int64[Tensor, " pairs"] | None = None,
) -> Reconstruction:
    """Decode, from a vector on if one is given, and take sum_l weight_l ||Gamma (x_hat_l - target)||^2 back to z."""
    W, rows, ordered, levels = sae.W_dec.detach(), code.rows(), code, len(nested.weights)
    if level is not None:
        rows = level * code.batch + rows
        ordered = _level_by_level(code, rows, levels)
    decoded = decode(ordered.values, W, in_row_order(ordered))
    errors = decoded.view(levels, *target.shape)
    errors[0].sub_(target if start is None else target - start)
    for number in range(1, levels):
        errors[number].add_(errors[number - 1])
    weighted = weigh(errors, sae.gamma)
    losses = weighted.square().sum((1, 2)) / len(target)
    # Gamma^T Gamma e: the transpose shows only where Gamma is a matrix
    G = weigh(weighted, sae.gamma if sae.gamma.ndim == 1 else sae.gamma.T)
    for number in reversed(range(levels)):
        G[number].mul_(2 / len(target) * nested.weights[number])
        if number + 1 < levels:
            G[number].add_(G[number + 1])
    G = G.view(-1, W.shape[1])
    dz = products(G, W, rows, code.indices)
    return Reconstruction(code.indices, rows, code.values, dz, G, errors, losses)


def _level_by_level(code: SparseCode, rows: Int64[Tensor, " pairs"], levels: int) -> SparseCode:
    """Return the pairs of a code in order of `rows`, which count through the batches of all levels."""
    ordered, order = rows.sort(stable=True)
    bounds = torch.arange(levels * code.batch + 1, device=rows.device)
    offsets = torch.searchsorted(ordered, bounds)
    return SparseCode(code.values[order], code.indices[order], offsets)


def _revivals(
    member: MemberState,
    centred: Tensor,
    main: Reconstruction,
    nested: Nested,
    dtype: torch.dtype,
) -> list[Reconstruction]:
    """Return what dead latents make of what is left: by all latents, or by the levels up to their own."""
    if not member.cfg.auxk:
        return []
    left, found = main.errors if nested.level_auxk else main.errors[nested.main, None], []
    groups = dead_latents(member.dead, nested if nested.level_auxk else None)
    for dead, errors in zip(groups, left, strict=True):
        if dead.number:
            k = min(member.cfg.revived(errors.shape[1]), dead.number)
            code = revive(member.sae, centred, dead, k, dtype)
            found.append(_reconstruct(member.sae, code, -errors))
    return found


def _joined(
    parts: list[Reconstruction], dpre: list[Tensor], centred: Tensor, d_sae: int
) -> GradientTerms:
    """Return the gradients of all reconstructions."""
    rows, before = [], 0
    for part in parts:
        rows.append(part.rows + before)
        before += len(part.G)
    plan = sorted_by_latent(torch.cat([p.indices for p in parts]), torch.cat(rows), d_sae)
    z, G = (torch.cat(each) for each in zip(*((p.z, p.G) for p in parts), strict=True))
    return GradientTerms(plan, z, torch.cat(dpre), G, centred, len(parts[0].z))


def _losses(main: Reconstruction, nested: Nested, shown: int) -> Losses:
    """Return what the reconstruction came to, with the errors of its first rows."""
    own, error = nested.main, main.errors[nested.main]
    assert nested.weights[own] == 1  # what is called the reconstruction is its share of the loss
    others = [w * main.losses[level] for level, w in enumerate(nested.weights) if level != own]
    return Losses(
        main.losses[own], error.square().sum(), sum(others), error[:shown] if shown else None
    )

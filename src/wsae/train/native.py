"""One step by hand-written gradients on the compiled kernels; `wsae.train.step` is its specification.

With G = dL/dx_hat = (2 / batch) Gamma^T Gamma (x_hat - x) and the pairs (b, j) of active latents:
    dz = W_dec[j] . G[b]      dpre = dz dz/dpre, and what penalties add: by autograd at the pairs
    dW_dec[j] = sum z G[b]     dW_enc[j] = sum dpre (x - b_dec)[b]     db_enc[j] = sum dpre
    db_dec = sum_b G[b] - sum_j db_enc[j] W_enc[j]
Nested levels have a G each: a pair of level l has the sum of those of the levels from l on.
A transcoder's inputs are x, not x - b_dec, so the last sum is not there; dW_skip = sum_b G[b] x[b]^T.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from wsae.kernels.eager import AdamStep, SparseCode, adam_rows_, offsets_of
from wsae.kernels.native.select import (
    RoundedEncoder,
    dimension_scales,
    rank_levels,
    select_above,
    select_positive,
    select_topk,
    select_topk_shared,
)
from wsae.kernels.native.slices import (
    Centred,
    Level,
    Residual,
    Slices,
    SortedPairs,
    from_slices,
    residual,
    sort_pairs,
    to_slices,
)
from wsae.kernels.native.weights import Bias, Matrix, Terms, Weights, make_weights
from wsae.sae.architectures import Above, Nested, PerBatch, PerGroup, PerRow, relu
from wsae.sae.forward import (
    WHOLE,
    Coded,
    Price,
    Whole,
    dead_by_level,
    keep_positive_,
    level_of,
    penalty,
    thresholds,
    up_to,
    weigh,
)
from wsae.sae.model import SAE, at_latents
from wsae.train.config import TrainConfig
from wsae.train.state import (
    Batch,
    MemberState,
    StepResult,
    anneal,
    gradient_scale,
    looked_at,
    note_gradient,
    price_at,
    record,
    threshold_pace,
)

# What the steps by hand-written gradients share, whatever sums over their pairs (row, active latent).


class Losses(NamedTuple):
    """What a step's reconstruction came to."""

    reconstruction: Float[Tensor, ""]
    """Mean over the batch of ||Gamma e||^2."""
    sse: Float[Tensor, ""]
    """Sum over the batch of ||e||^2."""
    more: float | Float[Tensor, ""] = 0.0
    """Penalties, and the losses of nested levels and gates, before the step."""
    error: Float[Tensor, "rows d_out"] | None = None
    """x_hat - x of the rows `looked_at`."""


class PairSlopes(NamedTuple):
    """The gradients at a step's pairs, in order of row."""

    pre: Float[Tensor, " pairs"]
    own: dict[str, Float[Tensor, " pairs"]]
    """Each pair's part of those in its kind's parameters, and in b_enc where its values look at it themselves."""
    norms: Float[Tensor, " pairs"] | None
    """Each pair's part of those in the lengths of the decoder's rows (tied)."""
    penalty: float | Float[Tensor, ""]


class PairValues:
    """The values of chosen pairs, and the way back from their gradients to what they were made of."""

    def __init__(
        self, sae: SAE, pre: SparseCode, price: Price, norms: Float[Tensor, " d_sae"] | None = None
    ) -> None:
        """`norms` are the lengths of the decoder's rows where they are not 1."""
        self.pre, self._sae, self._price = pre, sae, price
        self.entries: Coded | None = None
        """None where dz/dpre is 1 where z > 0 and no penalty but L1 is there: no graph is needed then."""
        self.gate: Float[Tensor, " pairs"] | None = None
        if sae.arch.values is relu and sae.arch.gate is None and price.only_l1(sae.arch):
            self.z = pre.values.relu()
            self._norms = None if norms is None else norms[pre.indices]
            return
        with torch.enable_grad():
            self._pre = pre.values.detach().requires_grad_()
            own = at_latents({n: t.detach() for n, t in sae.own.items()}, pre.indices)
            self._own = {n: t.requires_grad_() for n, t in own.items() if t.ndim}
            self._norms = None if norms is None else norms[pre.indices].requires_grad_()
            self.entries = Coded.of(
                sae.arch, sae.cfg.activation, self._pre, {**own, **self._own}, self._norms, pre
            )
            self.gate = None if sae.arch.gate is None else sae.arch.gate(self._pre)
        self.z = self.entries.z.detach()

    @property
    def code(self) -> SparseCode:
        """The latents."""
        return self.pre._replace(values=self.z)

    def back(
        self,
        dz: Float[Tensor, " pairs"],
        dgate: Float[Tensor, " pairs"] | None = None,
        part: Whole = WHOLE,
    ) -> PairSlopes:
        """Return the gradients of the loss, given those of its reconstructions in z (and in the gate's code)."""
        if self.entries is None:
            return self._simply(dz)
        with torch.enable_grad():
            price = penalty(self.entries, self._price, self.pre.batch, part)
            total = price + (self.entries.z * dz).sum()
            if dgate is not None and self.gate is not None:
                total = total + (self.gate * dgate).sum()
        wanted = [self._pre, *self._own.values()]
        wanted += [] if self._norms is None else [self._norms]
        found = torch.autograd.grad(total, wanted, materialize_grads=True)
        own = dict(zip(self._own, found[1:], strict=False))
        norms = None if self._norms is None else found[-1]
        return PairSlopes(found[0], own, norms, price.detach())

    def _simply(self, dz: Float[Tensor, " pairs"]) -> PairSlopes:
        """Do the same for ReLU, without the cost of a graph."""
        passes = (self.z > 0).float()
        if not self._price.l1:
            return PairSlopes(dz * passes, {}, None, 0.0)
        price = self._price.l1 / self.pre.batch
        norms = None if self._norms is None else price * self.z
        each = price if self._norms is None else price * self._norms
        return PairSlopes((dz + each) * passes, {}, norms, (self.z * each).sum())


def step_result(
    member: MemberState, code: SparseCode, losses: Losses, revival: Float[Tensor, ""] | None
) -> StepResult:
    """Return the step's loss and its parts; `revival` is the mean of ||Gamma (e - e_hat)||^2, None without."""
    reconstruction = losses.reconstruction
    aux = reconstruction.new_zeros(()) if revival is None else revival
    loss = member.part.once(reconstruction + member.cfg.auxk * aux) + losses.more
    return StepResult(code, loss, reconstruction, aux, losses.sse, losses.error)


# Where a member's large tensors are: in the SAE and its optimiser, or, while compiled kernels train it, in slices.


def enter(member: MemberState) -> Weights:
    """Move a member's matrices and their Adam moments into slices, if they are not there; returns them."""
    if member.weights is None:
        cfg, choice = member.sae.cfg, member.sae.choice
        whole = member.part.d_sae or cfg.d_sae
        group = whole // choice.k if isinstance(choice, PerGroup) else cfg.d_sae
        matrices = []
        for p in _matrices(member):
            state = member.optimizer.moments(p)
            matrices.append(Matrix.of(p.detach(), state["exp_avg"], state["exp_avg_sq"]))
            _clear(member, p)
        encoder = matrices[1] if len(matrices) > 1 else None
        dim = dimension_scales(member.spread)
        member.weights = make_weights(matrices[0], encoder, cfg.d_in, group, dim, cfg.d_out)
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


def find_pairs(sae: SAE, weights: Weights, centred: Centred, part: Whole = WHOLE) -> SparseCode:
    """Choose the latents that may be active as `wsae.sae.forward` does; their pre-activations in float32."""
    rounded, W = weights.rounded, weights.encoder_rows
    bias = None if sae.b_enc is None else sae.b_enc.detach()
    match choice := sae.choice:
        case PerRow(k=k) if (gather := part.gatherer(k)) is not None:
            return select_topk_shared(rounded, W, bias, centred, k, gather, part.part)
        case PerRow(k=k):
            return part.among(choice, select_topk(rounded, W, bias, centred, k))
        case PerGroup():  # none lies on several ranks
            return select_topk(rounded, W, bias, centred, weights.d_sae // rounded.group)
        case PerBatch(k=k):
            return part.among(choice, _batch_topk(weights, bias, centred, k))
        case Above(floor=floor):
            floor = floor.detach() if isinstance(floor, Tensor) else floor
            return select_above(rounded, W, bias, centred, floor)
        case _:
            raise AssertionError(choice)  # `wsae.train.step.unfit_native` has refused it


def _batch_topk(weights: Weights, bias: Tensor | None, centred: Centred, k: int) -> SparseCode:
    """Return the batch * k largest positive pre-activations: a threshold from the batch before narrows them first."""
    rounded, rows, W = weights.rounded, centred.rows, weights.encoder_rows
    wanted = min(len(rows) * k, len(rows) * weights.d_sae)
    cut, share = rounded.guess, 1.0
    while True:
        if not cut > 0 and share < 8:  # what a growing share of a sample exceeds, at last any
            share *= 1.5
            pre = rows[:: max(1, len(rows) // SAMPLE)] @ from_slices(W, weights.d_in).T
            pre = pre if bias is None else pre + bias
            rank = min(pre.numel(), int(share * k / weights.d_sae * pre.numel()) + 8)
            cut = float(pre.flatten().topk(rank).values[-1])
        code = select_above(rounded, W, bias, centred, max(cut, 0.0))
        if len(code.values) >= wanted or cut <= 0:
            break
        cut = 0.0
    if len(code.values) > wanted:
        keep = code.values.topk(wanted, sorted=False).indices.sort().values
        offsets = offsets_of(code.rows()[keep], code.batch)
        code = SparseCode(code.values[keep], code.indices[keep], offsets)
    smallest = float(code.values.min()) if len(code.values) else 0.0
    fall = min(1.0, smallest / rounded.trend) if rounded.trend > 0 else 1.0
    rounded.guess, rounded.trend = 0.95 * fall * smallest, smallest
    return code


class Reconstructed(NamedTuple):
    """One reconstruction (of x, or of the residual by dead latents): its gradients and its loss."""

    terms: list[Terms]
    """One for each nested level, `v` the gradients in z: those in pre are not known yet."""
    places: list[Int64[Tensor, " of_level"]]
    """Where the pairs of each stood in the code."""
    dz: Float[Tensor, " pairs"]
    """In order of row."""
    left: Residual
    """Of the main level."""
    lefts: list[Residual]
    """Of every level."""
    total: Float[Tensor, " d_in"]
    """Sum over the batch of dL/dx_hat."""
    more: float | Float[Tensor, ""] = 0.0
    """The weighted losses of the other levels."""
    shown: Float[Tensor, "rows d_in"] | None = None
    """x_hat - target of the first rows, where asked for."""

    @property
    def reconstruction(self) -> Float[Tensor, ""]:
        """Mean over the batch of ||Gamma e||^2."""
        return weighted_error(self.left)

    def with_slopes(self, slopes: Float[Tensor, " pairs"]) -> list[Terms]:
        """Return the terms with the gradients in pre, given in order of row."""
        both = zip(self.terms, self.places, strict=True)
        return [terms._replace(v=slopes.index_select(0, place)) for terms, place in both]


def weighted_error(left: Residual) -> Float[Tensor, ""]:
    """Return the mean over the batch of ||Gamma e||^2."""
    return left.errors[:, 1].sum() / len(left.errors)


@torch.no_grad()
def native_step(
    member: MemberState, batch: Batch, rate: float, run: TrainConfig, step: int
) -> SparseCode:
    """One optimiser step at learning rate `rate`; metrics are summed into the member; returns the code."""
    weights, sae, x = enter(member), member.sae, batch.x.contiguous()
    b_dec, b_in = (None if b is None else b.detach() for b in (sae.b_dec, sae.b_in))
    centred = Centred.of(x, b_in)
    part, target = member.part, left_by_skip(sae, batch)
    nested, price = part.nested(sae), price_at(member, run, step)
    chosen = find_pairs(sae, weights, centred, part)
    values = PairValues(sae, chosen, price, weights.norms)
    code, shown, gated = values.code, looked_at(member, batch), None
    if nested is None:
        main = _reconstruct(member, weights, code, target, b_dec, shown=shown)
    else:
        level = _level(nested, values.pre, part)
        main = _reconstruct_levels(member, weights, code, nested, level, target, b_dec, shown)
        if nested.main < len(nested.weights) - 1:  # the others' are no part of the code
            code = up_to(code, level, nested.main)
    if values.gate is not None:
        by_gate = values.pre._replace(values=values.gate.detach())
        gated = _reconstruct(member, weights, by_gate, target, b_dec)
    slopes = values.back(main.dz, None if gated is None else gated.dz, part)
    parts = main.with_slopes(slopes.pre)
    revived, aux = _revive(member, weights, centred, main, target)
    parts += revived
    skip = None
    if sae.W_skip is not None:
        skip = from_slices(main.terms[0].gradient, weights.d_out).T @ x
    gradients = Slopes(parts, values.pre, slopes, main.total, skip)
    _update(member, weights, gradients, centred.slices, rate, run, step)
    also = main.more + (0.0 if gated is None else gated.reconstruction)
    more = slopes.penalty + (part.once(also) if isinstance(also, Tensor) else also)
    losses = Losses(main.reconstruction, main.left.errors[:, 0].sum(), more, main.shown)
    record(member, batch, step_result(member, code, losses, aux), step, run, weights.W_dec)
    if values.entries is not None:
        anneal(member, values.entries, run, step)
    return code


def left_by_skip(sae: SAE, batch: Batch) -> Float[Tensor, "batch d_out"]:
    """Return what a transcoder's skip leaves for its latents: the target where it has none."""
    target = batch.target.contiguous()
    if sae.W_skip is None:
        return target
    return torch.addmm(target, batch.x, sae.W_skip.detach().T, alpha=-1)


class Revival(NamedTuple):
    """What dead latents model: pairs, gradients included, and the mean of ||Gamma (e - e_hat)||^2; None without any."""

    terms: list[Terms]
    loss: Float[Tensor, ""] | None


def _revive(
    member: MemberState, weights: Weights, centred: Centred, main: Reconstructed, target: Tensor
) -> Revival:
    """Let the dead latents model what is left: by all latents, or by the levels up to their own."""
    cfg, nested, terms, losses = member.cfg, member.part.nested(member.sae), [], []
    if not cfg.auxk:
        return Revival([], None)
    if nested is None or not nested.level_auxk:
        groups = [(main.left, member.dead)]
    else:
        groups = list(zip(main.lefts, dead_by_level(nested, member.dead), strict=True))
    for left, mask in groups:
        if not member.part.any_dead(mask):
            continue
        code = _revived(member, weights, centred, mask)
        found = _reconstruct(member, weights, code, _error(member, left, target), share=cfg.auxk)
        terms += found.terms
        losses.append(found.reconstruction)
    return Revival(terms, torch.stack(losses).sum() if losses else None)


def _level(nested: Nested, pre: SparseCode, part: Whole) -> Int64[Tensor, " pairs"]:
    """Return the level of each pair."""
    if nested.widths is not None:
        return level_of(nested, pre, part.first)
    best = part.best(pre, nested.k)
    return rank_levels(pre, nested.k) if best is None else (~best).long()


def _reconstruct(
    member: MemberState,
    weights: Weights,
    code: SparseCode,
    target: Tensor,
    start: Tensor | None = None,
    share: float = 1.0,
    shown: int = 0,
) -> Reconstructed:
    """Decode, starting from a vector if one is given, and take share * ||Gamma (x_hat - target)||^2 back to z."""
    pairs = sort_pairs(code, weights.d_sae)
    z = code.values.index_select(0, pairs.order)
    start = None if start is None else member.part.once(start)
    x_hat = member.part.over_latents(weights.decode(pairs, z, len(target), start))
    error = _first_errors(x_hat, target, shown)  # before the residual takes its place
    left = _weighted_residual(x_hat, target, member.sae.gamma)
    if share != 1:
        left.gradient.mul_(share)
    along = weights.dots(pairs, left.gradient)
    dz = torch.empty_like(along).scatter_(0, pairs.order, along)
    return Reconstructed(
        [Terms(pairs, z, along, along, left.gradient)],
        [pairs.order],
        dz,
        left,
        [left],
        left.total,
        shown=error,
    )


def _first_errors(x_hat: Slices, target: Tensor, rows: int) -> Float[Tensor, "shown d_in"] | None:
    """Return x_hat - target of the first rows; None where there are none."""
    if not rows:
        return None
    return from_slices(x_hat[:, :rows].contiguous(), target.shape[1]).sub_(target[:rows])


def _reconstruct_levels(  # noqa: PLR0913
    member: MemberState,
    weights: Weights,
    code: SparseCode,
    nested: Nested,
    level: Int64[Tensor, " pairs"],
    target: Tensor,
    start: Tensor | None,
    shown: int,
) -> Reconstructed:
    """Decode level upon level and take the weighted sum of ||Gamma (x_hat - target)||^2 back to z."""
    x_hat, error, places, pairs, left = None, None, [], [], []
    last = len(nested.weights) - 1
    start = None if start is None else member.part.once(start)
    for number in range(last + 1):
        pairs.append(sort_pairs(code, weights.d_sae, Level(level, number)))
        places.append(pairs[-1].order)
        more = weights.decode(
            pairs[-1], code.values.index_select(0, places[-1]), len(target), start
        )
        more = member.part.over_latents(more)
        x_hat, start = more if x_hat is None else x_hat.add_(more), None
        error = _first_errors(x_hat, target, shown) if number == nested.main else error
        x_hat_here = x_hat if number == last else x_hat.clone()  # the residual takes its place
        left.append(_weighted_residual(x_hat_here, target, member.sae.gamma))
    terms, dz, gradient = [], torch.empty_like(code.values), None
    for number in reversed(range(last + 1)):
        own, weight = left[number].gradient, nested.weights[number]
        gradient = own * weight if gradient is None else gradient.add(own, alpha=weight)
        along = weights.dots(pairs[number], gradient)
        dz.scatter_(0, places[number], along)
        z = code.values.index_select(0, places[number])
        terms.insert(0, Terms(pairs[number], z, along, along, gradient))
    parts = list(zip(nested.weights, left, strict=True))
    total = torch.stack([weight * part.total for weight, part in parts]).sum(0)
    parts.pop(nested.main)
    others = [weight * weighted_error(part) for weight, part in parts]
    more = torch.stack(others).sum() if others else 0.0
    weight = nested.weights[nested.main]
    assert weight == 1  # so that what is called the reconstruction is its share of the loss
    return Reconstructed(terms, places, dz, left[nested.main], left, total, more, error)


def _weighted_residual(x_hat: Slices, x: Tensor, gamma: Tensor) -> Residual:
    if gamma.ndim == 1:
        return residual(x_hat, x, gamma)
    error = from_slices(x_hat, x.shape[1]) - x
    weighted = weigh(error, gamma)
    gradient = 2 / len(x) * (weighted @ gamma)
    errors = torch.stack([error.double().square().sum(1), weighted.double().square().sum(1)], dim=1)
    return Residual(to_slices(gradient), errors, gradient.sum(0), error)


def _revived(
    member: MemberState, weights: Weights, centred: Centred, mask: Bool[Tensor, " d_sae"]
) -> SparseCode:
    """Return the positive pre-activations among each row's largest ones of dead latents: the others change nothing."""
    dead, W = mask.nonzero()[:, 0], weights.encoder_rows
    k = member.cfg.revived(weights.d_out)
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


class Slopes(NamedTuple):
    """What the gradients of a step are made of."""

    parts: list[Terms]
    pre: SparseCode
    slopes: PairSlopes
    """Those at the pairs of `pre`."""
    total: Float[Tensor, " d_out"]
    """Sum over the batch of dL/dx_hat."""
    skip: Float[Tensor, "d_out d_in"] | None
    """That of a transcoder's skip."""


def _update(
    member: MemberState,
    weights: Weights,
    gradients: Slopes,
    centred: Slices,
    rate: float,
    run: TrainConfig,
    step: int,
) -> None:
    """Step every parameter, thresholds at their own pace."""
    parts, pre, slopes, total, skip = gradients
    sae, state, bias, pull = member.sae, member.optimizer.state, None, None
    pace, scale = threshold_pace(member.cfg, sae.cfg.d_in, run.steps), gradient_scale(member, run)
    for parameter in (sae.W_dec, sae.W_enc_t):
        if parameter is not None:
            state[parameter]["step"] += 1
    if slopes.norms is not None and weights.norms is not None:  # tied: it pulls at row j's length
        found = torch.bincount(pre.indices, slopes.norms, minlength=weights.d_sae)
        pull = (found / weights.norms.clamp_min(1e-12)).float()
    of_bias, through = None, None
    if sae.b_enc is not None and "b_enc" in slopes.own:  # its gradient is not that of pre alone
        of_bias = torch.stack([_per_latent(t.v, t.pairs) for t in parts]).sum(0)
        through = of_bias @ from_slices(weights.encoder_rows, weights.d_in)
    elif sae.b_enc is not None:
        own = member.optimizer.moments(sae.b_enc)
        own["step"] += 1
        bias = Bias(sae.b_enc.detach(), own["exp_avg"], own["exp_avg_sq"])
    adam = AdamStep(rate, int(state[sae.W_dec]["step"]), scale=scale)
    kept, (by_bias, square) = thresholds(sae), weights.update(parts, centred, adam, bias, pull)
    for name, slope in slopes.own.items():
        grad = torch.bincount(pre.indices, slope, minlength=weights.d_sae).float()
        grad = grad if name != "b_enc" or of_bias is None else grad + of_bias
        lr = rate * (pace if name in kept else 1)
        square = square + _adam(member, sae.get_parameter(name), grad, lr, scale)
    keep_positive_(sae)
    of_all = torch.zeros_like(square)
    if sae.b_dec is not None:
        through = member.part.over_latents(by_bias if through is None else through)
        grad = total if sae.b_in is None else total - through
        of_all += _adam(member, sae.b_dec, grad, rate, scale)
    if sae.W_skip is not None and skip is not None:
        of_all += _adam(member, sae.W_skip, skip, rate, scale)
    note_gradient(member, run, step, square, of_all)


def _per_latent(weights: Float[Tensor, " pairs"], pairs: SortedPairs) -> Float[Tensor, " d_sae"]:
    """Return the sum of the weights of each latent's pairs, which are sorted by latent."""
    return torch.segment_reduce(weights, "sum", offsets=pairs.offsets, unsafe=True, initial=0)


def _adam(
    member: MemberState, parameter: nn.Parameter, grad: Tensor, rate: float, scale: Tensor | None
) -> Float64[Tensor, ""]:
    """Step a parameter; returns the gradient's sum of squares, 0 where nobody asks for it."""
    state = member.optimizer.moments(parameter)
    state["step"] += 1
    tensors = (parameter.detach(), grad, state["exp_avg"], state["exp_avg_sq"])
    W, grad, m, v = (tensor.view(1, -1) for tensor in tensors)
    adam = AdamStep(rate, int(state["step"]), scale=scale)
    square = adam_rows_(W, grad, m, v, adam, unit=False)
    return torch.zeros((), dtype=torch.float64) if square is None else square

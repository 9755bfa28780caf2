"""Sparse codes, which latents are active, encode and decode at those, and the optimiser's step: all in plain PyTorch.

This is the specification of any faster path. Dense equivalents (used by the tests):
    encode_at: ((x - b_dec) @ W_enc + b_enc).gather(...)      decode: z @ W_dec
No gradient passes through the choice of latents. The weight gradients are products of a sparse [d_sae, batch] matrix
with dense rows; one sort of the chosen latents (`Plan`) serves both.
"""

import warnings
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor
from torch.autograd import Function


class SparseCode(NamedTuple):
    """Active latents of a batch: row b holds entries offsets[b] : offsets[b + 1]. A value of exactly 0 is inactive."""

    values: Float[Tensor, " nnz"]
    indices: Int64[Tensor, " nnz"]
    offsets: Int64[Tensor, " batch_plus_1"]

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    def rows(self) -> Int64[Tensor, " nnz"]:
        """Return the row of each entry."""
        counts = self.offsets.diff()
        return torch.repeat_interleave(counts, output_size=len(self.indices))

    def active(self) -> Int64[Tensor, ""]:
        """Return the number of active latents, all rows together."""
        return torch.count_nonzero(self.values)

    def sums(self, d_sae: int, moments: bool) -> "CodeSums":
        """Return sums over the rows; those of z and z^2 where asked for."""
        fired = torch.zeros(d_sae, dtype=torch.int32, device=self.indices.device)
        fired.index_add_(0, self.indices, (self.values != 0).int())
        if not moments:
            return CodeSums(self.batch, fired)
        z = self.values.double()
        both = [torch.bincount(self.indices, w, minlength=d_sae) for w in (z, z * z)]
        # of no entries, bincount forgets the type of their weights
        return CodeSums(self.batch, fired, torch.stack(both).double())

    def where(self, kept: Bool[Tensor, " nnz"]) -> "SparseCode":
        """Return the entries for which `kept` is true."""
        offsets = offsets_of(self.rows()[kept], self.batch)
        return SparseCode(self.values[kept], self.indices[kept], offsets)

    def padded(self) -> tuple[Float[Tensor, "batch k"], Int64[Tensor, "batch k"]]:
        """Return values and indices as rectangles; shorter rows end in value 0, index 0."""
        counts, rows = self.offsets.diff(), self.rows()
        width = int(counts.max()) if self.batch else 0
        place = torch.arange(len(rows), device=rows.device) - self.offsets[rows]
        values = self.values.new_zeros(self.batch, width).index_put((rows, place), self.values)
        indices = self.indices.new_zeros(self.batch, width)
        return values, indices.index_put((rows, place), self.indices)

    def dense(self, d_sae: int) -> Float[Tensor, "batch d_sae"]:
        """Return z [batch, d_sae]."""
        z = self.values.new_zeros(self.batch, d_sae)
        return z.index_put((self.rows(), self.indices), self.values, accumulate=True)


class CodeSums(NamedTuple):
    """A batch's codes by their sums over the rows alone."""

    batch: int
    fired: Int[Tensor, " d_sae"]
    """Rows in which each latent is active."""
    moments: Float64[Tensor, "2 d_sae"] | None = None
    """Of z and z^2."""

    def active(self) -> Int64[Tensor, ""]:
        """Return the number of active latents, all rows together."""
        return self.fired.sum()

    def sums(self, d_sae: int, moments: bool) -> "CodeSums":  # noqa: ARG002
        """Return itself."""
        return self


def code_from_topk(
    values: Float[Tensor, "batch k"], indices: Int64[Tensor, "batch k"]
) -> SparseCode:
    """Flatten the same number of entries per row."""
    batch, k = values.shape
    offsets = (
        torch.arange(0, batch * k + 1, k, device=values.device) if k else _zeros(batch, values)
    )
    return SparseCode(values.reshape(-1), indices.reshape(-1), offsets)


def code_from_dense(z: Float[Tensor, "batch d_sae"]) -> SparseCode:
    """Keep the non-zero entries of z."""
    rows, indices = z.nonzero(as_tuple=True)
    return SparseCode(z[rows, indices], indices, offsets_of(rows, len(z)))


def offsets_of(rows: Int64[Tensor, " nnz"], batch: int) -> Int64[Tensor, " batch_plus_1"]:
    """Return row offsets of entries sorted by row."""
    counts = torch.bincount(rows, minlength=batch)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _zeros(batch: int, like: Tensor) -> Tensor:
    return torch.zeros(batch + 1, dtype=torch.int64, device=like.device)


# Which latents are active.

_SAMPLE = 1 << 16
"""Entries looked at to guess the batch Top-k threshold."""


def select_topk(pre: Float[Tensor, "*rows d_sae"], k: int) -> Int64[Tensor, "*rows k"]:
    """Return the k largest pre-activations of each row (Gao et al. 2025), unordered."""
    return pre.topk(k, dim=-1, sorted=False).indices


def select_group_topk(pre: Float[Tensor, "*rows d_sae"], k: int) -> Int64[Tensor, "*rows k"]:
    """Return the largest pre-activation in each of k contiguous groups (paper Appendix B.1); k divides d_sae."""
    d_sae = pre.shape[-1]
    assert d_sae % k == 0, (d_sae, k)  # SAEConfig refuses it with a message
    winners = pre.unflatten(-1, (k, -1)).argmax(-1)
    return winners + torch.arange(0, d_sae, d_sae // k, device=pre.device)


def select_batch_topk(
    pre: Float[Tensor, "batch d_sae"], k: int
) -> tuple[Int64[Tensor, " nnz"], Int64[Tensor, " nnz"]]:
    """Return rows and latents of the batch * k largest positive entries (Bussmann et al. 2024), sorted by row.

    Exact: a threshold guessed from a sample only narrows the candidates, and is lowered until they suffice.
    """
    wanted = min(len(pre) * k, pre.numel())
    flat = pre.reshape(-1)
    candidates = _at_least(flat, wanted)
    if len(candidates) > wanted:
        keep = flat[candidates].topk(wanted, sorted=False).indices
        candidates = candidates[keep].sort().values
    return candidates // pre.shape[1], candidates % pre.shape[1]


def _at_least(flat: Float[Tensor, " n"], wanted: int) -> Int64[Tensor, " m"]:
    """Return positions of the positive entries above a threshold that leaves `wanted` or more, if there are."""
    stride = max(1, len(flat) // _SAMPLE)
    sample = flat[::stride]
    share = wanted / len(flat)
    while share < 0.5:
        share *= 1.5
        rank = min(len(sample), int(share * len(sample)) + 8)
        threshold = float(sample.topk(rank).values[-1])
        if threshold <= 0:
            break
        found = (flat > threshold).nonzero()[:, 0]
        if len(found) >= wanted:
            return found
    return (flat > 0).nonzero()[:, 0]


# Encode and decode at chosen latents only, with gradients that touch only those.

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


# The optimiser's step on one matrix of rows: Adam, with rows kept at unit norm on request.


class AdamStep(NamedTuple):
    """What Adam needs to know of a step (Kingma and Ba 2015); `step` counts from 1."""

    lr: float
    step: int
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    scale: Float[Tensor, ""] | None = None
    """What the gradient is multiplied by; None stands for 1, and for one whose size is not asked for."""


class Adam:
    """torch.optim.Adam with `fused`, to the bit.

    The constructor of PyTorch's own loads its compiler, which takes a second in every process that trains.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        self.parameters, self.lr = list(parameters), lr
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        """What each has by now: the number of its steps, and the running means of its gradients and their squares."""

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return a parameter's state, made where there is none."""
        if not (state := self.state.setdefault(parameter, {})):
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter.detach())
            state["exp_avg_sq"] = torch.zeros_like(parameter.detach())
        return state

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return both moments of every parameter that has any."""
        return [(state["exp_avg"], state["exp_avg_sq"]) for state in self.state.values()]

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for parameter in self.parameters:
            if parameter.grad is not None:
                by_type.setdefault(parameter.dtype, []).append(parameter)
        for moved in by_type.values():
            states = [self.moments(parameter) for parameter in moved]
            for state, parameter in zip(states, moved, strict=True):
                state["step"] = state["step"].to(parameter.device)  # a checkpoint's lies on the CPU
            counts = [state["step"] for state in states]
            torch._foreach_add_(counts, 1)
            _fused_adam_(
                [parameter.detach() for parameter in moved],
                [parameter.grad for parameter in moved if parameter.grad is not None],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                counts,
                AdamStep(self.lr, 0),
            )


class SGD:
    """Plain gradient descent."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        self.parameters, self.lr = list(parameters), lr

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=-self.lr)


def limit_of(limit: float, norms: Float64[Tensor, "*members"]) -> Float[Tensor, "*members"]:
    """Return min(1, limit / norm), 1 for a norm of 0."""
    return (limit / norms).clamp(max=1).float()


def rescale_(moments: Iterable[tuple[Tensor, Tensor]], scale: Float[Tensor, "..."]) -> None:
    """Make moments what they would be of gradients multiplied by `scale`."""
    for m, v in moments:
        m.mul_(scale)
        v.mul_(scale * scale)


def _fused_adam_(
    W: list[Tensor],
    grad: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    counts: list[Tensor],
    adam: AdamStep,
) -> None:
    torch._fused_adam_(
        W,
        grad,
        m,
        v,
        [],  # no running maximum of v: amsgrad is off
        counts,
        lr=adam.lr,
        beta1=adam.beta1,
        beta2=adam.beta2,
        weight_decay=0.0,
        eps=adam.eps,
        amsgrad=False,
        maximize=False,
    )


class SparseGrad(NamedTuple):
    """A gradient as its terms: row j is the sum over pairs (b, j) of the plan of weight * rows[b].

    Terms of several losses are one plan over more rows: concatenate the row offsets and the matrices of rows.
    """

    plan: Plan
    weights: Float[Tensor, " nnz"]
    rows: Float[Tensor, "batch d_in"]

    def dense(self) -> Float[Tensor, "d_sae d_in"]:
        """Return the gradient as a matrix."""
        return self.plan.scatter(self.weights, self.rows)


def adam_rows_(
    W: Float[Tensor, "n d"],
    grad: Float[Tensor, "n d"],
    m: Float[Tensor, "n d"],
    v: Float[Tensor, "n d"],
    adam: AdamStep,
    unit: bool,
) -> Float[Tensor, ""] | None:
    """Take one step of Adam on W [n, d] in place, exactly as torch.optim.Adam does; `grad` may be overwritten.

    m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2,  bias corrections c_i = 1 - beta_i^step,
    W -= lr (m / c_1) / (sqrt(v / c_2) + eps). With `unit` the part of g along each (unit) row is dropped before,
    g -= (g . W_j) W_j, and each row is divided by max(|W_j|, 1e-12) after. With `adam.scale` g is then multiplied by
    it; returns the sum of squares of g before that (else None).
    """
    if unit:
        grad.addcmul_(W, torch.linalg.vecdot(grad, W, dim=1)[:, None], value=-1)
    square = None
    if adam.scale is not None:
        square = grad.double().square().sum()
        grad.mul_(adam.scale)
    count = torch.tensor(float(adam.step), dtype=torch.float32, device=W.device)
    _fused_adam_([W], [grad], [m], [v], [count], adam)
    if unit:
        unit_rows_(W)
    return square


def update_rows_(
    W: Float[Tensor, "n d"],
    grad: SparseGrad,
    m: Float[Tensor, "n d"],
    v: Float[Tensor, "n d"],
    adam: AdamStep,
    unit: bool,
) -> Float[Tensor, ""] | None:
    """Take the step of `adam_rows_` on W [n, d] with the gradient given by its terms."""
    return adam_rows_(W, grad.dense(), m, v, adam, unit)


def unit_rows_(W: Float[Tensor, "n d"]) -> None:
    """Divide each row of W [n, d] by max(|W_j|, 1e-12) in place."""
    W.div_(torch.linalg.vector_norm(W, dim=1, keepdim=True).clamp_min_(1e-12))

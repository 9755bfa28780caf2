"""The training forward pass, x to x_hat through the chosen latents, and the losses of what it gives.

Reconstruction and the revival of dead latents are weighted by the same gamma.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64, Num
from torch import Tensor

from wsae.core.errors import UserError
from wsae.kernels.eager import (
    Plan,
    SparseCode,
    code_from_dense,
    code_from_topk,
    decode,
    encode_at,
    offsets_of,
    select_batch_topk,
)
from wsae.sae.architectures import (
    Above,
    Architecture,
    Choice,
    Every,
    Nested,
    Parameters,
    PerBatch,
    PerGroup,
    PerRow,
    architecture_of,
)
from wsae.sae.config import ActivationConfig, SAEConfig
from wsae.sae.model import SAE, at_latents, fixed


class Coded(NamedTuple):
    """The latents of a batch, differentiable: all of them [..., batch, d_sae], or chosen pairs alone [pairs]."""

    arch: Architecture
    cfg: ActivationConfig
    pre: Float[Tensor, "*entries"]
    own: Parameters
    """The kind's own parameters at these latents."""
    z: Float[Tensor, "*entries"]
    norms: Float[Tensor, "*per_entry"] | None
    """Lengths of the decoder's rows, where they are not 1."""
    pairs: SparseCode | None = None
    """Where they are, of chosen pairs alone (its values are not read)."""

    @classmethod
    def of(
        cls,
        arch: Architecture,
        cfg: ActivationConfig,
        pre: Float[Tensor, "*entries"],
        own: Parameters,
        norms: Float[Tensor, "*per_entry"] | None = None,
        pairs: SparseCode | None = None,
    ) -> "Coded":
        """Compute z."""
        return cls(arch, cfg, pre, own, arch.values(pre, own, cfg), norms, pairs)

    def lengths(self) -> Float[Tensor, "*entries"]:
        """Return z_j ||W_dec[j]||."""
        return self.z if self.norms is None else self.z * self.norms

    def l1(self, p: float | None = None) -> Float[Tensor, "*entries"]:
        """Return what the L1 penalty sums: (z_j ||W_dec[j]||)^p, with the gate's code for z where it has one.

        `p` is 1 where it is not given.
        """
        gated = self if self.arch.gate is None else self._replace(z=self.arch.gate(self.pre))
        lengths = gated.lengths()
        if p is None or p == 1:
            return lengths
        positive = lengths > 0  # the slope of z^p at 0 is infinite
        return torch.where(positive, lengths, 1.0).pow(p) * positive

    def by_row(self, values: Float[Tensor, "*entries"]) -> Float[Tensor, "*rows"]:
        """Return the sum of one value per entry over each row."""
        if self.pairs is None:
            return values.sum(-1)
        return values.new_zeros(self.pairs.batch).index_add(0, self.pairs.rows(), values)

    def active(self) -> Float[Tensor, "*entries"] | None:
        """Return what the L0 penalty sums, differentiable; None for kinds where nothing moves it."""
        if self.arch.count is None:
            return None
        return self.arch.count(self.pre, self.own, self.cfg)


class Also(NamedTuple):
    """Another reconstruction of x, which the loss adds."""

    x_hat: Float[Tensor, "batch d_out"]
    weight: float


class Forward(NamedTuple):
    """One training forward pass; everything but `code`, `pre` and `centred` carries gradients."""

    x_hat: Float[Tensor, "batch d_out"]
    entries: Coded
    code: SparseCode
    """The latents, detached."""
    pre: Float[Tensor, "batch d_sae"]
    """All pre-activations, detached, perhaps in bf16."""
    centred: Float[Tensor, "batch d_in"]
    """x - b_dec (of a transcoder x), detached."""
    also: tuple[Also, ...] = ()
    """Of nested levels, or of a gate."""


def dense_entries(
    arch: Architecture,
    cfg: ActivationConfig,
    pre: Float[Tensor, "*members batch d_sae"],
    own: Parameters,
    norms: Float[Tensor, "*per d_sae"] | None = None,
) -> Coded:
    """Return z of a batch in training, dense: 0 wherever the kind does not choose."""
    choice, entries = arch.choose(cfg, own), Coded.of(arch, cfg, pre, own, norms)
    match choice:
        case PerRow() | PerGroup():
            index = fixed(choice, pre.detach())
        case PerBatch(k=k):
            flat = pre.detach().flatten(-2)
            index = flat.topk(min(k * pre.shape[-2], flat.shape[-1]), dim=-1, sorted=False).indices
            kept = torch.zeros_like(flat).scatter_(-1, index, 1.0).view_as(pre)
            return entries._replace(z=entries.z * kept)
        case Above() | Every():
            return entries
    kept = torch.zeros_like(pre.detach()).scatter_(-1, index, 1.0)
    return entries._replace(z=entries.z * kept)


class Whole:
    """An SAE whose rows and latents are all here. `wsae.train.parallel.step.Shard` has them on several ranks."""

    batch: int = 0
    """Rows of the whole batch, where they are not all here."""
    unfit: str | None = None
    """Why the compiled kernels cannot train this part of an SAE."""
    leads: bool = True
    """Whether this part speaks for all."""
    d_sae: int = 0
    """Latents of the whole SAE, where they are not all here."""
    first: int = 0
    """The number of the first of those here."""
    part: int = 0
    """Which part of the latents this is."""

    def nested(self, sae: SAE) -> Nested | None:
        """Return the levels of the whole SAE's code, where its kind has any."""
        make = sae.arch.nested
        return None if make is None else make(sae.cfg.activation, self.d_sae or sae.cfg.d_sae)

    def level(
        self,
        nested: Nested,
        pre: Float[Tensor, "rows d_sae"],  # noqa: ARG002
        code: SparseCode,
    ) -> Int64[Tensor, " nnz"]:
        """Return the level of each chosen pair; another part's also depends on `pre`, all pre-activations."""
        return level_of(nested, code, self.first)

    def best(self, code: SparseCode, k: int) -> Bool[Tensor, " nnz"] | None:  # noqa: ARG002
        """Say which pairs are among their row's k largest over all parts; None where all are here."""
        return None

    def choose(self, choice: Choice, pre: Float[Tensor, "rows d_sae"]) -> SparseCode:
        """Return the pairs that a choice of Top-k makes active, in order of row (their values are not read)."""
        assert isinstance(choice, PerRow | PerGroup | PerBatch)
        if isinstance(choice, PerBatch):
            rows, latents = select_batch_topk(pre, choice.k)
            return SparseCode(pre[rows, latents], latents, offsets_of(rows, len(pre)))
        indices = fixed(choice, pre)
        return code_from_topk(pre.gather(1, indices), indices)

    def choose_dead(self, pre: Float[Tensor, "rows dead"], k: int) -> SparseCode | None:
        """Return the k largest of each row among the dead latents' pre-activations; None where none is dead."""
        if not pre.shape[1]:
            return None
        return code_from_topk(*pre.topk(min(k, pre.shape[1]), dim=1, sorted=False))

    def gatherer(self, k: int) -> Callable[[Tensor], Tensor] | None:  # noqa: ARG002
        """Return what stacks the parts' tensors of k numbers a row; None where all is here, or that would be much."""
        return None

    def among(self, choice: Choice, pre: SparseCode) -> SparseCode:  # noqa: ARG002
        """Return the pairs that are active over all parts, of those that would be if only the latents here were."""
        return pre

    def among_dead(self, pre: SparseCode, k: int) -> SparseCode:  # noqa: ARG002
        """Return those of dead latents that are among their row's k largest over all parts."""
        return pre

    def any_dead(self, dead: Bool[Tensor, " d_sae"]) -> bool:
        """Return whether a latent of any part is dead."""
        return bool(dead.any())

    def summed(self, part: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the sum of what each part of the latents gives, differentiable in each."""
        return part

    def shared(self, whole: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return what every part of the latents reads; gradients that reach it are summed."""
        return whole

    def settle(self) -> None:
        """Wait until every gradient is that of the whole batch."""

    def over_rows(self, tensor: Num[Tensor, "..."]) -> Num[Tensor, "..."]:
        """Replace a sum over the rows here by that over the whole batch."""
        return tensor

    def over_latents(self, tensor: Num[Tensor, "..."]) -> Num[Tensor, "..."]:
        """Replace a sum over the latents here by that over all of them."""
        return tensor

    def least(self, value: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Replace the least value of the rows and latents here by the least of all."""
        return value

    def once(self, tensor: Num[Tensor, "..."]) -> Num[Tensor, "..."]:
        """Return the tensor, or zeros where another part of the latents has the same and counts it."""
        return tensor

    def window(self, sums: Float64[Tensor, " sums"]) -> Float64[Tensor, " sums"]:
        """Return a step's sums for the metrics (`wsae.train.state.SUMS`) over the whole batch and all latents."""
        return sums

    def note_dead(self, dead: Bool[Tensor, " d_sae"]) -> None:
        """Take note of which latents here are dead."""

    def dead_share(self, dead: Bool[Tensor, " d_sae"]) -> float:
        """Return the share of all latents that is dead."""
        return float(dead.double().mean())


WHOLE = Whole()


def training_forward(
    sae: SAE, x: Float[Tensor, "rows d_in"], bf16: bool = False, part: Whole = WHOLE
) -> Forward:
    """Run the SAE on a batch for training. `bf16` computes the dense encoder product in bf16.

    Top-k kinds compute the dense product without gradient, choose, and differentiate at the chosen pairs only
    (their values always in full precision). Other codes are not sparse at the start of training, so they take the dense
    route. Of a `part`, x_hat is whole; code, pre and entries are those of the latents and rows here.
    """
    choice = sae.choice
    if isinstance(choice, Above | Every):
        return _dense_forward(sae, x, bf16, part)
    with torch.no_grad():
        centred = sae.centre(x)
        pre = product(sae, centred, bf16)
        chosen = part.choose(choice, pre)
    plan = Plan.build(chosen.indices, chosen.offsets, len(sae.W_dec))
    b_in = None if sae.b_in is None else part.shared(sae.b_in)
    at = encode_at(centred, sae.encoder_rows, plan, sae.b_enc, b_in, pre)
    norms = sae.W_dec.norm(dim=1)[chosen.indices] if sae.cfg.tied else None
    own = at_latents(sae.own, chosen.indices)
    entries = Coded.of(sae.arch, sae.cfg.activation, at, own, norms, chosen)
    code = SparseCode(entries.z.detach(), chosen.indices, chosen.offsets)
    nested = part.nested(sae)
    if nested is None:
        x_hat = sae.completed(part.summed(decode(entries.z, sae.W_dec, plan)), x)
        return Forward(x_hat, entries, code, pre.detach(), centred.detach())
    level = part.level(nested, pre, chosen)
    decoded, found = 0, []
    for number, weight in enumerate(nested.weights):
        here = level == number
        rows, indices = plan.rows[here], chosen.indices[here]
        own_plan = Plan.build(indices, offsets_of(rows, len(x)), len(sae.W_dec))
        decoded = decoded + part.summed(decode(entries.z[here], sae.W_dec, own_plan))
        found.append(Also(sae.completed(decoded, x), weight))
    main = found.pop(nested.main)
    code = up_to(code, level, nested.main)
    return Forward(main.x_hat, entries, code, pre.detach(), centred.detach(), tuple(found))


def _dense_forward(sae: SAE, x: Tensor, bf16: bool, part: Whole) -> Forward:
    """Run a kind that may have any number of active latents."""
    centred = x if sae.b_in is None else x - part.shared(sae.b_in)
    pre = product(sae, centred, bf16).to(x.dtype)
    norms = sae.W_dec.norm(dim=1) if sae.cfg.tied else None
    entries = dense_entries(sae.arch, sae.cfg.activation, pre, sae.own, norms)
    x_hat, also = part.summed(entries.z @ sae.W_dec), ()
    if sae.arch.gate is not None:
        from_gate = part.summed(sae.arch.gate(pre) @ sae.W_dec.detach())
        frozen = sae.completed(torch.zeros_like(from_gate), x).detach()
        also = (Also(from_gate + frozen, 1.0),)
    code = code_from_dense(entries.z.detach())
    return Forward(sae.completed(x_hat, x), entries, code, pre.detach(), centred.detach(), also)


def level_of(nested: Nested, pre: SparseCode, first: int = 0) -> Int64[Tensor, " nnz"]:
    """Return the level of each pair of a row's pre-activations; `first` is the number of the first latent here."""
    if nested.widths is None:
        return level_by_rank(pre, nested.k)
    return level_by_latent(pre.indices + first, nested.widths)


def level_by_latent(
    indices: Int64[Tensor, " nnz"], widths: tuple[int, ...]
) -> Int64[Tensor, " nnz"]:
    """Return which of the nested widths is the first that holds each latent."""
    level = torch.zeros_like(indices)
    for width in widths[:-1]:  # a table of them would have to wait for a GPU
        level += indices >= width
    return level


def dead_by_level(nested: Nested, dead: Bool[Tensor, " d_sae"]) -> list[Bool[Tensor, " d_sae"]]:
    """Return the dead latents of each nested width that no narrower one has."""
    assert nested.widths is not None
    every = torch.arange(len(dead), device=dead.device)
    level = level_by_latent(every, nested.widths)
    return [dead & (level == number) for number in range(len(nested.widths))]


def level_by_rank(code: SparseCode, k: int) -> Int64[Tensor, " nnz"]:
    """Return 0 for the k largest of each row and 1 for the rest; every row has the same number of pairs."""
    values = code.values.view(code.batch, -1)
    level = torch.ones_like(values, dtype=torch.int64)
    return level.scatter_(1, values.topk(k, dim=1).indices, 0).view(-1)


def up_to(code: SparseCode, level: Int64[Tensor, " nnz"], last: int) -> SparseCode:
    """Return a code with the pairs beyond a level at 0, which is inactive."""
    return code._replace(values=code.values * (level <= last))


def revived(
    sae: SAE, forward: Forward, chosen: SparseCode, part: Whole
) -> Float[Tensor, "rows d_out"]:
    """Return what the decoder makes, without b_dec, of ReLU(pre) at chosen pairs; differentiable at these."""
    plan = Plan.build(chosen.indices, chosen.offsets, len(sae.W_dec))
    b_in = None if sae.b_in is None else part.shared(sae.b_in)
    pre = encode_at(forward.centred, sae.encoder_rows, plan, sae.b_enc, b_in, forward.pre)
    return part.summed(decode(pre.relu(), sae.W_dec, plan))


def product(sae: SAE, centred: Tensor, bf16: bool) -> Tensor:
    """Return the pre-activations of centred rows, in bfloat16 where that is asked for."""
    if not bf16:
        return sae.pre(centred)
    low = centred.bfloat16() @ sae.W_enc.bfloat16()
    return low if sae.b_enc is None else low + sae.b_enc.bfloat16()


# Many SAEs of one shape as stacked tensors


@dataclass
class Stack:
    """SAEs of one SAEConfig; parameters have a leading axis of members and broadcast over the batch."""

    cfg: SAEConfig
    W_dec: Float[Tensor, "members d_sae d_in"]
    W_enc_t: Float[Tensor, "members d_sae d_in"] | None
    b_enc: Float[Tensor, "members 1 d_sae"] | None
    b_dec: Float[Tensor, "members 1 d_in"] | None
    threshold: Float64[Tensor, " members"]
    """Batch Top-k's running threshold."""
    own: dict[str, Float[Tensor, "members 1 d_sae"]] = field(default_factory=dict)
    """The parameters of its kind."""

    @property
    def encoder_rows(self) -> Float[Tensor, "members d_sae d_in"]:
        """The encoder with one row per latent: W_dec itself when tied."""
        return self.W_dec if self.W_enc_t is None else self.W_enc_t

    @property
    def choice(self) -> Choice:
        """Which latents of a batch may be active in training."""
        own = {"threshold": self.threshold[:, None, None], **self.own}
        return architecture_of(self.cfg.activation).choose(self.cfg.activation, own)

    def parameters(self) -> list[Tensor]:
        """Return what an optimiser moves."""
        named = (self.W_dec, self.W_enc_t, self.b_enc, self.b_dec, *self.own.values())
        return [p for p in named if p is not None]

    def write_back(self, saes: list[SAE]) -> None:
        """Copy every member's tensors into its SAE."""
        for i, sae in enumerate(saes):
            for name, target in sae.named_parameters():
                source = self.own[name] if name in self.own else getattr(self, name)
                target.data.copy_(source[i].reshape(target.shape))
            if "threshold" not in self.own:
                sae.threshold.copy_(self.threshold[i])


class StackForward(NamedTuple):
    """One training pass of a stack; as `Forward`, with an axis of members."""

    x_hat: Float[Tensor, "members batch d_in"]
    entries: Coded
    """Latents and pre-activations [members, batch, d_sae]."""
    l1: Float[Tensor, " members"]
    l0: Float[Tensor, " members"]
    """Mean number of active latents; differentiable for kinds that have an L0 penalty."""


def stackable(arch: Architecture) -> bool:
    """Return whether SAEs of a kind can be stacked: those with one reconstruction can."""
    return arch.nested is None and arch.gate is None


def stack_saes(
    saes: list[SAE],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Stack:
    """Return copies of the SAEs' tensors as one trainable stack; all must have the same SAEConfig."""
    first = saes[0]
    assert all(sae.cfg == first.cfg for sae in saes), "a stack holds SAEs of one SAEConfig"

    def stacked(name: str, vector: bool = True) -> Tensor | None:
        if getattr(first, name) is None:
            return None
        parts = torch.stack([sae.get_parameter(name).detach() for sae in saes])
        parts = parts.to(device, dtype)
        return (parts[:, None] if vector else parts).contiguous().requires_grad_()

    W_dec = stacked("W_dec", vector=False)
    assert W_dec is not None
    if not stackable(first.arch):
        raise UserError(f"{first.arch.kind} has more than one reconstruction: it cannot be stacked")
    own = {name: stacked(name) for name in first.arch.parameters}
    buffers = [W_dec.new_zeros(()) if "threshold" in own else sae.threshold for sae in saes]
    return Stack(
        first.cfg,
        W_dec,
        stacked("W_enc_t", vector=False),
        stacked("b_enc"),
        stacked("b_dec"),
        torch.stack(buffers).double().to(device),
        {name: parameter for name, parameter in own.items() if parameter is not None},
    )


def stack_forward(stack: Stack, x: Float[Tensor, "members batch d_in"]) -> StackForward:
    """Run every member on its own batch for training (Eq. 2 and 3)."""
    centred = x if stack.b_dec is None else x - stack.b_dec
    pre = torch.bmm(centred, stack.encoder_rows.mT)
    pre = pre if stack.b_enc is None else pre + stack.b_enc
    arch, activation = architecture_of(stack.cfg.activation), stack.cfg.activation
    own = {"threshold": stack.threshold[:, None, None].to(pre.dtype), **stack.own}
    norms = stack.W_dec.norm(dim=2)[:, None] if stack.cfg.tied else None
    entries = dense_entries(arch, activation, pre, own, norms)
    x_hat = torch.bmm(entries.z, stack.W_dec)
    x_hat = x_hat if stack.b_dec is None else x_hat + stack.b_dec
    batch, count = pre.shape[1], entries.active()
    count = entries.z.detach().ne(0).to(pre.dtype) if count is None else count
    l1, l0 = entries.l1().sum((1, 2)) / batch, count.sum((1, 2)) / batch
    return StackForward(x_hat, entries, l1, l0)


def thresholds(trained: SAE | Stack) -> dict[str, Float[Tensor, "..."]]:
    """Return the parameters of a kind that may not be negative, detached."""
    parameters = architecture_of(trained.cfg.activation).parameters.items()
    kept = [name for name, parameter in parameters if parameter.positive]
    return {name: trained.own[name].detach() for name in kept}


def keep_positive_(trained: SAE | Stack) -> None:
    """Bring back the parameters of a kind that may not be negative."""
    for threshold in thresholds(trained).values():
        threshold.clamp_min_(0)


# Where gamma meets a residual: one weight per dimension, or a matrix.

Weights = Float[Tensor, " d_in"] | Float[Tensor, "d_in d_in"]
"""gamma: the diagonal of Gamma [d_in], or Gamma itself [d_in, d_in]."""


def weigh(residual: Float[Tensor, "*batch d_in"], gamma: Weights) -> Float[Tensor, "*batch d_in"]:
    """Return Gamma e for every residual e = x - x_hat (inside Eq. 12)."""
    return residual * gamma if gamma.ndim == 1 else residual @ gamma.T


def dimension_weights(gamma: Weights) -> Float[Tensor, " d_in"]:
    """Return sqrt(diag(Gamma^T Gamma)): what a unit error in one dimension costs; gamma itself if it is a vector.

    For a matrix it is blind to the angles between dimensions: whitened data may have equal weights here.
    """
    return gamma if gamma.ndim == 1 else torch.linalg.vector_norm(gamma, dim=0)


def effective_dimensions(gamma: Weights) -> float:
    """Return tr(M)^2 / ||M||_F^2, M = Gamma^T Gamma: how many directions carry the loss's weight (1 .. d_in).

    For a vector: 1 / sum of squared shares, share_i = gamma_i^2 / sum gamma^2.
    """
    gamma = gamma.double()
    if gamma.ndim == 1:
        share = gamma.square() / gamma.square().sum()
        return float(1.0 / share.square().sum())
    gram: Float64[Tensor, "d_in d_in"] = gamma.T @ gamma
    return float(gram.trace().square() / gram.square().sum())


def weighted_reconstruction_loss(
    x: Float[Tensor, "batch d_in"],
    x_hat: Float[Tensor, "batch d_in"],
    gamma: Weights,
    batch: int = 0,
) -> Float[Tensor, ""]:
    """Mean over the batch of ||Gamma (x - x_hat)||^2 (Eq. 12; Eq. 4 when gamma is 1).

    `batch` counts its rows where they are not all here.
    """
    return weigh(x - x_hat, gamma).square().sum() / (batch or len(x))


def also_loss(
    x: Float[Tensor, "batch d_in"], forward: Forward, gamma: Weights, batch: int = 0
) -> Float[Tensor, ""]:
    """Return the weighted sum of the losses of what else reconstructs x: nested levels, a gate. 0 for most kinds."""
    losses = [
        also.weight * weighted_reconstruction_loss(x, also.x_hat, gamma, batch)
        for also in forward.also
    ]
    return torch.stack(losses).sum() if losses else x.new_zeros(())


Form = Literal["step", "tanh", "quadratic"]
TANH_SCALE = 4.0


class Price(NamedTuple):
    """What the penalties of a step cost."""

    l1: float | Float[Tensor, ""] = 0.0
    l0: float = 0.0
    form: Form = "step"
    """What the L0 penalty sums over a row."""
    target: float = 1.0
    """The L0 that the form quadratic draws to."""
    p: float | None = None
    """The power of what the L1 penalty sums, where it is annealed; else 1."""
    pre_act: float = 0.0
    """Of dead latents' distances below their thresholds."""

    def only_l1(self, arch: Architecture) -> bool:
        """Return whether a kind of SAE has no other penalty than sum_j z_j ||W_dec[j]||."""
        moved = self.form == "tanh" or arch.count is not None
        return self.p is None and not self.pre_act and not (self.l0 and moved)


def penalty(entries: Coded, price: Price, batch: int, part: Whole = WHOLE) -> Float[Tensor, ""]:
    """Return l1 * sum_j (z_j ||W_dec[j]||)^p + l0 * L0, means over a batch of so many rows.

    In place of L0 = sum_j H(pre_j - theta_j), the form tanh has sum_j tanh(4 z_j ||W_dec[j]||), and the form quadratic
    2 / target (L0 - target)^2.
    """
    total = entries.z.new_zeros(())
    if isinstance(price.l1, Tensor) or price.l1:
        total = total + price.l1 * (entries.l1(price.p).sum() / batch)
    if not price.l0:
        return total
    if price.form == "tanh":
        return total + price.l0 * (torch.tanh(TANH_SCALE * entries.lengths()).sum() / batch)
    count = entries.active()
    if count is None:
        return total
    if price.form == "step":
        return total + price.l0 * (count.sum() / batch)
    L0 = part.summed(entries.by_row(count))
    off = 2 / price.target * (L0 - price.target).square().sum() / batch
    # every part of the latents has the gradient, one of them the value
    return total + price.l0 * (off - off.detach() + part.once(off.detach()))


def pre_act_loss(entries: Coded, dead: Bool[Tensor, " d_sae"], batch: int) -> Float[Tensor, ""]:
    """Return the mean over the batch of sum_j relu(theta_j - pre_j) ||W_dec[j]|| over dead latents j, dense.

    It draws the encoder of a latent that never fires towards the data, and its threshold down (Anthropic, January
    2025 update).
    """
    below = (entries.own["threshold"] - entries.pre).relu() * dead
    below = below if entries.norms is None else below * entries.norms
    return below.sum() / batch


def auxk_loss(
    sae: SAE,
    residual: Float[Tensor, "batch d_in"],
    forward: Forward,
    dead: Bool[Tensor, " d_sae"],
    k_aux: int,
    part: Whole = WHOLE,
) -> Float[Tensor, ""]:
    """Mean over the batch of ||Gamma (e - e_hat)||^2, e the residual x - x_hat as a constant, e_hat = z_dead W_dec.

    z_dead are the ReLU'd k_aux largest pre-activations among dead latents (Gao et al. 2025, A.2), without b_dec
    since e has none. The gradient reaches encoder and decoder of those latents. 0 when none is dead.
    """
    candidates = dead.nonzero()[:, 0]
    with torch.no_grad():
        chosen = part.choose_dead(forward.pre.index_select(1, candidates), k_aux)
    if chosen is None:
        return residual.new_zeros(())
    chosen = chosen._replace(indices=candidates[chosen.indices])
    e_hat = revived(sae, forward, chosen, part)
    return weighted_reconstruction_loss(residual.detach(), e_hat, sae.gamma, part.batch)

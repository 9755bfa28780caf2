"""One member of a family in training: its SAE, optimiser and counters, and its step."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from wsae.losses.gamma import gamma_from_proxy, latent_variance_proxy
from wsae.losses.reconstruction import auxk_loss, weighted_reconstruction_loss
from wsae.losses.weigh import weigh
from wsae.sae.config import BatchTopK
from wsae.sae.forward import Forward, training_forward
from wsae.sae.model import SparseAutoencoder
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.schedule import lr_factor

GAMMA_EVERY = 10
"""Steps between refreshes of a latent_variance gamma and of the set of dead latents."""
THRESHOLD_DECAY = 0.95
"""Per-step decay of batch Top-k's running threshold."""
SUMS = (
    "loss",
    "reconstruction",
    "auxk",
    "sse",
    "variance",
    "weighted_variance",
    "l0",
    "rows",
    "steps",
)


@dataclass
class MemberState:
    """Everything of a member that changes during training; `tensors()` is all of it."""

    name: str
    cfg: MemberConfig
    sae: SparseAutoencoder
    optimizer: torch.optim.Adam
    mean: Float[Tensor, " d_in"]
    """Mean activation, in scaled units: FVU is taken about it."""
    scale: float
    """Activations are divided by this power of two for training."""
    since_fired: Int64[Tensor, " d_sae"]
    """Tokens since each latent last fired."""
    dead: Bool[Tensor, " d_sae"]
    latent_moments: Float64[Tensor, "2 d_sae"]
    """Running mean of z and z^2, for the rule latent_variance."""
    sums: dict[str, Float64[Tensor, ""]] = field(default_factory=dict)
    """Sums since the last row of metrics."""

    def __post_init__(self) -> None:
        self.reset_sums()

    def reset_sums(self) -> None:
        """Start a new window of metrics."""
        self.sums = {name: torch.zeros((), dtype=torch.float64) for name in SUMS}


def make_member(
    name: str, cfg: MemberConfig, run: TrainConfig, mean: Float[Tensor, " d_in"], scale: float
) -> MemberState:
    """Return a member at its start: b_dec at the data's mean, encoder the decoder's transpose, gamma all 1."""
    d_in = len(mean)
    sae = SparseAutoencoder(cfg.sae_config(d_in), seed=run.seed if cfg.seed is None else cfg.seed)
    centre = (mean / scale).float()
    if sae.b_dec is not None:
        sae.b_dec.data.copy_(centre)
    d_sae = sae.cfg.d_sae
    parameters = [p for p in sae.parameters() if p.requires_grad]
    return MemberState(
        name=name,
        cfg=cfg,
        sae=sae,
        optimizer=torch.optim.Adam(parameters, lr=cfg.learning_rate(d_in), fused=True),
        mean=centre,
        scale=scale,
        since_fired=torch.zeros(d_sae, dtype=torch.int64),
        dead=torch.zeros(d_sae, dtype=torch.bool),
        latent_moments=torch.zeros(2, d_sae, dtype=torch.float64),
    )


class Batch(NamedTuple):
    """One step's activations, scaled, and what all members need of them."""

    x: Float[Tensor, "batch d_in"]
    deviation: Float[Tensor, " d_in"]
    """Sum over the rows of the squared deviation from the data's mean, per dimension."""


def make_batch(x: Float[Tensor, "batch d_in"], member: MemberState) -> Batch:
    """Scale activations for training; members of one hook share scale and mean."""
    scaled = x / member.scale
    return Batch(scaled, (scaled - member.mean).square_().sum(0))


def train_step(member: MemberState, batch: Batch, step: int, run: TrainConfig) -> None:
    """One optimiser step; metrics are summed into the member, nothing is read back."""
    sae, cfg, x = member.sae, member.cfg, batch.x
    forward = training_forward(sae, x, bf16=run.dtype == "bfloat16")
    reconstruction = weighted_reconstruction_loss(x, forward.x_hat, sae.gamma)
    revival = _revival(member, x, forward)
    loss = reconstruction + cfg.auxk * revival + cfg.l1 * forward.l1 + cfg.l0 * forward.l0
    member.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    rate = cfg.learning_rate(sae.cfg.d_in) * lr_factor(step, run.steps, run.warmup, run.decay)
    for group in member.optimizer.param_groups:
        group["lr"] = rate
    with torch.no_grad():
        _remove_radial_gradient(sae)
        member.optimizer.step()
        _unit_rows_(sae)
        _count(member, forward, len(x))
        _add_sums(member, batch, forward, (loss, reconstruction, revival))
        if (step + 1) % GAMMA_EVERY == 0:
            member.dead = member.since_fired > run.dead_tokens
        _track_latents(member, forward, step, run.latent_variance_decay)


def _revival(member: MemberState, x: Tensor, forward: Forward) -> Tensor:
    if member.cfg.auxk == 0:
        return x.new_zeros(())
    k_aux = member.cfg.k_aux or max(1, member.sae.cfg.d_in // 2)
    return auxk_loss(member.sae, x - forward.x_hat.detach(), forward, member.dead, k_aux)


def _remove_radial_gradient(sae: SparseAutoencoder) -> None:
    """Drop the part of the decoder's gradient along each row: the rows are kept at unit norm."""
    grad = sae.W_dec.grad
    if sae.cfg.tied or grad is None:
        return
    along = torch.linalg.vecdot(grad, sae.W_dec, dim=1)
    grad.addcmul_(sae.W_dec, along[:, None], value=-1)


def _unit_rows_(sae: SparseAutoencoder) -> None:
    if not sae.cfg.tied:
        norms = torch.linalg.vector_norm(sae.W_dec, dim=1, keepdim=True)
        sae.W_dec.div_(norms.clamp_min_(1e-12))


def _count(member: MemberState, forward: Forward, rows: int) -> None:
    code = forward.code
    fired = torch.zeros_like(member.dead)
    fired[code.indices[code.values > 0]] = True
    member.since_fired.add_(rows).masked_fill_(fired, 0)
    if isinstance(member.sae.cfg.activation, BatchTopK):
        positive = torch.where(code.values > 0, code.values, torch.inf)
        smallest = positive.min() if len(positive) else positive.new_tensor(torch.inf)
        old = member.sae.threshold
        moved = torch.where(old == 0, smallest, torch.lerp(smallest.double(), old, THRESHOLD_DECAY))
        old.copy_(torch.where(smallest.isfinite(), moved, old))


def _add_sums(
    member: MemberState, batch: Batch, forward: Forward, losses: tuple[Tensor, Tensor, Tensor]
) -> None:
    sums, unit, deviation = member.sums, member.scale**2, batch.deviation
    for name, value in zip(("loss", "reconstruction", "auxk"), losses, strict=True):
        sums[name] += value.detach().double() * unit
    sums["sse"] += F.mse_loss(forward.x_hat.detach(), batch.x, reduction="sum").double() * unit
    sums["variance"] += deviation.sum().double() * unit
    sums["weighted_variance"] += _weighted_variance(member, batch).double() * unit
    sums["l0"] += torch.count_nonzero(forward.code.values).double()
    sums["rows"] += len(batch.x)
    sums["steps"] += 1


def _weighted_variance(member: MemberState, batch: Batch) -> Tensor:
    """Return the sum over rows of ||Gamma (x - mean)||^2; a vector needs only the sums per dimension."""
    gamma = member.sae.gamma
    if gamma.ndim == 1:
        return (batch.deviation * gamma.square()).sum()
    return weigh(batch.x - member.mean, gamma).square().sum()


def _track_latents(member: MemberState, forward: Forward, step: int, decay: float) -> None:
    """Refresh a latent_variance gamma from the running variances of the latents."""
    if member.cfg.gamma.rule != "latent_variance":
        return
    code, d_sae = forward.code, member.sae.cfg.d_sae
    z = code.values.double()
    sums = [torch.bincount(code.indices, w, minlength=d_sae) for w in (z, z * z)]
    member.latent_moments.lerp_(torch.stack(sums) / code.batch, 1 - decay)
    if (step + 1) % GAMMA_EVERY == 0:
        mean, square = member.latent_moments / (1 - decay ** (step + 1))
        variance = (square - mean * mean).clamp_min(0) * member.scale**2
        proxy = latent_variance_proxy(variance, member.sae.W_dec.double())
        member.sae.gamma.copy_(gamma_from_proxy(member.cfg.gamma, proxy))


def metrics_row(member: MemberState) -> dict[str, float]:
    """Return the means of the window of metrics, in the activations' own units."""
    s = {name: float(value) for name, value in member.sums.items()}
    steps, rows = max(s["steps"], 1.0), max(s["rows"], 1.0)
    weighted = s["reconstruction"] * rows / steps  # reconstruction is a mean per row
    return {
        "loss": s["loss"] / steps,
        "reconstruction": s["reconstruction"] / steps,
        "auxk": s["auxk"] / steps,
        "fvu": s["sse"] / s["variance"] if s["variance"] else 0.0,
        "fvu_weighted": weighted / s["weighted_variance"] if s["weighted_variance"] else 0.0,
        "l0": s["l0"] / rows,
        "dead_frac": float(member.dead.double().mean()),
    }

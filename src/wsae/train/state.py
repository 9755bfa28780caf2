"""One member of a family in training: its SAE, optimiser and counters, and the batches it is given."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from wsae.losses.gamma import gamma_from_proxy, latent_variance_proxy
from wsae.losses.reconstruction import weigh
from wsae.ops import SparseCode
from wsae.ops.native.weights import Weights
from wsae.sae.config import BatchTopK
from wsae.sae.model import SparseAutoencoder
from wsae.train.config import MemberConfig, TrainConfig

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
    """Everything of a member that changes during training; `wsae.train.checkpoint` keeps it."""

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
    spread: Float[Tensor, " d_in"]
    """Standard deviation per dimension, in scaled units: the compiled kernels round by it."""
    sparse: Bool[Tensor, ""]
    """Whether few enough latents are active for the compiled kernels (ReLU and JumpReLU; Top-k always)."""
    weights: Weights | None = None
    """The large tensors while the compiled kernels train them; the SAE's own are empty then."""
    sums: dict[str, Float64[Tensor, ""]] = field(default_factory=dict)
    """Sums since the last row of metrics."""

    def __post_init__(self) -> None:
        self.reset_sums()

    def reset_sums(self) -> None:
        """Start a new window of metrics."""
        self.sums = {name: torch.zeros((), dtype=torch.float64) for name in SUMS}


def make_member(
    name: str,
    cfg: MemberConfig,
    run: TrainConfig,
    mean: Float[Tensor, " d_in"],
    scale: float,
    spread: Float[Tensor, " d_in"] | None = None,
) -> MemberState:
    """Return a member at its start: b_dec at the data's mean, encoder along the decoder, gamma all 1.

    `mean` and `spread` (standard deviations; by default equal ones) are in the activations' own units.
    """
    d_in = len(mean)
    seed = run.seed if cfg.seed is None else cfg.seed
    sae = SparseAutoencoder(cfg.sae_config(d_in), seed, cfg.start_scale())
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
        spread=torch.ones(d_in, dtype=torch.float32)
        if spread is None
        else (spread / scale).float(),
        sparse=torch.tensor(hasattr(cfg.activation, "k")),
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


# What a step counts: firing latents, the batch Top-k threshold, sums for the metrics, running
# latent variances.

GAMMA_EVERY = 10
"""Steps between refreshes of a latent_variance gamma and of the set of dead latents."""
THRESHOLD_DECAY = 0.95
"""Per-step decay of batch Top-k's running threshold."""


class StepResult(NamedTuple):
    """What one step found, detached."""

    code: SparseCode
    loss: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]
    revival: Float[Tensor, ""]
    sse: Float[Tensor, ""]
    """Sum over the batch of |x_hat - x|^2, in scaled units."""


def count(member: MemberState, code: SparseCode, rows: int) -> None:
    """Note which latents fired and, for batch Top-k, move the threshold of inference."""
    fired = torch.zeros_like(member.dead)
    fired[code.indices[code.values > 0]] = True
    member.since_fired.add_(rows).masked_fill_(fired, 0)
    if isinstance(member.sae.cfg.activation, BatchTopK):
        follow_threshold(member.sae.threshold, smallest_active(code))


def smallest_active(code: SparseCode) -> Float[Tensor, ""]:
    """Return the smallest positive value of a batch's code, infinity where no latent is active."""
    positive = torch.where(code.values > 0, code.values, torch.inf)
    return positive.min() if len(positive) else positive.new_tensor(torch.inf)


def follow_threshold(
    threshold: Float64[Tensor, "*members"], smallest: Float[Tensor, "*members"]
) -> None:
    """Move batch Top-k's threshold of inference to a batch's smallest active value, where it has one."""
    smallest = smallest.double()
    moved = torch.lerp(smallest, threshold, THRESHOLD_DECAY)
    moved = torch.where(threshold == 0, smallest, moved)
    threshold.copy_(torch.where(smallest.isfinite(), moved, threshold))


def add_sums(member: MemberState, batch: Batch, result: StepResult) -> None:
    """Add a step to the window of metrics, in the activations' own units."""
    sums, unit, deviation = member.sums, member.scale**2, batch.deviation
    sums["loss"] += result.loss.double() * unit
    sums["reconstruction"] += result.reconstruction.double() * unit
    sums["auxk"] += result.revival.double() * unit
    sums["sse"] += result.sse.double() * unit
    sums["variance"] += deviation.sum().double() * unit
    sums["weighted_variance"] += _weighted_variance(member, batch).double() * unit
    sums["l0"] += torch.count_nonzero(result.code.values).double()
    sums["rows"] += len(batch.x)
    sums["steps"] += 1


def _weighted_variance(member: MemberState, batch: Batch) -> Tensor:
    """Return the sum over rows of ||Gamma (x - mean)||^2; a vector needs only the sums per dimension."""
    gamma = member.sae.gamma
    if gamma.ndim == 1:
        return (batch.deviation * gamma.square()).sum()
    return weigh(batch.x - member.mean, gamma).square().sum()


def follow_latents(member: MemberState, code: SparseCode, step: int, decay: float) -> bool:
    """Keep the running variances of the latents for the rule latent_variance; return whether gamma is due."""
    if member.cfg.gamma.rule != "latent_variance":
        return False
    sums = moment_sums(code, member.sae.cfg.d_sae)
    member.latent_moments.lerp_(sums / code.batch, 1 - decay)
    return (step + 1) % GAMMA_EVERY == 0


def moment_sums(code: SparseCode, d_sae: int) -> Float64[Tensor, "2 d_sae"]:
    """Return the sums over a batch of z and z^2 of every latent."""
    z = code.values.double()
    return torch.stack([torch.bincount(code.indices, w, minlength=d_sae) for w in (z, z * z)])


def latent_variance(
    moments: Float64[Tensor, "2 *latents"], step: int, decay: float
) -> Float64[Tensor, "*latents"]:
    """Return Var(z_j) from the running means of z and z^2 after step `step`, which began at 0."""
    mean, square = moments / (1 - decay ** (step + 1))
    return (square - mean * mean).clamp_min(0)


def refresh_gamma(
    member: MemberState, W_dec: Float[Tensor, "d_sae d_in"], step: int, decay: float
) -> None:
    """Set a latent_variance gamma from the running variances of the latents."""
    variance = latent_variance(member.latent_moments, step, decay) * member.scale**2
    proxy = latent_variance_proxy(variance, W_dec.double())
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

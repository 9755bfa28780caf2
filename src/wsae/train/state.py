"""One member of a family in training: its SAE, optimiser and counters, and the batches it is given."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from wsae.ops.native.weights import Weights
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

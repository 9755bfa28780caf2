"""One member of a bank: an SAE to train, what it is, and the world it sees."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from wsae.sae.model import SparseAutoencoder
from wsae.train.config import MemberConfig


@dataclass
class Entry:
    """One SAE to train: it is changed in place. Its gamma is set, its b_dec at the data's mean (untied)."""

    sae: SparseAutoencoder
    cfg: MemberConfig
    world: int = 0
    """Which of the batches' worlds it sees."""
    dead: Bool[Tensor, " d_sae"] | None = None
    """Set by training: the latents that are dead at its end, where they are followed."""


def make_entry(
    cfg: MemberConfig,
    gamma: Float[Tensor, "..."],
    mean: Float[Tensor, " d_in"] | None = None,
    world: int = 0,
    seed: int = 0,
) -> Entry:
    """Return a member at its start, as a lone run would have it; `seed` serves where the member names none."""
    d_in = gamma.shape[-1]
    seed = seed if cfg.seed is None else cfg.seed
    sae = SparseAutoencoder(cfg.sae_config(d_in), seed, cfg.start_scale())
    sae.set_gamma(gamma.detach().float())
    if sae.b_dec is not None and mean is not None:
        sae.b_dec.data.copy_(mean)
    return Entry(sae, cfg, world)

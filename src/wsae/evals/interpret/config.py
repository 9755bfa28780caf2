"""Settings of auto-interpretability (torch-free)."""

from typing import Literal, get_args

from wsae.core.config import Config
from wsae.evals.config import Count, Fraction, Size

Free = Literal["embedding", "surprisal"]
"""Scores that need no language model that follows instructions."""
Asked = Literal["detection", "fuzzing", "simulation"]
"""Scores that ask one."""
Score = Free | Asked
FREE: tuple[Score, ...] = get_args(Free)
Control = Literal["random_sae", "random_model", "neurons", "pca", "shuffled"]


class ContextConfig(Config):
    """Which contexts stand for a latent."""

    width: Count = 32
    """Tokens per window; windows tile a sequence and never straddle two documents."""
    n_latents: Count = 200
    """Latents per member, one drawn from each of as many equal-count strata of density."""
    min_windows: Count = 20
    """A latent with fewer activating windows on either side is skipped, and counted."""
    n_top: Size = 5
    """Explaining windows of largest activation."""
    n_quantile: Size = 10
    """Explaining windows spread over the quantiles of activation."""
    n_score: Count = 20
    """Activating windows to score on, spread over the quantiles; as many random ones in which the latent is silent."""
    n_hard: Size = 20
    """Silent windows in which a neighbouring latent (decoder cosine) is active."""
    reservoir: Count = 100
    """Random activating windows kept per latent and side, from which quantiles are taken."""
    pool: Count = 2048
    """Random windows kept per side, the same for all latents."""
    seed: int = 0


class FragmentConfig(Config):
    """What simulation is scored on."""

    width: Count = 64
    """Tokens of a fragment."""
    limit: Count = 50_000
    """Fragments looked at, one per document."""
    batch_size: Count = 2048
    """Rows read at once."""
    seed: int = 0


class InterpretConfig(Config):
    """What is scored, and how sure the numbers are."""

    contexts: ContextConfig = ContextConfig()
    scores: tuple[Score, ...] = ("embedding", "surprisal")
    """What is measured; detection, fuzzing and simulation ask a language model."""
    controls: tuple[Control, ...] = ()
    """What the scores are compared with."""
    hooks: tuple[str, ...] = ()
    """Hooks of the run; default: all."""
    members: tuple[str, ...] = ()
    """Members of the run; default: all. A weighted member brings its plain twin."""
    surprisal_latents: Count = 50
    """Latents per member scored by surprisal, which costs a model pass per window (the first of a seeded order)."""
    fragment_tokens: Count = 64
    """Tokens of the fragments that simulation is scored on."""
    keep_store: bool = False
    """Keep the activations that the control random_model harvests."""
    draws: Count = 2000
    """Bootstrap resamples of latents behind each interval."""
    confidence: Fraction = 0.95
    """Coverage of the intervals."""
    batch_size: Count = 2048
    """Rows encoded at once."""
    seed: int = 0

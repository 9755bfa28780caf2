"""Settings of an evaluation, and thresholds of the recovery scores (torch-free)."""

from typing import Annotated

from pydantic import Field, model_validator

from wsae.core.config import Config

Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=0)]
AtLeastZero = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class EvalConfig(Config):
    """How held-out data are measured, and how sure the numbers are."""

    batch_size: Count = 2048
    """Held-out rows encoded at once."""
    rows: Count | None = None
    """Held-out rows measured at most, the first ones; default: all. Fewer need splice-tokens 0."""
    draws: Count = 2000
    """Bootstrap resamples behind each interval."""
    confidence: Fraction = 0.95
    """Coverage of the intervals."""
    dense_threshold: Fraction = 0.1
    """A latent that fires on more than this share of tokens is dense."""
    assignment_max: Size = 8192
    """Latents up to which members are matched one-to-one optimally; beyond, by mutual nearest."""
    random_control: bool = True
    """Add an untrained SAE with random directions and the same L0, the floor of fvu."""
    n_latents: Size = 200
    """Latents per member whose contexts are collected, spread over the densities; 0 skips contexts."""
    n_contexts: Count = 8
    """Contexts per latent, each from another sequence."""
    window_tokens: Count = 24
    """Tokens shown per context, about two thirds of them before the strongest one."""
    splice_tokens: Size = 8192
    """Held-out tokens run through the model with reconstructions in place; 0 skips it."""
    splice_logits: Count = 1 << 27
    """Logits held at once while splicing; bounds memory (4 bytes each)."""
    replay_bytes: Size = 1 << 29
    """Held-out activations and codes kept in memory between the two passes; more are read or computed again."""
    seed: int = 0
    """Root of the bootstrap, the sampling of latents and the random control."""

    @model_validator(mode="after")
    def _splicing_needs_all_rows(self) -> "EvalConfig":
        if self.rows is not None and self.splice_tokens:
            raise ValueError(f"rows {self.rows}: splicing needs all rows; set splice_tokens to 0")
        return self


class RecoveryConfig(Config):
    """Where the recovery scores draw their lines; the paper states none of these values."""

    threshold: AtLeastZero = 1.0
    """A feature activates a latent when the sum M_j^i over samples exceeds this (Appendix B.3). In units of one
    sample at full strength, so what it means depends on the number of rows and on how often a feature is active."""
    mean_threshold: AtLeastZero = 0.05
    """The same for the mean response over the samples in which the feature is active."""
    relative_threshold: Fraction = 0.1
    """The same as a share of the latent's strongest mean response."""
    found_correlation: Fraction = 0.5
    """A feature with no latent correlated above this is missing."""
    seed: int = 0
    """Seed of the random directions behind mcc_direction_chance."""

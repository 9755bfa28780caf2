"""Thresholds of the recovery scores (torch-free)."""

from typing import Annotated

from pydantic import Field

from wsae.core.config import Config

Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
AtLeastZero = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


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

"""How a bank of small SAEs trains, as values. No torch here."""

from typing import Literal

from pydantic import Field, PositiveInt

from wsae.core.config import Config


class BankConfig(Config):
    """What all members of a bank share; what may differ is in each MemberConfig."""

    steps: PositiveInt = 5000
    """Optimiser steps."""
    warmup: float = Field(default=0.02, ge=0, le=1)
    """Share of the steps over which the learning rate rises from 0."""
    decay: float = Field(default=0.3, ge=0, le=1)
    """Share of the steps, at the end, over which it falls to 0."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam without weight decay, or plain gradient descent."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of weights and updates."""
    dead_after: PositiveInt | None = None
    """Rows without firing after which a latent counts as dead; by default a fifth of all rows."""
    latent_variance_decay: float = Field(default=0.99, gt=0, lt=1)
    """Per-step decay of the running latent variances behind the rule latent_variance."""
    count_dead: bool = False
    """Follow which latents are dead also where there is no revival."""
    log_every: PositiveInt = 50
    """Steps per row of the record of losses."""

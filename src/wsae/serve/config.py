"""What goes into a browser's index."""

from pydantic import Field

from wsae.core.config import Config


class IndexConfig(Config):
    """Sizes of the lists kept for every latent, and which latents get contexts."""

    neighbours: int = Field(default=12, ge=0, le=100)
    """Nearest latents of the same SAE, by decoder cosine."""
    logits: int = Field(default=10, ge=0, le=100)
    """Tokens a latent promotes most, and as many it demotes; 0 leaves the model alone."""
    contexts: int | None = Field(default=None, ge=0)
    """Latents of each member, spread over the densities, to collect contexts for, from the run's held-out data; 0:
    only those that the evaluation stored; default: all."""
    per_latent: int = Field(default=20, ge=1, le=64)
    """Strongest contexts collected for each of them."""
    samples: int = Field(default=10, ge=0, le=50)
    """Contexts over the quantiles of its activations beside these."""
    window: int = Field(default=24, ge=4, le=256)
    """Tokens in a collected context."""
    batch_size: int = Field(default=2048, ge=1)
    """Rows encoded at once while collecting."""
    seed: int = 0
    """Decides what is random: the samples, and which latents are collected."""

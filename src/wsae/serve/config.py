"""What goes into a browser's index."""

from pydantic import Field

from wsae.core.config import Config


class IndexConfig(Config):
    """Sizes of the lists kept for every latent, and how many more latents get contexts."""

    neighbours: int = Field(default=12, ge=0, le=100)
    """Nearest latents of the same SAE, by decoder cosine."""
    logits: int = Field(default=10, ge=0, le=100)
    """Tokens a latent promotes most, and as many it demotes; 0 leaves the model alone."""
    contexts: int = Field(default=0, ge=0)
    """Latents of each member, spread over the densities, to collect contexts for; 0: those that are stored."""
    per_latent: int = Field(default=8, ge=1, le=64)
    """Contexts collected for each of them."""
    window: int = Field(default=24, ge=4, le=256)
    """Tokens in a collected context."""
    batch_size: int = Field(default=2048, ge=1)
    """Rows encoded at once while collecting."""
    seed: int = 0
    """Decides which latents are collected."""

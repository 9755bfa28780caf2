"""Weighted reconstruction, dead-latent revival, and the rules that give the loss weights gamma."""

from wsae.losses.config import GammaConfig

__all__ = ["GammaConfig"]

"""One sparse autoencoder; its activation function is a value. The class is imported on first use (torch)."""

from typing import TYPE_CHECKING

from wsae.sae.config import (
    Activation,
    BatchTopK,
    GroupTopK,
    JumpReLU,
    ReLU,
    SAEConfig,
    TopK,
    make_activation,
)

if TYPE_CHECKING:
    from wsae.sae.model import SparseAutoencoder

__all__ = [
    "Activation",
    "BatchTopK",
    "GroupTopK",
    "JumpReLU",
    "ReLU",
    "SAEConfig",
    "SparseAutoencoder",
    "TopK",
    "make_activation",
]


def __getattr__(name: str) -> object:
    if name == "SparseAutoencoder":
        from wsae.sae.model import SparseAutoencoder

        return SparseAutoencoder
    raise AttributeError(f"module 'wsae.sae' has no attribute {name!r}")

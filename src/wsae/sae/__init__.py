"""One sparse autoencoder; its activation function is a value. The class is imported on first use (torch)."""

import importlib
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
    from wsae.sae.model import SAE, SparseAutoencoder

__all__ = [
    "Activation",
    "BatchTopK",
    "GroupTopK",
    "JumpReLU",
    "ReLU",
    "SAE",
    "SAEConfig",
    "SparseAutoencoder",
    "TopK",
    "make_activation",
]


def __getattr__(name: str) -> object:
    if name in ("SAE", "SparseAutoencoder"):
        return importlib.import_module("wsae.sae.model").SAE
    raise AttributeError(f"module 'wsae.sae' has no attribute {name!r}")

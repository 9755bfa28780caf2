"""One sparse autoencoder; its activation function is a value. What needs torch is imported on first use."""

import importlib
from typing import TYPE_CHECKING

from wsae.sae.config import (
    Activation,
    ActivationConfig,
    BatchTopK,
    Gated,
    GroupTopK,
    JumpReLU,
    Matryoshka,
    MultiTopK,
    ReLU,
    SAEConfig,
    TopK,
    make_activation,
)

if TYPE_CHECKING:
    from wsae.sae.architectures import Architecture, Parameter, architecture_of, register
    from wsae.sae.model import SAE, SparseAutoencoder

__all__ = [
    "Activation",
    "ActivationConfig",
    "Architecture",
    "BatchTopK",
    "Gated",
    "GroupTopK",
    "JumpReLU",
    "Matryoshka",
    "MultiTopK",
    "Parameter",
    "ReLU",
    "SAE",
    "SAEConfig",
    "SparseAutoencoder",
    "TopK",
    "architecture_of",
    "make_activation",
    "register",
]


def __getattr__(name: str) -> object:
    if name in ("SAE", "SparseAutoencoder"):
        return importlib.import_module("wsae.sae.model").SAE
    if name in ("Architecture", "Parameter", "architecture_of", "register"):
        return getattr(importlib.import_module("wsae.sae.architectures"), name)
    raise AttributeError(f"module 'wsae.sae' has no attribute {name!r}")

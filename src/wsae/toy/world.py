"""A world with known truth: features x by a law, and activations x_p = W_p x (paper Eq. 1)."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jaxtyping import Float, Float32, Shaped
from torch import Tensor

from wsae.core.errors import UserError
from wsae.ops import SparseCode
from wsae.theory.geometry import check_W_p
from wsae.toy.config import FeatureConfig
from wsae.toy.features import FeatureStream
from wsae.toy.model import ToyModels
from wsae.toy.sparse import embed_sparse, sample_sparse


@dataclass(frozen=True, eq=False)
class World:
    """A superposition matrix W_p [d_in, n_features] and the law of its features.

    Rows depend on (seed, step) alone. With `sparse` they come from the sparse sampler, whose cost follows the number
    of active entries: the same law, other draws. Raises UserError for a W_p that is not a finite matrix of as many
    columns as there are features, or that has a zero column, and for sparsity 1.
    """

    W_p: Shaped[Tensor, "..."]
    """[d_in, n_features], kept in float32; column i is the direction of feature i."""
    features: FeatureConfig
    sparse: bool = False

    def __post_init__(self) -> None:
        """Check the matrix, and keep it in float32."""
        matrix = check_W_p(self.W_p)
        if matrix.shape[1] != self.features.n_features:
            raise UserError(
                f"W_p has {matrix.shape[1]} columns for n_features = {self.features.n_features}; "
                "one column per feature"
            )
        if self.features.sparsity == 1:
            raise UserError(
                "sparsity 1: no feature is ever active, so x_p is always 0; use less than 1"
            )
        object.__setattr__(self, "W_p", matrix.float())

    @classmethod
    def of_toy_model(cls, models: ToyModels, index: int) -> "World":
        """Return the world that toy model `index` was trained in, seen through its W_p."""
        if not -len(models.configs) <= index < len(models.configs):
            raise UserError(f"toy model {index}: there are only {len(models.configs)}")
        return cls(models.W_p[index], models.configs[index].features)

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.W_p.shape[0]

    @property
    def n_features(self) -> int:
        """Number of true features."""
        return self.W_p.shape[1]

    def sample(
        self, rows: int, seed: int, step: int = 0
    ) -> tuple[Float32[Tensor, "rows n_features"], Float32[Tensor, "rows d_in"]]:
        """Return features x [rows, n_features] and activations x_p [rows, d_in]."""
        if self.sparse:
            code = self.sample_sparse(rows, seed, step)
            return code.dense(self.n_features), self.embed(code)
        x = FeatureStream([self.features], [seed], rows).batch(step)[0]
        return x, self.embed(x)

    def sample_sparse(self, rows: int, seed: int, step: int = 0) -> SparseCode:
        """Return the active entries of x, by the sparse sampler (the features of `sample` where `sparse` is set)."""
        return sample_sparse(self.features, rows, seed, step)

    def embed(
        self, features: Float[Tensor, "rows n_features"] | SparseCode
    ) -> Float32[Tensor, "rows d_in"]:
        """Return x_p = W_p x (Eq. 1), of dense features or of active entries."""
        if isinstance(features, SparseCode):
            return embed_sparse(self._by_feature.T, features)
        return features @ self.W_p.T

    def describe(self) -> dict[str, Any]:
        """Return the world as JSON: sizes, the law of the features, and a digest of W_p."""
        return {
            "d_in": self.d_in,
            "features": self.features.to_dict(),
            "sparse": self.sparse,
            "W_p": self.digest,
        }

    @cached_property
    def digest(self) -> str:
        """A name for W_p, to the bit."""
        sha = hashlib.sha256(repr(tuple(self.W_p.shape)).encode())
        sha.update(self.W_p.contiguous().numpy().data)
        return sha.hexdigest()

    @cached_property
    def _by_feature(self) -> Float32[Tensor, "n_features d_in"]:
        """W_p with one row per feature: what the sparse product reads."""
        return self.W_p.T.contiguous()

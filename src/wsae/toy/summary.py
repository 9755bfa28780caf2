"""What superposition looks like in a trained W_p: norms, dimensionality, signs of interference, variances."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from wsae.core.errors import UserError
from wsae.toy.config import FeatureConfig, Independent
from wsae.toy.draws import feature_moments


@dataclass(frozen=True)
class Superposition:
    """Measures of a matrix W_p [d_in, n_features] whose columns W_i are feature directions."""

    norms: Float64[Tensor, " n_features"]
    """||W_i||: 1 for a feature that is represented, near 0 for one that is not."""
    dimensionality: Float64[Tensor, " n_features"]
    """D_i = ||W_i||^2 / sum_j (W_i . W_j / ||W_i||)^2, the share of a dimension that feature i has (Elhage et al.).

    1 alone, 1/2 in an antipodal pair, 2/5 in a pentagon; 0 for a zero column.
    """
    positive_share: float
    """Share of the pairs of represented features with W_i . W_j > `tolerance`: the paper's theory assumes 0."""
    negative_share: float
    """Share of those pairs with W_i . W_j < -`tolerance`."""
    represented: int
    """Number of features with ||W_i|| > `above`."""


def superposition(
    W_p: Float[Tensor, "d_in n_features"], above: float = 0.5, tolerance: float = 0.01
) -> Superposition:
    """Return the measures of one W_p; pairs are counted among features with ||W_i|| > `above`."""
    W = W_p.double().cpu()
    norms = W.norm(dim=0)
    gram = W.T @ W
    shared = gram.square().sum(1)  # ||W_i||^2 sum_j (W_i/||W_i|| . W_j)^2
    dimensionality = torch.where(shared > 0, norms.pow(4) / shared.clamp_min(1e-300), 0.0)
    kept = norms > above
    pairs = gram[kept][:, kept]
    upper = pairs[tuple(torch.triu_indices(*pairs.shape, offset=1))]
    positive, negative = (upper > tolerance).sum(), (upper < -tolerance).sum()
    count = max(1, len(upper))
    return Superposition(
        norms, dimensionality, int(positive) / count, int(negative) / count, int(kept.sum())
    )


def acts_variance(
    W_p: Float[Tensor, "d_in n_features"], features: FeatureConfig
) -> Float64[Tensor, " d_in"]:
    """Return Var(x_p,i) = sum_j W_p[i, j]^2 Var(x_j), exact for independent features.

    Raises UserError for other structures, whose covariances it does not know.
    """
    if not isinstance(features.structure, Independent):
        raise UserError(
            f"structure '{features.structure.kind}': variances are known in closed form for independent features "
            "only; take SyntheticSource(world).stats()"
        )
    mean, second = feature_moments(features)
    return W_p.double().cpu().square() @ (second - mean.square())

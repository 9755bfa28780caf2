"""Average activated features (paper Appendix B.3): which features, each shown alone, switch a latent on.

    x^i = x_i e_i        M_j^i = sum over samples of h_j(x^i), h the latents of W_p x^i

The paper calls latent j activated by feature i when M_j^i exceeds a threshold, and states none. The sum shrinks with
the number of samples in which x_i > 0, so an absolute threshold on it lets the score fall as S -> 1 whatever the SAE
does. The other scores therefore look at the mean response over the samples in which the feature is active,

    R_j^i = E[h_j(x^i) | x_i > 0],

which in a world of independent features does not depend on S.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from wsae.evals.recovery.codes import mean_over
from wsae.evals.recovery.options import RecoveryConfig
from wsae.evals.recovery.spread import Scores
from wsae.evals.recovery.truth import GroundTruth
from wsae.sae import GroupTopK, ReLU, SparseAutoencoder, TopK

Encode = Callable[[Float[Tensor, "batch d_in"]], Float[Tensor, "batch d_sae"]]
_BLOCK = 1 << 22
"""Latents held at once while isolated inputs are encoded (16 MB in fp32)."""


class Isolated(NamedTuple):
    """What latents do when features are shown one at a time."""

    total: Float64[Tensor, "n d_sae"]
    """M_j^i, the sum over all samples."""
    response: Float64[Tensor, "n d_sae"]
    """R_j^i, the mean over the samples in which feature i is active; 0 where it never is."""


@torch.no_grad()
def isolated(
    truth: GroundTruth, W_p: Float64[Tensor, "d_in n"], sae: SparseAutoencoder
) -> Isolated:
    """Return M and R of an SAE: in closed form where its encoder is homogeneous, else by encoding."""
    dtype, device = sae.W_dec.dtype, sae.W_dec.device
    if is_homogeneous(sae):
        unit = sae.encode(W_p.T.to(device, dtype))
        return isolated_homogeneous(truth, unit.double().to(W_p.device))
    return isolated_encoded(truth, W_p, lambda x: sae.encode(x.to(device, dtype)))


def is_homogeneous(sae: SparseAutoencoder) -> bool:
    """Say whether h(c v) = c h(v) for every c > 0: no bias, no threshold."""
    biases = sae.biases
    free = biases is None or not any(bool(bias.any()) for bias in biases)
    return free and isinstance(sae.cfg.activation, ReLU | TopK | GroupTopK)


def isolated_homogeneous(truth: GroundTruth, unit: Float64[Tensor, "n d_sae"]) -> Isolated:
    """Return M and R from the latents `unit` of the columns of W_p: h_j(x_i W_p[:, i]) = x_i unit[i, j].

    For the tied ReLU SAE, unit = relu(W_p^T W_m^T).
    """
    total = truth.features.sum(0)[:, None] * unit
    return Isolated(total, total / truth.count.clamp_min(1)[:, None])


def isolated_encoded(
    truth: GroundTruth, W_p: Float64[Tensor, "d_in n"], encode: Encode
) -> Isolated:
    """Return M and R by encoding every isolated input x_i W_p[:, i], in blocks.

    Samples with x_i = 0 all have the input 0: it is encoded once and counted as often as it occurs in M, as the paper's
    sum over samples says; an encoder with biases may answer it with latents that are on.
    """
    silent = encode(W_p.new_zeros(1, len(W_p))).double().to(W_p.device)
    feature, row = truth.active.T.nonzero(as_tuple=True)
    strength = truth.features[row, feature]
    active = W_p.new_zeros(W_p.shape[1], silent.shape[1])
    size = max(1, _BLOCK // silent.shape[1])
    for start in range(0, len(feature), size):
        which = feature[start : start + size]
        z = encode(strength[start : start + size, None] * W_p.T[which])
        active.index_add_(0, which, z.double().to(W_p.device))
    zeros = (len(truth.features) - truth.count)[:, None] * silent
    return Isolated(active + zeros, active / truth.count.clamp_min(1)[:, None])


def activated_features(
    found: Isolated, cfg: RecoveryConfig
) -> tuple[Scores, dict[str, Float64[Tensor, " d_sae"]]]:
    """Return the average number of features that activate a latent, counted in four ways, and the counts per latent.

    sum: M > threshold (the paper's). mean: R > mean_threshold. relative: R > relative_threshold * max_i R.
    participation: (sum_i R)^2 / sum_i R^2, which needs no threshold. Means are over all latents, and (suffix _live)
    over those that some feature activates at all.
    """
    total, response = found
    strongest = response.amax(0)
    square = response.square().sum(0)
    counts = {
        "activated_sum": (total > cfg.threshold).sum(0).double(),
        "activated_mean": (response > cfg.mean_threshold).sum(0).double(),
        "activated_relative": (response > cfg.relative_threshold * strongest).sum(0).double(),
        "activated_participation": response.sum(0).square() / torch.where(square > 0, square, 1.0),
    }
    live = strongest > 0
    scores: Scores = {}
    for key, value in counts.items():
        scores[key] = float(value.mean())
        scores[f"{key}_live"] = mean_over(value, live)
    return scores, counts

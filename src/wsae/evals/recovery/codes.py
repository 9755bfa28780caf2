"""Does a latent follow a feature: correlation, detection, shrinking and vanishing, by the values of the code alone."""

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from wsae.evals.recovery.spread import Scores
from wsae.evals.recovery.sums import (
    Assignment,
    Sums,
    assign,
    of_latent,
    of_pair,
    quotient,
)
from wsae.evals.recovery.truth import GroundTruth

PerFeature = dict[str, Float64[Tensor, " n"]]


def correlations(truth: GroundTruth, found: Sums) -> Float64[Tensor, "n d_sae"]:
    """Return Pearson's correlation of every feature with every latent; 0 where either is constant."""
    rows = len(truth.features)
    covariance = found.overlap - rows * torch.outer(truth.moments.mean, found.moments.mean)
    scale = torch.outer(truth.moments.square, found.moments.square).sqrt()
    return quotient(covariance, scale).clamp(-1.0, 1.0)


def code_scores(
    truth: GroundTruth, found: Sums, found_correlation: float
) -> tuple[Scores, PerFeature, Assignment]:
    """Return the scores under the one-to-one assignment of largest total correlation, per feature too.

    Correlation, because it does not depend on the scale of a latent and is not won by latents that are always on.
    """
    correlation = correlations(truth, found)
    latent = assign(correlation)
    pair = of_pair(correlation, latent)
    best = correlation.amax(1)
    detection = detect(of_pair(found.hits, latent), of_latent(found.fired, latent), truth.count)
    detection["vanished"] = 1 - detection["recall"]
    shrinkage = conditional_ratio(truth, found, latent)
    scores = {
        "mcc_code": mean_over(pair, (latent >= 0) & truth.varying),
        "best_correlation": mean_over(best, truth.varying),
        "missing_frac": mean_over((best < found_correlation).double(), truth.varying),
        **{key: mean_over(value, truth.seen) for key, value in detection.items()},
        "shrinkage_code": mean_over(shrinkage, truth.seen),
    }
    per_feature = {
        "count": truth.count,
        "correlation": _known(pair, truth.varying),
        "best_correlation": _known(best, truth.varying),
        **{key: _known(value, truth.seen) for key, value in detection.items()},
        "shrinkage_code": _known(shrinkage, truth.seen),
    }
    return scores, per_feature, latent


def conditional_ratio(truth: GroundTruth, found: Sums, latent: Assignment) -> Float64[Tensor, " n"]:
    """Return E[z_m(i) | x_i > 0] / E[x_i | x_i > 0] per feature; 0 for a feature that is never active."""
    return quotient(of_pair(found.strength, latent), truth.features.sum(0))


def mean_over(values: Float64[Tensor, " n"], chosen: Bool[Tensor, " n"]) -> float:
    """Return the mean of the chosen values; 0 when none is."""
    return float(values[chosen].mean()) if bool(chosen.any()) else 0.0


def detect(
    hits: Float64[Tensor, " n"], fired: Float64[Tensor, " n"], present: Float64[Tensor, " n"]
) -> PerFeature:
    """Return precision = hits / fired, recall = hits / present and F1, their harmonic mean; 0 where undefined."""
    precision, recall = quotient(hits, fired), quotient(hits, present)
    f1 = quotient(2 * precision * recall, precision + recall)
    return {"precision": precision, "recall": recall, "f1": f1}


def _known(values: Tensor, chosen: Tensor) -> Tensor:
    return torch.where(chosen, values, torch.nan)

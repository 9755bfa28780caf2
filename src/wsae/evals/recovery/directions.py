"""Do decoder rows point along the true directions, the columns of W_p; in SAELens' definitions where it has one."""

import torch
from jaxtyping import Float64
from torch import Tensor

from wsae.core.seeds import seed_for
from wsae.evals.recovery.codes import PerFeature, conditional_ratio, detect
from wsae.evals.recovery.spread import Scores
from wsae.evals.recovery.sums import Assignment, Sums, assign, of_latent
from wsae.evals.recovery.truth import GroundTruth


def cosines(
    W_p: Float64[Tensor, "d_in n"], W_dec: Float64[Tensor, "d_sae d_in"]
) -> Float64[Tensor, "n d_sae"]:
    """Return cos(W_p[:, i], W_dec[j]) for every feature and latent; 0 for a vector of length 0."""
    columns = torch.nn.functional.normalize(W_p, dim=0, eps=1e-8)
    return columns.T @ torch.nn.functional.normalize(W_dec, dim=1, eps=1e-8).T


def matched_mean(
    similarity: Float64[Tensor, "n d_sae"],
) -> tuple[float, Float64[Tensor, " n"], Assignment]:
    """Return the mean over the min(n, d_sae) best one-to-one pairs, each feature's value and latent.

    A feature without a latent has the value NaN.
    """
    latent = assign(similarity)
    value = similarity.gather(1, latent.clamp_min(0)[:, None])[:, 0]
    value = torch.where(latent >= 0, value, torch.nan)
    return float(value.nanmean()), value, latent


def chance_mcc(W_p: Float64[Tensor, "d_in n"], d_sae: int, seed: int) -> float:
    """Return the MCC that d_sae random directions reach against W_p; in few dimensions it is far above 0."""
    generator = torch.Generator().manual_seed(seed_for(seed, "recovery", "chance"))
    random = torch.randn(d_sae, len(W_p), dtype=torch.float64, generator=generator)
    return matched_mean(cosines(W_p, random.to(W_p.device)).abs())[0]


def direction_scores(
    truth: GroundTruth,
    found: Sums,
    W_dec: Float64[Tensor, "d_sae d_in"],
    W_p: Float64[Tensor, "d_in n"],
    seed: int,
) -> tuple[Scores, PerFeature, dict[str, Assignment]]:
    """Return the direction scores, each feature's cosines, and the assignments of |cos| and of signed cos."""
    cosine = cosines(W_p, W_dec)
    absolute = cosine.abs()
    mcc, value, latent = matched_mean(absolute)
    signed, signed_value, signed_latent = matched_mean(cosine)
    nearest = absolute.argmax(0)
    scores = {
        "mcc_direction": mcc,
        "mcc_direction_signed": signed,
        "mcc_direction_chance": chance_mcc(W_p, len(W_dec), seed),
        "uniqueness": len(nearest.unique()) / len(nearest),
        **_latent_detection(truth, found, nearest),
    }
    per_feature = {"cosine": value, "cosine_signed": signed_value}
    return scores, per_feature, {"direction": latent, "direction_signed": signed_latent}


def length_shrinkage(
    truth: GroundTruth,
    found: Sums,
    W_dec: Float64[Tensor, "d_sae d_in"],
    W_p: Float64[Tensor, "d_in n"],
    latent: Assignment,
) -> tuple[float, Float64[Tensor, " n"]]:
    """Return how long a latent's output is against its feature's input, over all features and for each.

        sum_i E[z_m(i) | x_i > 0] |W_dec[m(i)]| / sum_i E[x_i | x_i > 0] |W_p[:, i]|

    The lengths make it blind to how a scale is shared between code and decoder. A ratio of sums, so that features
    that the world hardly represents (short columns) do not decide it. NaN for a feature that is never active or has a
    column of length 0.
    """
    lengths = of_latent(W_dec.norm(dim=1), latent)
    columns = W_p.norm(dim=0)
    strength = truth.features.sum(0) / truth.count.clamp_min(1)
    ratio = conditional_ratio(truth, found, latent)
    out, into = float((ratio * strength * lengths).sum()), float((strength * columns).sum())
    each = torch.where(truth.seen & (columns > 0), ratio * lengths / columns, torch.nan)
    return out / into if into > 0 else 0.0, each


def _latent_detection(truth: GroundTruth, found: Sums, nearest: Tensor) -> Scores:
    """Each latent as a detector of the feature nearest in direction: means over all latents, dead ones included."""
    hits = found.hits.gather(0, nearest[None])[0]
    present = truth.count[nearest]
    scores = {
        f"latent_{key}": float(value.mean())
        for key, value in detect(hits, found.fired, present).items()
    }
    wrong = (found.fired - hits) + (present - hits)
    return {**scores, "latent_accuracy": 1 - float(wrong.mean()) / len(truth.features)}

"""All recovery scores of one SAE: `recovery` for an SAE, `score_codes` for codes that are already there."""

from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64, Shaped
from torch import Tensor

from wsae.core.calls import own_settings
from wsae.core.errors import UserError
from wsae.evals.recovery.codes import code_scores
from wsae.evals.recovery.directions import direction_scores, length_shrinkage
from wsae.evals.recovery.glossary import RECOVERY
from wsae.evals.recovery.isolated import Isolated, activated_features, isolated
from wsae.evals.recovery.loss import ground_truth_losses, pair_errors
from wsae.evals.recovery.options import RecoveryConfig
from wsae.evals.recovery.reference import ground_truth
from wsae.evals.recovery.spread import Scores, spread
from wsae.evals.recovery.sums import Sums, sums
from wsae.evals.recovery.truth import GroundTruth, Matrix, matrix, two_dimensional
from wsae.sae import SparseAutoencoder


@dataclass(frozen=True)
class Codes:
    """What one SAE made of the rows of a ground truth."""

    latents: Shaped[Tensor, "..."]
    """z [rows, d_sae]."""
    W_dec: Shaped[Tensor, "..."]
    """Decoder rows [d_sae, d_in]."""
    x_hat: Shaped[Tensor, "..."] | None = None
    """The reconstruction [rows, d_in], for sae_loss, fvu and norm_ratio."""
    isolated: Isolated | None = None
    """Latents of features shown one at a time, for the activated_* scores (`wsae.evals.recovery.isolated`)."""


@dataclass(frozen=True)
class Recovery:
    """How much of the ground truth an SAE recovers."""

    scores: dict[str, float]
    """Flat; `recovery_glossary()` explains every key."""
    per_feature: dict[str, Float64[Tensor, " n"]]
    """count, correlation, best_correlation, precision, recall, f1, vanished, shrinkage_code, loss_matched and, with
    W_p, cosine, cosine_signed, shrinkage_length. NaN where a feature has no value."""
    per_latent: dict[str, Float64[Tensor, " d_sae"]]
    """Number of features that activate each latent, by activated_*; empty without W_p."""
    assignment: dict[str, Int64[Tensor, " n"]]
    """Latent of each feature (-1: none), for code, matched, padded, scaled and, with W_p, direction and
    direction_signed."""


@own_settings()
@torch.no_grad()
def recovery(
    sae: SparseAutoencoder,
    features: Matrix,
    acts: Matrix,
    W_p: Matrix | None = None,
    **options: float | int,
) -> Recovery:
    """Score an SAE against ground-truth features x [rows, n] behind activations x_p [rows, d_in] (paper Eq. 1).

    `W_p` [d_in, n] holds the features' directions as columns; scores that need it are absent without it. `options`
    are those of RecoveryConfig (threshold, mean_threshold, relative_threshold, found_correlation, seed). Raises
    UserError for shapes that do not fit, values that are not finite, negative features, or features without signal.
    """
    cfg = RecoveryConfig.parse(dict(options), where="recovery")
    if not isinstance(sae, SparseAutoencoder):
        raise UserError(
            f"recovery: given {type(sae).__name__} in place of an SAE; SparseAutoencoder.load(path)"
        )
    truth = ground_truth(features, acts, W_p)
    if truth.acts is None:
        raise UserError(
            "acts: given as None; give the activations [rows, d_in] behind the features"
        )
    x = truth.acts.to(sae.W_dec.device, sae.W_dec.dtype)
    latents = sae.encode(x)
    alone = None if truth.W_p is None else isolated(truth, truth.W_p, sae)
    return score_codes(truth, Codes(latents, sae.W_dec, sae.decode(latents), alone), cfg)


@own_settings()
@torch.no_grad()
def score_codes(
    truth: GroundTruth,
    codes: Codes,
    cfg: RecoveryConfig = RecoveryConfig(),  # noqa: B008  (frozen)
) -> Recovery:
    """Score codes against a ground truth; scores whose ingredients are missing are absent.

    `truth` is made once per world and serves any number of SAEs. Raises UserError when shapes do not fit or a latent is
    not finite.
    """
    z = two_dimensional("latents", codes.latents, "[rows, d_sae]").to(truth.features.device)
    z = z if z.is_floating_point() else z.double()
    W_dec = matrix("W_dec", codes.W_dec, "[d_sae, d_in]").to(z.device)
    _check(truth, z, W_dec)
    found = sums(truth, z)
    losses, assignment = ground_truth_losses(truth, found)
    code, per_feature, latent = code_scores(truth, found, cfg.found_correlation)
    scores: Scores = {**losses, **truth.reference, **code}
    error = pair_errors(truth, found, assignment["matched"])[0]
    per_feature["loss_matched"] = error / len(z)
    assignment = {"code": latent, **assignment}
    if truth.W_p is not None:
        ratio, each = length_shrinkage(truth, found, W_dec, truth.W_p, latent)
        direction, cosine, ways = direction_scores(truth, found, W_dec, truth.W_p, cfg.seed)
        scores |= {"shrinkage_length": ratio, **direction}
        per_feature |= {"shrinkage_length": each, **cosine}
        assignment |= ways
    per_latent: dict[str, Tensor] = {}
    if codes.isolated is not None:
        activated, per_latent = activated_features(codes.isolated, cfg)
        scores |= activated
    scores |= {**spread("latent", found.moments, len(z)), **_context(truth, found, codes.x_hat)}
    return Recovery(
        {key: scores[key] for key in RECOVERY if key in scores}, per_feature, per_latent, assignment
    )


def _context(truth: GroundTruth, found: Sums, x_hat: Tensor | None) -> Scores:
    """L0, dead latents and, where there is a reconstruction, how good it is."""
    rows = len(truth.features)
    scores = {
        "l0": float(found.fired.sum()) / rows,
        "dead_frac": float((found.fired == 0).double().mean()),
    }
    if truth.acts is None or x_hat is None:
        return scores
    x_p, x_hat = truth.acts, matrix("x_hat", x_hat, "[rows, d_in]").to(truth.features.device)
    if x_hat.shape != x_p.shape:
        raise UserError(f"x_hat has shape {tuple(x_hat.shape)} where acts have {tuple(x_p.shape)}")
    error = float((x_p - x_hat).square().sum())
    spread_p = float((x_p - x_p.mean(0)).square().sum())
    norm = x_p.norm(dim=1)
    there = norm > 1e-6  # as SAELens: a ratio of lengths needs a length
    ratio = x_hat.norm(dim=1)[there] / norm[there]
    return {
        **scores,
        "sae_loss": error / rows,
        "fvu": error / spread_p if spread_p > 0 else 0.0,
        "norm_ratio": float(ratio.mean()) if len(ratio) else 0.0,
    }


def _check(truth: GroundTruth, z: Tensor, W_dec: Tensor) -> None:
    if len(z) != len(truth.features):
        raise UserError(
            f"latents have {len(z)} rows but features have {len(truth.features)}; rows must agree"
        )
    if len(W_dec) != z.shape[1]:
        raise UserError(
            f"W_dec has {len(W_dec)} rows but there are {z.shape[1]} latents; give W_dec [d_sae, d_in]"
        )
    d_in = None if truth.acts is None else truth.acts.shape[1]
    if d_in is not None and W_dec.shape[1] != d_in:
        raise UserError(f"W_dec has {W_dec.shape[1]} columns but acts have {d_in}; they must agree")

"""All recovery scores of one SAE: `recovery` for an SAE, `score_codes` for codes that are already there."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from torch import Tensor

from wsae.core.calls import own_settings
from wsae.core.errors import UserError
from wsae.core.seeds import seed_for
from wsae.evals.recovery.glossary import RECOVERY
from wsae.evals.recovery.options import RecoveryConfig
from wsae.evals.recovery.truth import (
    ROWS,
    ColumnMoments,
    GroundTruth,
    Matrix,
    Scores,
    check_finite,
    checked_truth,
    matrix,
    moments,
    spread,
    two_dimensional,
)
from wsae.sae import GroupTopK, ReLU, SparseAutoencoder, TopK

# The sums over rows from which every score of a code follows: four products, never a [rows, n,
# d_sae] tensor.

Assignment = Int64[Tensor, " n"]
"""Latent of each feature; -1 where it has none (more features than latents)."""


@dataclass(frozen=True)
class Sums:
    """Sums over rows t of features x, their activity a = [x > 0] and latents z, for every pair (i, j)."""

    overlap: Float64[Tensor, "n d_sae"]
    """sum_t x_ti z_tj."""
    strength: Float64[Tensor, "n d_sae"]
    """sum_t a_ti z_tj."""
    active_energy: Float64[Tensor, "n d_sae"]
    """sum_t a_ti z_tj^2."""
    hits: Float64[Tensor, "n d_sae"]
    """sum_t a_ti [z_tj != 0]."""
    energy: Float64[Tensor, " d_sae"]
    """sum_t z_tj^2."""
    fired: Float64[Tensor, " d_sae"]
    """sum_t [z_tj != 0]."""
    moments: ColumnMoments
    """Mean and central moments of each latent."""


def sums(truth: GroundTruth, latents: Float[Tensor, "rows d_sae"]) -> Sums:
    """Return the sums of latents [rows, d_sae] (any precision), in fp64.

    Raises UserError for a latent that is not finite.
    """
    x, a = truth.features, truth.active
    overlap, strength, active_energy, hits = x.new_zeros(4, x.shape[1], latents.shape[1])
    energy, fired, total = x.new_zeros(3, latents.shape[1])
    for at, block in enumerate(latents.split(ROWS)):
        rows = slice(at * ROWS, at * ROWS + len(block))
        z = block.double()
        fires, square = (z != 0).double(), z.square()
        overlap.addmm_(x[rows].T, z)
        strength.addmm_(a[rows].T, z)
        active_energy.addmm_(a[rows].T, square)
        hits.addmm_(a[rows].T, fires)
        energy += square.sum(0)
        fired += fires.sum(0)
        total += z.sum(0)
    if not bool(torch.isfinite(energy).all()):
        check_finite("latents", latents)
    spread = moments(latents, total / len(latents))
    return Sums(overlap, strength, active_energy, hits, energy, fired, spread)


def assign(gain: Float64[Tensor, "n d_sae"]) -> Assignment:
    """Return the one-to-one assignment of min(n, d_sae) pairs with the largest total gain (Hungarian method)."""
    from scipy.optimize import linear_sum_assignment  # takes a third of a second, needed here only

    rows, columns = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    latent = torch.full((len(gain),), -1, dtype=torch.int64)
    latent[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return latent.to(gain.device)


def of_pair(table: Float64[Tensor, "n d_sae"], latent: Assignment) -> Float64[Tensor, " n"]:
    """Return table[i, latent(i)] for every feature i; 0 where it has no latent."""
    value = table.gather(1, latent.clamp_min(0)[:, None])[:, 0]
    return torch.where(latent >= 0, value, 0.0)


def of_latent(values: Float64[Tensor, " d_sae"], latent: Assignment) -> Float64[Tensor, " n"]:
    """Return values[latent(i)] for every feature i; 0 where it has no latent."""
    return torch.where(latent >= 0, values[latent.clamp_min(0)], 0.0)


def quotient(top: Float64[Tensor, "..."], bottom: Float64[Tensor, "..."]) -> Float64[Tensor, "..."]:
    """Return top / bottom, and 0 where bottom is 0."""
    return torch.where(bottom != 0, top / torch.where(bottom != 0, bottom, 1.0), 0.0)


# Does a latent follow a feature: correlation, detection, shrinking and vanishing, by the values of
# the code alone.

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


# Do decoder rows point along the true directions, the columns of W_p; in SAELens' definitions where
# it has one.


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


# Average activated features (paper Appendix B.3): which features, each shown alone, switch a latent
# on.
#
# x^i = x_i e_i M_j^i = sum over samples of h_j(x^i), h the latents of W_p x^i
#
# The paper calls latent j activated by feature i when M_j^i exceeds a threshold, and states none.
# The sum shrinks with the number of samples in which x_i > 0, so an absolute threshold on it lets
# the score fall as S -> 1 whatever the SAE does. The other scores therefore look at the mean
# response over the samples in which the feature is active,
#
# R_j^i = E[h_j(x^i) | x_i > 0],
#
# which in a world of independent features does not depend on S.

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
    """Return whether h(c v) = c h(v) for every c > 0: no bias, no threshold."""
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


# Ground-truth reconstruction (paper Eq. 10): how far latents z are from the features x themselves.
#
# L_GT = E_x ||x - z||^2 latent j taken as feature j; latents beyond n compared with 0 (Eq. 7)
#
# A trained SAE has its latents in no particular order, so the loss is also taken after the best
# one-to-one assignment of latents to features. The squared error of a pair comes from sums over
# rows,
#
# sum_t (x_ti - c z_tj)^2 = sum_t x_ti^2 - 2 c sum_t x_ti z_tj + c^2 sum_t z_tj^2,
#
# and on the active entries alone with sum_t [x_ti > 0] z_tj^2 in the last term; exact to 1e-15 of
# the first term.


def ground_truth_losses(truth: GroundTruth, found: Sums) -> tuple[Scores, dict[str, Assignment]]:
    """Return the losses gt_raw, gt_matched, gt_padded and gt_scaled, and the assignments behind the last three.

    matched minimises E sum_i (x_i - z_m(i))^2 and ignores latents left over; padded adds their E z_j^2 and minimises
    the sum (Eq. 7); scaled minimises E sum_i (x_i - c_i z_m(i))^2 with the best c_i >= 0 of each pair. The active
    entries are always judged under the assignment of all entries: a feature has one latent. raw is absent when
    d_sae < n.
    """
    n, d_sae = found.overlap.shape
    matched = assign(2 * found.overlap - found.energy)
    # With n >= d_sae no latent is left over, so both sums have the same minimiser.
    padded = assign(found.overlap) if d_sae > n else matched
    scaled = assign(quotient(found.overlap.clamp_min(0).square(), found.energy))
    scores: Scores = {}
    if d_sae >= n:
        scores |= raw_loss(truth, found)
    scores |= loss_parts("gt_matched", truth, *pair_errors(truth, found, matched))
    total, active = pair_errors(truth, found, padded)
    scores |= loss_parts("gt_padded", truth, total, active, _left_over(found, padded))
    scale = least_squares_scale(found, scaled)
    scores |= loss_parts("gt_scaled", truth, *pair_errors(truth, found, scaled, scale))
    return scores, {"matched": matched, "padded": padded, "scaled": scaled}


def raw_loss(truth: GroundTruth, found: Sums) -> Scores:
    """Return the loss of Eq. 10 as written, latent i for feature i; raises UserError when d_sae < n."""
    n, d_sae = found.overlap.shape
    if d_sae < n:
        raise UserError(
            f"the raw ground-truth loss (Eq. 10) takes latent i as feature i, but d_sae = {d_sae} is below "
            f"n_features = {n}; use the matched loss"
        )
    order = torch.arange(n, device=found.overlap.device)
    total, active = pair_errors(truth, found, order)
    return loss_parts("gt_raw", truth, total, active, _left_over(found, order))


def pair_errors(
    truth: GroundTruth,
    found: Sums,
    latent: Assignment,
    scale: Float64[Tensor, " n"] | None = None,
) -> tuple[Float64[Tensor, " n"], Float64[Tensor, " n"]]:
    """Return sum_t (x_ti - c_i z_tm(i))^2 per feature, over all rows and over rows with x_ti > 0.

    Without `scale`, c = 1.
    """
    c = torch.ones_like(truth.energy) if scale is None else scale
    common = truth.energy - 2 * c * of_pair(found.overlap, latent)
    total = common + c.square() * of_latent(found.energy, latent)
    active = common + c.square() * of_pair(found.active_energy, latent)
    return total.clamp_min(0), active.clamp_min(0)  # rounding may fall below 0


def least_squares_scale(found: Sums, latent: Assignment) -> Float64[Tensor, " n"]:
    """Return c_i = max(0, <x_i, z_m(i)> / <z_m(i), z_m(i)>); 0 for a silent latent."""
    return quotient(of_pair(found.overlap, latent).clamp_min(0), of_latent(found.energy, latent))


def loss_parts(
    name: str,
    truth: GroundTruth,
    total: Float64[Tensor, " n"],
    active: Float64[Tensor, " n"],
    rest: float = 0.0,
) -> Scores:
    """Return the loss of squared errors per feature (sums over rows, of all and of active entries) in five forms.

    Suffixes: none, the loss (paper Fig. 3a), with `rest` for latents left over; _active, over entries with x_i > 0
    (Fig. 3b); _rel, divided by E ||x||^2, so that an answer of zeros scores 1 in any world; _active_entry, the mean
    over entries with x_i > 0.
    """
    rows, power = len(truth.features), float(truth.energy.sum())
    everything, on_active = float(total.sum()) + rest, float(active.sum())
    return {
        name: everything / rows,
        f"{name}_rel": everything / power,
        f"{name}_active": on_active / rows,
        f"{name}_active_rel": on_active / power,
        f"{name}_active_entry": on_active / float(truth.count.sum()),
    }


def _left_over(found: Sums, latent: Assignment) -> float:
    """Sum of squares of the latents that no feature has."""
    unused = torch.ones_like(found.energy, dtype=torch.bool)
    unused[latent[latent >= 0]] = False
    return float(found.energy[unused].sum())


# What to hold an SAE's scores against: answers that need no SAE, and the features' own statistics.


def ground_truth(
    features: Matrix, acts: Matrix | None = None, W_p: Matrix | None = None
) -> GroundTruth:
    """Return the ground truth of features x [rows, n], activations [rows, d_in] and W_p [d_in, n]; it serves any SAE.

    Without `acts`, x_p = W_p x (paper Eq. 1) stands in for them. Raises UserError for a wrong shape, a value that is
    not finite, a negative feature, fewer than two rows, or when no feature is ever active.
    """
    truth = checked_truth(features, acts, W_p)
    rows = len(truth.features)
    scores = {**reference_losses(truth), **spread("feature", truth.moments, rows)}
    scores["true_l0"] = float(truth.count.sum()) / rows
    if truth.acts is not None and truth.W_p is not None:
        outside = (truth.acts - truth.features @ truth.W_p.T).square().sum()
        whole = float(truth.acts.square().sum())
        scores["acts_unexplained"] = float(outside) / whole if whole > 0 else 0.0
    return replace(truth, reference=scores)


def reference_losses(truth: GroundTruth) -> Scores:
    """Return the losses of what needs no SAE: z = 0, the best constant, and the best linear readout of the acts.

    zero: E ||x||^2. constant: z_i = E x_i. linear: least squares of x on (x_p, 1), on these same rows; absent without
    acts.
    """
    mean = truth.moments.mean
    answers = {"gt_zero": torch.zeros_like(mean), "gt_constant": mean}
    if truth.acts is not None:
        centred = truth.acts - truth.acts.mean(0)
        # Through the d_in x d_in covariance: acts of rank below d_in are met by the pseudo-inverse.
        inverse = torch.linalg.pinv(centred.T @ centred, hermitian=True)
        weights = inverse @ (centred.T @ (truth.features - mean))
        answers["gt_linear"] = mean + centred @ weights
    scores: Scores = {}
    for name, answer in answers.items():
        error = (truth.features - answer).square()
        scores |= loss_parts(name, truth, error.sum(0), (error * truth.active).sum(0))
    return scores


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
    """Latents of features shown one at a time, for the activated_* scores (`wsae.evals.recovery.score`)."""


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

"""How much of a known ground truth an SAE recovers: losses, matchings, detection, activated features.

`recovery` scores an SAE; `ground_truth` and `score_codes` serve many SAEs on one world. Every score of a code follows
from sums over rows: four products, never a [rows, n, d_sae] tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from torch import Tensor

from wsae.acts.source import as_path, open_matrix
from wsae.core.calls import own_settings, tensor
from wsae.core.errors import UserError
from wsae.core.seeds import seed_for
from wsae.evals.config import RecoveryConfig
from wsae.evals.glossary import RECOVERY
from wsae.sae import SAE, GroupTopK, MultiTopK, ReLU, TopK
from wsae.sae.model import an_sae

Scores = dict[str, float]
Matrix = object
"""A matrix as users bring it (`wsae.core.calls.tensor`), or an array file; a mistake is answered in words."""
Features = Float64[Tensor, " n"]
"""A value of each feature."""
Pairs = Float64[Tensor, "n d_sae"]
"""A value of each pair of a feature and a latent."""
Assignment = Int64[Tensor, " n"]
"""Latent of each feature; -1 where it has none (more features than latents)."""
ROWS = 512
"""Rows taken to fp64 at once: blocks that stay in a core's cache, and no fp64 copy of the whole."""


class ColumnMoments(NamedTuple):
    """Per column, over rows t."""

    mean: Float64[Tensor, " columns"]
    square: Float64[Tensor, " columns"]
    """sum_t (z_t - mean)^2; exactly 0 for a constant column."""
    fourth: Float64[Tensor, " columns"]
    """sum_t (z_t - mean)^4."""


def moments(
    values: Float[Tensor, "rows columns"], mean: Float64[Tensor, " columns"]
) -> ColumnMoments:
    """Return the central moments of each column about its `mean`."""
    square, fourth = torch.zeros_like(mean), torch.zeros_like(mean)
    for block in values.split(ROWS):
        part = (block.double() - mean).square_()
        square += part.sum(0)
        fourth += part.square_().sum(0)
    # What rounding leaves of a constant column is some 1e-32 of its square.
    varies = square > 1e-24 * len(values) * mean.square()
    return ColumnMoments(mean, torch.where(varies, square, 0.0), fourth)


def spread(name: str, found: ColumnMoments, rows: int) -> Scores:
    """Return per-column variance (mean over all columns), dispersion and kurtosis (medians over columns that vary).

        Var(z_j)        Var(z_j) / E[z_j]^2        E[(z_j - E z_j)^4] / Var(z_j)^2

    Variance grows with the square of a latent's scale (paper Fig. 3d); the others have none. The median, because a
    column that fires once in T rows has dispersion and kurtosis of about T and would decide a mean.
    """
    variance, live = found.square / rows, found.square > 0
    # A mean of 0 with a spread needs values of both signs; its dispersion is then large, not undefined.
    dispersion = variance[live] / found.mean[live].square().clamp_min(1e-300)
    kurtosis = found.fourth[live] / rows / variance[live].square()
    return {f"{name}_variance_mean": float(variance.mean())} | {
        f"{name}_{key}": float(torch.quantile(values, 0.5)) if len(values) else 0.0
        for key, values in (("dispersion", dispersion), ("kurtosis", kurtosis))
    }


@dataclass(frozen=True)
class GroundTruth:
    """Features x [rows, n], what each does over the rows, and, where known, the activations and W_p; all in fp64."""

    features: Float64[Tensor, "rows n"]
    active: Float64[Tensor, "rows n"]
    """1 where x > 0, else 0."""
    count: Features
    """Rows in which each feature is active."""
    moments: ColumnMoments
    """Mean and central moments of each feature."""
    energy: Features
    """sum_t x_ti^2."""
    acts: Float64[Tensor, "rows d_in"] | None
    W_p: Float64[Tensor, "d_in n"] | None
    reference: Scores = field(default_factory=dict)
    """Scores that no SAE changes: the losses of trivial answers, and the features' own statistics."""

    @property
    def seen(self) -> Bool[Tensor, " n"]:
        """Features active in at least one row; means over features are over these."""
        return self.count > 0

    @property
    def varying(self) -> Bool[Tensor, " n"]:
        """Features that are not constant over the rows, for which a correlation exists."""
        return self.moments.square > 0


def ground_truth(
    features: Matrix, acts: Matrix | None = None, W_p: Matrix | None = None
) -> GroundTruth:
    """Return the ground truth of features x [rows, n], activations [rows, d_in] and W_p [d_in, n]; it serves any SAE.

    Without `acts`, x_p = W_p x (paper Eq. 1) stands in for them. Raises UserError for a wrong shape, a value that is
    not finite, a negative feature, fewer than two rows, or when no feature is ever active.
    """
    x = matrix("features", features, "[rows, n_features]")
    rows = len(x)
    if rows < 2:
        raise UserError(f"features have {rows} rows; recovery scores need at least 2")
    if bool((x < 0).any()):
        row, column = (x < 0).nonzero()[0].tolist()
        raise UserError(
            f"features[{row}, {column}] is {float(x[row, column]):.3g}; ground-truth features are >= 0"
        )
    active = (x > 0).double()
    count = active.sum(0)
    if not bool(count.any()):
        raise UserError(
            f"no feature is active in any of {rows} rows (sparsity 1?), so there is no signal to recover"
        )
    W = None if W_p is None else matrix("W_p", W_p, "[d_in, n_features]").to(x.device)
    x_p = None if acts is None else matrix("acts", acts, "[rows, d_in]").to(x.device)
    _check_shapes(x, x_p, W)
    if x_p is None and W is not None:
        x_p = x @ W.T
    truth = GroundTruth(x, active, count, moments(x, x.mean(0)), x.square().sum(0), x_p, W)
    scores = {**reference_losses(truth), **spread("feature", truth.moments, rows)}
    scores["true_l0"] = float(count.sum()) / rows
    if x_p is not None and W is not None:
        whole = float(x_p.square().sum())
        outside = float((x_p - x @ W.T).square().sum())
        scores["acts_unexplained"] = outside / whole if whole > 0 else 0.0
    return replace(truth, reference=scores)


def matrix(name: str, value: Matrix, shape: str) -> Float64[Tensor, "rows columns"]:
    """Return a finite matrix in fp64; raises UserError naming it, in the words of `shape`, otherwise."""
    x = two_dimensional(name, value, shape).double()
    check_finite(name, x)
    return x


def two_dimensional(name: str, value: Matrix, shape: str) -> Shaped[Tensor, "rows columns"]:
    """Return `value` as a detached matrix; raises UserError when it is none, or empty."""
    path = as_path(value)
    if path is None:
        x = tensor(value, name).detach()
    else:
        file = open_matrix(path, str(path))
        x = file.take(np.arange(file.shape[0]))
    if x.ndim != 2 or 0 in x.shape:
        raise UserError(f"{name} has shape {tuple(x.shape)}; give {shape}, both at least 1")
    return x


def check_finite(name: str, x: Shaped[Tensor, "rows columns"]) -> None:
    """Raise UserError naming the first entry that is NaN or infinite."""
    bad = ~torch.isfinite(x)
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        raise UserError(f"{name}[{row}, {column}] is {float(x[row, column])}; it must be finite")


def _check_shapes(x: Tensor, acts: Tensor | None, W_p: Tensor | None) -> None:
    if acts is not None and len(acts) != len(x):
        raise UserError(f"features have {len(x)} rows but acts have {len(acts)}; rows must agree")
    if W_p is None:
        return
    needed = (acts.shape[1] if acts is not None else W_p.shape[0], x.shape[1])
    if tuple(W_p.shape) != needed:
        turned = "; it looks transposed" if tuple(W_p.T.shape) == needed else ""
        raise UserError(
            f"W_p has shape {tuple(W_p.shape)} where [d_in, n_features] = {needed} is needed{turned}"
        )


@dataclass(frozen=True)
class Sums:
    """Sums over rows t of features x, their activity a = [x > 0] and latents z, for every pair (i, j)."""

    overlap: Pairs
    """sum_t x_ti z_tj."""
    strength: Pairs
    """sum_t a_ti z_tj."""
    active_energy: Pairs
    """sum_t a_ti z_tj^2."""
    hits: Pairs
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
    found = moments(latents, total / len(latents))
    return Sums(overlap, strength, active_energy, hits, energy, fired, found)


def assign(gain: Pairs) -> Assignment:
    """Return the one-to-one assignment of min(n, d_sae) pairs with the largest total gain (Hungarian method)."""
    from scipy.optimize import linear_sum_assignment  # takes a third of a second, needed here only

    rows, columns = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    latent = torch.full((len(gain),), -1, dtype=torch.int64)
    latent[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return latent.to(gain.device)


def of_pair(table: Pairs, latent: Assignment) -> Features:
    """Return table[i, latent(i)] for every feature i; 0 where it has no latent."""
    return torch.where(latent >= 0, table.gather(1, latent.clamp_min(0)[:, None])[:, 0], 0.0)


def of_latent(values: Float64[Tensor, " d_sae"], latent: Assignment) -> Features:
    """Return values[latent(i)] for every feature i; 0 where it has no latent."""
    return torch.where(latent >= 0, values[latent.clamp_min(0)], 0.0)


def quotient(top: Float64[Tensor, "..."], bottom: Float64[Tensor, "..."]) -> Float64[Tensor, "..."]:
    """Return top / bottom, and 0 where bottom is 0."""
    return torch.where(bottom != 0, top / torch.where(bottom != 0, bottom, 1.0), 0.0)


def mean_over(values: Float64[Tensor, " n"], chosen: Bool[Tensor, " n"]) -> float:
    """Return the mean of the chosen values; 0 when none is."""
    return float(values[chosen].mean()) if bool(chosen.any()) else 0.0


def code_scores(
    truth: GroundTruth, found: Sums, found_correlation: float
) -> tuple[Scores, dict[str, Features], Assignment]:
    """Return the scores under the one-to-one assignment of largest total correlation, per feature too.

    Pearson's correlation (0 where either is constant), because it does not depend on the scale of a latent and is not
    won by latents that are always on.
    """
    rows = len(truth.features)
    covariance = found.overlap - rows * torch.outer(truth.moments.mean, found.moments.mean)
    scale = torch.outer(truth.moments.square, found.moments.square).sqrt()
    correlation = quotient(covariance, scale).clamp(-1.0, 1.0)
    latent = assign(correlation)
    pair, best = of_pair(correlation, latent), correlation.amax(1)
    used = detect(of_pair(found.hits, latent), of_latent(found.fired, latent), truth.count)
    used["vanished"] = 1 - used["recall"]
    used["shrinkage_code"] = conditional_ratio(truth, found, latent)
    scores = {
        "mcc_code": mean_over(pair, (latent >= 0) & truth.varying),
        "best_correlation": mean_over(best, truth.varying),
        "missing_frac": mean_over((best < found_correlation).double(), truth.varying),
        **{key: mean_over(value, truth.seen) for key, value in used.items()},
    }
    per_feature = {
        "count": truth.count,
        "correlation": torch.where(truth.varying, pair, torch.nan),
        "best_correlation": torch.where(truth.varying, best, torch.nan),
        **{key: torch.where(truth.seen, value, torch.nan) for key, value in used.items()},
    }
    return scores, per_feature, latent


def conditional_ratio(truth: GroundTruth, found: Sums, latent: Assignment) -> Features:
    """Return E[z_m(i) | x_i > 0] / E[x_i | x_i > 0] per feature; 0 for a feature that is never active."""
    return quotient(of_pair(found.strength, latent), truth.features.sum(0))


def detect(hits: Features, fired: Features, present: Features) -> dict[str, Features]:
    """Return precision = hits / fired, recall = hits / present and F1, their harmonic mean; 0 where undefined."""
    precision, recall = quotient(hits, fired), quotient(hits, present)
    f1 = quotient(2 * precision * recall, precision + recall)
    return {"precision": precision, "recall": recall, "f1": f1}


def cosines(W_p: Float64[Tensor, "d_in n"], W_dec: Float64[Tensor, "d_sae d_in"]) -> Pairs:
    """Return cos(W_p[:, i], W_dec[j]) for every feature and latent; 0 for a vector of length 0."""
    columns = torch.nn.functional.normalize(W_p, dim=0, eps=1e-8)
    return columns.T @ torch.nn.functional.normalize(W_dec, dim=1, eps=1e-8).T


def matched_mean(similarity: Pairs) -> tuple[float, Features, Assignment]:
    """Return the mean over the min(n, d_sae) best one-to-one pairs, each feature's value and latent.

    A feature without a latent has the value NaN.
    """
    latent = assign(similarity)
    value = torch.where(latent >= 0, of_pair(similarity, latent), torch.nan)
    return float(value.nanmean()), value, latent


def direction_scores(
    truth: GroundTruth,
    found: Sums,
    W_dec: Float64[Tensor, "d_sae d_in"],
    W_p: Float64[Tensor, "d_in n"],
    seed: int,
) -> tuple[Scores, dict[str, Features], dict[str, Assignment]]:
    """Return the direction scores, each feature's cosines, and the assignments of |cos| and of signed cos.

    Definitions are SAELens' where it has one. Chance is what d_sae random directions reach: in few dimensions far above
    0. Each latent also counts as a detector of the feature nearest in direction, dead ones included.
    """
    cosine = cosines(W_p, W_dec)
    absolute = cosine.abs()
    mcc, value, latent = matched_mean(absolute)
    signed, signed_value, signed_latent = matched_mean(cosine)
    generator = torch.Generator().manual_seed(seed_for(seed, "recovery", "chance"))
    random = torch.randn(len(W_dec), len(W_p), dtype=torch.float64, generator=generator)
    nearest = absolute.argmax(0)
    hits, present = found.hits.gather(0, nearest[None])[0], truth.count[nearest]
    wrong = (found.fired - hits) + (present - hits)
    scores = {
        "mcc_direction": mcc,
        "mcc_direction_signed": signed,
        "mcc_direction_chance": matched_mean(cosines(W_p, random.to(W_p.device)).abs())[0],
        "uniqueness": len(nearest.unique()) / len(nearest),
        **{f"latent_{k}": float(v.mean()) for k, v in detect(hits, found.fired, present).items()},
        "latent_accuracy": 1 - float(wrong.mean()) / len(truth.features),
    }
    per_feature = {"cosine": value, "cosine_signed": signed_value}
    return scores, per_feature, {"direction": latent, "direction_signed": signed_latent}


def length_shrinkage(
    truth: GroundTruth,
    found: Sums,
    W_dec: Float64[Tensor, "d_sae d_in"],
    W_p: Float64[Tensor, "d_in n"],
    latent: Assignment,
) -> tuple[float, Features]:
    """Return how long a latent's output is against its feature's input, over all features and for each.

        sum_i E[z_m(i) | x_i > 0] |W_dec[m(i)]| / sum_i E[x_i | x_i > 0] |W_p[:, i]|

    The lengths make it blind to how a scale is shared between code and decoder. A ratio of sums, so that features
    that the world hardly represents (short columns) do not decide it. NaN for a feature that is never active or has a
    column of length 0.
    """
    lengths, columns = of_latent(W_dec.norm(dim=1), latent), W_p.norm(dim=0)
    strength = truth.features.sum(0) / truth.count.clamp_min(1)
    ratio = conditional_ratio(truth, found, latent)
    out, into = float((ratio * strength * lengths).sum()), float((strength * columns).sum())
    each = torch.where(truth.seen & (columns > 0), ratio * lengths / columns, torch.nan)
    return out / into if into > 0 else 0.0, each


Encode = Callable[[Float[Tensor, "batch d_in"]], Float[Tensor, "batch d_sae"]]
_BLOCK = 1 << 22
"""Latents held at once while isolated inputs are encoded (16 MB in fp32)."""


class Isolated(NamedTuple):
    """What latents do when features are shown one at a time (paper Appendix B.3): h_j(x^i), x^i = x_i W_p[:, i].

    The paper calls latent j activated by feature i when M_j^i exceeds a threshold, and states none. M shrinks with the
    number of samples in which x_i > 0, so an absolute threshold on it lets the score fall as S -> 1 whatever the SAE
    does. R does not depend on S in a world of independent features.
    """

    total: Pairs
    """M_j^i, the sum over all samples."""
    response: Pairs
    """R_j^i, the mean over the samples in which feature i is active; 0 where it never is."""


@torch.no_grad()
def isolated(truth: GroundTruth, W_p: Float64[Tensor, "d_in n"], sae: SAE) -> Isolated:
    """Return M and R of an SAE: in closed form where its encoder is homogeneous, else by encoding."""
    dtype, device = sae.W_dec.dtype, sae.W_dec.device
    if is_homogeneous(sae):
        unit = sae.encode(W_p.T.to(device, dtype))
        return isolated_homogeneous(truth, unit.double().to(W_p.device))
    return isolated_encoded(truth, W_p, lambda x: sae.encode(x.to(device, dtype)))


def is_homogeneous(sae: SAE) -> bool:
    """Return whether h(c v) = c h(v) for every c > 0: no bias, no threshold, and no scale taken from rows."""
    biases = sae.biases
    free = biases is None or not any(bool(bias.any()) for bias in biases)
    free = free and sae.cfg.input_norm is None
    return free and isinstance(sae.cfg.activation, ReLU | TopK | MultiTopK | GroupTopK)


def isolated_homogeneous(truth: GroundTruth, unit: Pairs) -> Isolated:
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
    strongest, square = response.amax(0), response.square().sum(0)
    counts = {
        "activated_sum": (total > cfg.threshold).sum(0).double(),
        "activated_mean": (response > cfg.mean_threshold).sum(0).double(),
        "activated_relative": (response > cfg.relative_threshold * strongest).sum(0).double(),
        "activated_participation": response.sum(0).square() / torch.where(square > 0, square, 1.0),
    }
    scores = {key: float(value.mean()) for key, value in counts.items()}
    live = {f"{key}_live": mean_over(value, strongest > 0) for key, value in counts.items()}
    return scores | live, counts


def ground_truth_losses(truth: GroundTruth, found: Sums) -> tuple[Scores, dict[str, Assignment]]:
    """Return the losses gt_raw, gt_matched, gt_padded and gt_scaled, and the assignments behind the last three.

    L_GT = E ||x - z||^2 (paper Eq. 10), latent j taken as feature j, latents beyond n compared with 0 (Eq. 7): raw,
    absent when d_sae < n. A trained SAE has its latents in no particular order: matched minimises
    E sum_i (x_i - z_m(i))^2 and ignores latents left over; padded adds their E z_j^2 and minimises the sum; scaled
    minimises E sum_i (x_i - c_i z_m(i))^2 with the best c_i >= 0 of each pair. The active entries are always judged
    under the assignment of all entries: a feature has one latent.
    """
    n, d_sae = found.overlap.shape
    matched = assign(2 * found.overlap - found.energy)
    # With n >= d_sae no latent is left over, so both sums have the same minimiser.
    padded = assign(found.overlap) if d_sae > n else matched
    scaled = assign(quotient(found.overlap.clamp_min(0).square(), found.energy))
    cover = of_pair(found.overlap, scaled).clamp_min(0)
    scale = quotient(cover, of_latent(found.energy, scaled))
    order = torch.arange(n, device=found.overlap.device)

    def loss(
        name: str, latent: Assignment, rest: bool = False, c: Features | None = None
    ) -> Scores:
        unused = torch.ones_like(found.energy, dtype=torch.bool)
        unused[latent[latent >= 0]] = False
        extra = float(found.energy[unused].sum()) if rest else 0.0
        return loss_parts(name, truth, *pair_errors(truth, found, latent, c), extra)

    scores = loss("gt_raw", order, rest=True) if d_sae >= n else {}
    scores |= loss("gt_matched", matched) | loss("gt_padded", padded, rest=True)
    scores |= loss("gt_scaled", scaled, c=scale)
    return scores, {"matched": matched, "padded": padded, "scaled": scaled}


def pair_errors(
    truth: GroundTruth, found: Sums, latent: Assignment, scale: Features | None = None
) -> tuple[Features, Features]:
    """Return sum_t (x_ti - c_i z_tm(i))^2 per feature, over all rows and over rows with x_ti > 0; default: c = 1.

        sum_t (x_ti - c z_tj)^2 = sum_t x_ti^2 - 2 c sum_t x_ti z_tj + c^2 sum_t z_tj^2,

    on the active entries alone with sum_t [x_ti > 0] z_tj^2 in the last term; exact to 1e-15 of the first term.
    """
    c = torch.ones_like(truth.energy) if scale is None else scale
    common = truth.energy - 2 * c * of_pair(found.overlap, latent)
    total = common + c.square() * of_latent(found.energy, latent)
    active = common + c.square() * of_pair(found.active_energy, latent)
    return total.clamp_min(0), active.clamp_min(0)  # rounding may fall below 0


def loss_parts(
    name: str, truth: GroundTruth, total: Features, active: Features, rest: float = 0.0
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
class Recovery:
    """How much of the ground truth an SAE recovers."""

    scores: dict[str, float]
    """Flat; `wsae.evals.glossary.RECOVERY` explains every key."""
    per_feature: dict[str, Float64[Tensor, " n"]]
    """count, correlation, best_correlation, precision, recall, f1, vanished, shrinkage_code, loss_matched and, with
    W_p, cosine, cosine_signed, shrinkage_length. NaN where a feature has no value."""
    per_latent: dict[str, Float64[Tensor, " d_sae"]]
    """Number of features that activate each latent, by activated_*; empty without W_p."""
    assignment: dict[str, Int64[Tensor, " n"]]
    """Latent of each feature (-1: none), for code, matched, padded, scaled and, with W_p, direction and
    direction_signed."""


@own_settings
@torch.no_grad()
def recovery(
    sae: SAE,
    features: Matrix,
    acts: Matrix,
    W_p: Matrix | None = None,
    **options: float | int,
) -> Recovery:
    """Score an SAE against ground-truth features x [rows, n] behind activations x_p [rows, d_in] (paper Eq. 1).

    `W_p` [d_in, n] holds the features' directions as columns; scores that need it are absent without it. `options`
    are those of RecoveryConfig (threshold, mean_threshold, relative_threshold, found_correlation, seed). Raises
    UserError for a transcoder, shapes that do not fit, values that are not finite, negative features, or features
    without signal.
    """
    cfg = RecoveryConfig.parse(dict(options), where="recovery")
    sae = an_sae(sae, "recovery")
    if sae.cfg.transcoder:
        raise UserError(
            "recovery: a transcoder gives other activations than it reads; its latents alone have scores: "
            "wsae.evals.recovery.score_codes"
        )
    truth = ground_truth(features, acts, W_p)
    if truth.acts is None:
        raise UserError(
            "acts: given as None; give the activations [rows, d_in] behind the features"
        )
    acts = truth.acts.to(sae.W_dec.device, sae.W_dec.dtype)
    latents = sae.encode(acts)
    alone = None if truth.W_p is None else isolated(truth, truth.W_p, sae)
    return score_codes(truth, latents, sae.W_dec, sae.decode(latents, acts), alone, cfg)


@own_settings
@torch.no_grad()
def score_codes(
    truth: GroundTruth,
    latents: Shaped[Tensor, "..."],
    W_dec: Shaped[Tensor, "..."],
    x_hat: Shaped[Tensor, "..."] | None = None,
    alone: Isolated | None = None,
    cfg: RecoveryConfig = RecoveryConfig(),  # noqa: B008  (frozen)
) -> Recovery:
    """Score latents z [rows, d_sae] with decoder rows W_dec [d_sae, d_in] against a ground truth.

    With the reconstruction `x_hat` [rows, d_in] there are sae_loss, fvu and norm_ratio; with `alone` (`isolated`), the
    activated_* scores. `truth` is made once per world and serves any number of SAEs. Raises UserError when shapes do
    not fit or a latent is not finite.
    """
    z = two_dimensional("latents", latents, "[rows, d_sae]").to(truth.features.device)
    z = z if z.is_floating_point() else z.double()
    W = matrix("W_dec", W_dec, "[d_sae, d_in]").to(z.device)
    _check_codes(truth, z, W)
    found = sums(truth, z)
    losses, assignment = ground_truth_losses(truth, found)
    code, per_feature, latent = code_scores(truth, found, cfg.found_correlation)
    scores: Scores = {**losses, **truth.reference, **code}
    per_feature["loss_matched"] = pair_errors(truth, found, assignment["matched"])[0] / len(z)
    assignment = {"code": latent, **assignment}
    if truth.W_p is not None:
        ratio, each = length_shrinkage(truth, found, W, truth.W_p, latent)
        direction, cosine, ways = direction_scores(truth, found, W, truth.W_p, cfg.seed)
        scores |= {"shrinkage_length": ratio, **direction}
        per_feature |= {"shrinkage_length": each, **cosine}
        assignment |= ways
    per_latent: dict[str, Tensor] = {}
    if alone is not None:
        activated, per_latent = activated_features(alone, cfg)
        scores |= activated
    scores |= spread("latent", found.moments, len(z))
    scores["l0"] = float(found.fired.sum()) / len(z)
    scores["dead_frac"] = float((found.fired == 0).double().mean())
    if truth.acts is not None and x_hat is not None:
        scores |= _reconstruction(truth.acts, x_hat)
    ordered = {key: scores[key] for key in RECOVERY if key in scores}
    return Recovery(ordered, per_feature, per_latent, assignment)


def _reconstruction(x_p: Float64[Tensor, "rows d_in"], given: Matrix) -> Scores:
    """Return how good a reconstruction is."""
    x_hat = matrix("x_hat", given, "[rows, d_in]").to(x_p.device)
    if x_hat.shape != x_p.shape:
        raise UserError(f"x_hat has shape {tuple(x_hat.shape)} where acts have {tuple(x_p.shape)}")
    error = float((x_p - x_hat).square().sum())
    spread_p = float((x_p - x_p.mean(0)).square().sum())
    norm = x_p.norm(dim=1)
    there = norm > 1e-6  # as SAELens: a ratio of lengths needs a length
    ratio = x_hat.norm(dim=1)[there] / norm[there]
    return {
        "sae_loss": error / len(x_p),
        "fvu": error / spread_p if spread_p > 0 else 0.0,
        "norm_ratio": float(ratio.mean()) if len(ratio) else 0.0,
    }


def _check_codes(truth: GroundTruth, z: Tensor, W_dec: Tensor) -> None:
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

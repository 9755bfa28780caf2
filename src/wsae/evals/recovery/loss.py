"""Ground-truth reconstruction (paper Eq. 10): how far latents z are from the features x themselves.

    L_GT = E_x ||x - z||^2        latent j taken as feature j; latents beyond n compared with 0 (Eq. 7)

A trained SAE has its latents in no particular order, so the loss is also taken after the best one-to-one assignment
of latents to features. The squared error of a pair comes from sums over rows,

    sum_t (x_ti - c z_tj)^2 = sum_t x_ti^2 - 2 c sum_t x_ti z_tj + c^2 sum_t z_tj^2,

and on the active entries alone with sum_t [x_ti > 0] z_tj^2 in the last term; exact to 1e-15 of the first term.
"""

import torch
from jaxtyping import Float64
from torch import Tensor

from wsae.core.errors import UserError
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

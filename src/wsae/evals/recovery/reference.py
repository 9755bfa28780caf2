"""What to hold an SAE's scores against: answers that need no SAE, and the features' own statistics."""

from dataclasses import replace

import torch

from wsae.evals.recovery.loss import loss_parts
from wsae.evals.recovery.spread import Scores, spread
from wsae.evals.recovery.truth import GroundTruth, Matrix, checked_truth


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

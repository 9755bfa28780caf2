"""Every metric's formula, direction and unit: the one table behind evaluation.json, the report and the docs.

Scores against a known ground truth have theirs in `wsae.evals.recovery.glossary`.
"""

from typing import NamedTuple


class Metric(NamedTuple):
    """One line of the glossary."""

    name: str
    formula: str
    direction: str = "neither direction is better"
    unit: str = ""


LOWER, HIGHER = "lower is better", "higher is better"

METRICS: dict[str, Metric] = {
    "fvu": Metric(
        "Plain FVU",
        "sum_t |x_t - x_hat_t|^2 / sum_t |x_t - mean|^2 over held-out rows; mean over the same rows, not zero",
        LOWER,
    ),
    "fvu_weighted": Metric(
        "Weighted FVU",
        "sum_t |Gamma (x_t - x_hat_t)|^2 / sum_t |Gamma (x_t - mean)|^2, "
        "Gamma = diag(gamma) of the member itself, or its matrix (rule whiten); "
        "in a comparison both sides are measured under the first member's Gamma",
        LOWER,
    ),
    "ev_dim_mean": Metric(
        "Explained variance per dimension, mean",
        "mean over input dimensions i of 1 - sum_t (x_ti - x_hat_ti)^2 / sum_t (x_ti - mean_i)^2; "
        "constant dimensions are left out",
        HIGHER,
    ),
    "ev_dim_min": Metric(
        "Explained variance of the worst dimension",
        "minimum over input dimensions i of 1 - sum_t (x_ti - x_hat_ti)^2 / sum_t (x_ti - mean_i)^2",
        HIGHER,
    ),
    "l0": Metric(
        "L0, active latents", "mean over held-out rows of #{j : z_j != 0}", unit="latents per token"
    ),
    "dead_frac": Metric(
        "Dead latents", "share of latents active on no held-out row", LOWER, "share of latents"
    ),
    "dense_frac": Metric(
        "Dense latents",
        "share of latents active on more than dense_threshold (default 10 %) of the held-out rows",
        LOWER,
        "share of latents",
    ),
    "density_mean": Metric(
        "Latent density, mean",
        "mean over latents of the share of held-out rows on which the latent is active (= l0 / d_sae)",
        unit="share of tokens",
    ),
    "latent_variance_mean": Metric(
        "Latent variance, mean",
        "mean over latents j of E[z_j^2] - E[z_j]^2 over all held-out rows, zeros included",
        unit="squared activation",
    ),
    "decoder_cosine_max_mean": Metric(
        "Nearest decoder cosine, mean",
        "mean over latents j of max_{k != j} |cos(W_dec[j], W_dec[k])|; high where latents repeat each other",
    ),
    "ce_clean": Metric(
        "Model's cross-entropy",
        "mean over scored tokens of -log p_clean(next token), the model untouched",
        unit="nats per token",
    ),
    "ce_spliced": Metric(
        "Cross-entropy with reconstructions",
        "mean over scored tokens of -log p_spliced(next token), x_hat in place of x at every kept position",
        LOWER,
        "nats per token",
    ),
    "ce_delta": Metric("CE increase", "ce_spliced - ce_clean", LOWER, "nats per token"),
    "ce_loss_recovered_zero": Metric(
        "CE loss recovered (zero)",
        "(ce_zero - ce_spliced) / (ce_zero - ce_clean), ce_zero: kept positions set to 0",
        HIGHER,
    ),
    "ce_loss_recovered_mean": Metric(
        "CE loss recovered (mean)",
        "(ce_mean - ce_spliced) / (ce_mean - ce_clean), ce_mean: kept positions set to the held-out mean",
        HIGHER,
    ),
    "kl": Metric(
        "KL divergence",
        "mean over scored tokens of KL(p_clean || p_spliced) = sum_v p_clean(v) log(p_clean(v) / p_spliced(v))",
        LOWER,
        "nats per token",
    ),
}
"""Metrics of a member, in the order a reader wants them."""

MATCHING: dict[str, Metric] = {
    "n_pairs": Metric(
        "Matched latents",
        "one-to-one pairs of latents of the member and of its plain twin, both active on held-out data",
        unit="pairs",
    ),
    "decoder_cosine_mean": Metric(
        "Matched decoder cosine, mean", "mean over pairs of cos(W_dec_a[j], W_dec_b[pair(j)])"
    ),
    "frac_above_0.9": Metric(
        "Matched above 0.9", "share of pairs with cosine > 0.9", unit="share of pairs"
    ),
    "frac_above_0.7": Metric(
        "Matched above 0.7", "share of pairs with cosine > 0.7", unit="share of pairs"
    ),
    "random_cosine_mean": Metric(
        "Chance level of the cosine",
        "mean over the member's live latents of the largest cosine with as many random directions as the twin "
        "has live latents",
    ),
}
"""Statistics of the pairing with the plain twin."""

COMPARED: tuple[str, ...] = (
    "fvu",
    "fvu_weighted",
    "l0",
    "dead_frac",
    "dense_frac",
    "density_mean",
    "latent_variance_mean",
    "decoder_cosine_max_mean",
    "ce_delta",
    "ce_loss_recovered_zero",
    "ce_loss_recovered_mean",
    "kl",
)
"""Metrics for which members are compared."""


def glossary() -> dict[str, dict[str, str]]:
    """Return the table as JSON-ready objects {metric: {name, formula, direction, unit}}."""
    return {key: metric._asdict() for key, metric in {**METRICS, **MATCHING}.items()}

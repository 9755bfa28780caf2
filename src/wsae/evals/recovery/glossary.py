"""Every recovery score's formula, direction and unit: the table behind `Recovery.scores` and docs/metrics.md."""

from wsae.evals.glossary import HIGHER, LOWER, METRICS, Metric

LOSSES = {
    "raw": ("Ground-truth loss, raw", "z_i = latent i as it is; latents beyond n compared with 0"),
    "matched": (
        "Ground-truth loss, matched",
        "z_i = latent m(i), m the one-to-one assignment that minimises it; other latents ignored",
    ),
    "padded": (
        "Ground-truth loss, matched and padded",
        "as matched, plus E z_j^2 of every latent without a feature; m minimises the sum (Eq. 7)",
    ),
    "scaled": (
        "Ground-truth loss, matched and scaled",
        "z_i = c_i * latent m(i), c_i >= 0 by least squares and m minimising the result",
    ),
    "zero": ("Ground-truth loss of zeros", "z = 0: the answer that knows nothing"),
    "constant": ("Ground-truth loss of the best constant", "z_i = E x_i"),
    "linear": (
        "Ground-truth loss of the best linear readout",
        "z = least squares of x on (x_p, 1), on the rows it is measured on",
    ),
}
"""gt_<key> -> (name, what z is)."""

LOSS_PARTS = {
    "": ("", "E sum_i (x_i - z_i)^2 (Eq. 10; Fig. 3a)", "squared feature units per row"),
    "_rel": (", relative", "E sum_i (x_i - z_i)^2 / E |x|^2", ""),
    "_active": (
        ", active entries",
        "E sum_i [x_i > 0] (x_i - z_i)^2 (Fig. 3b)",
        "squared feature units per row",
    ),
    "_active_rel": (", active entries, relative", "E sum_i [x_i > 0] (x_i - z_i)^2 / E |x|^2", ""),
    "_active_entry": (
        ", per active entry",
        "mean of (x_i - z_i)^2 over entries with x_i > 0",
        "squared feature units",
    ),
}
"""Suffix -> (words after the name, formula, unit)."""


def _losses() -> dict[str, Metric]:
    return {
        f"gt_{which}{part}": Metric(f"{name}{suffix}", f"{formula}; {z}", LOWER, unit)
        for which, (name, z) in LOSSES.items()
        for part, (suffix, formula, unit) in LOSS_PARTS.items()
    }


_ACTIVATED = {
    "sum": (
        "summed response above a threshold",
        "#{i : M_j^i > threshold}; M_j^i = sum over rows of h_j(x^i)",
    ),
    "mean": (
        "mean response above a threshold",
        "#{i : R_j^i > mean_threshold}; R_j^i = E[h_j(x^i) | x_i > 0]",
    ),
    "relative": (
        "mean response above a share of the strongest",
        "#{i : R_j^i > relative_threshold * max_i R_j^i}",
    ),
    "participation": ("participation ratio", "(sum_i R_j^i)^2 / sum_i (R_j^i)^2"),
}


def _activated() -> dict[str, Metric]:
    """The four counts, over all latents and over the live ones; x^i is feature i alone."""
    return {
        f"activated_{key}{suffix}": Metric(
            f"Activated features, {name}{', live' if suffix else ''}",
            f"mean over {over} j of {counted} (Appendix B.3)",
            LOWER,
            "features per latent",
        )
        for key, (name, counted) in _ACTIVATED.items()
        for suffix, over in (("", "all latents"), ("_live", "latents with any response"))
    }


def _spread(name: str, subject: str, symbol: str) -> dict[str, Metric]:
    return {
        f"{name}_variance_mean": Metric(
            f"{subject} variance, mean",
            f"mean over {name}s of Var({symbol}) over all rows, zeros included (Fig. 3d)",
            unit="squared activation",
        ),
        f"{name}_dispersion": Metric(
            f"{subject} dispersion",
            f"median over {name}s that vary of Var({symbol}) / E[{symbol}]^2; blind to scale",
        ),
        f"{name}_kurtosis": Metric(
            f"{subject} kurtosis",
            f"median over {name}s that vary of E[({symbol} - E {symbol})^4] / Var({symbol})^2; blind to scale",
        ),
    }


RECOVERY: dict[str, Metric] = {
    **_losses(),
    "mcc_code": Metric(
        "Code MCC",
        "mean over one-to-one pairs of Pearson's corr(x_i, z_m(i)), m of largest total correlation; "
        "features that vary",
        HIGHER,
    ),
    "best_correlation": Metric(
        "Best correlation, mean",
        "mean over features that vary of max_j corr(x_i, z_j); not one-to-one",
        HIGHER,
    ),
    "missing_frac": Metric(
        "Missing features",
        "share of features that vary with max_j corr(x_i, z_j) < found_correlation (default 0.5)",
        LOWER,
        "share of features",
    ),
    "precision": Metric(
        "Precision",
        "mean over features of P(x_i > 0 | z_m(i) != 0), m of the code MCC; 0 for a silent latent",
        HIGHER,
    ),
    "recall": Metric(
        "Recall", "mean over features of P(z_m(i) != 0 | x_i > 0), m of the code MCC", HIGHER
    ),
    "f1": Metric(
        "F1", "mean over features of 2 precision_i recall_i / (precision_i + recall_i)", HIGHER
    ),
    "vanished": Metric(
        "Vanished",
        "mean over features of P(z_m(i) = 0 | x_i > 0) = 1 - recall_i",
        LOWER,
        "share of uses",
    ),
    "shrinkage_code": Metric(
        "Shrinkage of the code",
        "mean over features of E[z_m(i) | x_i > 0] / E[x_i | x_i > 0], m of the code MCC; 1 is no shrinkage",
    ),
    "shrinkage_length": Metric(
        "Shrinkage of the output",
        "sum_i E[z_m(i) | x_i > 0] |W_dec[m(i)]| / sum_i E[x_i | x_i > 0] |W_p[:, i]|; 1 is no shrinkage",
    ),
    "mcc_direction": Metric(
        "Direction MCC",
        "mean over one-to-one pairs of |cos(W_p[:, i], W_dec[m(i)])|, m of largest sum",
        HIGHER,
    ),
    "mcc_direction_signed": Metric(
        "Direction MCC, signed",
        "mean over one-to-one pairs of cos(W_p[:, i], W_dec[m(i)]), m of largest sum",
        HIGHER,
    ),
    "mcc_direction_chance": Metric(
        "Chance level of the direction MCC",
        "mcc_direction of d_sae random directions (one draw); near 1 in few dimensions",
    ),
    "uniqueness": Metric(
        "Uniqueness",
        "#{argmax_i |cos(W_p[:, i], W_dec[j])| over latents j} / d_sae; at most n / d_sae",
        HIGHER,
    ),
    "latent_precision": Metric(
        "Precision per latent",
        "mean over all latents of P(x_i > 0 | z_j != 0), i = argmax |cos| of latent j; 0 for a dead latent",
        HIGHER,
    ),
    "latent_recall": Metric(
        "Recall per latent",
        "mean over all latents of P(z_j != 0 | x_i > 0), i = argmax |cos| of latent j",
        HIGHER,
    ),
    "latent_f1": Metric(
        "F1 per latent", "mean over all latents of the harmonic mean of the two above", HIGHER
    ),
    "latent_accuracy": Metric(
        "Accuracy per latent",
        "share of (row, latent) in which z_j != 0 and x_i > 0 agree; high for sparse x whatever the SAE",
        HIGHER,
    ),
    **_activated(),
    **_spread("latent", "Latent", "z_j"),
    **_spread("feature", "Feature", "x_i"),
    "l0": Metric("L0, active latents", "mean over rows of #{j : z_j != 0}", unit="latents per row"),
    "true_l0": Metric(
        "L0 of the truth", "mean over rows of #{i : x_i > 0}", unit="features per row"
    ),
    "dead_frac": Metric(
        "Dead latents", "share of latents active on no row", LOWER, "share of latents"
    ),
    "sae_loss": Metric(
        "SAE loss", "E |x_p - x_hat|^2 (Eq. 4; Fig. 3c)", LOWER, "squared activation per row"
    ),
    "fvu": Metric(
        METRICS["fvu"].name,
        "sum_t |x_p - x_hat|^2 / sum_t |x_p - mean|^2; mean over the same rows",
        LOWER,
    ),
    "norm_ratio": Metric(
        "Length of the output",
        "mean over rows with |x_p| > 1e-6 of |x_hat| / |x_p|; 1 is no shrinkage",
    ),
    "acts_unexplained": Metric(
        "Activations outside the world",
        "sum_t |x_p - W_p x|^2 / sum_t |x_p|^2; 0 where W_p made these activations",
        LOWER,
    ),
}
"""Recovery scores, in the order of `Recovery.scores`."""


def recovery_glossary() -> dict[str, dict[str, str]]:
    """Return the table as JSON-ready objects {score: {name, formula, direction, unit}}."""
    return {key: metric._asdict() for key, metric in RECOVERY.items()}

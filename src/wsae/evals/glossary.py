"""Every metric's name, formula, direction and unit: the one table behind results, the report and the docs. No torch."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Metric(NamedTuple):
    """One line of the glossary."""

    name: str
    formula: str
    direction: str = "neither direction is better"
    unit: str = ""


LOWER = "lower is better"


def read_metrics(text: str) -> dict[str, Metric]:
    """Return the metrics of lines "key: name; direction; unit", each followed by its formula, indented."""
    out = {}
    for entry in re.split(r"\n(?=\S)", text.strip()):
        head, *formula = entry.splitlines()
        key, told = head.split(": ", 1)
        name, *rest = told.split("; ")
        out[key] = Metric(name, " ".join(line.strip() for line in formula), *rest)
    return out


METRICS = read_metrics("""
fvu: Plain FVU; lower is better
    sum_t |x_t - x_hat_t|^2 / sum_t |x_t - mean|^2 over held-out rows; mean over the same rows, not zero
fvu_weighted: Weighted FVU; lower is better
    sum_t |Gamma (x_t - x_hat_t)|^2 / sum_t |Gamma (x_t - mean)|^2, Gamma = diag(gamma) of the member itself, or
    its matrix (rule whiten); in a comparison both sides are measured under the first member's Gamma
ev_dim_mean: Explained variance per dimension, mean; higher is better
    mean over input dimensions i of 1 - sum_t (x_ti - x_hat_ti)^2 / sum_t (x_ti - mean_i)^2; constant dimensions
    are left out
ev_dim_min: Explained variance of the worst dimension; higher is better
    minimum over input dimensions i of 1 - sum_t (x_ti - x_hat_ti)^2 / sum_t (x_ti - mean_i)^2
l0: L0, active latents; neither direction is better; latents per token
    mean over held-out rows of #{j : z_j != 0}
dead_frac: Dead latents; lower is better; share of latents
    share of latents active on no held-out row
dense_frac: Dense latents; lower is better; share of latents
    share of latents active on more than dense_threshold (default 10 %) of the held-out rows
density_mean: Latent density, mean; neither direction is better; share of tokens
    mean over latents of the share of held-out rows on which the latent is active (= l0 / d_sae)
latent_variance_mean: Latent variance, mean; neither direction is better; squared activation
    mean over latents j of E[z_j^2] - E[z_j]^2 over all held-out rows, zeros included
decoder_cosine_max_mean: Nearest decoder cosine, mean
    mean over latents j of max_{k != j} |cos(W_dec[j], W_dec[k])|; high where latents repeat each other
ce_clean: Model's cross-entropy; neither direction is better; nats per token
    mean over scored tokens of -log p_clean(next token), the model untouched
ce_spliced: Cross-entropy with reconstructions; lower is better; nats per token
    mean over scored tokens of -log p_spliced(next token), x_hat in place of x at every kept position
ce_delta: CE increase; lower is better; nats per token
    ce_spliced - ce_clean
ce_loss_recovered_zero: CE loss recovered (zero); higher is better
    (ce_zero - ce_spliced) / (ce_zero - ce_clean), ce_zero: kept positions set to 0
ce_loss_recovered_mean: CE loss recovered (mean); higher is better
    (ce_mean - ce_spliced) / (ce_mean - ce_clean), ce_mean: kept positions set to the held-out mean
kl: KL divergence; lower is better; nats per token
    mean over scored tokens of KL(p_clean || p_spliced) = sum_v p_clean(v) log(p_clean(v) / p_spliced(v))
""")
"""Metrics of a member."""
HEADLINES = ("fvu", "fvu_weighted", "l0", "dead_frac", "ce_delta", "ce_loss_recovered_zero")
"""Those that `wsae evaluate` prints, and that travel with an SAE."""

HEADINGS: dict[str, tuple[str, ...]] = {
    "Reconstruction": ("fvu", "fvu_weighted", "ev_dim_mean", "ev_dim_min"),
    "The model's own predictions": (
        *("ce_loss_recovered_zero", "ce_loss_recovered_mean", "ce_delta"),
        *("ce_clean", "ce_spliced", "kl"),
    ),
    "Sparsity": ("l0", "dead_frac", "dense_frac", "density_mean"),
    "Latents": ("latent_variance_mean", "decoder_cosine_max_mean"),
}
"""The same in the order that a reader of the report wants: heading -> metrics."""

COMPARED = tuple(
    key for key in METRICS if key not in ("ev_dim_mean", "ev_dim_min", "ce_clean", "ce_spliced")
)
"""Metrics for which members are compared."""

MATCHING = read_metrics("""
n_pairs: Matched latents; neither direction is better; pairs
    one-to-one pairs of latents of the member and of its plain twin, both active on held-out data
decoder_cosine_mean: Matched decoder cosine, mean
    mean over pairs of cos(W_dec_a[j], W_dec_b[pair(j)])
frac_above_0.9: Matched above 0.9; neither direction is better; share of pairs
    share of pairs with cosine > 0.9
frac_above_0.7: Matched above 0.7; neither direction is better; share of pairs
    share of pairs with cosine > 0.7
random_cosine_mean: Chance level of the cosine
    mean over the member's live latents of the largest cosine with as many random directions as the twin has
    live latents
""")
"""Statistics of the pairing with the plain twin."""

SCORES = read_metrics("""
embedding: Embedding detection; higher is better
    mean over latents of the AUC of cos(u(c), g), u(c) = v(c) - m, for held-out windows c in which the latent fires
    against random ones in which it is silent; v: sentence encoder, m: mean v of all latents' explaining windows,
    g: mean of u / |u| over the latent's own
surprisal: Surprisal detection; higher is better
    mean over latents of the AUC of (log P(c | explaining windows) - log P(c | windows of other latents)) / tokens of c
    under a language model; windows c as for embedding
detection: Detection; higher is better
    mean over latents of (TPR + TNR) / 2 of a language model's yes or no on each scoring window, given an explanation
    written from the explaining windows; pooled: of all latents' windows together
fuzzing: Fuzzing; higher is better
    as detection, with tokens marked: the latent's own in windows in which it fires, as many random ones in the others
simulation: Simulation; higher is better
    mean over latents of Pearson's r between the activations (0-10) that a language model predicts from an explanation
    and the real ones, over 5 top and 5 random fragments of 64 tokens (Appendix B.4)
""")
"""Scores of interpretability, in the order a reader wants them."""

CLASS_SCORES = read_metrics("""
consistency_top: Consistency, strongest; higher is better
    mean over latents of the share of the most frequent class among the n held-out images on which a latent is
    most active (the paper's words); latents active on fewer are counted, not scored
consistency_corrected: Consistency above chance; higher is better
    mean over latents of (share - chance) / (1 - chance): share of the most frequent class among the images a
    latent is active on, chance: the same with the images' classes permuted; latents active on enough images
consistency_ncl: Consistency, NCL; higher is better
    mean over latents of the share of the most frequent class among the images a latent is active on, as NCL's
    code counts it: a latent active on one image has 1
selectivity: Class selectivity; higher is better
    mean over latents of (mu_max - mu_rest) / (mu_max + mu_rest), mu: mean activation by class
information: Class information; higher is better
    mean over latents of the mutual information between being active and the class, in bits, less that with the
    classes permuted
""")
"""Scores of latents against class labels."""

PROBES = read_metrics("""
probe: Sparse probe, latents; higher is better; share of rows
    mean over tasks of the accuracy on test rows, half of which are of the class, of a logistic regression (L2, C = 1)
    on the k latents of largest class mean difference over the training rows; a document is the mean of its tokens
probe_all: Probe on all latents; higher is better; share of rows
    the same on all latents (or dimensions), rows scaled by one number to a total variance of 1
tpp: Targeted probe perturbation, latents; higher is better; share of rows
    mean over classes c of a_c - mean over other classes e of a_e; a_e: accuracy that the probe of e on activations
    loses when the n latents that speak most for c are set to 0
scr: Spurious correlation removal, latents; higher is better
    mean over pairs of classes of (acc - acc_0) / (acc_clean - acc_0), acc: of a probe trained where two classes go
    together, on the one it tells worse, with the n latents of the other set to 0 (acc_0: none); acc_clean: of its own
    probe
absorption_full: Absorption, full; lower is better; share of words
    mean over first letters of the share of test words, found by the letter's probe on the activations, on which the
    letter's latents are silent and the latent of largest projection on the probe's direction carries 0.4 of it
absorption_share: Absorption, share; lower is better; share of the projection
    mean over first letters and such words of the part of the projection that other latents than the letter's carry
""")
"""Scores against labels of tokens or documents; a number at the end of a score's name is k or n."""

LOSSES = read_metrics("""
raw: Ground-truth loss, raw
    z_i = latent i as it is; latents beyond n compared with 0
matched: Ground-truth loss, matched
    z_i = latent m(i), m the one-to-one assignment that minimises it; other latents ignored
padded: Ground-truth loss, matched and padded
    as matched, plus E z_j^2 of every latent without a feature; m minimises the sum (Eq. 7)
scaled: Ground-truth loss, matched and scaled
    z_i = c_i * latent m(i), c_i >= 0 by least squares and m minimising the result
zero: Ground-truth loss of zeros
    z = 0: the answer that knows nothing
constant: Ground-truth loss of the best constant
    z_i = E x_i
linear: Ground-truth loss of the best linear readout
    z = least squares of x on (x_p, 1), on the rows it is measured on
""")
"""gt_<key>: name, and what z is."""

ACTIVATED = read_metrics("""
sum: summed response above a threshold
    #{i : M_j^i > threshold}; M_j^i = sum over rows of h_j(x^i)
mean: mean response above a threshold
    #{i : R_j^i > mean_threshold}; R_j^i = E[h_j(x^i) | x_i > 0]
relative: mean response above a share of the strongest
    #{i : R_j^i > relative_threshold * max_i R_j^i}
participation: participation ratio
    (sum_i R_j^i)^2 / sum_i (R_j^i)^2
""")
"""activated_<key>: name, and the count of latent j; x^i is feature i alone."""

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

RECOVERY: dict[str, Metric] = {
    **{
        f"gt_{which}{part}": Metric(
            f"{loss.name}{words}", f"{formula}; {loss.formula}", LOWER, unit
        )
        for which, loss in LOSSES.items()
        for part, (words, formula, unit) in LOSS_PARTS.items()
    },
    **read_metrics("""
mcc_code: Code MCC; higher is better
    mean over one-to-one pairs of Pearson's corr(x_i, z_m(i)), m of largest total correlation; features that
    vary
best_correlation: Best correlation, mean; higher is better
    mean over features that vary of max_j corr(x_i, z_j); not one-to-one
missing_frac: Missing features; lower is better; share of features
    share of features that vary with max_j corr(x_i, z_j) < found_correlation (default 0.5)
precision: Precision; higher is better
    mean over features of P(x_i > 0 | z_m(i) != 0), m of the code MCC; 0 for a silent latent
recall: Recall; higher is better
    mean over features of P(z_m(i) != 0 | x_i > 0), m of the code MCC
f1: F1; higher is better
    mean over features of 2 precision_i recall_i / (precision_i + recall_i)
vanished: Vanished; lower is better; share of uses
    mean over features of P(z_m(i) = 0 | x_i > 0) = 1 - recall_i
shrinkage_code: Shrinkage of the code
    mean over features of E[z_m(i) | x_i > 0] / E[x_i | x_i > 0], m of the code MCC; 1 is no shrinkage
shrinkage_length: Shrinkage of the output
    sum_i E[z_m(i) | x_i > 0] |W_dec[m(i)]| / sum_i E[x_i | x_i > 0] |W_p[:, i]|; 1 is no shrinkage
mcc_direction: Direction MCC; higher is better
    mean over one-to-one pairs of |cos(W_p[:, i], W_dec[m(i)])|, m of largest sum
mcc_direction_signed: Direction MCC, signed; higher is better
    mean over one-to-one pairs of cos(W_p[:, i], W_dec[m(i)]), m of largest sum
mcc_direction_chance: Chance level of the direction MCC
    mcc_direction of d_sae random directions (one draw); near 1 in few dimensions
uniqueness: Uniqueness; higher is better
    #{argmax_i |cos(W_p[:, i], W_dec[j])| over latents j} / d_sae; at most n / d_sae
latent_precision: Precision per latent; higher is better
    mean over all latents of P(x_i > 0 | z_j != 0), i = argmax |cos| of latent j; 0 for a dead latent
latent_recall: Recall per latent; higher is better
    mean over all latents of P(z_j != 0 | x_i > 0), i = argmax |cos| of latent j
latent_f1: F1 per latent; higher is better
    mean over all latents of the harmonic mean of the two above
latent_accuracy: Accuracy per latent; higher is better
    share of (row, latent) in which z_j != 0 and x_i > 0 agree; high for sparse x whatever the SAE
"""),
    **{
        f"activated_{key}{suffix}": Metric(
            f"Activated features, {count.name}{', live' if suffix else ''}",
            f"mean over {over} j of {count.formula} (Appendix B.3)",
            LOWER,
            "features per latent",
        )
        for key, count in ACTIVATED.items()
        for suffix, over in (("", "all latents"), ("_live", "latents with any response"))
    },
    **read_metrics("""
latent_variance_mean: Latent variance, mean; neither direction is better; squared activation
    mean over latents of Var(z_j) over all rows, zeros included (Fig. 3d)
latent_dispersion: Latent dispersion
    median over latents that vary of Var(z_j) / E[z_j]^2; blind to scale
latent_kurtosis: Latent kurtosis
    median over latents that vary of E[(z_j - E z_j)^4] / Var(z_j)^2; blind to scale
feature_variance_mean: Feature variance, mean; neither direction is better; squared activation
    mean over features of Var(x_i) over all rows, zeros included (Fig. 3d)
feature_dispersion: Feature dispersion
    median over features that vary of Var(x_i) / E[x_i]^2; blind to scale
feature_kurtosis: Feature kurtosis
    median over features that vary of E[(x_i - E x_i)^4] / Var(x_i)^2; blind to scale
l0: L0, active latents; neither direction is better; latents per row
    mean over rows of #{j : z_j != 0}
true_l0: L0 of the truth; neither direction is better; features per row
    mean over rows of #{i : x_i > 0}
dead_frac: Dead latents; lower is better; share of latents
    share of latents active on no row
sae_loss: SAE loss; lower is better; squared activation per row
    E |x_p - x_hat|^2 (Eq. 4; Fig. 3c)
fvu: Plain FVU; lower is better
    sum_t |x_p - x_hat|^2 / sum_t |x_p - mean|^2; mean over the same rows
norm_ratio: Length of the output
    mean over rows with |x_p| > 1e-6 of |x_hat| / |x_p|; 1 is no shrinkage
acts_unexplained: Activations outside the world; lower is better
    sum_t |x_p - W_p x|^2 / sum_t |x_p|^2; 0 where W_p made these activations
"""),
}
"""Scores against a known ground truth, in the order of `Recovery.scores`."""


def glossary(*tables: Mapping[str, Metric]) -> dict[str, dict[str, str]]:
    """Return tables as JSON-ready objects {metric: {name, formula, direction, unit}}."""
    return {key: metric._asdict() for table in tables for key, metric in table.items()}


def numbered(keys: Iterable[str], table: Mapping[str, Metric] = PROBES) -> dict[str, Metric]:
    """Return the metric of each key; one that ends in a number is the metric of its stem with that number."""
    out = {}
    for key in keys:
        stem, _, number = key.rpartition("_")
        metric = table[stem if number.isdigit() else key]
        out[key] = metric._replace(name=f"{metric.name}: {number}") if number.isdigit() else metric
    return out

"""Every class score's formula and direction: the table behind the results, the report and the docs."""

from wsae.evals.glossary import HIGHER, Metric

SCORES: dict[str, Metric] = {
    "consistency_top": Metric(
        "Consistency, strongest",
        "mean over latents of the share of the most frequent class among the n held-out images on which a latent is "
        "most active (the paper's words); latents active on fewer are counted, not scored",
        HIGHER,
    ),
    "consistency_corrected": Metric(
        "Consistency above chance",
        "mean over latents of (share - chance) / (1 - chance): share of the most frequent class among the images a "
        "latent is active on, chance: the same with the images' classes permuted; latents active on enough images",
        HIGHER,
    ),
    "consistency_ncl": Metric(
        "Consistency, NCL",
        "mean over latents of the share of the most frequent class among the images a latent is active on, as NCL's "
        "code counts it: a latent active on one image has 1",
        HIGHER,
    ),
    "selectivity": Metric(
        "Class selectivity",
        "mean over latents of (mu_max - mu_rest) / (mu_max + mu_rest), mu: mean activation by class",
        HIGHER,
    ),
    "information": Metric(
        "Class information",
        "mean over latents of the mutual information between being active and the class, in bits, less that with the "
        "classes permuted",
        HIGHER,
    ),
}


def glossary() -> dict[str, dict[str, str]]:
    """Return every score's entry, JSON-ready."""
    return {name: metric._asdict() for name, metric in SCORES.items()}

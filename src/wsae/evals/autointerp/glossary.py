"""Every interpretability score's formula and direction: the table behind the results, the report and the docs."""

from collections.abc import Iterable

from wsae.evals.autointerp.config import Score
from wsae.evals.glossary import HIGHER, Metric

SCORES: dict[Score, Metric] = {
    "embedding": Metric(
        "Embedding detection",
        "mean over latents of the AUC of cos(u(c), g), u(c) = v(c) - m, for held-out windows c in which the latent "
        "fires against random ones in which it is silent; v: sentence encoder, m: mean v of all latents' explaining "
        "windows, g: mean of u / |u| over the latent's own",
        HIGHER,
    ),
    "surprisal": Metric(
        "Surprisal detection",
        "mean over latents of the AUC of (log P(c | explaining windows) - log P(c | windows of other latents)) / "
        "tokens of c under a language model; windows c as for embedding",
        HIGHER,
    ),
    "detection": Metric(
        "Detection",
        "mean over latents of (TPR + TNR) / 2 of a language model's yes or no on each scoring window, given an "
        "explanation written from the explaining windows; pooled: of all latents' windows together",
        HIGHER,
    ),
    "fuzzing": Metric(
        "Fuzzing",
        "as detection, with tokens marked: the latent's own in windows in which it fires, as many random ones in "
        "the others",
        HIGHER,
    ),
    "simulation": Metric(
        "Simulation",
        "mean over latents of Pearson's r between the activations (0-10) that a language model predicts from an "
        "explanation and the real ones, over 5 top and 5 random fragments of 64 tokens (Appendix B.4)",
        HIGHER,
    ),
}
"""Scores in the order a reader wants them."""


def glossary(scores: Iterable[str] = tuple(SCORES)) -> dict[str, dict[str, str]]:
    """Return the table as JSON-ready objects {score: {name, formula, direction, unit}}."""
    wanted = set(scores)
    return {key: metric._asdict() for key, metric in SCORES.items() if key in wanted}

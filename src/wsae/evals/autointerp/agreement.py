"""Do the scores that need no LLM rank latents as LLM detection does? Rank correlation over the same latents."""

from typing import Any

import numpy as np
from jaxtyping import Float64

from wsae.evals.autointerp.config import FREE, InterpretConfig
from wsae.evals.intervals import Estimate

Json = dict[str, Any]
Pairs = Float64[np.ndarray, "latents 2"]
FEWEST = 3
"""Latents below which no correlation is reported."""


def agreement(record: Json, cfg: InterpretConfig, asked: str = "detection") -> list[Json]:
    """Return a line per free score: Spearman's correlation with an asked one over all latents that have both.

    Latents of all hooks and members (not controls), each in its member's own sample: score, with, value, low, high, n.
    """
    members = [m for hook in record["hooks"].values() for m in hook["members"].values()]
    rows = [latent["scores"] for member in members for latent in member["latents"]]
    out = []
    for score in FREE:
        both = [(row.get(score), row.get(asked)) for row in rows]
        known = [pair for pair in both if None not in pair]
        values = np.array(known, dtype=np.float64).reshape(len(known), 2)
        found = rank_correlation(values, cfg)
        out.append({"score": score, "with": asked, **found._asdict(), "n": len(values)})
    return out


def rank_correlation(values: Pairs, cfg: InterpretConfig) -> Estimate:
    """Return Spearman's rho (Pearson's r of ranks, ties at their mean rank) with its interval over latents.

    Percentile bootstrap: latents are drawn with replacement and ranked anew. None for fewer than three latents or a
    column without variance; draws without variance are left out.
    """
    value = spearman(values)
    if value is None:
        return Estimate(None, None, None)
    rng = np.random.default_rng(cfg.seed)
    picks = rng.integers(0, len(values), size=(cfg.draws, len(values)))
    found = [rho for pick in picks if (rho := spearman(values[pick])) is not None]
    tail = (1 - cfg.confidence) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


def spearman(values: Pairs) -> float | None:
    """Return Spearman's rank correlation of two columns."""
    from scipy.stats import rankdata  # a third of a second to import, needed here only

    if len(values) < FEWEST:
        return None
    ranks = rankdata(values, axis=0)
    centred = ranks - ranks.mean(0)
    scale = float(np.sqrt((centred**2).sum(0).prod()))
    return float((centred[:, 0] * centred[:, 1]).sum()) / scale if scale > 0 else None

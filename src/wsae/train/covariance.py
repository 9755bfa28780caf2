"""The covariance of each hook's activations, taken only when a member's gamma rule needs it."""

import math

from wsae.acts.stream import ActivationSource
from wsae.acts.tally import SourceStats
from wsae.core.progress import Progress, quiet
from wsae.stats import Covariance
from wsae.train.config import TrainConfig

MAX_ROWS = 131_072
"""Rows behind a covariance at most: 32 for each of 4096 dimensions."""
_BATCH = 4096


def covariances(
    cfg: TrainConfig,
    source: ActivationSource,
    stats: dict[str, SourceStats],
    progress: Progress = quiet,
) -> dict[str, Covariance]:
    """Return each hook's covariance over shuffled training rows of one epoch, 131,072 at most; {} if no rule needs it.

    Rows are counted as the statistics are: a live model's first `stats_tokens`. Memory is d_in^2 x 8 bytes per hook and
    one batch. The sample is that of the run's seed, so a resumed run sees the same one.
    """
    if not any(member.gamma.needs_covariance for member in cfg.members):
        return {}
    wanted = min(MAX_ROWS, *(s.kept.n for s in stats.values()))
    even = wanted // math.ceil(wanted / _BATCH)  # whole batches that leave almost no row out
    batch = even if source.n_rows is not None else min(cfg.batch_size, wanted)
    stream = source.stream(batch, cfg.seed)
    found = {hook: Covariance(d_in) for hook, d_in in source.hooks.items()}
    with progress("covariance", wanted // batch * batch, "rows") as tick:
        for _ in range(wanted // batch):
            rows = stream.next()
            if stream.state().get("epoch", 0) != 0:
                break  # a short text has begun again
            for hook, covariance in found.items():
                covariance.update(rows[hook])
            tick(batch)
    return found

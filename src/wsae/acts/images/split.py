"""Which images are kept for evaluation: one rule for pretraining, harvesting and every probe."""

import numpy as np
from jaxtyping import Bool

from wsae.core.seeds import seed_for


def heldout_images(n: int, fraction: float, seed: int) -> Bool[np.ndarray, " images"]:
    """Return for each image whether it is held out: a hash of seed and image number, whatever else there is."""
    limit = fraction * 2.0**63
    return np.array([seed_for(seed, "heldout image", i) < limit for i in range(n)], dtype=bool)

"""The proxy "top": consistency of each input dimension among its strongest training images, as the paper words it."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64

from wsae.acts.source import StoreSource
from wsae.core.files import read_sealed, seal, write_json
from wsae.stats.classes import Hits
from wsae.stats.strongest import Strongest

_ROWS = 4096


def top_consistency(
    source: StoreSource, labels: Int64[np.ndarray, " images"], n_top: int, cache: Path
) -> tuple[float, ...]:
    """Return, for each dimension of the only hook, the share of the most frequent class of its n strongest rows.

    Training rows alone; 0 for a dimension positive on fewer than n. Kept in the file `cache` beside the data's digest.
    """
    key = {"data": source.digest(), "n_top": n_top}
    if cache.exists():
        kept = read_sealed(cache)
        if kept.get("key") == key:
            return tuple(kept["beta"])
    ((hook, d_in),) = source.hooks.items()
    image = np.asarray(source.store.places("train")[0])
    strongest = Strongest(d_in, n_top)
    for first in range(0, source.n_rows, _ROWS):
        index = np.arange(first, min(first + _ROWS, source.n_rows))
        x = source.store.rows("train", index)[hook]
        candidates = x.topk(min(n_top, len(x)), dim=0).values[-1]
        hits = Hits.of_dense(torch.where((x >= candidates) & (x > 0), x, 0.0))
        number = image[index][hits.row.numpy()]
        strongest.update(hits.unit.numpy(), hits.value.numpy(), number, labels[number])
    beta = np.nan_to_num(strongest.share()).tolist()
    write_json(cache, seal({"key": key, "beta": beta}))
    return tuple(beta)

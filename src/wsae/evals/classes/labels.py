"""Where the classes of held-out rows come from."""

import numpy as np

from wsae.acts.arrays import ArraySource
from wsae.acts.source import StoreSource
from wsae.acts.store import IMAGES
from wsae.core.tensors import load_tensors
from wsae.evals.classes.tally import Labels
from wsae.evals.data import HeldOut


def labels_of(source: HeldOut) -> Labels | None:
    """Return the class of every image, or row of an array, by number (-1: not held out); none without classes."""
    if isinstance(source, ArraySource):
        return source.labels
    if not isinstance(source, StoreSource) or source.labels() is None:
        return None
    found = load_tensors(source.store.path / "heldout" / IMAGES)
    images, labels = found["images"].numpy(), found["labels"].numpy()
    out = np.full(int(images.max(initial=-1)) + 1, -1, dtype=np.int64)
    out[images] = labels
    return out

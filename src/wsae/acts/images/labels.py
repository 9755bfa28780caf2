"""Classes of images: whole numbers from 0, one an image, with names; or none at all."""

import numpy as np
from jaxtyping import Int, Shaped

from wsae.core.errors import UserError

MOST_CLASSES = 1 << 20
"""A label above would have a name, and sums of every dimension, made for each class below it."""


def checked_labels(
    labels: Shaped[np.ndarray, "..."] | None, names: tuple[str, ...], n_images: int, where: str
) -> tuple[Int[np.ndarray, " images"] | None, tuple[str, ...]]:
    """Return labels as int64 with one name a class (numbers where there are none); (None, ()) without labels.

    Labels that are all negative mean that nobody labelled the images. Raises UserError for another number of labels
    than images, ones that are not whole numbers from 0, or more classes than names.
    """
    if labels is None:
        return None, ()
    if labels.shape != (n_images,):
        raise UserError(
            f"{where}: labels of shape {labels.shape} for {n_images} images; give one an image"
        )
    if labels.dtype.kind not in "iu":
        raise UserError(
            f"{where}: labels are {labels.dtype}, not whole numbers; number the classes from 0"
        )
    if not n_images or int(labels.max()) < 0:
        return None, ()
    if int(labels.min()) < 0:
        raise UserError(
            f"{where}: image {int(labels.argmin())} has label {int(labels.min())}; number the classes from 0"
        )
    needed = int(labels.max()) + 1
    if needed > MOST_CLASSES:
        raise UserError(
            f"{where}: image {int(labels.argmax())} has label {needed - 1}; "
            f"number the classes from 0 (at most {MOST_CLASSES:,})"
        )
    if names and len(names) < needed:
        raise UserError(
            f"{where}: labels up to {needed - 1} but {len(names)} names; give one a class"
        )
    return labels.astype(np.int64), names or tuple(str(number) for number in range(needed))

"""What a finished run says of its encoder: probes of the frozen embeddings, beside raw pixels."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from wsae.core.progress import Progress
from wsae.vision.data import Data
from wsae.vision.pretrainer import Pretrainer
from wsae.vision.probe import (
    KNN_TRAIN,
    PROBE_TEST,
    PROBE_TRAIN,
    K,
    knn_accuracy,
    linear_probe,
    pixels,
)


def probes(job: Pretrainer, progress: Progress) -> dict[str, Any] | None:
    """Return held-out accuracies of embeddings and of raw pixels; none without two classes or held-out images."""
    data = job.data
    if data.labels is None or not len(data.heldout):
        return None
    train, test = _some(data.train, PROBE_TRAIN), _some(data.heldout, PROBE_TEST)
    with progress("embed", len(train) + len(test), "images") as tick:
        (train, x), (test, x_test) = job.embed(train, tick), job.embed(test, tick)
    y, y_test = (data.labels[torch.from_numpy(index)] for index in (train, test))
    near = _some(np.arange(len(train)), KNN_TRAIN)
    with progress("probe", 3, "probes") as tick:
        knn = knn_accuracy(x[near], y[near].to(x.device), x_test, y_test.to(x.device))
        tick(1)
        linear = linear_probe(x.cpu(), y, x_test.cpu(), y_test, job.cfg.seed)
        tick(1)
        raw = linear_probe(_pixels(data, train), y, _pixels(data, test), y_test, job.cfg.seed)
        tick(1)
    return {
        "linear": linear._asdict(),
        "raw_pixels": raw._asdict(),
        "knn": {"accuracy": knn, "k": K, "train": len(near), "test": len(test)},
    }


def _some(index: Int64[np.ndarray, " n"], most: int) -> Int64[np.ndarray, " some"]:
    """Return at most so many, spread evenly, since images may be sorted by class."""
    if len(index) <= most:
        return index
    return index[np.linspace(0, len(index) - 1, most).round().astype(np.int64)]


def _pixels(data: Data, index: Int64[np.ndarray, " n"]) -> Float[Tensor, "n pixels"]:
    return torch.cat([pixels(images) for _, images in data.squares(index)])

"""What frozen embeddings know of the classes: nearest neighbours, and a linear probe beside one on raw pixels."""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

K, KNN_TRAIN = 20, 20_000
PROBE_TRAIN, PROBE_TEST = 50_000, 20_000
"""Images at most behind each probe."""
_CELLS = 5_000_000


class ProbeResult(NamedTuple):
    """Accuracy on images that were held out, and how many rows there were."""

    accuracy: float
    train: int
    test: int
    converged: bool


def knn_accuracy(
    train: Float[Tensor, "train width"],
    train_labels: Int64[Tensor, " train"],
    test: Float[Tensor, "test width"],
    test_labels: Int64[Tensor, " test"],
    k: int = K,
    temperature: float = 0.07,
) -> float:
    """Return the accuracy of the k nearest by cosine, each voting with exp(cosine / temperature).

    As solo-learn has it.
    """
    train, test = nn.functional.normalize(train, dim=1), nn.functional.normalize(test, dim=1)
    k, classes = min(k, len(train)), int(train_labels.max()) + 1
    right, rows = 0, max(1, _CELLS // len(train))
    for part, truth in zip(test.split(rows), test_labels.split(rows), strict=True):
        near = (part @ train.T).topk(k, dim=1)
        votes = torch.zeros(len(part), classes, device=part.device, dtype=torch.float32)
        votes.scatter_add_(1, train_labels[near.indices], (near.values / temperature).exp())
        right += int((votes.argmax(1) == truth).sum())
    return right / len(test)


def linear_probe(
    train: Float[Tensor, "train width"],
    train_labels: Int64[Tensor, " train"],
    test: Float[Tensor, "test width"],
    test_labels: Int64[Tensor, " test"],
    seed: int = 0,
) -> ProbeResult:
    """Fit a multinomial logistic regression on standardised rows and return its accuracy on the test rows."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    x, y = scaler.fit_transform(train.cpu().numpy()), train_labels.cpu().numpy()
    model = LogisticRegression(max_iter=200, tol=1e-3, random_state=seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(x, y)
    right = model.predict(scaler.transform(test.cpu().numpy())) == test_labels.cpu().numpy()
    unfinished = any(issubclass(w.category, ConvergenceWarning) for w in caught)
    return ProbeResult(float(np.mean(right)), len(train), len(test), not unfinished)


def pixels(images: Tensor, side: int = 32) -> Float[Tensor, "batch pixels"]:
    """Return images as rows of pixels in [0, 1], those larger than `side` averaged down to it."""
    x = images.float() / 255
    if max(x.shape[-2:]) > side:
        x = nn.functional.adaptive_avg_pool2d(x, side)
    return x.flatten(1)

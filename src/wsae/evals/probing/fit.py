"""Sparse probes as SAEBench defines them: the k columns of largest class mean difference, then logistic regression.

The regression is scikit-learn's (L2, C = 1), at its optimum: Newton's method for a few columns, L-BFGS for all.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from scipy.optimize import minimize
from scipy.special import expit

Table = Any
"""What a member makes of tokens or documents, [rows, columns]: a NumPy array or a sparse one of SciPy, by rows."""
STEPS, HALVINGS = 60, 30
"""Newton steps at most, and how often one is halved; a handful is usual."""


class ProbeTask(NamedTuple):
    """One class against the rest: the rows that train and test its probes, and which of them are of the class."""

    name: str
    train: Int64[np.ndarray, " train"]
    train_y: Bool[np.ndarray, " train"]
    test: Int64[np.ndarray, " test"]
    test_y: Bool[np.ndarray, " test"]


class LinearProbe(NamedTuple):
    """The class is told where x . weight + bias > 0."""

    weight: Float64[np.ndarray, " columns"]
    bias: float

    def logits(self, x: Table) -> Float64[np.ndarray, " rows"]:
        """Return x . weight + bias."""
        return np.asarray(x @ self.weight) + self.bias


def balanced(y: Bool[np.ndarray, " rows"]) -> Float64[np.ndarray, " rows"]:
    """Return weights under which the class weighs as much as the rest, of mean 1."""
    return np.where(y, 0.5 / y.mean(), 0.5 / (~y).mean())


def fit_few(
    x: Float64[np.ndarray, "rows k"],
    y: Bool[np.ndarray, " rows"],
    weight: Float64[np.ndarray, " rows"] | float = 1.0,
) -> LinearProbe:
    """Return the minimiser of |w|^2 / 2 + sum c log(1 + exp(-s (w . x + b))), s = 1 for the class and -1 for the rest.

    c is the row's weight. There must be rows of both kinds; without them b has no optimum.
    """
    rows = np.column_stack([x, np.ones(len(x))]).astype(np.float64)
    ridge = np.ones(rows.shape[1])
    ridge[-1] = 0.0

    def loss(w: np.ndarray) -> float:
        logits = rows @ w
        fit = weight * (np.logaddexp(0, logits) - y * logits)
        return float(fit.sum() + (ridge * w * w).sum() / 2)

    w = np.zeros(rows.shape[1])
    value = loss(w)
    for _ in range(STEPS):
        p = expit(rows @ w)
        slope = ridge * w + rows.T @ (weight * (p - y))
        curve = np.diag(ridge + 1e-12) + rows.T @ (rows * (weight * p * (1 - p))[:, None])
        move = np.linalg.solve(curve, slope)
        lengths = (w - 0.5**i * move for i in range(HALVINGS))
        trial = next((t for t in lengths if loss(t) <= value), w)
        w, value = trial, loss(trial)
        if float(slope @ move) < 1e-14 * max(value, 1.0):
            break
    return LinearProbe(w[:-1], float(w[-1]))


def fit_all(
    x: Table,
    y: Bool[np.ndarray, " rows"],
    weight: Float64[np.ndarray, " rows"] | float = 1.0,
) -> LinearProbe:
    """Return the same regression on all columns, of rows scaled by one number so that their total variance is 1."""
    x = x.astype(np.float64)
    mean = np.asarray(x.mean(0)).ravel()
    squares = x.ravel() if isinstance(x, np.ndarray) else x.data
    spread = float(squares @ squares) / x.shape[0] - float(mean @ mean)
    scale = 1 / np.sqrt(spread) if spread > 0 else 1.0
    sign = np.where(y, 1.0, -1.0)

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the loss and its slope; the columns' means are taken off, which moves the bias alone."""
        margin = sign * (scale * (np.asarray(x @ w[:-1]) - mean @ w[:-1]) + w[-1])
        pull = -sign * weight * expit(-margin)
        slope = scale * (np.asarray(x.T @ pull) - mean * pull.sum()) + w[:-1]
        value = float((weight * np.logaddexp(0, -margin)).sum() + w[:-1] @ w[:-1] / 2)
        return value, np.append(slope, pull.sum())

    start = np.zeros(x.shape[1] + 1)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500})
    along = scale * found.x[:-1]
    return LinearProbe(along, float(found.x[-1] - mean @ along))


def class_difference(x: Table, y: Bool[np.ndarray, " rows"]) -> Float64[np.ndarray, " columns"]:
    """Return the mean of every column over the class less that over the others."""
    return np.asarray(x.T @ np.where(y, 1 / y.sum(), -1 / (~y).sum()))


def strongest(scores: Float64[np.ndarray, " columns"], k: int) -> Int64[np.ndarray, " k"]:
    """Return the k columns of largest score, largest first."""
    return np.argsort(-scores, kind="stable")[:k]


def dense(x: Table, columns: Int64[np.ndarray, " k"]) -> Float64[np.ndarray, "rows k"]:
    """Return some columns as an array."""
    part = x[:, columns]
    return np.asarray(part if isinstance(part, np.ndarray) else part.toarray(), dtype=np.float64)


def sparse_right(
    x: Table, task: ProbeTask, ks: Sequence[int]
) -> tuple[dict[int, Bool[np.ndarray, " test"]], Int64[np.ndarray, " k"]]:
    """Return for every k which test rows a probe of k columns tells right, and the columns of the largest k."""
    train, test = x[task.train], x[task.test]
    columns = strongest(np.abs(class_difference(train, task.train_y)), max(ks))
    near, far = dense(train, columns), dense(test, columns)
    right = {}
    for k in ks:
        probe = fit_few(near[:, :k], task.train_y)
        right[k] = (probe.logits(far[:, :k]) > 0) == task.test_y
    return right, columns


def one_against_others(
    train: Mapping[str, Int64[np.ndarray, " _"]],
    test: Mapping[str, Int64[np.ndarray, " _"]],
    seed: int,
) -> list[ProbeTask]:
    """Return each class's task over documents, whose rows are given by class.

    As SAEBench draws them: all documents of the class, and as many of the others, equally many of each other class,
    from the same random numbers. Where the others are too few, so many of the class are taken.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(rows: Mapping[str, np.ndarray], own: str) -> tuple[np.ndarray, np.ndarray]:
        n, others = len(rows[own]), [name for name in rows if name != own]
        each = -(-n // len(others))

        def some(of: np.ndarray, most: int) -> np.ndarray:
            return of[torch.randperm(len(of), generator=generator).numpy()[:most]]

        rest = some(np.concatenate([some(rows[name], each) for name in others]), n)
        mine = rows[own] if len(rest) == n else some(rows[own], len(rest))
        both = np.concatenate([mine, rest])
        order = torch.randperm(len(both), generator=generator).numpy()
        return both[order], order < len(mine)

    return [ProbeTask(own, *drawn(train, own), *drawn(test, own)) for own in train]

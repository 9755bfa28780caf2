"""Scores of what members make of labelled rows: sparse probes, and what is left of a class when latents are set to 0.

Probes are SAEBench's: the k columns of largest class mean difference, then scikit-learn's logistic regression (L2,
C = 1) at its optimum, by Newton's method for a few columns and L-BFGS for all.

A score has a value per task, and the same sum spread over the units that are independent (sequences, documents), so
that it has an interval over either.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Bool, Float64, Int64
from scipy.optimize import minimize
from scipy.special import expit

from wsae.evals.config import ProbeConfig
from wsae.evals.intervals import Difference, Ratio, estimate, mean, paired_difference

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


Decoder = Float64[np.ndarray, "d_sae d_in"]


class ProbeScore(NamedTuple):
    """One score of one member: a value per task (NaN: undefined there), and where there is one a ratio over units."""

    by_task: Float64[np.ndarray, " tasks"]
    by_unit: Ratio | None = None

    @property
    def value(self) -> float | None:
        """The mean over the tasks that have a value."""
        known = self.by_task[~np.isnan(self.by_task)]
        return float(known.mean()) if len(known) else None


class TaskSet(NamedTuple):
    """Tasks over the same rows, and the independent unit (0, 1, ...) that each row belongs to."""

    tasks: list[ProbeTask]
    unit: Int64[np.ndarray, " rows"]
    units: int

    @property
    def names(self) -> list[str]:
        """The tasks' names."""
        return [task.name for task in self.tasks]

    def spread(self, values: Sequence[np.ndarray]) -> Ratio:
        """Return sum_t mean_r v_tr / T as a ratio of sums over units, of values by task and test row."""
        num, den = np.zeros(self.units), np.zeros(self.units)
        for task, of_rows in zip(self.tasks, values, strict=True):
            weight = np.full(len(of_rows), 1 / (len(of_rows) * len(self.tasks)))
            unit = self.unit[task.test]
            num += np.bincount(unit, weight * of_rows, self.units)
            den += np.bincount(unit, weight, self.units)
        seen = den > 0
        return Ratio(num[seen], den[seen])


@dataclass(frozen=True)
class ProbeFindings:
    """What was found at one hook: scores by member (the activations and the random SAE too) and score."""

    tasks: list[str]
    scores: dict[str, dict[str, ProbeScore]] = field(default_factory=dict)
    latents: dict[str, Int64[np.ndarray, "tasks k"]] = field(default_factory=dict)
    """Each task's latents of the largest k by member, most different between the classes first."""
    letters: list[str] = field(default_factory=list)
    """The tasks of absorption."""
    pairs: list[str] = field(default_factory=list)
    """The pairs of classes of spurious correlation removal."""

    def accuracy(self, member: str, k: int | None) -> Float64[np.ndarray, " tasks"]:
        """Return the share of test rows that a probe of k latents (None: of all) tells right, by task."""
        return self.scores[member][probe_score(k)].by_task


def probe_score(k: int | None) -> str:
    """Return the name of the score of probes with k columns, or all."""
    return f"probe_{'all' if k is None else k}"


def score_probes(
    tables: Mapping[str, Table], tasks: TaskSet, cfg: ProbeConfig, tick: Callable[[int], None]
) -> tuple[ProbeFindings, dict[str, list[LinearProbe]]]:
    """Return the accuracies of every member's probes, and the probes on all columns by member and task."""
    found = ProbeFindings(tasks.names)
    probes: dict[str, list[LinearProbe]] = {}
    for name, table in tables.items():
        right: dict[int | None, list[Bool[np.ndarray, " test"]]] = {k: [] for k in (*cfg.k, None)}
        chosen = []
        for task in tasks.tasks:
            some, columns = sparse_right(table, task, cfg.k)
            whole = fit_all(table[task.train], task.train_y)
            some_or_all: dict[int | None, np.ndarray] = {**some}
            some_or_all[None] = (whole.logits(table[task.test]) > 0) == task.test_y
            for k, told in some_or_all.items():
                right[k].append(told)
            chosen.append(columns)
            probes.setdefault(name, []).append(whole)
            tick(1)
        found.latents[name] = np.stack(chosen)
        found.scores[name] = {
            probe_score(k): ProbeScore(np.array([r.mean() for r in rows]), tasks.spread(rows))
            for k, rows in right.items()
        }
    return found, probes


class Removal(NamedTuple):
    """What setting latents to 0 does: the rows' means in the model and in an SAE, its decoder, probes on the former.

    A document's activations with latents S at 0 and the SAE's error kept have the mean x - sum_S z_j W_dec[j].
    """

    raw: Table
    codes: Table
    decoder: Decoder
    tasks: list[ProbeTask]
    probes: list[LinearProbe]

    def effects(self, at: int, signed: bool = True) -> Float64[np.ndarray, " d_sae"]:
        """Return what each latent adds to a task's logit: class mean difference times W_dec[j] . w.

        Signed: only latents that the class has more of count (targeted perturbation); else the absolute value.
        """
        task = self.tasks[at]
        difference = class_difference(self.codes[task.train], task.train_y)
        along = self.decoder @ self.probes[at].weight
        return np.maximum(difference, 0) * along if signed else np.abs(difference * along)

    def chosen(self, effects: Float64[np.ndarray, " d_sae"], n: int) -> Int64[np.ndarray, " n"]:
        """Return the n latents of largest effect, fewer where fewer have one."""
        return strongest(effects, min(n, int((effects != 0).sum())))

    def right(
        self, probe: int, on: int, latents: Int64[np.ndarray, " n"]
    ) -> Bool[np.ndarray, " test"]:
        """Return which test rows of task `on` the probe of another tells right with these latents at 0."""
        task, found = self.tasks[on], self.probes[probe]
        logits = found.logits(self.raw[task.test])
        if len(latents):
            along = self.decoder[latents] @ found.weight
            logits = logits - dense(self.codes[task.test], latents) @ along
        return (logits > 0) == task.test_y


def targeted(removal: Removal, tasks: TaskSet, ns: Sequence[int]) -> dict[str, ProbeScore]:
    """Return targeted probe perturbation: how much more a class's own probe loses than the others', n latents at 0.

    tpp_n = mean over classes c of (loss of c's accuracy - mean over other classes of the loss of theirs).
    """
    count = len(tasks.tasks)
    none = np.zeros(0, dtype=np.int64)
    clean = [removal.right(e, e, none) for e in range(count)]
    effects = [removal.effects(c) for c in range(count)]
    out = {}
    for n in ns:
        by_task, by_row = np.zeros(count), [np.zeros(len(rows)) for rows in clean]
        for c in range(count):
            latents = removal.chosen(effects[c], n)
            for e in range(count):
                lost = clean[e].astype(float) - removal.right(e, e, latents)
                share = 1.0 if e == c else -1 / (count - 1)
                by_task[c] += share * lost.mean()
                by_row[e] += share * lost
        out[f"tpp_{n}"] = ProbeScore(by_task, tasks.spread(by_row))
    return out


def removed(removal: Removal, ns: Sequence[int]) -> dict[str, ProbeScore]:
    """Return spurious correlation removal by pair of classes: (acc - acc_0) / (acc_clean - acc_0), n latents at 0.

    The tasks come in threes: the class, the second label, both together. acc is that of the probe of both on the task
    that it tells worse (with none at 0: acc_0); the latents are those of the other task. acc_clean: that of the task's
    own probe. NaN where the probe tells both tasks equally well.
    """
    none = np.zeros(0, dtype=np.int64)
    starts = range(0, len(removal.tasks), 3)
    out = {f"scr_{n}": ProbeScore(np.full(len(starts), np.nan)) for n in ns}
    for i, start in enumerate(starts):
        both = start + 2
        before = {on: float(removal.right(both, on, none).mean()) for on in (start, start + 1)}
        on, other = sorted(before, key=lambda task: before[task])
        if before[on] == before[other]:
            continue
        gap = float(removal.right(on, on, none).mean()) - before[on]
        effects = removal.effects(other, signed=False)
        for n in ns:
            after = float(removal.right(both, on, removal.chosen(effects, n)).mean())
            out[f"scr_{n}"].by_task[i] = 0.0 if gap < 0.001 else (after - before[on]) / gap
    return out


# Absorption of a first letter: words on which the letter's latents are silent and another latent speaks for them.

SPLIT = 0.03
"""A further latent is one of the letter's when the F1 of their probe rises by more."""
MOST_MAIN, MOST_ABSORBING = 10, 3
COSINE_FULL, COSINE_PART, PROPORTION = 0.025, 0.1, 0.4
"""How much like the letter's direction an absorbing latent is (alone, with others), and how much it must carry."""
WORDS = 128
"""Words whose codes are dense at once."""
LEAST_F1 = 0.6
"""Letters that the probe on the activations finds worse are left out."""


class LetterWords(NamedTuple):
    """Words of a letter (or not) that train and test, and the probe on the activations."""

    task: ProbeTask
    probe: LinearProbe


def f1(told: Bool[np.ndarray, " rows"], y: Bool[np.ndarray, " rows"]) -> float:
    """Return 2 TP / (2 TP + FP + FN)."""
    hit = int((told & y).sum())
    return 2 * hit / max(1, int(told.sum()) + int(y.sum()))


def main_latents(codes: Table, task: ProbeTask) -> Int64[np.ndarray, " k"]:
    """Return the letter's latents: of those that it has more of, the first ones by each of which the probe gains."""
    train, test = codes[task.train], codes[task.test]
    columns = strongest(class_difference(train, task.train_y), MOST_MAIN)
    near, far = dense(train, columns), dense(test, columns)
    best, count = -100.0, 0
    for k in range(1, MOST_MAIN + 1):
        probe = fit_few(near[:, :k], task.train_y, balanced(task.train_y))
        score = f1(probe.logits(far[:, :k]) > 0, task.test_y)
        if score <= best + SPLIT:
            break
        best, count = score, k
    return columns[:count]


class Absorption(NamedTuple):
    """Absorption by word: wholly by one latent, and the share of the letter's direction that others carry."""

    full: Bool[np.ndarray, " words"]
    share: Float64[np.ndarray, " words"]


def absorbed(
    raw: Float64[np.ndarray, "words d_in"],
    codes: Table,
    decoder: Decoder,
    direction: Float64[np.ndarray, " d_in"],
    main: Int64[np.ndarray, " k"],
) -> Absorption:
    """Return which words' letter is absorbed, with SAEBench's thresholds; `direction` is the letter's probe.

    A latent's projection is its value times cos(W_dec[j], direction); the word's is x . direction / |direction|.
    """
    unit = direction / np.linalg.norm(direction)
    cosine = decoder @ unit / np.maximum(np.linalg.norm(decoder, axis=1), 1e-30)
    word = raw @ unit
    along = codes.toarray() * cosine if scipy.sparse.issparse(codes) else codes * cosine
    values = dense(codes, main)
    mine = along[:, main].sum(1)
    others = along.copy()
    others[:, main] = 0
    others[:, cosine < COSINE_PART] = 0
    top = np.sort(np.maximum(others, 0), axis=1)[:, -MOST_ABSORBING:].sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        carries = top / word >= PROPORTION
        gained = np.minimum(top, word - mine)
        part = np.clip(gained / (gained + mine), 0, 1)
    share = np.where(~carries | (mine >= word), 0.0, np.where(mine <= 0, 1.0, part))
    first = along.argmax(1)
    largest = along[np.arange(len(along)), first]
    full = (values < 1e-8).all(1) & (cosine[first] >= COSINE_FULL) & (word >= 0)
    return Absorption(full & (largest >= PROPORTION * word), share)


def score_absorption(
    raw: Table, codes: Table, decoder: Decoder, letters: Sequence[LetterWords]
) -> dict[str, ProbeScore]:
    """Return by letter the share of its test words, found by the probe on the activations, whose letter is absorbed."""
    full, share = [], []
    for task, probe in letters:
        rows = task.test[task.test_y & (probe.logits(raw[task.test]) > 0)]
        main = main_latents(codes, task)
        found = [
            absorbed(
                np.asarray(raw[some], dtype=np.float64), codes[some], decoder, probe.weight, main
            )
            for some in np.array_split(rows, -(-len(rows) // WORDS))
        ]
        full.append(float(np.concatenate([part.full for part in found]).mean()))
        share.append(float(np.concatenate([part.share for part in found]).mean()))
    named = {"absorption_full": full, "absorption_share": share}
    return {name: ProbeScore(np.array(values)) for name, values in named.items()}


# From scores to a record: values with intervals over tasks and over units, differences from the twin and the floor.


def summary(score: ProbeScore, cfg: ProbeConfig) -> dict[str, object]:
    """Return a score's value with its interval over tasks, and with that over units where there is one."""
    known = score.by_task[~np.isnan(score.by_task)]
    out: dict[str, object] = {
        "value": score.value,
        "low": None,
        "high": None,
        "n": len(known),
    }
    if len(known):
        out |= estimate(mean(known), cfg.bootstrap())._asdict()
    if score.by_unit is not None:
        found = estimate(score.by_unit, cfg.bootstrap())
        out["by_unit"] = {"low": found.low, "high": found.high, "n": len(score.by_unit.num)}
    return out


def differences(a: ProbeScore, b: ProbeScore, unit: str, cfg: ProbeConfig) -> dict[str, Difference]:
    """Return a - b over tasks, and over units where there are any, paired."""
    both = ~np.isnan(a.by_task) & ~np.isnan(b.by_task)
    found = {
        "tasks": paired_difference(mean(a.by_task[both]), mean(b.by_task[both]), cfg.bootstrap())
    }
    if a.by_unit is not None and b.by_unit is not None:
        found[unit] = paired_difference(a.by_unit, b.by_unit, cfg.bootstrap())
    return found

"""How each unit (a latent, a dimension) goes with the classes: exact tables in one pass over sparse rows.

Memory is units x classes, whatever the number of samples; a row of codes is never made dense.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor

from wsae.core.errors import UserError
from wsae.core.seeds import mix64, seed_for

STRETCH = 256
"""Supports up to this use every disjoint stretch of a permutation, larger ones its beginning alone."""


class Chance(NamedTuple):
    """Expected scores of a latent that knows nothing of the classes, by the number s of samples it is active on.

    Under a random permutation of the labels its class counts are one draw from the multivariate hypergeometric
    distribution of the class totals. Entry 0 is NaN.
    """

    share: Float64[np.ndarray, " supports"]
    """E[max_c counts_c / s]."""
    information: Float64[np.ndarray, " supports"]
    """E of the plug-in mutual information between "active" and the class, in bits."""


def chance_levels(
    totals: Int[np.ndarray, " n_classes"], largest: int, draws: int = 1000, seed: int = 0
) -> Chance:
    """Return the expectations for supports 0 .. largest, given how many samples each class has.

    `draws` permutations of all labels: the first s labels of one are a draw for every s at once, and so is every
    disjoint stretch of it, which makes the table precise where it matters, at small s. The error at support s is about
    the spread of one score divided by sqrt(draws N / 256) for s <= 256 and by sqrt(draws) above.
    """
    totals = np.asarray(totals, dtype=np.int64)
    labels = np.repeat(np.arange(len(totals)), totals)
    n, rng = len(labels), np.random.default_rng(seed)
    largest = min(largest, n)
    short = min(STRETCH, largest)
    sums = {length: np.zeros((2, length)) for length in (short, largest)}
    logs = x_log2_x(np.arange(n + 1))
    for _ in range(draws if largest else 0):
        order = rng.permutation(labels)
        stretches = order[: n // short * short].reshape(-1, short)
        sums[short] += _scores(stretches, totals, logs) / len(stretches)
        if largest > short:
            sums[largest] += _scores(order[None, :largest], totals, logs)
    table = np.full((2, largest + 1), np.nan)
    table[:, 1:] = sums[largest] / draws
    table[:, 1 : short + 1] = sums[short] / draws
    return Chance(*table)


def x_log2_x(x: Int[np.ndarray, "..."]) -> Float64[np.ndarray, "..."]:
    """Return x log2 x, 0 at 0."""
    wide = np.asarray(x, dtype=np.float64)
    return wide * np.log2(np.maximum(wide, 1.0))


def _scores(
    drawn: Int64[np.ndarray, "draws length"],
    totals: Int64[np.ndarray, " n_classes"],
    logs: Float64[np.ndarray, " samples_plus_1"],
) -> Float64[np.ndarray, "2 length"]:
    """Return the sums over draws of share and information of the first 1 .. length labels of each.

    A label that is its class's k-th so far (from 0) raises the class's count from k to k + 1, and
    N I = sum_c [h(c_1) + h(c_0)] - h(s) - h(N - s) - sum_c h(n_c) + h(N),  h(x) = x log2 x,
    over active counts c_1 and silent ones c_0 = n_c - c_1, changes by what that moves.
    """
    n, length = int(totals.sum()), drawn.shape[1]
    before = _earlier(drawn, len(totals))
    share = np.maximum.accumulate(before + 1, axis=1).sum(0) / np.arange(1, length + 1)
    silent = totals[drawn] - before
    moved = logs[before + 1] - logs[before] + logs[silent - 1] - logs[silent]
    s = np.arange(1, length + 1)
    rest = len(drawn) * (logs[n] - logs[s] - logs[n - s])
    return np.stack([share, (moved.sum(0).cumsum() + rest) / n])


def _earlier(
    drawn: Int64[np.ndarray, "draws length"], n_classes: int
) -> Int64[np.ndarray, "draws length"]:
    """Return how many labels before each one, in its draw, are of the same class."""
    keys = (np.arange(len(drawn))[:, None] * n_classes + drawn).ravel()
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    start = np.maximum.accumulate(np.where(first, np.arange(len(keys)), 0))
    out = np.empty(len(keys), dtype=np.int64)
    out[order] = np.arange(len(keys)) - start
    return out.reshape(drawn.shape)


ACTIVE = 1e-5
"""A dimension is active on a sample when its value, after L2 normalisation of the row, exceeds this."""


class ConsistencyCounts:
    """Streaming counts [d_in, n_classes] of the samples each dimension is active on; exact and mergeable.

    As the code of Wang et al. 2024b counts (the paper's beta, Section 5.2.2): a dimension active on one sample scores 1
    whatever it means, and one active on all of them the share of the largest class. `corrected_share` takes that out.
    """

    def __init__(self, d_in: int, n_classes: int) -> None:
        self.counts: Int64[Tensor, "d_in n_classes"] = torch.zeros(
            d_in, n_classes, dtype=torch.int64
        )

    def update(self, x: Float[Tensor, "rows d_in"], labels: Int64[Tensor, " labels"]) -> None:
        """Add rows with their labels; raises UserError when they differ in number or a label is out of range."""
        check_labels(labels, len(x), self.counts.shape[1])
        norms = x.double().norm(dim=1, keepdim=True).clamp_min(1e-12)
        active = (x.double().abs() / norms > ACTIVE).double()
        classes = torch.zeros(len(x), self.counts.shape[1], dtype=torch.float64)
        classes.scatter_(1, labels[:, None], 1.0)
        self.counts += (active.T @ classes).round().to(torch.int64)

    def consistency(self) -> Float64[Tensor, " d_in"]:
        """Return beta_i, the share of the most frequent label among the samples active in dimension i (0 if none)."""
        return largest_share(self.counts).nan_to_num(0.0)


def check_labels(labels: Int64[Tensor, " labels"], rows: int, n_classes: int) -> None:
    """Raise UserError unless there is one label per row, from 0 to n_classes - 1."""
    if rows != len(labels):
        raise UserError(f"{len(labels)} labels for {rows} rows; give one label per row")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < n_classes:
        raise UserError(
            f"labels run from {int(labels.min())} to {int(labels.max())}; use 0 .. n_classes - 1"
        )


def largest_share(counts: Int64[Tensor, "units n_classes"]) -> Float64[Tensor, " units"]:
    """Return max_c counts[i, c] / sum_c counts[i, c]; NaN where the sum is 0."""
    return counts.amax(1).double() / counts.sum(1).double()


class NclSummary(NamedTuple):
    """What the reference prints of a set of dimensions, as shares rather than percent."""

    mean: float | None
    std: float | None
    """Over dimensions, with n - 1."""
    entropy: float | None
    """Mean over dimensions of -sum_c p_c ln(p_c + 1e-5)."""
    n: int
    """Dimensions averaged."""


def ncl_summary(
    counts: Int64[Tensor, "units n_classes"], positive: Bool[Tensor, " units"] | None = None
) -> NclSummary:
    """Return the mean over dimensions of the share of the most frequent label, as Wang et al.'s `main_eval.py` does.

    Averaged are the dimensions with a positive sum of positive parts (`positive`; none: all) that are active on at
    least one sample. `counts` must come from rows scaled to length 1 over the positive dimensions alone.
    """
    seen = counts.sum(1) > 0
    kept = counts[seen if positive is None else seen & positive]
    if not len(kept):
        return NclSummary(None, None, None, 0)
    share = largest_share(kept)
    p = kept.double() / kept.sum(1, keepdim=True).double()
    entropy = -(p * (p + ACTIVE).log()).sum(1)
    std = float(share.std()) if len(kept) > 1 else None
    return NclSummary(float(share.mean()), std, float(entropy.mean()), len(kept))


def minibatch_consistency(
    rows: Int64[Tensor, " hits"],
    units: Int64[Tensor, " hits"],
    labels: Int64[Tensor, " batch"],
) -> float | None:
    """Return the mean share of the most frequent label within one mini-batch, as the reference's training log has it.

    (rows, units) are the active entries of the batch. Dimensions active on one sample of the batch score 1, so that the
    value depends on the size of the batch: it is here to show how much. None where nothing is active.
    """
    if not len(units):
        return None
    n_classes = int(labels.max()) + 1
    seen, place = units.unique(return_inverse=True)
    keys = place * n_classes + labels[rows]
    counts = torch.bincount(keys, minlength=len(seen) * n_classes).view(len(seen), n_classes)
    return float(largest_share(counts).mean())


class Strongest:
    """Running top n of every unit: memory is units x n x 24 bytes, whatever the number of samples.

    Equal values are taken by ascending place, so that the result does not depend on how samples are split or ordered.
    """

    def __init__(self, units: int, n: int) -> None:
        self.n = n
        self.value: Float64[np.ndarray, "units n"] = np.full((units, n), -np.inf)
        self.place: Int64[np.ndarray, "units n"] = np.full((units, n), -1, dtype=np.int64)
        """The samples' numbers, strongest first; -1 where there are fewer than n."""
        self.label: Int64[np.ndarray, "units n"] = np.full((units, n), -1, dtype=np.int64)

    def update(
        self,
        unit: Int64[np.ndarray, " hits"],
        value: Float64[np.ndarray, " hits"],
        place: Int64[np.ndarray, " hits"],
        label: Int64[np.ndarray, " hits"],
    ) -> None:
        """Add activations: of which unit, how strong, on which sample, of which class."""
        enters = value >= self.value[unit, -1]
        columns = [column[enters] for column in (unit, value, place, label)]
        touched = np.unique(columns[0])
        kept, where = (self.place[touched] >= 0).nonzero()
        old = touched[kept]
        held = (old, self.value[old, where], self.place[old, where], self.label[old, where])
        unit, value, place, label = (
            np.concatenate(pair) for pair in zip(held, columns, strict=True)
        )
        order = np.lexsort((place, -value, unit))
        ordered = unit[order]
        start = np.searchsorted(ordered, ordered, side="left")
        rank = np.arange(len(order)) - start
        order, rank = order[rank < self.n], rank[rank < self.n]
        unit = unit[order]
        self.value[unit, rank], self.place[unit, rank] = value[order], place[order]
        self.label[unit, rank] = label[order]

    def full(self) -> np.ndarray:
        """Return which units have n samples [units]."""
        return self.place[:, -1] >= 0

    def share(self) -> Float64[np.ndarray, " units"]:
        """Return the share of the most frequent class among the n strongest samples; NaN where there are fewer."""
        label = torch.from_numpy(self.label)
        most = (label == label.mode(1, keepdim=True).values).sum(1)
        return np.where(self.full(), most.numpy() / self.n, np.nan)


class Hits(NamedTuple):
    """Non-zero values of some rows: which row, which unit, how large."""

    row: Int64[Tensor, " hits"]
    unit: Int64[Tensor, " hits"]
    value: Float64[Tensor, " hits"]

    @staticmethod
    def of_dense(
        x: Float[Tensor, "rows units"], units: Bool[Tensor, " units"] | None = None
    ) -> "Hits":
        """Return the entries of dense rows, of the marked units alone (none: all)."""
        kept = x if units is None else x * units
        row, unit = kept.nonzero(as_tuple=True)
        return Hits(row, unit, x[row, unit].double())

    def active(self, rows: int) -> "Hits":
        """Return the entries above 1e-5 of their row's length."""
        square = torch.bincount(self.row, self.value.square(), minlength=rows)
        norm = square.sqrt().clamp_min(1e-12)
        return self.take(self.value.abs() > ACTIVE * norm[self.row])

    def of_images(self, place: Int64[Tensor, " rows"]) -> "Hits":
        """Return the largest entry of every unit on every image, its row the image's: `place` is each row's image."""
        image = place[self.row]
        order = np.lexsort((-self.value.numpy(), self.unit.numpy(), image.numpy()))
        kept = Hits(image, self.unit, self.value).take(torch.from_numpy(order))
        new = torch.ones(len(order), dtype=torch.bool)
        new[1:] = (kept.row.diff() != 0) | (kept.unit.diff() != 0)
        return kept.take(new)

    def take(self, keep: Bool[Tensor, " hits"] | Int64[Tensor, " kept"]) -> "Hits":
        """Return some of the entries."""
        return Hits(*(column[keep] for column in self))


class ClassTable:
    """Counts, sums and strongest samples of every unit by class. A sample is an image: of its rows the largest value.

    `counts` [units, classes] says on how many samples of a class a unit is active, `sums` adds the positive parts of
    its values, `group_counts` [groups, units, classes] splits the counts by a hash of the image's number, so that
    scores can be computed again without each group.
    """

    def __init__(self, units: int, n_classes: int, n_top: int = 20, n_groups: int = 20) -> None:
        if n_classes < 2:
            raise UserError("the samples are all of one class; consistency needs two or more")
        self.units, self.n_classes, self.n_groups = units, n_classes, n_groups
        self.counts: Int64[Tensor, "units n_classes"] = torch.zeros(
            units, n_classes, dtype=torch.int64
        )
        self.sums = torch.zeros(units, n_classes, dtype=torch.float64)
        self.group_counts = torch.zeros(n_groups, units, n_classes, dtype=torch.int32)
        self.totals: Int64[Tensor, " n_classes"] = torch.zeros(n_classes, dtype=torch.int64)
        self.rows = self.entries = 0
        """Rows, and active entries in them."""
        self.strongest = Strongest(units, n_top)

    def update(
        self, hits: Hits, labels: Int64[Tensor, " labels"], image: Int64[Tensor, " rows"]
    ) -> None:
        """Add all rows of some images: entries, classes, image numbers; raises UserError for a label out of range."""
        check_labels(labels, len(image), self.n_classes)
        hits = hits.active(len(labels))
        self.rows, self.entries = self.rows + len(labels), self.entries + len(hits.row)
        hits, labels, image = by_image(hits, labels, image)
        self.totals += torch.bincount(labels, minlength=self.n_classes)
        label = labels[hits.row]
        key = hits.unit * self.n_classes + label
        self.counts.view(-1).index_add_(0, key, torch.ones_like(key))
        self.sums.view(-1).index_add_(0, key, hits.value.clamp_min(0.0))
        if self.n_groups:
            group = group_of(image, self.n_groups)[hits.row]
            flat = self.group_counts.view(-1)
            ones = torch.ones(len(key), dtype=torch.int32)
            flat.index_add_(0, group * (self.units * self.n_classes) + key, ones)
        positive = hits.value > 0
        columns = (hits.unit, hits.value, image[hits.row], label)
        self.strongest.update(*(column[positive].numpy() for column in columns))

    @property
    def support(self) -> Int64[Tensor, " units"]:
        """On how many samples each unit is active."""
        return self.counts.sum(1)


def by_image(
    hits: Hits, labels: Int64[Tensor, " rows"], image: Int64[Tensor, " rows"]
) -> tuple[Hits, Int64[Tensor, " images"], Int64[Tensor, " images"]]:
    """Return the entries, classes and numbers of the images that rows belong to; the rows' own where each is one."""
    number, place = image.unique(return_inverse=True)
    if len(number) == len(image):
        return hits, labels, image
    return hits.of_images(place), labels.new_zeros(len(number)).scatter(0, place, labels), number


def group_of(image: Int64[Tensor, " rows"], n_groups: int) -> Int64[Tensor, " rows"]:
    """Return the group of each image: a hash of its number, the same in every pass."""
    hashed = mix64(image.numpy().astype(np.uint64), seed_for(0, "image groups"))
    return torch.from_numpy((hashed % np.uint64(n_groups)).astype(np.int64))


def selectivity(
    sums: Float64[Tensor, "units n_classes"], totals: Int64[Tensor, " n_classes"]
) -> Float64[Tensor, " units"]:
    """Return the class-selectivity index (mu_max - mu_rest) / (mu_max + mu_rest) (Morcos et al. 2018).

    mu_c = sums_c / totals_c is the mean activation on class c (zeros included), mu_max the largest of them and mu_rest
    the mean of the others; classes without samples are left out. NaN where a unit is never positive. Like the share it
    is 1 for a unit active on a single sample.
    """
    seen = totals > 0
    mean = sums[:, seen] / totals[seen].double()
    top = mean.amax(1)
    rest = (mean.sum(1) - top) / (mean.shape[1] - 1)
    return (top - rest) / (top + rest)


def information(
    counts: Int64[Tensor, "units n_classes"], totals: Int64[Tensor, " n_classes"]
) -> Float64[Tensor, " units"]:
    """Return the plug-in mutual information of "active" and the class, in bits; 0 where a unit is never active.

    I = sum_{a, c} p(a, c) log2 [p(a, c) / (p(a) p(c))]. It is biased upwards by about (classes - 1) / (2 N ln 2).
    """
    n = int(totals.sum())
    active, total = counts.numpy(), totals.numpy()
    support = active.sum(1)
    cells = (x_log2_x(active) + x_log2_x(total - active)).sum(1)
    whole = x_log2_x(np.array([n])) - x_log2_x(total).sum()
    bits = (cells - x_log2_x(support) - x_log2_x(n - support) + whole) / n
    return torch.from_numpy(np.maximum(bits, 0.0))


Values = Float64[Tensor, " units"]


def corrected_share(
    counts: Int64[Tensor, "units n_classes"], chance: Chance, min_support: int = 1
) -> Values:
    """Return (beta - E) / (1 - E) of each unit, E = E[beta | s]: 1 is one class only, 0 chance.

    NaN under `min_support`, since the share of few samples says little either way, and where E is 1.
    """
    support = counts.sum(1)
    expected = torch.from_numpy(chance.share)[support]
    value = (largest_share(counts) - expected) / (1 - expected)
    known = (support >= max(1, min_support)) & (expected < 1)
    return torch.where(known, value, torch.nan)


def corrected_information(
    counts: Int64[Tensor, "units n_classes"],
    totals: Int64[Tensor, " n_classes"],
    chance: Chance,
    min_support: int = 1,
) -> Values:
    """Return I - E[I | s] in bits, the mutual information beyond chance; NaN under `min_support`."""
    support = counts.sum(1)
    value = information(counts, totals) - torch.from_numpy(chance.information)[support]
    return torch.where(support >= max(1, min_support), value, torch.nan)


class OverImages(NamedTuple):
    """A mean over units and the same without each group of images."""

    value: float
    without: Float64[np.ndarray, " groups"]


def over_images(
    table: ClassTable,
    score: Callable[[Int64[Tensor, "units n_classes"]], Values],
    units: Bool[Tensor, " units"],
) -> OverImages | None:
    """Return the mean score of the marked units, with all images and without each group; None where that has no spread.

    That is: no units, fewer than two groups, or a group that holds all images on which the units are active.
    The units stay the same when a group is left out (a unit whose support sinks below a minimum still counts). Groups
    are left out rather than images drawn with replacement: a sample drawn twice agrees with itself, which would raise
    every share.
    """
    if not bool(units.any()) or table.n_groups < 2:
        return None
    counts = table.counts[units]
    whole = float(score(counts).nanmean())
    parts = (score(counts - group[units]) for group in table.group_counts)
    without = np.array([float(part.nanmean()) for part in parts])
    return OverImages(whole, without) if np.isfinite(without).all() else None


def jackknife(found: OverImages, confidence: float = 0.95) -> tuple[float, float]:
    """Return value -+ t_(G-1) se with se^2 = (G - 1) / G sum_g (without_g - mean)^2 (delete-a-group jackknife)."""
    groups = len(found.without)
    spread = ((found.without - found.without.mean()) ** 2).sum()
    error = float(np.sqrt((groups - 1) / groups * spread))
    from scipy import stats  # takes a second and 60 MB, and few processes come here

    half = float(stats.t.ppf((1 + confidence) / 2, groups - 1)) * error
    return found.value - half, found.value + half

"""Members against members: differences a - b with paired bootstrap intervals, from their arrays alone."""

from typing import NamedTuple

import numpy as np

from wsae.evals.config import EvalConfig
from wsae.evals.glossary import COMPARED
from wsae.evals.intervals import Difference, Ratio, mean, paired_difference, unpaired_difference
from wsae.evals.scores import BY_SEQUENCE, Arrays, by_latent, fvu

Comparison = dict[str, str | float | int | bool | None]
"""One line of `comparisons`: a, b, metric, difference, low, high, effect_size, unit, n, paired."""

UNPAIRED = {"dead_frac", "dense_frac"}
"""Shares over all latents: matched pairs (live in both) could not show a difference in dead ones."""


class Side(NamedTuple):
    """One side of a comparison: its label in the results, its member name in its own run, its arrays."""

    label: str
    member: str
    arrays: Arrays


def compare_members(a: Side, b: Side, cfg: EvalConfig) -> list[Comparison]:
    """Compare `a` with `b` on the same held-out data; differences are a - b.

    By sequence, paired: fvu, fvu_weighted (both under a's gamma), l0, cross-entropy and KL. By latent: paired over the
    one-to-one pairs of the two where a has them, else (and always for dead_frac, dense_frac) unpaired.
    """
    out = []
    for metric, (left, right) in _by_sequence(a, b).items():
        difference = paired_difference(left, right, cfg)
        out.append(_line(metric, a, b, difference) | {"unit": "sequence", "paired": True})
    for metric, (difference, paired) in _by_latent(a, b, cfg).items():
        out.append(_line(metric, a, b, difference) | {"unit": "latent", "paired": paired})
    return out


def _line(metric: str, a: Side, b: Side, difference: Difference) -> Comparison:
    return {"a": a.label, "b": b.label, "metric": metric, **difference._asdict()}


def _by_sequence(a: Side, b: Side) -> dict[str, tuple[Ratio, Ratio]]:
    readers = {m: read for m, read in BY_SEQUENCE.items() if m in COMPARED}
    if not _same_spliced(a.arrays, b.arrays):
        readers = {m: read for m, read in readers.items() if m in ("fvu", "l0")}
    pairs = {metric: (read(a.arrays), read(b.arrays)) for metric, read in readers.items()}
    pairs["fvu_weighted"] = fvu(a.arrays, under=a.member), fvu(b.arrays, under=a.member)
    return {m: (x, y) for m, (x, y) in pairs.items() if x is not None and y is not None}


def _same_spliced(a: Arrays, b: Arrays) -> bool:
    return all(
        np.array_equal(a.get(key, np.zeros(0)), b.get(key, np.zeros(0)))
        for key in ("splice_seq", "splice_targets")
    )


def _by_latent(a: Side, b: Side, cfg: EvalConfig) -> dict[str, tuple[Difference, bool]]:
    values_a, values_b = by_latent(a.arrays, cfg), by_latent(b.arrays, cfg)
    index = a.arrays.get(f"pair_index@{b.label}")
    out = {}
    for metric in sorted(values_a.keys() & values_b.keys()):
        left, right = values_a[metric], values_b[metric]
        if index is None or metric in UNPAIRED:
            out[metric] = unpaired_difference(left, right, cfg), False
        else:
            kept = index >= 0
            out[metric] = paired_difference(mean(left[kept]), mean(right[index[kept]]), cfg), True
    return out


def across_runs(b: Side, a: Side) -> Side:
    """Return `b` for comparison with `a` of another run: weighted sums stay only where both have the same gamma."""
    same = "gamma" in b.arrays and all(
        np.array_equal(a.arrays.get(key, np.zeros(0)), b.arrays.get(key, np.zeros(0)))
        for key in ("gamma", "gamma_matrix")
    )
    keys = (
        {f"{key}@{b.member}": f"{key}@{a.member}" for key in ("seq_sse", "seq_var")} if same else {}
    )
    plain = {k: v for k, v in b.arrays.items() if "@" not in k}
    return b._replace(arrays=plain | {new: b.arrays[old] for old, new in keys.items()})

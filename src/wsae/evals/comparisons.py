"""Members against members: differences a - b with paired bootstrap intervals, from their arrays alone."""

import numpy as np

from wsae.core.errors import UserError
from wsae.evals.config import EvalConfig
from wsae.evals.intervals import Difference, Ratio, mean, paired_difference, unpaired_difference
from wsae.evals.scores import BY_SEQUENCE, Arrays, by_latent, fvu

Comparison = dict[str, str | float | int | bool | None]
"""One line of `comparisons`: a, b, metric, difference, low, high, effect_size, unit, n, paired."""

UNPAIRED = {"dead_frac", "dense_frac"}
"""Shares over all latents: matched pairs (live in both) could not show a difference in dead ones."""


def compare_members(a: tuple[str, Arrays], b: tuple[str, Arrays], cfg: EvalConfig) -> list[Comparison]:
    """Compare member `a` with member `b`, each a (name, arrays), on the same held-out data.

    By sequence, paired: fvu, fvu_weighted (both under a's gamma), l0, cross-entropy and KL. By latent: paired over the
    one-to-one pairs in a's `pair_index` where there is one, else (and for dead_frac, dense_frac) unpaired.
    """
    name_a, arrays_a = a
    out = []
    for metric, (left, right) in _by_sequence(name_a, arrays_a, b[1]).items():
        difference = paired_difference(left, right, cfg)
        out.append(_line(metric, a[0], b[0], difference, "sequence", True))
    for metric, (difference, paired) in _by_latent(arrays_a, b[1], b[0], cfg).items():
        out.append(_line(metric, a[0], b[0], difference, "latent", paired))
    return out


def _line(
    metric: str, a: str, b: str, difference: Difference, unit: str, paired: bool
) -> Comparison:
    return {"a": a, "b": b, "metric": metric, **difference._asdict(), "unit": unit, "paired": paired}


def _by_sequence(name_a: str, a: Arrays, b: Arrays) -> dict[str, tuple[Ratio, Ratio]]:
    readers = {m: read for m, read in BY_SEQUENCE.items() if m not in ("ce_clean", "ce_spliced")}
    if not np.array_equal(a.get("splice_seq", np.zeros(0)), b.get("splice_seq", np.zeros(0))):
        readers = {m: read for m, read in readers.items() if m in ("fvu", "l0")}
    pairs = {metric: (read(a), read(b)) for metric, read in readers.items()}
    pairs["fvu_weighted"] = fvu(a, under=name_a), fvu(b, under=name_a)
    return {m: (x, y) for m, (x, y) in pairs.items() if x is not None and y is not None}


def _by_latent(
    a: Arrays, b: Arrays, name_b: str, cfg: EvalConfig
) -> dict[str, tuple[Difference, bool]]:
    values_a, values_b = by_latent(a, cfg), by_latent(b, cfg)
    index = a.get(f"pair_index@{name_b}")
    out = {}
    for metric in values_a.keys() & values_b.keys():
        left, right = values_a[metric], values_b[metric]
        if index is None or metric in UNPAIRED:
            out[metric] = unpaired_difference(left, right, cfg), False
        else:
            kept = index >= 0
            out[metric] = paired_difference(mean(left[kept]), mean(right[index[kept]]), cfg), True
    return dict(sorted(out.items()))


def check_same_data(a: tuple[str, str], b: tuple[str, str]) -> None:
    """Raise UserError unless two (name, digest of the held-out data) agree: pairs exist only on the same sequences."""
    if a[1] != b[1]:
        raise UserError(
            f"{a[0]} and {b[0]} were evaluated on different held-out data (digests {a[1][:12]} and {b[1][:12]}); "
            "evaluate both on the same data before comparing"
        )

"""From a member's arrays to its metrics with intervals. Arrays in, numbers out: nothing here reads a model."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from wsae.evals.config import EvalConfig
from wsae.evals.glossary import COMPARED
from wsae.evals.intervals import (
    Column,
    Difference,
    Estimate,
    Ratio,
    estimates,
    mean,
    paired_difference,
    unpaired_difference,
)

Arrays = dict[str, np.ndarray]
"""One member's arrays by name (`arrays.safetensors` without the hook and member prefix)."""


def fvu(arrays: Arrays, under: str | None = None) -> Ratio | None:
    """Return FVU as a ratio over sequences; `under` names the member whose Gamma weighs it (None: plain)."""
    suffix = f"@{under}" if under else ""
    if f"seq_sse{suffix}" not in arrays:
        return None
    seen = arrays["seq_rows"] > 0
    return Ratio(arrays[f"seq_sse{suffix}"][seen], arrays[f"seq_var{suffix}"][seen])


def l0(arrays: Arrays) -> Ratio | None:
    """Return L0 as a ratio over sequences: active entries / rows."""
    if "seq_l0" not in arrays:
        return None
    seen = arrays["seq_rows"] > 0
    return Ratio(arrays["seq_l0"][seen], arrays["seq_rows"][seen])


def spliced(name: str) -> Callable[[Arrays], Ratio | None]:
    """Return the reader of a per-token mean over spliced sequences: sum / scored tokens."""

    def read(arrays: Arrays) -> Ratio | None:
        if f"splice_{name}" not in arrays:
            return None
        return Ratio(arrays[f"splice_{name}"], arrays["splice_targets"])

    return read


def ce_delta(arrays: Arrays) -> Ratio | None:
    """Return ce_spliced - ce_clean as a ratio over spliced sequences."""
    if "splice_ce" not in arrays:
        return None
    return Ratio(arrays["splice_ce"] - arrays["splice_ce_clean"], arrays["splice_targets"])


def recovered(ablation: str) -> Callable[[Arrays], Ratio | None]:
    """Return the reader of (CE_ablation - CE_spliced) / (CE_ablation - CE_clean), sums over sequences."""

    def read(arrays: Arrays) -> Ratio | None:
        if "splice_ce" not in arrays:
            return None
        ablated = arrays[f"splice_ce_{ablation}"]
        return Ratio(ablated - arrays["splice_ce"], ablated - arrays["splice_ce_clean"])

    return read


BY_SEQUENCE: dict[str, Callable[[Arrays], Ratio | None]] = {
    "fvu": fvu,
    "l0": l0,
    "ce_clean": spliced("ce_clean"),
    "ce_spliced": spliced("ce"),
    "ce_delta": ce_delta,
    "ce_loss_recovered_zero": recovered("zero"),
    "ce_loss_recovered_mean": recovered("mean"),
    "kl": spliced("kl"),
}
"""Metrics whose independent unit is the sequence (fvu_weighted beside them, which needs a name)."""


def by_latent(arrays: Arrays, cfg: EvalConfig) -> dict[str, Column]:
    """Return per-latent values of the metrics that are means over latents; absent arrays give no metric."""
    out: dict[str, Column] = {}
    if "density" in arrays:
        density = arrays["density"]
        out["dead_frac"] = (density == 0).astype(np.float64)
        out["dense_frac"] = (density > cfg.dense_threshold).astype(np.float64)
        out["density_mean"] = density
    if "variance" in arrays:
        out["latent_variance_mean"] = arrays["variance"]
    cosine = arrays.get("decoder_max_cosine")
    if cosine is not None and not np.isnan(cosine).any():
        out["decoder_cosine_max_mean"] = cosine.astype(np.float64)
    return out


def member_metrics(
    name: str, arrays: Arrays, cfg: EvalConfig
) -> dict[str, dict[str, float | None]]:
    """Return {metric: {value, low, high}} of one member; intervals by sequence or by latent.

    Explained variance over dimensions has no interval: dimensions are not a sample.
    """
    found = {key: read(arrays) for key, read in BY_SEQUENCE.items()}
    found["fvu_weighted"] = fvu(arrays, under=name)
    ratios = {key: ratio for key, ratio in found.items() if ratio is not None}
    ratios |= {key: mean(values) for key, values in by_latent(arrays, cfg).items()}
    out: dict[str, Estimate] = {}
    for units in {len(ratio.num) for ratio in ratios.values()}:
        group = {key: ratio for key, ratio in ratios.items() if len(ratio.num) == units}
        out |= dict(zip(group, estimates(list(group.values()), cfg), strict=True))
    ev = arrays.get("ev_per_dim")
    if ev is not None and not np.isnan(ev).all():
        out["ev_dim_mean"] = Estimate(float(np.nanmean(ev)), None, None)
        out["ev_dim_min"] = Estimate(float(np.nanmin(ev)), None, None)
    return {key: out[key]._asdict() for key in sorted(out)}


# Members against members: differences a - b with paired bootstrap intervals, from their arrays
# alone.

Comparison = dict[str, str | float | int | bool | None]
"""One line of `comparisons`: a, b, metric, difference, low, high, effect_size, unit, n, paired."""

UNPAIRED = {"dead_frac", "dense_frac"}
"""Shares over all latents: matched pairs (live in both) could not show a difference in dead ones."""


class ComparedMember(NamedTuple):
    """One side of a comparison: its label in the results, its member name in its own run, its arrays."""

    label: str
    member: str
    arrays: Arrays


def compare_members(a: ComparedMember, b: ComparedMember, cfg: EvalConfig) -> list[Comparison]:
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


def _line(metric: str, a: ComparedMember, b: ComparedMember, difference: Difference) -> Comparison:
    return {"a": a.label, "b": b.label, "metric": metric, **difference._asdict()}


def _by_sequence(a: ComparedMember, b: ComparedMember) -> dict[str, tuple[Ratio, Ratio]]:
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


def _by_latent(
    a: ComparedMember, b: ComparedMember, cfg: EvalConfig
) -> dict[str, tuple[Difference, bool]]:
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


def across_runs(b: ComparedMember, a: ComparedMember) -> ComparedMember:
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

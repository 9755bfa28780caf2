"""What lies in the activations: sinks, outlier dimensions, values a number format cannot hold."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from wsae.doctor.check import Check, Status
from wsae.losses.config import GammaConfig
from wsae.losses.gamma import gamma_from_proxy

SINK_RATIO = 10.0
"""A norm this many times the median is a sink, by the same measure as the harvest's mask."""
HEAVY_SHARE = 0.1
"""A dimension with more of the variance than this deserves a look (SmolLM2's middle block: 0.14)."""
ROUNDING_FVU = 1e-3
"""Rounding that alone leaves this share of the variance unexplained is worth a warning."""
FP16_MAX = 65504.0

Storage = Literal["float32", "bfloat16", "float16"]
_ADVICE = {
    "bfloat16": "store as float32, or as float16 if the values fit",
    "float16": "store as float32",
}


class Spread(NamedTuple):
    """How unevenly a quantity lies over dimensions."""

    top_dim: int
    top_share: float
    largest_over_median: float
    effective: float
    """1 / sum of squared shares: the number of dimensions that matter."""


def spread(weight: Float64[Tensor, " d_in"]) -> Spread:
    """Return how a non-negative quantity per dimension is spread."""
    share = weight / weight.sum().clamp_min(torch.finfo(torch.float64).tiny)
    top = int(share.argmax())
    median = float(weight.median())
    ratio = float(weight.max()) / median if median > 0 else float("inf")
    return Spread(top, float(share[top]), ratio, 1 / max(float((share**2).sum()), 1e-300))


def check_finite(hook: str, x: Float[Tensor, "rows d_in"]) -> Check:
    """Find NaN and infinity."""
    bad = ~torch.isfinite(x)
    if bool(bad.any()):
        row, dim = (int(i) for i in bad.nonzero()[0])
        value = f"{int(bad.sum())} NaN or infinite values, the first at row {row}, dimension {dim}"
        return Check(f"values at {hook}", "fail", value, "run the model in float32 or bfloat16")
    return Check(f"values at {hook}", "ok", f"finite, largest {float(x.abs().max()):.4g}")


def check_constant(hook: str, variance: Float64[Tensor, " d_in"]) -> Check:
    """Count dimensions without variance."""
    dead = (variance <= 0).nonzero()[:, 0].tolist()
    if dead:
        value = f"{len(dead)} of {len(variance)} never change, the first is {dead[0]}"
        mend = "an SAE cannot learn them; look whether the hook is the one you mean"
        return Check(f"constant dimensions at {hook}", "warn", value, mend)
    return Check(f"constant dimensions at {hook}", "ok", "none")


def check_sinks(
    hook: str, x: Float[Tensor, "batch seq d_in"], kept: Bool[Tensor, "batch seq"]
) -> Check:
    """Compare the first position's norm, and the largest kept one, with the median elsewhere."""
    norm = x.double().norm(dim=-1)
    median = max(float(norm[:, 1:].median()), 1e-300)
    first = float(norm[:, 0].median()) / median
    largest = float(norm[kept].max()) / median if bool(kept.any()) else 0.0
    value = f"norm at position 0 is {first:.3g} x the median; largest kept {largest:.3g} x"
    if largest > SINK_RATIO:
        mend = "keep the mask: --skip-first 1 --sink-norm-ratio 10"
        return Check(f"attention sinks at {hook}", "warn", value, mend)
    dropped = "; the mask drops it" if first > SINK_RATIO else ""
    return Check(f"attention sinks at {hook}", "ok", value + dropped)


def check_outliers(
    hook: str, variance: Float64[Tensor, " d_in"], gammas: list[GammaConfig]
) -> list[Check]:
    """Say which dimensions carry the variance, and which would carry the weighted loss."""
    plain = spread(variance)
    status: Status = "warn" if plain.top_share > HEAVY_SHARE else "ok"
    mend = "the plain loss looks mostly at it; read fvu per dimension" if status == "warn" else ""
    checks = [Check(f"variance at {hook}", status, _spread_text(plain), mend)]
    for cfg in gammas:
        if cfg.rule == "variance":
            gamma = gamma_from_proxy(cfg, variance).double()
            weighted = spread(variance * gamma**2)
            heavy = weighted.top_share > 0.5
            mend = "use --robust winsor, rank or drop, or a smaller --alpha" if heavy else ""
            name = f"loss under {cfg.label} at {hook}"
            checks.append(Check(name, "warn" if heavy else "ok", _spread_text(weighted), mend))
    return checks


def check_rounding(hook: str, x: Float[Tensor, "rows d_in"], storage: Storage) -> list[Check]:
    """Measure what rounding to 16 bits does to the variance: FVU of the rounding alone, and the worst dimension."""
    wide = x.double()
    variance = wide.var(0, correction=0).clamp_min(torch.finfo(torch.float64).tiny)
    checks = []
    for dtype in ("bfloat16", "float16"):
        largest = float(x.abs().max())
        if dtype == "float16" and largest > FP16_MAX:
            status: Status = "fail" if storage == dtype else "ok"
            value = f"impossible: values up to {largest:.3g}, float16 ends at {FP16_MAX:.0f}"
            checks.append(_storage(hook, dtype, status, value))
            continue
        error = (x.to(getattr(torch, dtype)).double() - wide).square().mean(0)
        fvu, worst = float(error.sum() / variance.sum()), error / variance
        dim = int(worst.argmax())
        value = f"costs fvu {fvu:.2g}; worst dimension {dim}: {float(worst[dim]):.2g}"
        status = "warn" if storage == dtype and fvu > ROUNDING_FVU else "ok"
        checks.append(_storage(hook, dtype, status, value))
    return checks


def _storage(hook: str, dtype: str, status: Status, value: str) -> Check:
    return Check(f"{dtype} at {hook}", status, value, _ADVICE[dtype] if status != "ok" else "")


def _spread_text(s: Spread) -> str:
    return (
        f"dimension {s.top_dim} holds {100 * s.top_share:.3g} %, {s.largest_over_median:,.0f} x the "
        f"median; {s.effective:.0f} dimensions matter"
    )

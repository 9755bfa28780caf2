"""How the trainer's time and memory grow: one of d_sae, k, batch and members is varied at a time."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from scipy import stats

from wsae.experiments.bench.config import BenchConfig, Block, Job, Size, Variant
from wsae.experiments.bench.table import Row

Axis = Literal["d_sae", "k", "batch", "members"]
FACTORS: dict[Axis, tuple[float, ...]] = {
    "d_sae": (0.5, 1, 2, 4),
    "k": (0.25, 0.5, 1, 2, 4),
    "batch": (0.25, 0.5, 1, 2, 4),
    "members": (1, 2, 4, 8),
}
STEEP = 1.1
"""An exponent above this is worth a warning: the cost grows faster than the work."""
QUANTITIES = {"ms": "time of a step", "extra_mib": "peak memory"}


def scaling_blocks(cfg: BenchConfig) -> list[Block]:
    """Return one block for each axis, around the last size."""
    return [_block(axis, cfg.sizes[-1], cfg) for axis in FACTORS]


def _block(axis: Axis, size: Size, cfg: BenchConfig) -> Block:
    jobs = []
    for factor in FACTORS[axis]:
        members = int(factor) if axis == "members" else 1
        changed = {} if axis == "members" else {axis: max(1, int(getattr(size, axis) * factor))}
        variant = Variant(
            name=f"{axis}={changed.get(axis, members)}",
            library="wsae",
            settings={"kernels": "auto", "members": members},
        )
        jobs.append(
            Job(
                name=variant.name,
                variant=variant,
                size=size.model_copy(update=changed),
                dtype=cfg.dtypes[0],
                threads=cfg.threads[0],
            )
        )
    return Block(
        kind="scaling",
        title=f"scaling with {axis}, around size {size.name}; {cfg.dtypes[0]}",
        jobs=tuple(jobs),
        rounds=size.rounds,
        turn=size.turn,
        warmup=size.warmup,
    )


def exponents(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return, per axis and quantity, the exponent p of quantity ~ axis^p and its 95 % interval, and the points."""
    found = []
    for axis in FACTORS:
        here = [r for r in rows if r["variant"].startswith(f"{axis}=") and "ms" in r]
        for quantity, words in QUANTITIES.items():
            points = [(float(r[axis]), float(r[quantity])) for r in here if r[quantity] > 0]
            if len(points) >= 3:
                p, low, high = exponent(points)
                steep = f"{words} grows as {axis}^{p:.2f}" if p > STEEP else ""
                found.append(
                    {
                        **{"axis": axis, "quantity": quantity, "points": points},
                        **{"exponent": p, "low": low, "high": high, "warning": steep},
                    }
                )
    return found


def exponent(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Return the least-squares slope of log y against log x with its 95 % interval (Student's t, n - 2)."""
    x, y = np.log(np.array(points)).T
    dx, free = x - x.mean(), len(points) - 2
    slope = float(dx @ y / (dx @ dx))
    rest = y - y.mean() - slope * dx
    error = float(np.sqrt(rest @ rest / free / (dx @ dx)))
    half = float(stats.t.ppf(0.975, free)) * error
    return slope, slope - half, slope + half

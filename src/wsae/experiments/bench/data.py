"""The rows that every variant trains on: a file of float32, the held-out rows first, mean |x|^2 = d_in."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from wsae.core.errors import UserError
from wsae.core.files import writing
from wsae.core.npy import mapped_npy
from wsae.core.seeds import Permutation, seed_for

ACTIVE = 24.0
"""Mean number of active directions of a row."""
OVERCOMPLETE = 4
MOST = 0.5
"""No direction is active more often than this."""
OFFSET, NOISE = 0.5, 0.15
"""Norms of the offset and of the noise, as shares of the mixture's root mean square norm."""
CHUNK = 2048
LIMIT = 1 << 30
"""Bytes a file of rows may take; a longer run sees its rows again."""


def rows_for(d_in: int, batch: int, steps: int, heldout: int) -> int:
    """Return how many rows a run of so many steps needs, within the limit."""
    most = max(batch, LIMIT // (4 * d_in) - heldout)
    return heldout + min(batch * steps, most)


def write_mixtures(path: Path, rows: int, d_in: int, seed: int) -> None:
    """Write x = s (sum_j a_j D_j + o + e): 4 d_in unit directions D_j, about 24 of them active, a_j ~ U(0.5, 1.5).

    Frequencies are Zipf's, o is one fixed offset, e Gaussian noise; s makes the first chunk's mean |x|^2 d_in.
    """
    generator = torch.Generator().manual_seed(seed_for(seed, "bench", d_in))
    n = OVERCOMPLETE * d_in
    directions = torch.randn(n, d_in, generator=generator, dtype=torch.float32)
    directions /= directions.norm(dim=1, keepdim=True)
    chance = zipf(n)
    norm = float((chance.sum() * 13 / 12).sqrt())  # E a^2 = 1 + 1/12
    offset = torch.randn(d_in, generator=generator, dtype=torch.float32) * (
        OFFSET * norm / d_in**0.5
    )
    scale = 0.0
    with writing(path) as temporary, temporary.open("wb") as file:
        for first in range(0, rows, CHUNK):
            shape = (min(CHUNK, rows - first), n)
            active = torch.rand(shape, generator=generator, dtype=torch.float32) < chance
            codes = (
                torch.rand(shape, generator=generator, dtype=torch.float32).add_(0.5).mul_(active)
            )
            noise = torch.randn(shape[0], d_in, generator=generator, dtype=torch.float32) * (
                NOISE * norm / d_in**0.5
            )
            x = codes @ directions + offset + noise
            scale = scale or unit_scale(x)
            file.write((x * scale).numpy().tobytes())


def zipf(n: int) -> Float[Tensor, " n"]:
    """Return min(c / j, 0.5) for j = 1 ... n, with c so that the sum is the mean number of active directions."""
    harmonic = 1.0 / torch.arange(1, n + 1, dtype=torch.float64)
    low, high = 0.0, float(n)
    for _ in range(60):
        middle = (low + high) / 2
        enough = float((middle * harmonic).clamp(max=MOST).sum()) >= min(ACTIVE, MOST * n)
        low, high = (low, middle) if enough else (middle, high)
    return (high * harmonic).clamp(max=MOST).float()


def unit_scale(x: Float[Tensor, "rows d_in"]) -> float:
    """Return s so that the mean of |s x|^2 is d_in."""
    return float((x.shape[1] / x.double().square().sum(1).mean()).sqrt())


def write_array(path: Path, source: Path, rows: int, seed: int) -> None:
    """Write `rows` random rows of a .npy array, scaled alike; raises UserError when there are not enough."""
    x = opened(source)
    if len(x) < rows:
        raise UserError(
            f"--acts {source}: {len(x)} rows, {rows} are needed; lower --batch or --rounds"
        )
    order = Permutation(len(x), seed_for(seed, "bench", "rows"))(np.arange(rows))
    scale = 0.0
    with writing(path) as temporary, temporary.open("wb") as file:
        for first in range(0, rows, CHUNK):
            chunk = np.asarray(x[order[first : first + CHUNK]], dtype=np.float32)
            if not np.isfinite(chunk).all():
                raise UserError(f"--acts {source}: holds NaN or infinity; remove those rows")
            scale = scale or unit_scale(torch.from_numpy(chunk))
            file.write((chunk * np.float32(scale)).tobytes())


def opened(source: Path) -> np.ndarray:
    """Return a .npy matrix of floats, memory-mapped; raises UserError for anything else."""
    x = mapped_npy(source, f"--acts {source}")
    if x.ndim != 2 or x.dtype.kind != "f" or not x.size:
        raise UserError(f"--acts {source}: needed is a .npy matrix of floats, rows x d_in")
    return x

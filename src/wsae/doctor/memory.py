"""What a run will hold in memory at most: what the process has already, and what training adds, by formula.

The constants are measured (`tests/test_doctor_memory.py` checks the sum against a run's peak within 15 %).
"""

import sys
from collections.abc import Sequence
from typing import NamedTuple

from wsae.core.units import size
from wsae.doctor.check import Check, room
from wsae.ops.native import why_not
from wsae.sae.config import SAEConfig

MEND = "lower --d-sae or --batch-size, or train fewer members at once"
LIBRARY, LIBRARY_BYTES = "torch._dynamo", 152_000_000
"""PyTorch's optimisers import its compiler."""
_FIXED = {"eager": 32_000_000, "native": 22_000_000}
"""Scratch of the products, pools of the allocator."""
_PER_ROW = {"eager": 12.0, "native": 3.5}
"""[batch, d_in] float32 buffers alive at once, with those the allocator keeps."""
_DENSE = {"topk": 1.05, "group_topk": 1.05, "batch_topk": 1.2, "relu": 6.4, "jumprelu": 8.5}
"""[batch, d_sae] float32 buffers alive at once in an eager step."""
_DENSE_BF16 = 1.5
"""The same for the Top-k kinds with a bfloat16 product: it, the sum with b_enc, and what is freed late."""
_SPARSE = {"batch_topk": 0.7}
"""The same in a compiled step."""
_PAIR = 100
"""Bytes per active latent of a row: values, indices, orders."""
_COPY, _MAKING = 4, 8
"""Bytes per weight of an SAE made to be saved (kept until the last is written), and while it is made."""
_LEFT, _RETURNED = 12, 1 << 25
"""Bytes per weight that stay in the allocator's pools of threads that trained side by side, when weights and moments
leave them; matrices of 32 MiB and more are returned to the system."""
_ENTERING = 5.5
"""Bytes per weight when the compiled kernels take over."""


class Memory(NamedTuple):
    """Bytes, by what needs them."""

    held: int
    """What the process has already: Python, libraries, the model."""
    libraries: int
    """What it has not imported yet."""
    weights: int
    """Weights, and their gradients (eager) or the encoder in 8 bits (native)."""
    optimiser: int
    rows: int
    """Activations of a live model, waiting in a block to be mixed."""
    step: int
    """The largest of what comes and goes: a step, taking over, finishing."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def parameters(cfg: SAEConfig) -> int:
    """Return the number of trained values: W_enc, W_dec, b_enc, b_dec and thresholds (tied: no W_enc, no biases)."""
    matrix = cfg.d_in * cfg.d_sae
    thresholds = cfg.d_sae if cfg.activation.kind == "jumprelu" else 0
    return (matrix if cfg.tied else 2 * matrix + cfg.d_sae + cfg.d_in) + thresholds


def kernels_of(wanted: str, device: str, cfg: SAEConfig) -> str:
    """Return what computes a member's steps at their neediest: "native" or "eager" (ReLU kinds start eager)."""
    sparse = hasattr(cfg.activation, "k")
    return (
        "native" if wanted != "eager" and device == "cpu" and sparse and not why_not() else "eager"
    )


def memory(
    saes: Sequence[SAEConfig],
    kernels: Sequence[str],
    batch_size: int,
    bf16: bool = False,
    together: int = 1,
) -> Memory:
    """Return the memory of training these SAEs together, each with its kernels ("eager", "native").

    Members step in turn, so only the neediest one's step counts; if all are native, `together` of them step side by
    side. Finished SAEs are kept until the last is written. What is held and waits (`held`, `rows`) is the caller's.
    """
    counts = [parameters(cfg) for cfg in saes]
    weights = [
        8 * n if kind == "eager" else 4 * n + cfg.d_in * cfg.d_sae
        for n, kind, cfg in zip(counts, kernels, saes, strict=True)
    ]
    steps = [_step(cfg, kind, batch_size, bf16) for cfg, kind in zip(saes, kernels, strict=True)]
    if "eager" in kernels:
        together = 1
    taking = [_ENTERING * n for n, kind in zip(counts, kernels, strict=True) if kind == "native"]
    largest = (sum(sorted(part)[-together:]) for part in (steps, taking))
    pooled = [
        n for n, cfg in zip(counts, saes, strict=True) if 4 * cfg.d_in * cfg.d_sae < _RETURNED
    ]
    left = _LEFT * sum(pooled) if together > 1 else 0
    ending = left + _COPY * sum(counts) + _MAKING * max(counts, default=0)
    fixed = max((_FIXED[kind] for kind in kernels), default=0)
    return Memory(
        held=0,
        libraries=0 if LIBRARY in sys.modules else LIBRARY_BYTES,
        weights=sum(weights),
        optimiser=8 * sum(counts),
        rows=0,
        step=fixed + int(max(*largest, ending)),
    )


def _step(cfg: SAEConfig, kernels: str, batch_size: int, bf16: bool) -> float:
    kind = cfg.activation.kind
    pairs = _PAIR * batch_size * getattr(cfg.activation, "k", 0)
    narrow = 4 * batch_size * cfg.d_in * _PER_ROW[kernels] + pairs
    if kernels == "native":
        return narrow + 4 * batch_size * cfg.d_sae * _SPARSE.get(kind, 0.0)
    dense = max(_DENSE[kind], _DENSE_BF16) if bf16 else _DENSE[kind]
    return narrow + 4 * batch_size * cfg.d_sae * dense + 4 * cfg.d_in * cfg.d_sae


def check_memory(need: Memory, free: float) -> Check:
    """Compare the need with what is free (what the process holds already counts as free)."""
    parts = {
        "held now": need.held,
        "libraries": need.libraries,
        "SAE weights": need.weights,
        "Adam": need.optimiser,
        "rows to mix": need.rows,
        "a step": need.step,
    }
    shown = ", ".join(f"{name} {size(n)}" for name, n in parts.items() if n)
    status, mend = room(need.total, free, MEND)
    return Check("memory", status, f"{size(need.total)} of {size(free)} free: {shown}", mend)

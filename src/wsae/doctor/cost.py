"""What a run will need: memory by formula, time by measuring a few steps here."""

import time
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from wsae.acts.config import HarvestConfig
from wsae.core.units import duration, size
from wsae.doctor.check import Check, Status
from wsae.sae.config import SAEConfig
from wsae.stats import Moments
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.family import power_of_two_scale, to_device
from wsae.train.member import make_batch, make_member, train_step

TIGHT = 0.8
"""Share of what is free above which memory or disk is called tight."""
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_PER_ROW = 16
"""Bytes of a stored row besides its activations: sequence number and position."""
STEPS = 3
RUNTIME = 150_000_000
"""Bytes that PyTorch itself takes for autograd, optimiser and thread buffers (measured: 130 MB on a CPU)."""
_BUFFERS = {"topk": 4, "group_topk": 4, "batch_topk": 4, "relu": 8, "jumprelu": 9}
"""Dense [batch, d_sae] float32 buffers alive at once (measured: 2.5, 2.5, 2.6, 7.1, 8.7; revival adds one)."""


class Memory(NamedTuple):
    """Bytes, by what needs them."""

    weights: int
    optimiser: int
    step: int
    model: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def parameters(cfg: SAEConfig) -> int:
    """Return the number of trained values: W_enc, W_dec, b_enc, b_dec and thresholds (tied: one matrix)."""
    matrix = cfg.d_in * cfg.d_sae
    if cfg.tied:
        return matrix
    thresholds = cfg.d_sae if cfg.activation.kind == "jumprelu" else 0
    return 2 * matrix + cfg.d_sae + cfg.d_in + thresholds


def memory(saes: list[SAEConfig], widths: list[int], batch_size: int, model_bytes: int) -> Memory:
    """Return the memory of training: fp32 weights and gradients, two Adam moments, and one step's dense buffers.

    Members step in turn, so only the neediest one's dense [batch, d_sae] buffers count.
    """
    count = sum(parameters(cfg) for cfg in saes)
    dense = max((cfg.d_sae * _BUFFERS[cfg.activation.kind] for cfg in saes), default=0)
    step = RUNTIME + 4 * batch_size * (dense + 2 * sum(widths))
    return Memory(weights=8 * count, optimiser=8 * count, step=step, model=model_bytes)


def check_memory(need: Memory, free: float) -> Check:
    """Compare the need with what is free."""
    shown = (
        f"{size(need.total)} of {size(free)} free: model {size(need.model)}, SAE weights and gradients "
        f"{size(need.weights)}, Adam {size(need.optimiser)}, one step {size(need.step)}"
    )
    mend = "lower --d-sae or --batch-size, or train fewer members at once"
    return Check(
        "memory", _room(need.total, free), shown, mend if need.total > TIGHT * free else ""
    )


def store_bytes(cfg: HarvestConfig, widths: list[int]) -> int:
    """Return the size of a store of every hook's rows."""
    rows = cfg.tokens + cfg.heldout_tokens
    return rows * (sum(widths) * _BYTES[cfg.store_dtype] + _PER_ROW)


def check_disk(need: int, free: float) -> Check:
    """Compare a store's size with the free disk."""
    shown = f"a store takes {size(need)} of {size(free)} free"
    mend = "train from the live model (no store), lower --tokens, or use --store-dtype bfloat16"
    return Check("disk", _room(need, free), shown, mend if need > TIGHT * free else "")


def _room(need: int, free: float) -> Status:
    return "fail" if need > free else "warn" if need > TIGHT * free else "ok"


def seconds_per_step(
    x: Float[Tensor, "rows d_in"], cfg: TrainConfig, device: str, budget_s: float
) -> float:
    """Return the time of one training step of every member on batches of cfg.batch_size rows.

    Where the budget does not reach to a whole batch, a smaller one is timed and scaled by its rows.
    """
    moments = Moments(x.shape[1])
    moments.update(x[:1024].cpu())
    forms: dict[str, list[MemberConfig]] = {}
    for member in cfg.members:  # members of one shape take the same time
        forms.setdefault(member.sae_config(x.shape[1]).model_dump_json(), []).append(member)
    probes = [Bench(cfg, alike[0], moments, device) for alike in forms.values()]
    times = [probe.full_step(x, budget_s / len(probes)) for probe in probes]
    return sum(t * len(alike) for t, alike in zip(times, forms.values(), strict=True))


class Bench:
    """Times training steps of one member's shape."""

    def __init__(
        self, cfg: TrainConfig, member: MemberConfig, moments: Moments, device: str
    ) -> None:
        self.cfg, self.device = cfg, device
        scale = power_of_two_scale(moments)
        self.member = make_member("probe", member, cfg, moments.mean, scale)
        to_device(self.member, device)

    def full_step(self, x: Float[Tensor, "rows d_in"], budget_s: float) -> float:
        """Return the seconds of a step of cfg.batch_size rows, growing the batch while the budget lasts."""
        rows = min(self.cfg.batch_size, 256)
        best = self._seconds(x, rows)
        while rows < self.cfg.batch_size and best * 2 * STEPS < budget_s:
            budget_s -= best * 2 * STEPS
            rows = min(2 * rows, self.cfg.batch_size)
            best = self._seconds(x, rows)
        return best * self.cfg.batch_size / rows

    def _seconds(self, x: Tensor, rows: int) -> float:
        batch = make_batch(x.repeat(-(-rows // len(x)), 1)[:rows].to(self.device), self.member)
        times = []
        for step in range(STEPS):
            start = time.perf_counter()
            train_step(self.member, batch, step, self.cfg)
            if self.device.startswith("cuda"):
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)


def check_time(cfg: TrainConfig, per_step: float, forward_tokens_per_s: float | None) -> Check:
    """Add up the model's and the SAEs' time."""
    training = per_step * cfg.steps
    shown = f"training {duration(training)} ({cfg.steps:,} steps of {1000 * per_step:.3g} ms, all members)"
    if forward_tokens_per_s:
        forward = cfg.tokens / forward_tokens_per_s
        shown += f"; model {duration(forward)} ({forward_tokens_per_s:,.0f} tokens/s)"
    return Check("time", "ok", shown)

"""What a run will take of disk and time: disk by formula, time by measuring a few steps here."""

import statistics
import time

import torch
from jaxtyping import Float
from torch import Tensor

from wsae.acts.config import HarvestConfig
from wsae.core.units import duration, size
from wsae.doctor.check import Check, room
from wsae.losses.config import GammaConfig
from wsae.stats import Covariance, Moments
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.covariance import MAX_ROWS
from wsae.train.family import Family, power_of_two_scale, to_device
from wsae.train.side_by_side import side_by_side
from wsae.train.state import make_batch, make_member

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_PER_ROW = 16
"""Bytes of a stored row besides its activations: sequence number and position."""
STEPS = 3
_SAMPLE_VALUES = 1 << 30
"""Products behind the time of a covariance, about."""


def store_bytes(cfg: HarvestConfig, widths: list[int]) -> int:
    """Return the size of a store of every hook's rows."""
    rows = cfg.tokens + cfg.heldout_tokens
    return rows * (sum(widths) * _BYTES[cfg.store_dtype] + _PER_ROW)


def check_disk(need: int, free: float) -> Check:
    """Compare a store's size with the free disk."""
    mend = "train from the live model (no store), lower --tokens, or use --store-dtype bfloat16"
    status, mend = room(need, free, mend)
    return Check("disk", status, f"a store takes {size(need)} of {size(free)} free", mend)


def check_covariance(
    hook: str, x: Float[Tensor, "rows d_in"], gammas: list[GammaConfig], rows: int
) -> list[Check]:
    """Say whether `rows` training rows give the covariance that a gamma rule needs, and what taking it costs."""
    rules = sorted({cfg.rule for cfg in gammas if cfg.needs_covariance})
    if not rules:
        return []
    d_in, name = x.shape[1], f"covariance for {' and '.join(rules)} at {hook}"
    rows = min(rows, MAX_ROWS)
    need = f"{rows:,} rows for {d_in} dimensions"
    if rows <= d_in:
        mend = f"give at least {d_in + 1} rows, better {10 * d_in}, or use another --gamma"
        return [Check(name, "fail", f"{need}: too few", mend)]
    sample, covariance = x[: max(256, _SAMPLE_VALUES // d_in**2)], Covariance(d_in)
    start = time.perf_counter()
    covariance.update(sample)
    seconds = (time.perf_counter() - start) * rows / len(sample)
    shown = f"{need}, {size(8 * d_in * d_in)}, about {duration(seconds)}"
    if rows < 10 * d_in:
        return [Check(name, "warn", shown, f"noisy under {10 * d_in:,} rows; more are better")]
    return [Check(name, "ok", shown)]


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
    budget_s, total = budget_s / len(forms), 0.0
    for alike in forms.values():
        some = alike[: torch.get_num_threads()]  # as many as may train side by side
        seconds = Bench(cfg, some, moments, device).full_step(x, budget_s)
        total += seconds * len(alike) / len(some)
    return total


class Bench:
    """Times training steps of members of one shape."""

    def __init__(
        self, cfg: TrainConfig, members: list[MemberConfig], moments: Moments, device: str
    ) -> None:
        self.cfg, self.device = cfg, device
        scale = power_of_two_scale(moments)
        states = [make_member("probe", m, cfg, moments.mean, scale) for m in members]
        self.family = Family({"probe": [to_device(m, device) for m in states]}, {})

    def full_step(self, x: Float[Tensor, "rows d_in"], budget_s: float) -> float:
        """Return the seconds of a step of cfg.batch_size rows, growing the batch while the budget lasts.

        What a smaller batch leaves open is drawn on along the line through the last two: the update of the weights
        takes as long for any batch.
        """
        rows = min(self.cfg.batch_size, 256)
        before, best = (0, 0.0), self._seconds(x, rows)
        while rows < self.cfg.batch_size and best * 2 * STEPS < budget_s:
            budget_s -= best * 2 * STEPS
            before = (rows, best)
            rows = min(2 * rows, self.cfg.batch_size)
            best = self._seconds(x, rows)
        slope = max(0.0, best - before[1]) / (rows - before[0])
        return best + slope * (self.cfg.batch_size - rows)

    def _seconds(self, x: Tensor, rows: int) -> float:
        data = x.repeat(-(-rows // len(x)), 1)[:rows].to(self.device)
        (members,), times = self.family.members.values(), []
        with side_by_side(self.cfg, self.family) as step_all:
            for step in range(STEPS + 1):
                start = time.perf_counter()
                step_all(members, make_batch(data, members[0]), step)
                if self.device.startswith("cuda"):
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
        return statistics.median(times[1:])  # the first step makes the optimiser's state


def check_time(cfg: TrainConfig, per_step: float, forward_tokens_per_s: float | None) -> Check:
    """Add up the model's and the SAEs' time."""
    training = per_step * cfg.steps
    shown = f"training {duration(training)} ({cfg.steps:,} steps of {1000 * per_step:.3g} ms, all members)"
    if forward_tokens_per_s:
        forward = cfg.tokens / forward_tokens_per_s
        shown += f"; model {duration(forward)} ({forward_tokens_per_s:,.0f} tokens/s)"
    return Check("time", "ok", shown)

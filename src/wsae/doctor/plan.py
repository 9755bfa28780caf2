"""The planned SAEs: do their shapes fit, and what will they take of memory and time?"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from wsae.core.errors import UserError
from wsae.doctor import cost, machine, shape
from wsae.doctor.check import Check
from wsae.doctor.config import DoctorConfig
from wsae.doctor.memory import check_memory, kernels_of, memory
from wsae.train.config import MemberConfig


class Live(NamedTuple):
    """What training from a model adds: the speed of its forward pass, and the rows that wait to be mixed."""

    tokens_per_s: float
    mixed_rows: int


def check_shapes(cfg: DoctorConfig, widths: dict[str, int]) -> list[Check]:
    """Check each hook's width and every form of SAE on it."""
    checks: list[Check] = []
    for hook, d_in in widths.items():
        checks.append(shape.check_width(hook, d_in, cfg.d_in))
        forms = {
            m.sae_config(d_in).model_dump_json() if _fits(m, d_in) else str(m.activation): m
            for m in cfg.train.members
        }
        checks += [shape.check_member(hook, d_in, member) for member in forms.values()]
    return checks


def _fits(member: MemberConfig, d_in: int) -> bool:
    try:
        member.sae_config(d_in)
    except UserError:
        return False
    return True


def check_costs(
    cfg: DoctorConfig,
    sample: dict[str, Float[Tensor, "rows _"]],
    rows: int,
    live: Live | None,
) -> list[Check]:
    """Check covariances, memory and time of the planned training, when its shapes fit the sample.

    `rows` is how many rows the statistics will see.
    """
    widths = [x.shape[1] for x in sample.values()]
    if not widths or not all(_fits(m, d) for m in cfg.train.members for d in widths):
        return []
    checks = [_check_memory(cfg, widths, live)]
    finite = all(bool(torch.isfinite(x).all()) for x in sample.values())
    if checks[0].status == "fail" or not finite:
        return checks
    gammas = [member.gamma for member in cfg.train.members]
    for hook, x in sample.items():
        checks += cost.check_covariance(hook, x, gammas, rows)
    per_step = sum(
        cost.seconds_per_step(x, cfg.train, cfg.device, cfg.probe_seconds / len(sample))
        for x in sample.values()
    )
    return [*checks, cost.check_time(cfg.train, per_step, live and live.tokens_per_s)]


def _check_memory(cfg: DoctorConfig, widths: list[int], live: Live | None) -> Check:
    saes = [m.sae_config(d) for d in widths for m in cfg.train.members]
    held = machine.held_memory(cfg.device)
    # a live model's first block exists twice: as the rows behind the statistics, and in the block
    mixing = 2 * 4 * live.mixed_rows * sum(widths) if live else 0
    need = memory(
        saes,
        [kernels_of(cfg.train.kernels, cfg.device, sae) for sae in saes],
        cfg.train.batch_size,
        bf16=cfg.train.dtype == "bfloat16",
        together=min(torch.get_num_threads(), len(cfg.train.members)),
    )
    need = need._replace(held=int(held), rows=mixing)
    return check_memory(need, machine.free_memory(cfg.device) + held)

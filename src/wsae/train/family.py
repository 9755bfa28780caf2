"""A family: every hook's members, made from the run's config and the data's statistics."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from wsae.acts.tally import SourceStats
from wsae.core.errors import UserError
from wsae.losses.config import GammaConfig
from wsae.losses.gamma import describe_gamma, gamma_from_proxy
from wsae.sae.model import SparseAutoencoder
from wsae.stats import Moments
from wsae.train.config import TrainConfig
from wsae.train.member import MemberState, make_member


@dataclass
class Family:
    """The members of each hook, in config order, and the record of their loss weights."""

    members: dict[str, list[MemberState]]
    gamma_record: dict[str, dict[str, Any]]

    def all(self) -> list[tuple[str, MemberState]]:
        """Return (hook, member) pairs in training order."""
        return [(hook, m) for hook, members in self.members.items() for m in members]


def make_family(cfg: TrainConfig, stats: dict[str, SourceStats], device: str = "cpu") -> Family:
    """Return every hook's members at step 0, their gamma set from the statistics of the kept rows."""
    members, record = {}, {}
    for hook, s in stats.items():
        scale = power_of_two_scale(s.kept)
        members[hook], record[hook] = [], {}
        for name, member_cfg in zip(cfg.names(), cfg.members, strict=True):
            member = make_member(name, member_cfg, cfg, s.kept.mean, scale)
            gamma = initial_gamma(member_cfg.gamma, s.kept, s.consistency)
            member.sae.gamma.copy_(gamma)
            members[hook].append(to_device(member, device))
            record[hook][name] = gamma_record(member_cfg.gamma, gamma, s)
    return Family(members, record)


def power_of_two_scale(moments: Moments) -> float:
    """Return the power of two nearest the root mean variance; dividing by it makes one learning rate fit all models.

    A power of two, so that folding it back into the trained SAE is exact. Raises UserError on constant data.
    """
    variance = float(moments.variance.mean())
    if variance == 0:
        raise UserError(
            f"all {moments.n} activations are the same vector; there is nothing to learn"
        )
    return 2.0 ** round(math.log2(variance) / 2)


def initial_gamma(
    cfg: GammaConfig, kept: Moments, consistency: Float64[Tensor, " d_in"] | None
) -> Float64[Tensor, " d_in"]:
    """Return gamma at the start of training; latent_variance starts at 1 and moves with the latents."""
    match cfg.rule:
        case "none" | "latent_variance":
            return torch.ones(kept.d_in, dtype=torch.float64)
        case "variance":
            return gamma_from_proxy(cfg, kept.variance)
        case "consistency":
            if consistency is None:
                raise UserError(
                    "gamma rule consistency needs labels, one class per row; give --labels FILE"
                )
            return gamma_from_proxy(cfg, consistency)
        case "vector":
            assert cfg.vector is not None
            if len(cfg.vector) != kept.d_in:
                raise UserError(
                    f"the gamma vector has {len(cfg.vector)} entries, the activations {kept.d_in} dimensions"
                )
            return gamma_from_proxy(cfg, torch.tensor(cfg.vector, dtype=torch.float64))


def gamma_record(
    cfg: GammaConfig, gamma: Float[Tensor, " d_in"], stats: SourceStats
) -> dict[str, Any]:
    """Return what gamma.json keeps of one member, with the movement the mask prevented."""
    unmasked = None
    if cfg.rule == "variance" and stats.all.n > stats.kept.n:
        unmasked = gamma_from_proxy(cfg, stats.all.variance)
    record = describe_gamma(cfg, gamma, unmasked)
    return {**record, "tokens": stats.kept.n, "skipped": stats.skipped}


def to_device(member: MemberState, device: str) -> MemberState:
    """Move a member that has not trained yet."""
    if device != "cpu":
        member.sae.to(device)
        for name in ("mean", "since_fired", "dead", "latent_moments"):
            setattr(member, name, getattr(member, name).to(device))
        member.sums = {name: value.to(device) for name, value in member.sums.items()}
    return member


def finished(member: MemberState) -> SparseAutoencoder:
    """Return the trained SAE in the activations' own units, on the CPU."""
    sae = member.sae.scaled(member.scale).cpu()
    sae.gamma.copy_(member.sae.gamma)
    return sae.requires_grad_(False)

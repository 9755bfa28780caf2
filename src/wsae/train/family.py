"""A family: every hook's members, made from the run's config and the data's statistics."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

from wsae.acts.flow import SourceStats
from wsae.core.errors import UserError
from wsae.sae.config import GammaConfig, PreconditionConfig, SAEConfig, SourcePart
from wsae.sae.forward import Weights
from wsae.sae.gamma import (
    describe_gamma,
    gamma_from_covariance,
    gamma_from_proxy,
    gamma_from_residual,
)
from wsae.sae.model import SAE, even
from wsae.sae.precondition import Preconditioner
from wsae.stats.moments import Covariance, Moments
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.native import leave
from wsae.train.state import MemberState, Target, make_member


@dataclass
class FamilyState:
    """The members of each hook, in config order, and the record of their loss weights."""

    members: dict[str, list[MemberState]]
    gamma_record: dict[str, dict[str, Any]]

    def all(self) -> list[tuple[str, MemberState]]:
        """Return (hook, member) pairs in training order."""
        return [(hook, m) for hook, members in self.members.items() for m in members]


@dataclass(frozen=True)
class Start:
    """The SAEs that training goes on with, by hook, and the address where they were found, if any."""

    saes: dict[str, SAE]
    address: str | None = None

    def digest(self) -> str:
        """Return a hash of their kinds and weights: what `TrainConfig.init_from` records."""
        sha = hashlib.sha256()
        for hook, sae in sorted(self.saes.items()):
            sha.update(f"{hook} {sae.cfg.activation.kind}".encode())
            for name, tensor in sorted(sae.tensors().items()):
                sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                sha.update(
                    tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
                )
        return sha.hexdigest()

    def check(self, cfg: TrainConfig, hooks: dict[str, int]) -> None:
        """Raise UserError where there is none for a hook {hook: width}, or it is of another shape than a member."""
        for hook in cfg.read(hooks):
            if hook not in self.saes:
                raise UserError(f"no SAE to start from at {hook}, only at {', '.join(self.saes)}")
            out = cfg.given(hook)
            d_out = None if out is None else hooks[out]
            for member in cfg.members:
                shape = member.sae_config(hooks[hook], d_out, cfg.crosscoder)
                _check_alike(hook, self.saes[hook].cfg, shape)

    def begun(self, hook: str, member: MemberConfig, inputs: "Inputs") -> SAE:
        """Return a hook's SAE as a member goes on with it: of P x / scale, decoder rows of norm 1 (see `folded`).

        Its loss weights are left to the member. Raises UserError for Top-k kinds whose rows, brought to norm 1, would
        choose other latents.
        """
        sae = self.saes[hook]
        if inputs.inside is not None:
            sae = inputs.inside.unfold(sae)
        target = inputs.target
        scale = inputs.scale if target is None else target.scale
        sae = sae.scaled(1 / scale, 1 / inputs.scale)
        tensors = {name: tensor.double().cpu() for name, tensor in sae.tensors().items()}
        if not sae.cfg.tied:
            norm = tensors["W_dec"].norm(dim=1)
            norm = torch.where(norm > 0, norm, 1.0)
            if sae.arch.sparse and not even(norm, sae.W_dec):
                raise UserError(
                    f"the SAE to start from at {hook} has decoder rows of lengths {norm.min():.3g} to {norm.max():.3g} "
                    f"here, and with rows of length 1, as training keeps them, {sae.cfg.activation.kind} would choose "
                    "other latents; one that was trained with --precondition goes on with the same, and with --no-twin"
                )
            tensors["W_dec"] /= norm[:, None]
            tensors["W_enc"] *= norm
            tensors["b_enc"] *= norm
            if "threshold" not in sae.arch.parameters:
                tensors["threshold"] *= norm.mean()
            for name, parameter in sae.arch.parameters.items():
                tensors[name] *= norm**parameter.power
        d_out = None if target is None else len(target.mean)
        found = SAE(member.sae_config(len(inputs.mean), d_out, self.saes[hook].cfg.sources))
        found.set_tensors({**tensors, "gamma": found.gamma})
        return found


def _check_alike(hook: str, there: SAEConfig, here: SAEConfig) -> None:
    """Raise UserError naming the first thing in which an SAE to start from differs from a member; k may."""
    ours, theirs = (
        {**shape.to_dict(), "activation": shape.activation.kind, "sources": _named(shape.sources)}
        for shape in (here, there)
    )
    for name, value in ours.items():
        if (theirs[name] or None) != (value or None):
            raise UserError(
                f"the SAE to start from at {hook} has {name} {theirs[name]}, and {name} {value} is to be trained; "
                "leave the flag out, or start from another"
            )


def _named(sources: tuple[SourcePart, ...] | None) -> str | None:
    return None if sources is None else " ".join(f"{s.name} [{s.width}]" for s in sources)


@dataclass(frozen=True)
class Inputs:
    """What members of one preconditioner know of the activations they are trained on."""

    mean: Float64[Tensor, " d_in"]
    variance: Float64[Tensor, " d_in"]
    scale: float
    """Activations are divided by this power of two for training."""
    inside: Preconditioner | None = None
    target: Target | None = None
    """Of what transcoders are to give."""


def inputs_of(
    cfg: PreconditionConfig | None,
    stats: Moments,
    covariance: Covariance | None,
    half: bool = False,
    sources: tuple[SourcePart, ...] | None = None,
    left: Covariance | None = None,
) -> Inputs:
    """Return the moments of P x, `half`: of a P in bfloat16; those of a crosscoder's sources are made alike before.

    `left` is what a pilot left, of which a P of kind residual is made.

    Raises UserError where there is no such P, or no covariance to make it of.
    """
    before = None if sources is None else Preconditioner.alike(sources, stats.variance)
    if cfg is None:
        mean, variance = stats.mean, stats.variance
        if before is not None:
            mean, variance = before.rows(mean), variance * before.map.square()
        return Inputs(mean, variance, power_of_two_scale(variance, stats.n), before)
    if covariance is None or covariance.d_in != stats.d_in:
        given = "none" if covariance is None else f"one of width {covariance.d_in}"
        raise UserError(
            f"precondition {cfg.kind} needs the covariance of {stats.d_in} dimensions; given: {given}"
        )
    if cfg.needs_pilot and left is None:
        raise UserError(f"precondition {cfg.kind} needs what a pilot SAE leaves; give it")
    inside = Preconditioner.of(cfg, covariance if left is None else left, before)
    inside = inside.rounded() if half else inside
    variance = inside.covariance(covariance.covariance).diagonal().clone()
    scale = power_of_two_scale(variance, covariance.n)
    return Inputs(inside.rows(stats.mean), variance, scale, inside)


def make_family(
    cfg: TrainConfig,
    stats: dict[str, SourceStats],
    device: str = "cpu",
    covariances: dict[str, Covariance] | None = None,
    residuals: dict[str, dict[str, Covariance]] | None = None,
    make: Callable[[str, str, MemberConfig, Inputs], MemberState | None] | None = None,
    start: Start | None = None,
) -> FamilyState:
    """Return every hook's members at step 0, their gamma set from the statistics of the kept rows.

    `covariances` of each hook serve preconditioners and the rules gap and whiten, `residuals` of each hook and member
    what is called residual (`wsae.train.run` takes both). `make` makes a hook's member called so in place of
    `make_member`, or none. With a `start` members go on with its SAEs.
    """

    def whole(hook: str, name: str, member: MemberConfig, inputs: Inputs) -> MemberState:
        begun = None if start is None else start.begun(hook, member, inputs)
        spread, target = inputs.variance.sqrt(), inputs.target
        made = make_member(name, member, cfg, inputs.mean, inputs.scale, spread, begun, target)
        return to_device(made, device)

    members, record = {}, {}
    for hook in cfg.read(stats):
        s, out, covariance = stats[hook], cfg.given(hook), (covariances or {}).get(hook)
        sources = cfg.crosscoder if start is None else start.saes[hook].cfg.sources
        goal = None if out is None else _goal(stats[out], (covariances or {}).get(out))
        members[hook], record[hook], known = [], {}, {}
        mapping: dict[object, Preconditioner] = {}  # members map a batch once
        for name, member_cfg in zip(cfg.names(), cfg.members, strict=True):
            left = (residuals or {}).get(hook, {}).get(name)
            mapped = member_cfg.precondition
            own = left if mapped is not None and mapped.needs_pilot else None
            chosen = (mapped, id(own))
            if chosen not in known:
                half = cfg.dtype == "bfloat16"
                known[chosen] = inputs_of(mapped, s.kept, covariance, half, sources, own)
            inputs = known[chosen]
            weighed = goal or Weighed(s, inputs, covariance)
            if goal is not None:
                inputs = replace(inputs, target=Target(goal.inputs.mean, goal.inputs.scale))
            member = (make or whole)(hook, name, member_cfg, inputs)
            if member is None:
                continue
            gamma = initial_gamma(member_cfg.gamma, *weighed, left)
            member.sae.set_gamma(gamma)
            if inputs.inside is not None:
                member.inside = mapping.setdefault(chosen, inputs.inside.to(member.mean))
            members[hook].append(member)
            record[hook][name] = gamma_record(member_cfg.gamma, gamma, *weighed)
            record[hook][name] |= _mapped(inputs.inside)
    return FamilyState(members, record)


def _mapped(inside: Preconditioner | None) -> dict[str, Any]:
    """Return what gamma.json keeps of a map: the preconditioner, the scales of a crosscoder's sources."""
    if inside is None:
        return {}
    if inside.sources is not None:
        return {"sources": inside.record}
    return {"precondition": inside.record, **_mapped(inside.before)}


class Weighed(NamedTuple):
    """What loss weights are made of: the moments of the activations whose errors they weigh."""

    stats: SourceStats
    inputs: Inputs
    covariance: Covariance | None


def _goal(stats: SourceStats, covariance: Covariance | None) -> Weighed:
    """Return the moments of what transcoders are to give, which no preconditioner maps."""
    return Weighed(stats, inputs_of(None, stats.kept, None), covariance)


def power_of_two_scale(variance: Float64[Tensor, " d_in"], rows: int) -> float:
    """Return the power of two nearest the root mean variance; dividing by it makes one learning rate fit all models.

    A power of two, so that folding it back into the trained SAE is exact. Raises UserError on constant data.
    """
    mean = float(variance.mean())
    if mean == 0:
        raise UserError(f"all {rows} activations are the same vector; there is nothing to learn")
    return 2.0 ** round(math.log2(mean) / 2)


def initial_gamma(
    cfg: GammaConfig,
    stats: SourceStats,
    inputs: Inputs,
    covariance: Covariance | None = None,
    residual: Covariance | None = None,
) -> Float64[Tensor, " d_in"] | Float64[Tensor, "d_in d_in"]:
    """Return gamma at the start of training, of P x; latent_variance starts at 1 and moves with the latents."""
    kept = stats.kept
    match cfg.rule:
        case "none" | "latent_variance":
            return torch.ones(kept.d_in, dtype=torch.float64)
        case "variance":
            return gamma_from_proxy(cfg, inputs.variance)
        case "consistency":
            return gamma_from_proxy(cfg, _consistency(stats))
        case "vector":
            assert cfg.vector is not None
            if len(cfg.vector) != kept.d_in:
                raise UserError(
                    f"the gamma vector has {len(cfg.vector)} entries, the activations {kept.d_in} dimensions"
                )
            return gamma_from_proxy(cfg, torch.tensor(cfg.vector, dtype=torch.float64))
        case "residual" | "residual_covariance":
            if residual is None:
                raise UserError(f"gamma rule {cfg.rule} needs what a pilot SAE leaves; give it")
            return gamma_from_residual(cfg, residual.covariance)
        case "gap" | "whiten":
            return _from_covariance(cfg, inputs, covariance)


def _consistency(stats: SourceStats) -> Float64[Tensor, " d_in"]:
    found = stats.consistency
    if found is None:
        raise UserError(
            "gamma rule consistency needs labels, one class per row; give --labels FILE, or a store of labelled images"
        )
    if len(found) > 1 and bool((found == found[0]).all()):
        raise UserError(
            "gamma rule consistency: every dimension has the same, as where all rows are of one class, or all "
            "dimensions active on all rows; it would weigh nothing"
        )
    return found


def _from_covariance(
    cfg: GammaConfig, inputs: Inputs, covariance: Covariance | None
) -> Float64[Tensor, " d_in"] | Float64[Tensor, "d_in d_in"]:
    d_in = len(inputs.mean)
    if not cfg.needs_covariance:
        return torch.ones(d_in, dtype=torch.float64)
    if covariance is None:
        raise UserError(f"gamma rule {cfg.rule} needs the covariance of the activations; give it")
    if covariance.d_in != d_in:
        raise UserError(
            f"gamma rule {cfg.rule}: a covariance of width {covariance.d_in}, the activations have {d_in} dimensions"
        )
    if covariance.n <= d_in:
        raise UserError(
            f"gamma rule {cfg.rule}: {covariance.n} rows cannot give the covariance of {d_in} dimensions; "
            f"give at least {d_in + 1}, better {10 * d_in}"
        )
    C = covariance.covariance
    return gamma_from_covariance(cfg, C if inputs.inside is None else inputs.inside.covariance(C))


def gamma_record(
    cfg: GammaConfig,
    gamma: Weights,
    stats: SourceStats,
    inputs: Inputs,
    covariance: Covariance | None = None,
) -> dict[str, Any]:
    """Return what gamma.json keeps of one member, with the movement the mask prevented."""
    unmasked = None
    if cfg.rule == "variance" and inputs.inside is None and stats.all.n > stats.kept.n:
        unmasked = gamma_from_proxy(cfg, stats.all.variance)
    record = describe_gamma(cfg, gamma, unmasked)
    if cfg.needs_covariance and covariance is not None:
        record["covariance_rows"] = covariance.n
    return {**record, "tokens": stats.kept.n, "skipped": stats.skipped}


def to_device(member: MemberState, device: str) -> MemberState:
    """Move a member that has not trained yet."""
    if device != "cpu":
        member.sae.to(device)
        names = ("mean", "since_fired", "dead", "latent_moments", "spread", "sparse", "window")
        for name in names:
            setattr(member, name, getattr(member, name).to(device))
        for name in ("annealed", "norm"):
            if (value := getattr(member, name)) is not None:
                setattr(member, name, value.to(device))
    return member


def finished(member: MemberState) -> SAE:
    """Return the trained SAE of the activations as they are, on the CPU."""
    leave(member)
    return folded(member, member.sae)


def folded(member: MemberState, sae: SAE) -> SAE:
    """Return a member's SAE with its scale and its preconditioner folded into the weights, on the CPU."""
    sae = sae.scaled(member.scale, member.scale_in).cpu()
    if member.inside is not None:
        sae = member.inside.fold(sae)
    return sae.requires_grad_(False)

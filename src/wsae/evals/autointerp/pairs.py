"""Before contexts are collected: which latents stand for a member, and which latent of its twin each is compared with.

One pass over the held-out rows gives densities, live latents and the statistics behind the controls. A member's sample
is one live latent from each of n equal-count strata of density; its twin shows the partners of these beside a sample of
its own, so that a comparison over matched latents has both sides.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Int64
from torch import Tensor

from wsae.core.errors import UserError
from wsae.core.progress import Progress, quiet
from wsae.evals.autointerp.config import Control, InterpretConfig
from wsae.evals.autointerp.controls import NAMES, neurons, pca
from wsae.evals.contexts import sample_latents
from wsae.evals.control import random_control
from wsae.evals.data import HeldOut
from wsae.evals.fidelity import Survey
from wsae.evals.matching import Matching, Side, match
from wsae.evals.measure import Family
from wsae.sae import SparseAutoencoder
from wsae.stats.covariance import Covariance

ASSIGNMENT_MAX = 8192
"""Live latents up to which members are matched one-to-one optimally, as in `wsae evaluate`."""


@dataclass(frozen=True)
class Sides:
    """One hook's members before collection."""

    family: Family
    survey: Survey
    covariance: Covariance | None
    reference: str
    """The member that the controls are made like: the plain twin, or the first member where none is plain."""
    sample: dict[str, list[int]] = field(default_factory=dict)
    """Each member's own latents: its means are over these."""
    matching: dict[str, Matching] = field(default_factory=dict)

    def partners(self, member: str) -> dict[int, int]:
        """Return latent -> its partner in the twin, for the member's sampled latents that have one."""
        matching = self.matching[member]
        pairs = dict(zip(matching.pair_a.tolist(), matching.pair_b.tolist(), strict=True))
        return {latent: pairs[latent] for latent in self.sample[member] if latent in pairs}

    def latents(self) -> dict[str, Int64[Tensor, " latents"]]:
        """Return what to collect of each member: its sample, then partners of other members' samples."""
        wanted = {name: list(sample) for name, sample in self.sample.items()}
        for member, twin in self.family.twins.items():
            wanted[twin] += self.partners(member).values()
        return {
            name: torch.tensor(list(dict.fromkeys(latents)), dtype=torch.int64)
            for name, latents in wanted.items()
        }

    def controls(self, cfg: InterpretConfig) -> dict[str, SparseAutoencoder]:
        """Return the controls that are SAEs of the same rows, by name."""
        mean, l0 = self.survey.moments.mean, self.survey.activity[self.reference].l0
        like = self.family.saes[self.reference]
        made: dict[Control, SparseAutoencoder] = {}
        if "random_sae" in cfg.controls:
            made["random_sae"] = random_control(like, mean, l0, cfg.seed)
        if "neurons" in cfg.controls:
            made["neurons"] = neurons(mean, self.survey.moments.variance, l0)
        if "pca" in cfg.controls:
            assert self.covariance is not None
            made["pca"] = pca(mean, self.covariance.covariance, l0)
        device = like.W_dec.device
        return {NAMES[control]: sae.to(device) for control, sae in made.items()}


@torch.inference_mode()
def look(
    source: HeldOut,
    families: dict[str, Family],
    cfg: InterpretConfig,
    progress: Progress = quiet,
) -> dict[str, Sides]:
    """Survey the held-out rows once and choose each member's latents, hook by hook.

    Raises UserError when there are no rows, a width differs, or the data hold NaN.
    """
    surveys = {
        hook: Survey(hook, family.saes, source.hooks[hook]) for hook, family in families.items()
    }
    covariances = {h: Covariance(source.hooks[h]) for h in families if "pca" in cfg.controls}
    n_rows = 0
    with progress("survey", None, "rows") as tick:
        for chunk in source.heldout(cfg.batch_size):
            for hook, survey in surveys.items():
                survey.update(chunk.x[hook])
                if hook in covariances:
                    covariances[hook].update(chunk.x[hook])
            n_rows += len(chunk.seq)
            tick(len(chunk.seq))
    if not n_rows:
        raise UserError("there are no held-out rows to interpret on; hold out more data")
    return {h: _sides(f, surveys[h], covariances.get(h), cfg) for h, f in families.items()}


def _sides(
    family: Family, survey: Survey, covariance: Covariance | None, cfg: InterpretConfig
) -> Sides:
    sample = {
        name: sample_latents(
            activity.density, cfg.contexts.n_latents, cfg.seed, "interpret", survey.hook, name
        ).tolist()
        for name, activity in survey.activity.items()
    }
    matching = {}
    for member, twin in family.twins.items():
        a, b = (Side(family.saes[n].W_dec, survey.activity[n].alive) for n in (member, twin))
        matching[member] = match(a, b, ASSIGNMENT_MAX, cfg.seed)
    reference = next(iter(family.twins.values()), next(iter(family.saes)))
    return Sides(family, survey, covariance, reference, sample, matching)


def selected(families: dict[str, Family], cfg: InterpretConfig) -> dict[str, Family]:
    """Return the hooks and members asked for, each weighted member with its twin; raises UserError for others."""
    for hook in cfg.hooks:
        if hook not in families:
            raise UserError(f"hook {hook!r}: the run has {', '.join(families)}")
    chosen = {hook: f for hook, f in families.items() if not cfg.hooks or hook in cfg.hooks}
    return {hook: _restricted(family, cfg.members) for hook, family in chosen.items()}


def _restricted(family: Family, members: tuple[str, ...]) -> Family:
    for name in members:
        if name not in family.saes:
            raise UserError(f"member {name!r}: the run has {', '.join(family.saes)}")
    if not members:
        return family
    kept = set(members) | {twin for name, twin in family.twins.items() if name in members}
    twins = {name: twin for name, twin in family.twins.items() if name in kept}
    return Family({name: sae for name, sae in family.saes.items() if name in kept}, twins)

"""Which SAEs are trained on which embeddings: one family per backbone, hook and seed, as values. No torch here."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from wsae.core.config import Config
from wsae.losses.config import GammaConfig
from wsae.sae.config import TopK
from wsae.train.config import MemberConfig
from wsae.vision.config import Method

FigureName = Literal["figure4", "figure5"]
Proxy = Literal["none", "consistency", "top", "variance"]
"""consistency: beta as NCL's code counts it. top: the share of the most frequent class among each dimension's n most
strongly activated training images, as the paper words it. variance: of the dimension. All from training images."""

PLAIN = "plain"
HOOKS = ("pooler", "projector")
"""The paper trains on "the learned representations" and does not say which: embeddings, or NCL's projections."""


class Weighting(Config):
    """The loss weights of one member: gamma_i = proxy_i ^ alpha, scaled to mean square 1."""

    proxy: Proxy = "none"
    alpha: float = Field(default=1.0, gt=0)

    @property
    def label(self) -> str:
        """The member's name."""
        return PLAIN if self.proxy == "none" else f"{self.proxy}-a{self.alpha:g}"

    def gamma(self, top: tuple[float, ...] | None) -> GammaConfig:
        """Return the gamma rule; `top` is the proxy of that name, one value a dimension."""
        if self.proxy == "none":
            return GammaConfig()
        if self.proxy == "top":
            return GammaConfig(rule="vector", alpha=self.alpha, vector=top)
        return GammaConfig(rule=self.proxy, alpha=self.alpha)


class SAEPlan(Config):
    """What all members have in common."""

    d_sae: PositiveInt = 16_384
    k: PositiveInt = 16
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    passes: PositiveInt = 20
    """Passes over the training rows."""
    batch_size: PositiveInt = 1024
    auxk: NonNegativeFloat = 0.0
    """Weight of the dead latents' loss. None by default: with tens of thousands of images most of 16,384 latents are
    dead whatever one does, and reviving them left more of them dead (97 % against 76 %) in four times the time."""

    def member(self, weighting: Weighting, top: tuple[float, ...] | None) -> MemberConfig:
        """Return one member."""
        return MemberConfig(
            gamma=weighting.gamma(top),
            d_sae=self.d_sae,
            activation=TopK(k=self.k),
            lr=self.lr,
            auxk=self.auxk,
            label=weighting.label,
        )


class RunPlan(Config):
    """One training run: a backbone, a hook, a seed, and the members that share its batches."""

    backbone: str
    hook: str
    seed: int
    weightings: tuple[Weighting, ...] = Field(min_length=1)


class Plan(Config):
    """All runs of a figure."""

    name: FigureName
    sae: SAEPlan
    runs: tuple[RunPlan, ...] = Field(min_length=1)

    @property
    def n_members(self) -> int:
        """Return how many SAEs are trained."""
        return sum(len(run.weightings) for run in self.runs)


class Members(Config):
    """Which weightings are tried, and how often."""

    alphas: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Exponents of the consistency, for Figure 5 (a) and (c)."""
    seeds: PositiveInt = 3
    hooks: tuple[str, ...] = HOOKS

    def weightings(self, method: Method) -> tuple[Weighting, ...]:
        """Return the members on a backbone: all on NCL's, what Figure 4 needs on others'."""
        one = [Weighting(proxy="consistency"), Weighting(proxy="top"), Weighting(proxy="variance")]
        if method != "ncl":
            return (Weighting(), *one)
        others = [Weighting(proxy="consistency", alpha=alpha) for alpha in self.alphas]
        return tuple(dict.fromkeys([Weighting(), *others, *one]))


def figure_plan(
    name: FigureName, sae: SAEPlan, members: Members, backbones: dict[str, Method], seed: int = 0
) -> Plan:
    """Return a figure's runs: both figures share those on NCL's backbones, Figure 4 has the others' embeddings too.

    Others' projections are left out: no dimension of theirs is asked to mean anything.
    """
    runs = [
        RunPlan(
            backbone=backbone,
            hook=hook,
            seed=seed + s,
            weightings=members.weightings(method),
        )
        for backbone, method in backbones.items()
        if name == "figure4" or method == "ncl"
        for hook in (members.hooks if method == "ncl" else members.hooks[:1])
        for s in range(members.seeds)
    ]
    return Plan(name=name, sae=sae, runs=tuple(runs))

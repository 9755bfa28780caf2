"""Which SAEs are trained: for every hook and seed one family, as values. No torch here.

A run holds one hook and one seed, so that its rows fit the page cache and a killed command loses at most one run.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from wsae.core.config import Config
from wsae.losses.config import GammaConfig
from wsae.sae.config import Activation, GroupTopK, TopK
from wsae.train.config import MemberConfig

# What Tables 1 to 3 say, as data: auto-interpretability scores in percent, by layer and method. No
# torch here.

TableName = Literal["table1", "table2", "table3"]

PLAIN, HALF, ONE = "plain", "variance-a0.5", "variance-a1"
"""The paper's three methods, by the labels of `wsae.experiments.tables.plan`."""


class PaperTable(Config):
    """One table: `scores` of each method, in the order of `layers`."""

    title: str
    model: str
    layers: tuple[int, ...]
    """Counted from 0; for Llama-3-8B the last of 32."""
    scores: dict[str, tuple[float, ...]]

    def gains(self, method: str) -> list[float]:
        """Return a method's score minus the plain SAE's, by layer, in points (rounded as the table's are)."""
        return [
            round(a - b, 1) for a, b in zip(self.scores[method], self.scores[PLAIN], strict=True)
        ]


PAPER: dict[TableName, PaperTable] = {
    "table1": PaperTable(
        title="Table 1: Top-k 32, 32x",
        model="Pythia-160M",
        layers=tuple(range(12)),
        scores={
            PLAIN: (74.7, 74.1, 76.7, 77.8, 78.5, 79.5, 79.3, 77.8, 74.6, 75.6, 71.6, 72.5),
            HALF: (75.4, 77.6, 76.4, 77.9, 79.3, 79.6, 79.8, 77.4, 78.6, 79.3, 76.1, 72.6),
            ONE: (77.2, 78.9, 81.3, 84.6, 83.9, 83.3, 83.9, 79.6, 81.5, 77.6, 72.4, 73.5),
        },
    ),
    "table2": PaperTable(
        title="Table 2: group Top-k 32, 32x",
        model="Pythia-160M",
        layers=(9, 10, 11),
        scores={PLAIN: (69.0, 61.8, 56.3), ONE: (71.5, 63.7, 59.0)},
    ),
    "table3": PaperTable(
        title="Table 3: the last layer",
        model="Llama-3-8B",
        layers=(31,),
        scores={PLAIN: (41.6,), ONE: (63.6,)},
    ),
}

StudyName = TableName | Literal["language"]
Kind = Literal["topk", "group_topk"]

PLAIN_GAMMA = GammaConfig()
ALPHAS = (0.5, 1.0)
PROXIES: tuple[Literal["none", "winsor", "rank"], ...] = ("none", "winsor", "rank")
ALL_ALPHAS = (-1.0, -0.5, 0.5, 1.0, 2.0)


class SAEPlan(Config):
    """What all members have in common."""

    expansion: PositiveInt = 32
    k: PositiveInt = 32
    lr: PositiveFloat | None = None
    """Peak learning rate; none means 2e-4 / sqrt(d_sae / 2^14)."""
    curve_k: tuple[PositiveInt, ...] = ()
    """Plain members with fewer active latents, whose FVU is higher: they say what a plain SAE of some FVU scores."""
    curve_lr: tuple[PositiveFloat, ...] = ()
    """Plain members with the same k, trained too slowly: the same at the same density."""

    def member(
        self,
        gamma: GammaConfig = PLAIN_GAMMA,
        kind: Kind = "topk",
        k: int | None = None,
        lr: float | None = None,
    ) -> MemberConfig:
        """Return a member labelled by what sets it apart from the plain Top-k SAE."""
        k, slow = k or self.k, lr is not None
        activation: Activation = TopK(k=k) if kind == "topk" else GroupTopK(k=k)
        parts = [
            gamma.label,
            "group" if kind == "group_topk" else "",
            f"k{k}" if k != self.k else "",
            f"lr{lr:g}" if slow else "",
        ]
        return MemberConfig(
            gamma=gamma,
            expansion=self.expansion,
            activation=activation,
            lr=lr if slow else self.lr,
            label="-".join(part for part in parts if part),
        )

    def curve(self, kind: Kind = "topk") -> list[MemberConfig]:
        """Return the plain members along which the score is read as a function of FVU."""
        fewer = [self.member(kind=kind, k=k) for k in self.curve_k if _divides(kind, self, k)]
        return fewer + [self.member(kind=kind, lr=lr) for lr in self.curve_lr]


class RunPlan(Config):
    """One training run: a hook, a seed, and the members that share its batches."""

    hook: str
    seed: int
    members: tuple[MemberConfig, ...] = Field(min_length=1)

    def kinds(self) -> list[str]:
        """Return the kinds of Top-k among the members, in order."""
        return list(dict.fromkeys(member.activation.kind for member in self.members))


class Plan(Config):
    """All runs of a study."""

    name: StudyName
    runs: tuple[RunPlan, ...] = Field(min_length=1)

    @property
    def hooks(self) -> tuple[str, ...]:
        """Return the hooks in order."""
        return tuple(dict.fromkeys(run.hook for run in self.runs))

    @property
    def n_members(self) -> int:
        """Return how many SAEs are trained."""
        return sum(len(run.members) for run in self.runs)


def table_plan(name: TableName, sae: SAEPlan, hooks: Sequence[str], seed: int = 0) -> Plan:
    """Return a table's runs at the given hooks: its own members and those that make the comparison fair.

    The paper's members, weights without the outlier dimensions and the plain loss without them, and the curve.
    """
    kind: Kind = "group_topk" if name == "table2" else "topk"
    alphas = ALPHAS if name == "table1" else (1.0,)
    gammas = [PLAIN_GAMMA, *(_variance(alpha) for alpha in alphas), *_dropped((0.0, 1.0))]
    members = [sae.member(gamma, kind) for gamma in gammas] + sae.curve(kind)
    return Plan(name=name, runs=tuple(_run(hook, seed, members) for hook in hooks))


class StudyPlace(Config):
    """Where the wider study looks: every hook, more seeds at some, all gamma rules at one."""

    hooks: tuple[str, ...]
    seeds: PositiveInt = 3
    seeded: tuple[str, ...] = ()
    """Hooks with `seeds` seeds; the others have one."""
    rules_at: str
    curve_at: tuple[str, ...]
    """Hooks at which plain SAEs of other FVU are trained too."""


def study_plan(sae: SAEPlan, place: StudyPlace, seed: int = 0) -> Plan:
    """Return the wider study's runs.

    Everywhere: both Top-k variants, plain and alpha 0.5, 1; alpha 1 with the proxy winsorised, by rank and without
    outlier dimensions (Top-k). At some hooks the curve; at one all alphas and rules; at some plain and alpha 0.5, 1
    again with other seeds.
    """
    core = [PLAIN_GAMMA, *(_variance(alpha) for alpha in ALPHAS)]
    tamed = [_variance(1.0, robust) for robust in PROXIES[1:]]
    every = [sae.member(g) for g in (*core, *tamed, *_dropped((0.0, 1.0)))]
    every += [sae.member(gamma, "group_topk") for gamma in core]
    runs = []
    for hook in place.hooks:
        curve = sae.curve() if hook in place.curve_at else []
        rules = [sae.member(gamma) for gamma in all_rules()] if hook == place.rules_at else []
        runs.append(_run(hook, seed, [*every, *curve, *rules]))
    for hook in place.seeded:
        again = [sae.member(gamma) for gamma in core]
        runs += [_run(hook, seed + s, again) for s in range(1, place.seeds)]
    return Plan(name="language", runs=tuple(runs))


def all_rules() -> list[GammaConfig]:
    """Return every gamma rule of the study: alphas by proxy, latent variance, gap, whiten."""
    powers = [_variance(alpha) for alpha in ALL_ALPHAS]
    powers += [_variance(a, robust) for robust in PROXIES[1:] for a in ALL_ALPHAS if a > 0]
    carried = [GammaConfig(rule="latent_variance", alpha=alpha) for alpha in ALPHAS]
    other = [*_dropped((0.5,)), GammaConfig(rule="gap"), GammaConfig(rule="whiten")]
    return [*powers, *carried, *other]


def _variance(
    alpha: float, robust: Literal["none", "winsor", "rank", "drop"] = "none"
) -> GammaConfig:
    return GammaConfig(rule="variance", alpha=alpha, robust=robust)


def _dropped(alphas: Iterable[float]) -> list[GammaConfig]:
    return [_variance(alpha, "drop") for alpha in alphas]


def _run(hook: str, seed: int, members: Sequence[MemberConfig]) -> RunPlan:
    return RunPlan(hook=hook, seed=seed, members=tuple(dict.fromkeys(members)))


def _divides(kind: Kind, sae: SAEPlan, k: int) -> bool:
    """Say whether a width that the base k divides can be cut into k equal groups."""
    return kind == "topk" or sae.k % k == 0

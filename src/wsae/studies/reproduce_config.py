"""Settings of Tables 1 to 3, of the wider studies beside them, and of Figures 4 and 5. No torch here.

What is harvested (or which embeddings of which images), which SAEs are trained on it, and how they are scored.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from wsae.acts.config import HarvestConfig, ImageHarvestConfig, ImagesConfig, LiveConfig, TextConfig
from wsae.core.artifact import read_manifest
from wsae.core.config import Config
from wsae.core.errors import UserError
from wsae.evals.config import (
    ClassesConfig,
    ContextConfig,
    Control,
    EvalConfig,
    InterpretConfig,
    LlmConfig,
    Score,
)
from wsae.sae.config import Activation, GammaConfig, GroupTopK, PreconditionConfig, TopK
from wsae.studies.sweep_config import Preset
from wsae.theory.record import TableName
from wsae.train.config import MemberConfig, TrainConfig
from wsae.vision.config import Method, PretrainConfig, preset

StudyName = Literal[TableName, "language", "remedy"]
FigureName = Literal["figure4", "figure5"]
Name = Literal[
    "figure2", "figure3", FigureName, "readings", "worlds", "recovery", "noise", StudyName
]
"""All that `wsae reproduce` makes; the toy worlds' settings are in `sweep_config`."""
Kind = Literal["topk", "group_topk"]

PLAIN_GAMMA = GammaConfig()
ALPHAS = (0.5, 1.0)
PROXIES: tuple[Literal["none", "winsor", "rank"], ...] = ("none", "winsor", "rank")
ALL_ALPHAS = (-1.0, -0.5, 0.5, 1.0, 2.0)


# Which SAEs are trained: for every hook and seed one family. A run holds one hook and one seed, so that its rows fit
# the page cache and a killed command loses at most one run.


class TableSAEs(Config):
    """What all members have in common."""

    expansion: PositiveInt = 32
    k: PositiveInt = 32
    lr: PositiveFloat | None = None
    """Peak learning rate; default: 2e-4 / sqrt(d_sae / 2^14)."""
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
        precondition: PreconditionConfig | None = None,
    ) -> MemberConfig:
        """Return a member labelled by what sets it apart from the plain Top-k SAE."""
        k, slow = k or self.k, lr is not None
        activation: Activation = TopK(k=k) if kind == "topk" else GroupTopK(k=k)
        rule = "" if precondition and gamma.rule == "none" else gamma.label
        parts = [
            rule,
            precondition.label if precondition else "",
            "group" if kind == "group_topk" else "",
            f"k{k}" if k != self.k else "",
            f"lr{lr:g}" if slow else "",
        ]
        return MemberConfig(
            gamma=gamma,
            precondition=precondition,
            expansion=self.expansion,
            activation=activation,
            lr=lr if slow else self.lr,
            label="-".join(part for part in parts if part),
        )

    def curve(self, kind: Kind = "topk") -> list[MemberConfig]:
        """Return the plain members along which the score is read as a function of FVU."""
        whole = [k for k in self.curve_k if kind == "topk" or self.k % k == 0]  # equal groups
        fewer = [self.member(kind=kind, k=k) for k in whole]
        return fewer + [self.member(kind=kind, lr=lr) for lr in self.curve_lr]


class HookRun(Config):
    """One training run: a hook, a seed, and the members that share its batches."""

    hook: str
    seed: int
    members: tuple[MemberConfig, ...] = Field(min_length=1)


class TablePlan(Config):
    """All runs of a study."""

    name: StudyName
    runs: tuple[HookRun, ...] = Field(min_length=1)

    @property
    def hooks(self) -> tuple[str, ...]:
        """Return the hooks in order."""
        return tuple(dict.fromkeys(run.hook for run in self.runs))

    @property
    def n_members(self) -> int:
        """Return how many SAEs are trained."""
        return sum(len(run.members) for run in self.runs)


def table_plan(name: TableName, sae: TableSAEs, hooks: Sequence[str], seed: int = 0) -> TablePlan:
    """Return a table's runs at the given hooks: its own members and those that make the comparison fair.

    The paper's members, weights without the outlier dimensions and the plain loss without them, and the curve.
    """
    kind: Kind = "group_topk" if name == "table2" else "topk"
    alphas = ALPHAS if name == "table1" else (1.0,)
    gammas = [PLAIN_GAMMA, *(_variance(alpha) for alpha in alphas), *_dropped((0.0, 1.0))]
    members = [sae.member(gamma, kind) for gamma in gammas] + sae.curve(kind)
    return TablePlan(name=name, runs=tuple(_run(hook, seed, members) for hook in hooks))


def study_plan(sae: TableSAEs, hooks: tuple[str, ...], tiny: bool, seed: int = 0) -> TablePlan:
    """Return the wider study's runs.

    Everywhere: both Top-k variants, plain and alpha 0.5, 1; alpha 1 with the proxy winsorised, by rank and without
    outlier dimensions (Top-k). At some hooks the curve; at one all alphas and rules; at some plain and alpha 0.5, 1
    again with other seeds, fewer of both where it is tiny.
    """
    rules_at = "layers.9" if "layers.9" in hooks else hooks[len(hooks) // 2]
    last = "layers.19" if "layers.19" in hooks else hooks[-1]
    seeded = list(dict.fromkeys((rules_at, last)))[: 1 if tiny else 2]
    core = [PLAIN_GAMMA, *(_variance(alpha) for alpha in ALPHAS)]
    tamed = [_variance(1.0, robust) for robust in PROXIES[1:]]
    every = [sae.member(g) for g in (*core, *tamed, *_dropped((0.0, 1.0)))]
    every += [sae.member(gamma, "group_topk") for gamma in core]
    runs = []
    for hook in hooks:
        curve = sae.curve() if hook in (hooks[0], rules_at, last) else []
        rules = [sae.member(gamma) for gamma in all_rules()] if hook == rules_at else []
        runs.append(_run(hook, seed, [*every, *curve, *rules]))
    for hook in seeded:
        again = [sae.member(gamma) for gamma in core]
        runs += [_run(hook, seed + s, again) for s in range(1, 2 if tiny else 3)]
    return TablePlan(name="language", runs=tuple(runs))


def remedy_plan(sae: TableSAEs, hooks: tuple[str, ...], tiny: bool, seed: int = 0) -> TablePlan:
    """Return the runs of the study of remedies: every arm once at each hook, the main ones with more seeds at half."""

    def whiten(power: float) -> PreconditionConfig:
        return PreconditionConfig(kind="whiten", power=power)

    residual = GammaConfig(rule="residual")
    main = [
        *(sae.member(gamma) for gamma in (PLAIN_GAMMA, *map(_variance, (0.5, 1.0, -0.5)))),
        *(sae.member(GammaConfig(rule=rule)) for rule in ("whiten", "residual")),
        sae.member(precondition=PreconditionConfig(kind="standardise")),
        *(sae.member(precondition=whiten(power)) for power in (0.25, 0.5, 1.0)),
        sae.member(residual, precondition=whiten(0.5)),
    ]
    every = [
        *main,
        *(sae.member(gamma) for gamma in (_variance(0.25), _variance(1.0, "rank"))),
        *(sae.member(GammaConfig(rule=rule)) for rule in ("gap", "residual_covariance")),
    ]
    if tiny:
        main, every = [main[0], main[5], main[8]], [main[0], main[5], main[8], every[-2]]
    runs = [_run(hook, seed, every) for hook in hooks]
    for s in range(1, 2 if tiny else 4):
        runs += [_run(hook, seed + s, main) for hook in hooks[1::2]]
    return TablePlan(name="remedy", runs=tuple(runs))


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


def _run(hook: str, seed: int, members: Sequence[MemberConfig]) -> HookRun:
    return HookRun(hook=hook, seed=seed, members=tuple(dict.fromkeys(members)))


# A study as settings.

StageName = Literal["harvest", "train", "evaluate", "interpret"]
STAGES: tuple[StageName, ...] = ("harvest", "train", "evaluate", "interpret")


class TableChoices(Config):
    """What a user may change of a preset."""

    model: str | None = None
    text: str | None = None
    hooks: tuple[str, ...] = ()
    store: Path | None = None
    """A finished store to use in place of a harvest; its hooks are used where none are named."""
    judge: LlmConfig | None = None
    """A language model that explains latents and judges contexts; none: the scores that need none."""
    scores: tuple[Score, ...] = ()
    """none: embedding, and with a judge detection."""
    controls: tuple[Control, ...] | None = None
    """None: those that cost no model pass."""
    until: StageName = "interpret"
    """The last stage to run."""


class StudyConfig(Config):
    """One study, complete: its results follow from this and the files it names."""

    plan: TablePlan
    harvest: HarvestConfig
    live: LiveConfig | None = None
    """Train straight from the model, all hooks in one run; none: by way of a store, a run for each hook."""
    tokens: PositiveInt | None = None
    """Training rows per SAE; default: once through the store."""
    batch_size: PositiveInt = 2048
    evaluation: EvalConfig = EvalConfig()
    interpret: InterpretConfig = InterpretConfig()
    judge: LlmConfig | None = None
    made_here: bool = False
    """The model is a tiny one, made in the output directory (preset tiny)."""

    @model_validator(mode="after")
    def _live_runs_share_members(self) -> "StudyConfig":
        if self.live is not None and len({run.members for run in self.plan.runs}) > 1:
            raise ValueError("training from a live model needs the same members at every hook")
        return self

    def interpretation(self, run: int) -> InterpretConfig:
        """Return how run number `run` is interpreted: controls stand beside the first seed of a hook alone."""
        planned = self.plan.runs[run]
        first = min(other.seed for other in self.plan.runs if other.hook == planned.hook)
        if planned.seed == first:
            return self.interpret
        return self.interpret.model_copy(update={"controls": ()})

    def training(self, run: int, rows: int | None) -> TrainConfig:
        """Return run number `run`'s training over `rows` stored rows."""
        planned = self.plan.runs[run]
        tokens = self.tokens or rows
        data = {
            "members": planned.members,
            "tokens": tokens,
            "batch_size": min(self.batch_size, tokens or self.batch_size),
            "seed": planned.seed,
        }
        return TrainConfig.parse(data, where=f"{self.plan.name}, {planned.hook}")


# The sizes of the tables and of the wider study: tiny (seconds), small (two cores), paper.

MODEL_FOLDER = "model"
"""Directory, under the output directory, of the model that the preset tiny makes."""

TABLE_SAES: dict[Preset, TableSAEs] = {
    "tiny": TableSAEs(expansion=8, k=8, lr=3e-3, curve_k=(4,), curve_lr=(1e-4,)),
    # lr: chosen on the plain SAE (docs/reproduction.md); the curve reaches the FVU of all but the most extreme weights
    "small": TableSAEs(expansion=8, k=32, lr=3e-3, curve_k=(16,), curve_lr=(5e-4, 1e-4)),
    "paper": TableSAEs(expansion=32, k=32, curve_k=(16,), curve_lr=(2e-5,)),
}
HARVESTS: dict[Preset, dict[str, Any]] = {
    "tiny": {
        "hooks": ("layers.0", "layers.1"),
        "tokens": 4096,
        "heldout_tokens": 8192,
        "seq_len": 64,
        "heldout_fraction": 0.5,
    },
    "small": {
        "hooks": tuple(f"layers.{i}" for i in (4, 9, 14, 19, 24, 29)),
        "tokens": 1_048_576,
        "heldout_tokens": 262_144,
        "dtype": "bfloat16",
        "store_dtype": "float16",
    },
    "paper": {
        "model": "EleutherAI/pythia-160m",
        "text": {"path": "Skylion007/openwebtext"},
        "hooks": ("layers.*",),
        "tokens": 100_000_000,
        "heldout_tokens": 1_000_000,
        "dtype": "bfloat16",
        "batch_seqs": 32,
    },
}
PAPER_HOOKS: dict[StudyName, tuple[str, ...]] = {
    "table1": tuple(f"layers.{i}" for i in range(12)),
    "table2": ("layers.9", "layers.10", "layers.11"),
    "table3": ("layers.31",),
}
LLAMA = "meta-llama/Meta-Llama-3-8B"
LAST = {"table2": 3, "table3": 1}
"""How many of the last hooks a smaller preset's table has."""

CONTEXTS: dict[Preset, ContextConfig] = {
    "tiny": ContextConfig(
        width=16, n_latents=24, min_windows=6, n_top=2, n_quantile=3, n_score=6, n_hard=4, pool=256
    ),
    "small": ContextConfig(n_latents=100, n_hard=10),
    "paper": ContextConfig(),
}
SURPRISAL: dict[Preset, int] = {"tiny": 4, "small": 10, "paper": 50}
EVALUATED = 65_536
"""Held-out rows behind FVU and the other metrics; contexts are collected from all of them."""
CONTROLS: tuple[Control, ...] = ("random_sae", "neurons", "pca", "shuffled")
"""Those that need no further model pass."""


def study_config(
    name: StudyName,
    preset: Preset,
    out: Path,
    choices: TableChoices,
    seed: int = 0,
    device: str = "cpu",
) -> StudyConfig:
    """Return the study at a preset's size with the user's choices; raises UserError for ones that do not go together.

    `out` is where the preset tiny makes its model, and where the store goes.
    """
    if name in ("language", "remedy") and preset == "paper":
        raise UserError(f"{name}: has the presets tiny and small; the paper has no such study")
    data = _harvest(name, preset, out, choices) | {"seed": seed, "device": device}
    harvest = HarvestConfig.parse(data, where=f"preset {preset}")
    live, hooks = preset == "paper" and choices.store is None, harvest.hooks
    if name in ("language", "remedy"):
        made = study_plan if name == "language" else remedy_plan
        plan = made(TABLE_SAES[preset], hooks, preset == "tiny", seed)
    else:
        last = LAST.get(name, len(hooks)) if preset != "paper" else len(hooks)
        plan = table_plan(name, TABLE_SAES[preset], hooks[-last:], seed)
    usual = ("embedding",) if choices.judge is None else ("embedding", "detection")
    interpret = {
        "contexts": CONTEXTS[preset],
        "scores": choices.scores or usual,
        "controls": CONTROLS if choices.controls is None else choices.controls,
        "surprisal_latents": SURPRISAL[preset],
        "seed": seed,
    }
    settings = {
        "plan": plan,
        "harvest": harvest,
        "live": LiveConfig(shuffle_tokens=131_072, stats_tokens=1_000_000) if live else None,
        "tokens": harvest.tokens if live else None,
        "batch_size": {"tiny": 256, "small": 2048, "paper": 4096}[preset],
        "evaluation": EvalConfig(
            splice_tokens=0,
            n_latents=0,
            rows=EVALUATED // 4 if name == "remedy" else EVALUATED,
            seed=seed,
        ),
        "interpret": InterpretConfig.parse(interpret, where=f"preset {preset}"),
        "judge": choices.judge,
        "made_here": preset == "tiny" and choices.model is None and choices.store is None,
    }
    return StudyConfig.parse(settings, where=f"{name}, preset {preset}")


def _harvest(name: StudyName, preset: Preset, out: Path, choices: TableChoices) -> dict[str, Any]:
    for hook in choices.hooks:
        if "*" in hook:
            raise UserError(
                f"--hook {hook}: a table has a column for each hook; name them one by one"
            )
    if choices.store is not None:  # the harvest that it came from
        for flag, value in (("--model", choices.model), ("--text", choices.text)):
            if value is not None:
                raise UserError(
                    f"{flag} {value}: {choices.store} holds activations already; leave one"
                )
        manifest = read_manifest(choices.store, "store", verify=False)
        if manifest.info.get("kind") == "images":
            raise UserError(
                f"--store {choices.store}: {name} is about tokens, and these rows are of images; give a store of text, "
                "or reproduce figure4 or figure5, which are about images"
            )
        return {**manifest.config, "hooks": choices.hooks or tuple(manifest.info["hooks"])}
    data = dict(HARVESTS[preset])
    if preset == "tiny":
        data["model"] = str(out / MODEL_FOLDER)
    if preset == "paper":
        data["hooks"] = PAPER_HOOKS[name]
        data["model"] = LLAMA if name == "table3" else data["model"]
    text = None if choices.text is None else TextConfig(path=choices.text)
    given = {"model": choices.model, "text": text, "hooks": choices.hooks or None}
    return data | {key: value for key, value in given.items() if value is not None}


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


class FigureSAEs(Config):
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


class BackboneRun(Config):
    """One training run: a backbone, a hook, a seed, and the members that share its batches."""

    backbone: str
    hook: str
    seed: int
    weightings: tuple[Weighting, ...] = Field(min_length=1)


class FigurePlan(Config):
    """All runs of a figure."""

    name: FigureName
    sae: FigureSAEs
    runs: tuple[BackboneRun, ...] = Field(min_length=1)

    @property
    def n_members(self) -> int:
        """Return how many SAEs are trained."""
        return sum(len(run.weightings) for run in self.runs)


def figure_plan(
    name: FigureName,
    sae: FigureSAEs,
    backbones: dict[str, Method],
    alphas: tuple[float, ...] = (0.5, 1.0, 2.0),
    seeds: int = 3,
    seed: int = 0,
) -> FigurePlan:
    """Return a figure's runs: both figures share those on NCL's backbones, Figure 4 has the others' embeddings too.

    On NCL's every weighting is tried, with all `alphas` of the consistency for Figure 5 (a) and (c); on others' what
    Figure 4 needs. Others' projections are left out: no dimension of theirs is asked to mean anything.
    """
    one = [Weighting(proxy="consistency"), Weighting(proxy="top"), Weighting(proxy="variance")]
    powers = [Weighting(proxy="consistency", alpha=alpha) for alpha in alphas]
    tried = tuple(dict.fromkeys([Weighting(), *powers, *one]))
    runs = [
        BackboneRun(
            backbone=backbone,
            hook=hook,
            seed=seed + s,
            weightings=tried if method == "ncl" else (Weighting(), *one),
        )
        for backbone, method in backbones.items()
        if name == "figure4" or method == "ncl"
        for hook in (HOOKS if method == "ncl" else HOOKS[:1])
        for s in range(seeds)
    ]
    return FigurePlan(name=name, sae=sae, runs=tuple(runs))


# A figure as settings.


class VisionChoices(Config):
    """What a user may change of a preset."""

    images: str | None = None
    """Labelled images, as in `wsae pretrain`; none: the preset's."""
    pretrained: tuple[Path, ...] = ()
    """Finished pretraining runs to use in place of one for each method."""


class Backbone(Config):
    """An encoder to be pretrained, or one that is there."""

    name: str
    pretrain: PretrainConfig
    """How it is, or was, pretrained; its held-out images are the ones scored."""
    run: Path | None = None
    """The finished run, where there is one."""


class VisionConfig(Config):
    """One figure, complete: its results follow from this and the files it names."""

    images: ImagesConfig
    backbones: tuple[Backbone, ...] = Field(min_length=1)
    plan: FigurePlan
    classes: ClassesConfig = ClassesConfig()
    evaluation: EvalConfig = EvalConfig()
    device: str = "cpu"

    def backbone(self, name: str) -> Backbone:
        """Return the backbone of this name."""
        return next(backbone for backbone in self.backbones if backbone.name == name)

    def used(self) -> list[Backbone]:
        """Return the backbones that the plan reads, in order."""
        names = dict.fromkeys(run.backbone for run in self.plan.runs)
        return [self.backbone(name) for name in names]

    def hooks(self, name: str) -> tuple[str, ...]:
        """Return the hooks read of a backbone."""
        return tuple(dict.fromkeys(run.hook for run in self.plan.runs if run.backbone == name))

    def harvest(self, name: str, model: Path) -> ImageHarvestConfig:
        """Return the harvest of a backbone's embeddings: its own held-out images stay held out."""
        pretrained = self.backbone(name).pretrain
        return ImageHarvestConfig(
            model=str(model),
            images=self.images,
            hooks=self.hooks(name),
            limit=pretrained.limit,
            heldout_fraction=pretrained.heldout_fraction,
            seed=pretrained.seed,
            device=self.device,
        )

    def training(self, run: int, rows: int, top: tuple[float, ...] | None) -> TrainConfig:
        """Return run number `run`'s training over `rows` stored rows."""
        planned, sae = self.plan.runs[run], self.plan.sae
        data = {
            "members": tuple(sae.member(weighting, top) for weighting in planned.weightings),
            "tokens": rows * sae.passes,
            "batch_size": min(sae.batch_size, rows),
            "seed": planned.seed,
        }
        return TrainConfig.parse(data, where=f"{planned.backbone}, {planned.hook}")


# The sizes of Figures 4 and 5: tiny (digits, seconds), small (Fashion-MNIST), paper (ImageNet-100).

FASHION = (Path("/usr/share/dataset-fashion-mnist"), Path("/usr/share/datasets/fashion-mnist"))
"""Where Debian's dataset-fashion-mnist may lie."""
IMAGENET100 = "clane9/imagenet-100"
"""ImageNet-100 on the hub (126,689 training images, the split that is read here; some are held out)."""

FIGURE_SAES: dict[Preset, FigureSAEs] = {
    "tiny": FigureSAEs(d_sae=64, k=4, lr=3e-3, passes=8, batch_size=128),
    # 48,000 rows of 512, 281 steps. Plain SAE's FVU after 5 passes: 0.030, 0.019, 0.014 at lr 5e-4, 1e-3, 2e-3
    "small": FigureSAEs(lr=2e-3, passes=6, batch_size=1024),
    "paper": FigureSAEs(lr=5e-4, passes=50, batch_size=4096),
}
MEMBERS: dict[Preset, dict[str, Any]] = {"tiny": {"alphas": (0.5, 1.0), "seeds": 2}}
"""What of `figure_plan` is another than its default."""
METHODS: dict[Preset, tuple[Method, ...]] = {
    "tiny": ("ncl",),
    "small": ("ncl", "simclr"),
    "paper": ("ncl",),
}
PRETRAINING: dict[Preset, tuple[str, dict[str, Any]]] = {
    "tiny": ("tiny", {}),
    "small": ("small", {}),
    "paper": ("imagenet100", {"heldout_fraction": 0.1}),
}
CLASSES: dict[Preset, ClassesConfig] = {
    "tiny": ClassesConfig(n_top=10, min_support=10, groups=10, permutations=200, draws=500)
}
SHOWN: dict[Preset, int] = {"tiny": 8, "small": 100, "paper": 200}
"""Latents per member whose strongest images are kept for the report."""


def vision_config(
    name: FigureName,
    size: Preset,
    choices: VisionChoices,
    seed: int = 0,
    device: str = "cpu",
) -> VisionConfig:
    """Return a figure at a preset's size with the user's choices; raises UserError for ones that do not go together."""
    given = _given(choices.pretrained)
    images = _images(name, size, choices, given)
    base, changes = PRETRAINING[size]
    backbones = given or [
        Backbone(
            name=method,
            pretrain=preset(base, **changes, method=method, images=images, seed=seed),
        )
        for method in METHODS[size]
    ]
    methods: dict[str, Method] = {backbone.name: backbone.pretrain.method for backbone in backbones}
    if name == "figure5" and "ncl" not in methods.values():
        raise UserError(
            "figure5: is about NCL's embeddings; give --pretrained a run of that method"
        )
    settings = {
        "images": images,
        "backbones": tuple(backbones),
        "plan": figure_plan(name, FIGURE_SAES[size], methods, **MEMBERS.get(size, {}), seed=seed),
        "classes": CLASSES.get(size, ClassesConfig()).model_copy(update={"seed": seed}),
        "evaluation": EvalConfig(
            splice_tokens=0, n_latents=SHOWN[size], assignment_max=2048, seed=seed
        ),
        "device": device,
    }
    return VisionConfig.parse(settings, where=f"{name}, preset {size}")


def _images(
    name: FigureName, size: Preset, choices: VisionChoices, given: list[Backbone]
) -> ImagesConfig:
    if choices.images is not None:
        return ImagesConfig(path=choices.images)
    if given:
        return given[0].pretrain.images
    if size == "tiny":
        return ImagesConfig()
    if size == "paper":
        return ImagesConfig(path=IMAGENET100)
    found = next((place for place in FASHION if place.is_dir()), None)
    if found is None:
        raise UserError(
            f"{name}, preset small: Fashion-MNIST is not at {FASHION[0]}; install Debian's dataset-fashion-mnist, or "
            "give --images PATH (a folder of IDX files, an .npz file, class folders, .parquet files)"
        )
    return ImagesConfig(path=str(found))


def _given(paths: tuple[Path, ...]) -> list[Backbone]:
    """Return finished pretraining runs as backbones, called by their methods.

    A method that comes twice takes its directory's name along.
    """
    found = []
    for path in paths:
        manifest = read_manifest(path, "pretrain", verify=False)
        data = {**manifest.config["pretrain"], "images": manifest.config["source"]}
        cfg = PretrainConfig.parse(data, where=str(path))
        found.append(Backbone(name=cfg.method, pretrain=cfg, run=path.resolve()))
    methods = [backbone.name for backbone in found]
    names = [
        name if methods.count(name) == 1 else f"{name}-{Path(str(backbone.run)).name}"
        for name, backbone in zip(methods, found, strict=True)
    ]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"--pretrained: two runs are called {twice[0]}; rename one's directory")
    return [b.model_copy(update={"name": name}) for b, name in zip(found, names, strict=True)]

"""Settings of Tables 1 to 3 and of the wider study: what is harvested, trained and scored. No torch here."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from wsae.acts.config import HarvestConfig, LiveConfig, TextConfig
from wsae.core.artifact import read_manifest
from wsae.core.config import Config
from wsae.core.errors import UserError
from wsae.evals.config import ContextConfig, Control, EvalConfig, InterpretConfig, LlmConfig, Score
from wsae.sae.config import Activation, GammaConfig, GroupTopK, PreconditionConfig, TopK
from wsae.studies.sweep_config import Preset
from wsae.theory.record import TableName
from wsae.train.config import MemberConfig, TrainConfig

StudyName = TableName | Literal["language", "remedy"]
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

    def kinds(self) -> list[str]:
        """Return the kinds of Top-k among the members, in order."""
        return list(dict.fromkeys(member.activation.kind for member in self.members))


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

TINY_MODEL = "model"
"""Directory, under the output directory, of the model that the preset tiny makes."""

SAES: dict[Preset, TableSAEs] = {
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
        plan = made(SAES[preset], hooks, preset == "tiny", seed)
    else:
        last = LAST.get(name, len(hooks)) if preset != "paper" else len(hooks)
        plan = table_plan(name, SAES[preset], hooks[-last:], seed)
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
        data["model"] = str(out / TINY_MODEL)
    if preset == "paper":
        data["hooks"] = PAPER_HOOKS[name]
        data["model"] = LLAMA if name == "table3" else data["model"]
    text = None if choices.text is None else TextConfig(path=choices.text)
    given = {"model": choices.model, "text": text, "hooks": choices.hooks or None}
    return data | {key: value for key, value in given.items() if value is not None}

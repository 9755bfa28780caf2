"""Settings of a table or of the wider study: what is harvested, trained and scored. No torch here."""

from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt, model_validator

from wsae.acts.config import HarvestConfig, LiveConfig, TextConfig
from wsae.core.artifact import read_manifest
from wsae.core.config import Config
from wsae.core.errors import UserError
from wsae.evals.autointerp.config import ContextConfig, Control, InterpretConfig, Score
from wsae.evals.autointerp.llm.config import LlmConfig
from wsae.evals.config import EvalConfig
from wsae.experiments.presets import Preset
from wsae.experiments.tables.plan import (
    Plan,
    SAEPlan,
    StudyName,
    StudyPlace,
    study_plan,
    table_plan,
)
from wsae.train.config import TrainConfig

Stage = Literal["harvest", "train", "evaluate", "interpret"]
STAGES: tuple[Stage, ...] = ("harvest", "train", "evaluate", "interpret")


class Choices(Config):
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
    until: Stage = "interpret"
    """The last stage to run."""

    def given(self) -> bool:
        """Say whether anything is chosen."""
        return self != Choices()


class StudyConfig(Config):
    """One study, complete: its results follow from this and the files it names."""

    plan: Plan
    harvest: HarvestConfig
    live: LiveConfig | None = None
    """Train straight from the model, all hooks in one run; none: by way of a store, a run for each hook."""
    tokens: PositiveInt | None = None
    """Training rows per SAE; none means once through the store."""
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


# The sizes of the tables and of the wider study: tiny (seconds), small (two cores), paper. No torch
# here.

TINY_MODEL = "model"
"""Directory, under the output directory, of the model that the preset tiny makes."""

SAES: dict[Preset, SAEPlan] = {
    "tiny": SAEPlan(expansion=8, k=8, lr=3e-3, curve_k=(4,), curve_lr=(1e-4,)),
    # lr: chosen on the plain SAE (docs/reproduction.md); the curve reaches the FVU of all but the most extreme weights
    "small": SAEPlan(expansion=8, k=32, lr=3e-3, curve_k=(16,), curve_lr=(5e-4, 1e-4)),
    "paper": SAEPlan(expansion=32, k=32, curve_k=(16,), curve_lr=(2e-5,)),
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
    choices: Choices,
    seed: int = 0,
    device: str = "cpu",
) -> StudyConfig:
    """Return the study at a preset's size with the user's choices; raises UserError for ones that do not go together.

    `out` is where the preset tiny makes its model, and where the store goes.
    """
    if name == "language" and preset == "paper":
        raise UserError("language: has the presets tiny and small; the paper has no such study")
    data = _harvest(name, preset, out, choices) | {"seed": seed, "device": device}
    harvest = HarvestConfig.parse(data, where=f"preset {preset}")
    live = preset == "paper" and choices.store is None
    settings = {
        "plan": _plan(name, preset, harvest.hooks, seed),
        "harvest": harvest,
        "live": LiveConfig(shuffle_tokens=131_072, stats_tokens=1_000_000) if live else None,
        "tokens": harvest.tokens if live else None,
        "batch_size": {"tiny": 256, "small": 2048, "paper": 4096}[preset],
        "evaluation": EvalConfig(splice_tokens=0, n_latents=0, rows=EVALUATED, seed=seed),
        "interpret": _interpret(preset, choices, seed),
        "judge": choices.judge,
        "made_here": preset == "tiny" and choices.model is None and choices.store is None,
    }
    return StudyConfig.parse(settings, where=f"{name}, preset {preset}")


def _harvest(name: StudyName, preset: Preset, out: Path, choices: Choices) -> dict[str, Any]:
    for hook in choices.hooks:
        if "*" in hook:
            raise UserError(
                f"--hook {hook}: a table has a column for each hook; name them one by one"
            )
    if choices.store is not None:
        return _of_store(choices)
    data = dict(HARVESTS[preset])
    if preset == "tiny":
        data["model"] = str(out / TINY_MODEL)
    if preset == "paper":
        data["hooks"] = PAPER_HOOKS[name]
        data["model"] = LLAMA if name == "table3" else data["model"]
    if choices.model is not None:
        data["model"] = choices.model
    if choices.text is not None:
        data["text"] = TextConfig(path=choices.text)
    if choices.hooks:
        data["hooks"] = choices.hooks
    return data


def _of_store(choices: Choices) -> dict[str, Any]:
    """Return the harvest that a finished store came from, with its hooks by name."""
    for flag, value in (("--model", choices.model), ("--text", choices.text)):
        if value is not None:
            raise UserError(f"{flag} {value}: {choices.store} holds activations already; leave one")
    manifest = read_manifest(Path(str(choices.store)), "store", verify=False)
    hooks = choices.hooks or tuple(manifest.info["hooks"])
    return {**manifest.config, "hooks": hooks}


def _plan(name: StudyName, preset: Preset, hooks: tuple[str, ...], seed: int) -> Plan:
    sae = SAES[preset]
    if name != "language":
        last = LAST.get(name, len(hooks)) if preset != "paper" else len(hooks)
        return table_plan(name, sae, hooks[-last:], seed)
    rules = "layers.9" if "layers.9" in hooks else hooks[len(hooks) // 2]
    again = "layers.19" if "layers.19" in hooks else hooks[-1]
    place = StudyPlace(
        hooks=hooks,
        seeds=2 if preset == "tiny" else 3,
        seeded=tuple(dict.fromkeys((rules, again)))[: 1 if preset == "tiny" else 2],
        rules_at=rules,
        curve_at=tuple(dict.fromkeys((hooks[0], rules, again))),
    )
    return study_plan(sae, place, seed)


def _interpret(preset: Preset, choices: Choices, seed: int) -> InterpretConfig:
    usual = ("embedding",) if choices.judge is None else ("embedding", "detection")
    controls = CONTROLS if choices.controls is None else choices.controls
    data = {
        "contexts": CONTEXTS[preset],
        "scores": choices.scores or usual,
        "controls": controls,
        "surprisal_latents": SURPRISAL[preset],
        "seed": seed,
    }
    return InterpretConfig.parse(data, where=f"preset {preset}")

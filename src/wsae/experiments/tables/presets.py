"""The sizes of the tables and of the wider study: tiny (seconds), small (two cores), paper. No torch here."""

from pathlib import Path
from typing import Any

from wsae.acts.config import HarvestConfig, LiveConfig, TextConfig
from wsae.core.artifact import read_manifest
from wsae.core.errors import UserError
from wsae.evals.autointerp.config import ContextConfig, Control, InterpretConfig
from wsae.evals.config import EvalConfig
from wsae.experiments.presets import Preset
from wsae.experiments.tables.config import Choices, StudyConfig
from wsae.experiments.tables.plan import (
    Plan,
    SAEPlan,
    StudyName,
    StudyPlace,
    study_plan,
    table_plan,
)

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

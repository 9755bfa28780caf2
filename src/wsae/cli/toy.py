"""`wsae toy`: toy models and families of SAEs over sparsity levels, scored against the truth."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from wsae.cli.common import (
    UI,
    Common,
    CommonFlags,
    Count,
    MaybeCount,
    MaybeNumber,
    Number,
    Place,
    device,
)
from wsae.core.config import Config
from wsae.core.errors import UserError
from wsae.evals.glossary import RECOVERY
from wsae.sae.config import GammaConfig, Kind, Normalise
from wsae.studies.sweep_config import TOP_K, ToySweepConfig, toy_methods

ABOUT = """\
Train toy models of superposition over sparsity levels S, and on each a family of SAEs: every kind with every
loss weight, beside its plain twin. The true features are known, so it shows what was recovered.
What is finished in OUT is not run again; toy models are kept for other SAEs.
The defaults take about half a minute on two cores."""

WorldRule = Literal["none", "variance", "latent_variance", "gap", "whiten"]
TOY_LR, TOY_DECAY = 2e-3, 0.5
NOISE_LEVEL = 0.1
NOISE_OF = {
    "noise_level": ("isotropic", "anisotropic", "low_rank"),
    "noise_spread": ("anisotropic",),
    "noise_rank": ("low_rank",),
    "noise_floor": ("low_rank",),
}
"""Which kinds of noise take a flag."""
IMPORTANCES = {
    "equal": {"kind": "equal"},
    "decay": {"kind": "decay", "last": 0.01},
    "power": {"kind": "decay", "base": 0.9},
}
RECORDS = 20
"""Stretches of training whose mean loss is kept, at least."""


class SAEFlags(Config):
    """The SAEs and their training."""

    d_sae: MaybeCount = None
    """Latents; default: n-features."""
    activation: Annotated[tuple[Kind, ...], tyro.conf.arg(metavar="KIND ...")] = (
        "relu",
        "topk",
    )
    """Kinds of SAE: relu, topk, group_topk, batch_topk, jumprelu."""
    k: MaybeCount = None
    """Active latents per sample of the Top-k kinds; default: the truth's mean number of active features."""
    tied: bool = True
    """Kind relu in the theory's form: decoder = encoder transposed, no biases. Other kinds are never tied."""
    l1: Number = 0.0
    """L1 penalty on the latents of the kind relu."""
    l0: Number = 0.03
    """L0 penalty of the kind jumprelu."""
    gamma: Annotated[tuple[WorldRule, ...], tyro.conf.arg(metavar="RULE ...")] = (
        "variance",
        "whiten",
    )
    """What the loss weights follow: none, variance, latent_variance, gap, whiten. The plain twin is always there."""
    alpha: Annotated[tuple[float, ...], tyro.conf.arg(metavar="A ...")] = ()
    """Exponents of the weights, each with every rule; default: 1."""
    normalise: Normalise = "rms"
    """Scale of the weights: rms makes their mean square 1; none is the paper's raw s^alpha."""
    steps: Count = 1500
    """Optimiser steps of every SAE."""
    batch_size: Count = 256
    """Fresh rows per step."""
    lr: Number = 3e-3
    """Peak learning rate."""


class NoiseFlags(Config):
    """Noise on the activations."""

    noise: Literal["none", "isotropic", "anisotropic", "low_rank"] = "none"
    """Gaussian noise on x_p: alike in all directions, growing along the dimensions, or in few directions."""
    noise_level: MaybeNumber = None
    """Power of the noise over that of the signal; default: 0.1."""
    noise_spread: MaybeNumber = None
    """anisotropic: standard deviation in the last dimension over that in the first; default: 10."""
    noise_rank: MaybeCount = None
    """low_rank: number of loud directions; default: 2."""
    noise_floor: MaybeNumber = None
    """low_rank: share of the power that is spread over all directions; default: 0.1."""

    def chosen(self) -> dict[str, Any]:
        """Return the noise as values; raises UserError for a flag that this kind does not take."""
        given = self.model_dump(exclude_none=True)
        kind = given.pop("noise")
        for name in given:
            if kind not in NOISE_OF[name]:
                takers = " or ".join(NOISE_OF[name])
                raise UserError(
                    f"--{name.replace('_', '-')} {given[name]:g}: needs --noise {takers}"
                )
        if kind == "none":
            return {"kind": "isotropic"}
        values = {name.removeprefix("noise_"): value for name, value in given.items()}
        return {"kind": kind, "level": NOISE_LEVEL, **values}


class Flags(Config):
    """Flags of `wsae toy`."""

    n_features: Count = 64
    """True features of a world."""
    d_in: Count = 16
    """Width of the toy models' hidden layer, so of the SAEs' input."""
    sparsity: Annotated[tuple[float, ...], tyro.conf.arg(metavar="S ...")] = (0.0, 0.9, 0.97)
    """Levels of S: each feature is 0 with probability S, else uniform on (0, 1]."""
    importance: Literal["equal", "decay", "power"] = "equal"
    """Weights of the features in the toy models' loss: all 1, from 1 down to 0.01, or 0.9^i."""
    toy_sparsity: MaybeNumber = None
    """S that the toy models are trained at, whose W_p serves all levels; none: each level has its own."""
    toy_steps: Count = 3000
    """Training steps of a toy model."""
    seeds: Count = 3
    """SAEs per method and level; intervals are over seeds."""
    toy_seeds: Literal["one", "each"] = "each"
    """one: a level's toy model serves all its seeds, as in the paper; each: every seed has a world of its own."""
    noise: tyro.conf.OmitArgPrefixes[NoiseFlags] = NoiseFlags()
    saes: tyro.conf.OmitArgPrefixes[SAEFlags] = SAEFlags()
    score: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = (
        "fvu",
        "mcc_direction",
        "mcc_code",
        "gt_scaled_rel",
        "activated_participation",
    )
    """Scores to show, by their keys in docs/metrics.md; rows.json holds all."""
    out: Place = Path("toy-out")
    """Directory of the toy models and the results."""
    common: CommonFlags = Common()


def run(flags: Flags, ui: UI) -> dict[str, Any]:
    """Run the sweep and return its rows, summaries and differences."""
    from wsae.studies.sweep import run_toy

    cfg = config(flags)
    where = "cpu" if flags.common.device == "auto" else device(flags.common.device)
    scores = tuple(dict.fromkeys(flags.score))
    return run_toy(cfg, scores, flags.out, where, ui.progress, ui.note)


def config(flags: Flags) -> ToySweepConfig:
    """Return the sweep these flags describe; raises UserError in one line."""
    _check(flags)
    saes = flags.saes
    fields = saes.model_dump(include={"tied", "l1", "l0", "lr"})
    fields["d_sae"] = flags.n_features if saes.d_sae is None else saes.d_sae
    data = {
        "n_features": flags.n_features,
        "d_in": flags.d_in,
        "sparsities": tuple(dict.fromkeys(flags.sparsity)),
        "seeds": flags.seeds,
        "toy_seeds": flags.toy_seeds,
        "toy_sparsity": flags.toy_sparsity,
        "importance": IMPORTANCES[flags.importance],
        "noise": flags.noise.chosen(),
        "methods": toy_methods(saes.activation, _rules(saes), saes.k, **fields),
        "training": {
            "bank": {"steps": saes.steps, "log_every": max(1, min(50, saes.steps // RECORDS))},
            "batch_size": saes.batch_size,
            "unit_scale": True,
        },
        "toy_steps": flags.toy_steps,
        "toy_lr": TOY_LR,
        "toy_decay": TOY_DECAY,
        "seed": flags.common.seed,
    }
    return ToySweepConfig.parse(data, where="flags")


def show(result: dict[str, Any], ui: UI) -> None:
    """Print a table of means and one of paired differences per score, then where the files are."""
    for score in dict.fromkeys(line["score"] for line in result["summaries"]):
        name, _, direction, _ = RECOVERY[score]
        means = [line for line in result["summaries"] if line["score"] == score]
        ui.say(f"{score}: {name}; {direction}")
        ui.table("mean over seeds", *_pivot(means, "method", _mean))
        paired = [line for line in result["differences"] if line["score"] == score]
        if paired:
            ui.table("minus the plain twin", *_pivot(paired, "a", _difference))
        ui.say("")
    settings, count = result["config"], len(result["differences"])
    each = settings["toy_seeds"] == "each"
    if settings["seeds"] == 1:
        ui.say("one seed, so no intervals")
    else:
        worlds = "each its own world" if each else "all on one world per level"
        ui.say(f"means and 95 % intervals over {settings['seeds']} seeds, {worlds}")
    if count and settings["seeds"] > 1:
        ui.say(f"*: leaves out 0; of {count} differences about {count / 20:.2g} do so by chance")
    ui.say(
        f"in its last tenth of training a loss fell by up to {result['loss_still_falling']:.1%} of its start"
    )
    ui.say("files: " + ", ".join(result["files"]))


def interrupted(flags: Flags, words: list[str], error: KeyboardInterrupt) -> str:  # noqa: ARG001
    """Return what is kept."""
    from wsae.core.artifact import MANIFEST

    if (flags.out / "toy" / MANIFEST).exists():
        return f"{flags.out} keeps its toy models; the same command goes on from there"
    return "no toy model is finished yet; the same command starts again"


def _check(flags: Flags) -> None:
    saes = flags.saes
    if not saes.activation:
        raise UserError("--activation: give at least one kind")
    if not flags.sparsity:
        raise UserError("--sparsity: give at least one level")
    if saes.k is not None and not set(saes.activation) & set(TOP_K):
        raise UserError(
            f"--k {saes.k}: {saes.activation[0]} has no k; leave it out, or use --activation topk"
        )
    if not flags.score:
        raise UserError("--score: give at least one name")
    if flags.n_features < 1:
        raise UserError(f"--n-features {flags.n_features}: a world has at least one")


def _rules(saes: SAEFlags) -> list[GammaConfig]:
    rules = [rule for rule in saes.gamma if rule != "none"]
    if saes.alpha and not rules:
        shown = " ".join(f"{alpha:g}" for alpha in saes.alpha)
        raise UserError(
            f"--alpha {shown}: no rule to apply it to; name one, as in --gamma variance"
        )
    parts = [(rule, alpha) for rule in rules for alpha in saes.alpha or (1.0,)]
    return [
        GammaConfig.parse(
            {"rule": rule, "alpha": alpha, "normalise": saes.normalise}, where="flags"
        )
        for rule, alpha in parts
    ]


def _pivot(
    lines: list[dict[str, Any]], key: str, cell: Callable[[dict[str, Any]], str]
) -> tuple[list[str], list[list[str]]]:
    levels = list(dict.fromkeys(line["sparsity"] for line in lines))
    by_name: dict[str, dict[float, str]] = {}
    for line in lines:
        by_name.setdefault(line[key], {})[line["sparsity"]] = cell(line)
    rows = [[name, *(cells.get(s, "-") for s in levels)] for name, cells in by_name.items()]
    return ["method", *(f"S = {level:g}" for level in levels)], rows


def _mean(line: dict[str, Any]) -> str:
    return f"{line['value']:.3g}{_half(line)}"


def _difference(line: dict[str, Any]) -> str:
    low, high = line["low"], line["high"]
    sure = low is not None and low * high > 0
    return f"{line['value']:+.3g}{_half(line)}{' *' if sure else ''}"


def _half(line: dict[str, Any]) -> str:
    """Half the interval's width; Student's interval is symmetric."""
    return "" if line["low"] is None else f" ±{(line['high'] - line['low']) / 2:.2g}"

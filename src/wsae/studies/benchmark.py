"""The recovery benchmarks: methods x loss weights x worlds. What recovers features, and where does weighting help?

`run_benchmark` has many kinds of world without noise, `run_noise` few with noise of several shapes and strengths.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from wsae.core.files import write_text
from wsae.core.seeds import seed_for
from wsae.sae.config import GammaConfig, make_activation
from wsae.studies.drawing import panels_figure
from wsae.studies.engine import (
    TABLES,
    Reproduction,
    Row,
    Table,
    as_series,
    cell,
    differences,
    markdown,
    mean_interval,
    select,
    series,
)
from wsae.studies.sweep import (
    RANDOM,
    ROWS,
    Trial,
    kept_rows,
    score_trials,
    toy_models,
    train_trials,
)
from wsae.studies.sweep_config import Method, TrainingConfig, preset_training
from wsae.theory import geometry
from wsae.toy.config import (
    Anisotropic,
    Correlated,
    FeatureConfig,
    Hierarchical,
    Isotropic,
    LowRank,
    Noise,
    ToyModelConfig,
    ZipfRates,
)
from wsae.toy.model import ToyModels
from wsae.toy.world import World
from wsae.train.config import MemberConfig

# The worlds of the recovery benchmark: geometries, and feature models that keep or break the
# paper's assumptions.


class WorldKind(NamedTuple):
    """One kind of world: a recipe for W_p by seed, and how its features fire."""

    name: str
    W_p: Callable[[int], Float[Tensor, "d_in n_features"]]
    features: FeatureConfig


def mixed() -> Float[Tensor, "d_in n_features"]:
    """Return 8 monosemantic dimensions, 6 digons, 3 planar triangles: 20 dimensions, 29 features, in their own axes."""
    blocks = [geometry.orthogonal(8), geometry.digons(6), *[geometry.polygon(3)] * 3]
    return geometry.direct_sum(*blocks)


def made_worlds(d_in: int, n: int, active: int = 3) -> list[WorldKind]:
    """Return the worlds that need no toy model; all but `mixed` have n features of random unit directions.

    `active` of them are so on average, where the world's words do not say otherwise.
    """

    def random(seed: int) -> Tensor:
        return geometry.random_unit(d_in, n, seed_for(seed, "world"))

    def uneven(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_for(seed, "uneven"))
        scale = 10 ** (torch.rand(d_in, 1, generator=generator, dtype=torch.float64) - 0.5)
        return random(seed) * scale

    def firing(**fields: Any) -> FeatureConfig:
        return FeatureConfig(**{"n_features": n, "sparsity": 1 - active / n, **fields})

    crowd, family = Correlated(group=5, rho=0.7), Hierarchical(children=4, given_parent=0.5)
    return [
        WorldKind("mixed", lambda _: mixed(), firing(n_features=29, sparsity=0.8)),
        WorldKind("random", random, firing()),  # few of n features active
        WorldKind("random, dense", random, firing(sparsity=0.8)),  # a fifth active
        WorldKind("zipf", random, firing(rates=ZipfRates())),  # frequencies 1 / rank
        WorldKind("correlated", random, firing(structure=crowd)),  # groups of 5 fire together
        WorldKind("hierarchical", random, firing(structure=family)),  # children need their parent
        WorldKind("uneven", uneven, firing()),  # dimensions' scales span a decade
    ]


def trials(world: WorldKind, seeds: int, seed: int) -> list[Trial]:
    """Return one trial per seed: another W_p, other data, other initial weights."""
    return [
        Trial(
            World(world.W_p(seed + s), world.features),
            seed + s,
            {"world": world.name, "sparsity": world.features.sparsity, "seed": s},
        )
        for s in range(seeds)
    ]


SCORES = ("mcc_direction", "mcc_code", "gt_scaled_rel")
CHOSEN_BY = "gt_scaled_rel"
"""A penalty's coefficient is the best of its grid by this score against the truth, for every rule alike. The same rows
then make the tables, so kinds with a grid (L1, JumpReLU) look a little better beside kinds without one."""
Rules = dict[str, dict[str, Any]]
"""What sets an SAE apart from its plain twin, by name: fields of `Method`, or of its `MemberConfig`."""
RULES: Rules = {
    "plain": {},
    "variance 1": {"gamma": GammaConfig(rule="variance", alpha=1.0)},
    "variance -0.5": {"gamma": GammaConfig(rule="variance", alpha=-0.5)},
    "gap": {"gamma": GammaConfig(rule="gap")},
    "whiten": {"gamma": GammaConfig(rule="whiten")},
}
Kinds = dict[str, list[dict[str, Any]]]
"""Fields of `MemberConfig` at each place of a kind's grid, by name."""
KINDS: Kinds = {
    "tied ReLU": [{"activation": "relu", "tied": True}],
    "ReLU + L1": [{"activation": "relu", "l1": c} for c in (0.1, 0.3, 1.0, 3.0)],
    "Top-k": [{"activation": "topk", "auxk": 1 / 32}],
    "batch Top-k": [{"activation": "batch_topk", "auxk": 1 / 32}],
    "JumpReLU": [{"activation": "jumprelu", "l0": c} for c in (0.03, 0.1, 0.3, 1.0)],
}
_TOY = (0.5, 0.9, 0.99)


def benchmark_methods(d_sae: int, kinds: Kinds = KINDS, rules: Rules = RULES) -> list[Method]:
    """Return every kind, penalty and rule as a method called "kind | rule | place in the grid"."""
    methods = []
    for kind, grid in kinds.items():
        for place, settings in enumerate(grid):
            for rule, own in rules.items():
                fields = {"auxk": 0.0, "lr": 3e-3, "d_sae": d_sae, **settings, **own}
                outer = {key: fields.pop(key) for key in own if key in Method.model_fields}
                fields["encoder_scale"] = 1.0
                fields["activation"] = make_activation(settings["activation"], 1)
                member = MemberConfig.parse(fields, where=kind)
                k = settings["activation"] in ("topk", "batch_topk")
                name = f"{kind} | {rule} | {place}"
                methods.append(Method(name=name, member=member, k_from_truth=k, **outer))
    return methods


def run_benchmark(at: Reproduction) -> tuple[dict[str, Any], list[Path]]:
    """Train and score every method on every world; return the tables and the file with every SAE's scores."""
    sizes = {"tiny": (30, 2, 20, 60), "small": (60, 3, 1000, 3000), "paper": (100, 3, 2000, 3000)}
    n, seeds, steps, toy_steps = sizes[at.preset]
    scored = {"unit_scale": True, "rows": 512 if at.preset == "tiny" else 2048}
    cfg = preset_training(at.preset, steps=steps).model_copy(update=scored)
    toys = [
        ToyModelConfig(
            features=FeatureConfig(n_features=n, sparsity=level),
            d_in=20,
            steps=toy_steps,
            lr=2e-3,
            decay=0.5,
            seed=at.seed + s,
        )
        for level in _TOY
        for s in range(seeds)
    ]
    settings = {
        "training": cfg.to_dict(),
        "methods": [method.to_dict() for method in benchmark_methods(n)],
        "toys": [toy.to_dict() for toy in toys],
    }
    place = at.out / "recovery"

    def made() -> list[Row]:
        models = toy_models(toys, at.out / "toy-recovery", at.device, at.progress)
        rows = []
        for group in _groups(models, n, seeds, at.seed):
            rows += _rows(at, cfg, group, benchmark_methods(group[0].world.n_features))
        return rows

    rows = kept_rows(settings, place, made)
    worlds = list(dict.fromkeys(row["world"] for row in rows))
    chosen = best_of_grid(rows)
    tables = {f"{score}, plain": plain_table(chosen, worlds, score) for score in SCORES}
    tables |= {f"{score}, rule minus plain": rule_table(chosen, worlds, score) for score in SCORES}
    return {"tables": tables, "saes": len(rows)}, [place / ROWS]


def _rows(
    at: Reproduction, cfg: TrainingConfig, group: list[Trial], methods: list[Method]
) -> list[Row]:
    """Train and score every method on a group of worlds of one width."""
    width = group[0].world.n_features
    at.say(f"{len(group) * len(methods)} SAEs on {len(group)} worlds of {width} features")
    trained = train_trials(group, methods, cfg, at.device, at.progress)
    return score_trials(group, trained, cfg, at.progress)


def _groups(models: ToyModels, n: int, seeds: int, seed: int) -> list[list[Trial]]:
    """Return the trials, those of one width together."""
    wide = []
    for W_p, cfg in zip(models.W_p, models.configs, strict=True):
        level = cfg.features.sparsity
        labels = {"world": f"toy, S = {level:g}", "sparsity": level, "seed": cfg.seed - seed}
        wide.append(Trial(World(W_p, cfg.features), cfg.seed, labels))
    narrow: list[Trial] = []
    for world in made_worlds(20, n):
        group = wide if world.features.n_features == n else narrow
        group += trials(world, seeds, seed)
    return [narrow, wide]


def best_of_grid(rows: Sequence[Row], kinds: Kinds = KINDS, rules: Rules = RULES) -> list[Row]:
    """Return, per world, kind and rule, the rows of the grid's best place (mean over seeds), named "kind | rule"."""
    out = [row for row in rows if row["method"] == RANDOM]
    for world in dict.fromkeys(row["world"] for row in rows):
        here = select(rows, world=world)
        for kind, grid in kinds.items():
            for rule in rules:
                places = [
                    select(here, method=f"{kind} | {rule} | {place}") for place in range(len(grid))
                ]
                best = min(places, key=lambda found: np.mean([row[CHOSEN_BY] for row in found]))
                out += [{**row, "method": f"{kind} | {rule}"} for row in best]
    return out


def plain_table(rows: Sequence[Row], worlds: list[str], score: str) -> Table:
    """Return world x kind -> mean of a score without weights, with the untrained SAE and chance beside it."""
    header = ["world", *KINDS, RANDOM]
    table = []
    for world in worlds:
        here = select(rows, world=world)
        cells = [
            f"{series(here, f'{kind} | plain', score, 'world')[world].value:.3f}" for kind in KINDS
        ]
        control = mean_interval([row[score] for row in select(here, method=RANDOM)])
        table.append([world, *cells, f"{control.value:.3f}"])
    return {"header": header, "rows": table}


def rule_table(rows: Sequence[Row], worlds: list[str], score: str) -> Table:
    """Return world x (kind, rule) -> mean paired difference from the plain twin; * where its interval excludes 0."""
    rules = [rule for rule in RULES if rule != "plain"]
    header = ["world", "kind", *rules]
    table = []
    for world in worlds:
        here = select(rows, world=world)
        for kind in KINDS:
            cells = []
            for rule in rules:
                pair = (f"{kind} | {rule}", f"{kind} | plain")
                found = differences(here, *pair, score, "world")[world]
                cells.append(f"{found.value:+.3f}{'*' if found.sure else ''}")
            table.append([world, kind, *cells])
    return {"header": header, "rows": table}


# The benchmark with noise: does a loss that knows the noise, or guesses it, recover more?

NOISE_RULES: Rules = {
    **RULES,
    "variance 0.5": {"gamma": GammaConfig(rule="variance", alpha=0.5)},
    "oracle": {"gamma_from_truth": True},
}
NOISE_KINDS: Kinds = {
    "Top-k": KINDS["Top-k"],
    "ReLU + L1": [{"activation": "relu", "l1": c} for c in (3.0, 10.0)],
}
NOISES: dict[str, type[Isotropic | Anisotropic | LowRank]] = {
    "isotropic": Isotropic,
    "anisotropic": Anisotropic,
    "low rank": LowRank,
}
LEVELS = (0.1, 0.3, 1.0)
"""Power of the noise over that of the signal, beside none."""
NOISE_WORLDS = ("random", "uneven")
PRIMARY = "mcc_direction"
"""Stated before anything was run; the other scores of `SCORES` are told beside it."""
NO_NOISE = "none"


def noise_settings() -> dict[str, Noise]:
    """Return every noise of the benchmark by name, none first."""
    found: dict[str, Noise] = {NO_NOISE: Isotropic()}
    for name, kind in NOISES.items():
        found |= {f"{name} {level:g}": kind(level=level) for level in LEVELS}
    return found


def noisy_trials(d_in: int, n: int, active: int, seeds: int, seed: int) -> list[Trial]:
    """Return a trial per world, noise and seed; a seed's W_p, features and normals are the same under every noise."""
    return [
        Trial(
            World(trial.world.W_p, trial.world.features, noise=noise),
            trial.seed,
            {**trial.labels, "world": f"{world.name} | {name}"},
        )
        for world in made_worlds(d_in, n, active)
        if world.name in NOISE_WORLDS
        for name, noise in noise_settings().items()
        for trial in trials(world, seeds, seed)
    ]


def run_noise(at: Reproduction) -> tuple[dict[str, Any], list[Path]]:
    """Train and score every rule on every noisy world; return the tables and the files written."""
    sizes = {
        "tiny": (6, 12, 1, 2, 20),
        "small": (12, 36, 2, 8, 800),
        "paper": (20, 100, 3, 8, 2000),
    }
    d_in, n, active, seeds, steps = sizes[at.preset]
    scored = {"unit_scale": True, "rows": 512 if at.preset == "tiny" else 1024, "batch_size": 128}
    cfg = preset_training(at.preset, steps=steps).model_copy(update=scored)
    methods = benchmark_methods(n, NOISE_KINDS, NOISE_RULES)
    group, place = noisy_trials(d_in, n, active, seeds, at.seed), at.out / "noise"
    settings = {
        "training": cfg.to_dict(),
        "methods": [method.to_dict() for method in methods],
        "worlds": [{**trial.labels, **trial.world.describe()} for trial in group],
    }
    rows = kept_rows(settings, place, lambda: _rows(at, cfg, group, methods))
    tables = noise_tables(rows)
    write_text(place / TABLES, markdown(tables))
    pictures = panels_figure(
        noise_panels(rows), at.out / "noise", "noise over signal, standard deviations", columns=3
    )
    return {"tables": tables, "saes": len(rows)}, [place / ROWS, place / TABLES, *pictures]


def over_worlds(rows: Sequence[Row]) -> list[Row]:
    """Return each method's mean over the worlds, one row per noise, seed and method, grids at their best place."""
    grouped: dict[tuple[str, int, str], list[Row]] = {}
    for row in best_of_grid(rows, NOISE_KINDS, NOISE_RULES):
        noise = row["world"].split(" | ")[1]
        grouped.setdefault((noise, row["seed"], row["method"]), []).append(row)
    keys = (*SCORES, "mcc_direction_chance")
    return [
        {"world": "all", "noise": noise, "seed": seed, "method": method}
        | {key: float(np.mean([row[key] for row in part])) for key in keys}
        for (noise, seed, method), part in grouped.items()
    ]


def noise_tables(rows: Sequence[Row]) -> dict[str, Table]:
    """Return, for each score, its mean without weights, and each rule's paired difference, over worlds and in each.

    *: the 95 % interval leaves out 0. **: so does the interval at 1 - 0.05 / m, m all differences of a score over the
    worlds (Bonferroni).
    """
    pooled = over_worlds(rows)
    tables = {}
    for score in SCORES:
        tables[f"{score}, plain and floors"] = _noise_plain(pooled, score)
        tables[f"{score}, rule minus plain"] = _noise_rules(pooled, score)
    chosen = [
        {**row, "noise": row["world"], "world": "one"}
        for row in best_of_grid(rows, NOISE_KINDS, NOISE_RULES)
    ]
    tables[f"{PRIMARY}, rule minus plain, each world"] = _noise_rules(chosen, PRIMARY)
    return tables


def _noise_plain(rows: Sequence[Row], score: str) -> Table:
    methods = [*(f"{kind} | plain" for kind in NOISE_KINDS), RANDOM]
    found = {method: series(rows, method, score, "noise") for method in methods}
    if score == PRIMARY:
        found["random directions"] = series(rows, RANDOM, "mcc_direction_chance", "noise")
    lines = [
        [noise, *(cell(line[noise], form=".3f") for line in found.values())]
        for noise in found[RANDOM]
    ]
    return {"header": ["noise", *found], "rows": lines}


def _noise_rules(rows: Sequence[Row], score: str) -> Table:
    rules = [rule for rule in NOISE_RULES if rule != "plain"]
    noises = list(series(rows, RANDOM, score, "noise"))
    strict = 1 - 0.05 / (len(rules) * len(noises) * len(NOISE_KINDS))

    def shown(kind: str, rule: str) -> dict[str, str]:
        pair = (f"{kind} | {rule}", f"{kind} | plain", score, "noise")
        wide, narrow = differences(rows, *pair), differences(rows, *pair, confidence=strict)
        return {
            noise: cell(mean, form="+.3f") + "*" * (mean.sure + narrow[noise].sure)
            for noise, mean in wide.items()
        }

    lines = []
    for kind in NOISE_KINDS:
        columns = [shown(kind, rule) for rule in rules]
        lines += [[noise, kind, *(column[noise] for column in columns)] for noise in noises]
    return {"header": ["noise", "kind", *rules], "rows": lines}


def noise_panels(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return a panel per kind and shape of noise: direction MCC against the noise's strength, a line per rule."""
    pooled, panels = over_worlds(rows), []
    for kind in NOISE_KINDS:
        for shape in NOISES:
            places = {NO_NOISE: 0.0} | {f"{shape} {level:g}": level**0.5 for level in LEVELS}
            methods = {rule: f"{kind} | {rule}" for rule in NOISE_RULES} | {"untrained": RANDOM}
            lines = []
            for name, method in methods.items():
                found = series(pooled, method, PRIMARY, "noise")
                line = as_series(name, {x: found[key] for key, x in places.items()})
                lines.append(line.to_dict())
            about = {"title": f"{kind}, {shape} noise", "ylabel": "direction MCC", "bottom": 0.3}
            panels.append(about | {"series": lines})
    return panels

"""The recovery benchmark: methods x loss weights x worlds. What recovers features, and where does weighting help?"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from wsae.core.seeds import seed_for
from wsae.sae.config import GammaConfig, make_activation
from wsae.studies.engine import Reproduction
from wsae.studies.results import Row, Table, differences, mean_interval, select, series
from wsae.studies.sweep.config import Method, preset_training
from wsae.studies.sweep.run import (
    RANDOM,
    ROWS,
    Trial,
    read_rows,
    score_trials,
    toy_models,
    train_trials,
    write_rows,
)
from wsae.theory import geometry
from wsae.toy.config import Correlated, FeatureConfig, Hierarchical, ToyModelConfig, ZipfRates
from wsae.toy.model import ToyModels
from wsae.train.config import MemberConfig

# The worlds of the recovery benchmark: geometries, and feature models that keep or break the
# paper's assumptions.


class WorldKind(NamedTuple):
    """One kind of world: a recipe for W_p by seed, and how its features fire."""

    name: str
    words: str
    W_p: Callable[[int], Float[Tensor, "d_in n_features"]]
    features: FeatureConfig


def mixed() -> Float[Tensor, "d_in n_features"]:
    """Return 8 monosemantic dimensions, 6 digons, 3 planar triangles: 20 dimensions, 29 features, in their own axes."""
    blocks = [geometry.orthogonal(8), geometry.digons(6), *[geometry.polygon(3)] * 3]
    return geometry.direct_sum(*blocks)


def made_worlds(d_in: int, n: int) -> list[WorldKind]:
    """Return the worlds that need no toy model; all but `mixed` have n features of random unit directions."""

    def random(seed: int) -> Tensor:
        return geometry.random_unit(d_in, n, seed_for(seed, "world"))

    def uneven(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_for(seed, "uneven"))
        scale = 10 ** (torch.rand(d_in, 1, generator=generator, dtype=torch.float64) - 0.5)
        return random(seed) * scale

    sparse = 1 - 3 / n
    base = FeatureConfig(n_features=n, sparsity=sparse)
    crowd = {"structure": Correlated(group=5, rho=0.7)}
    family = {"structure": Hierarchical(children=4, given_parent=0.5)}
    blocks = FeatureConfig(n_features=29, sparsity=0.8)
    return [
        WorldKind(
            "mixed", "29 features in digons, triangles and single axes", lambda _: mixed(), blocks
        ),
        WorldKind("random", "3 of n features active", random, base),
        WorldKind(
            "random, dense", "a fifth active", random, base.model_copy(update={"sparsity": 0.8})
        ),
        WorldKind(
            "zipf", "frequencies 1 / rank", random, base.model_copy(update={"rates": ZipfRates()})
        ),
        WorldKind("correlated", "groups of 5 fire together", random, base.model_copy(update=crowd)),
        WorldKind(
            "hierarchical", "children need their parent", random, base.model_copy(update=family)
        ),
        WorldKind("uneven", "dimensions' scales span a decade", uneven, base),
    ]


def trials(world: WorldKind, seeds: int, seed: int) -> list[Trial]:
    """Return one trial per seed: another W_p, other data, other initial weights."""
    return [
        Trial(
            world.W_p(seed + s).float(),
            world.features,
            seed + s,
            {"world": world.name, "sparsity": world.features.sparsity, "seed": s},
        )
        for s in range(seeds)
    ]


SCORES = ("mcc_direction", "mcc_code", "gt_scaled_rel")
CHOSEN_BY = "gt_scaled_rel"
"""A penalty's coefficient is the best of its grid by this score against the truth, for every rule alike. The same rows
then make the tables, so kinds with a grid (L1, JumpReLU) look a little better beside kinds without one."""
RULES = {
    "plain": GammaConfig(),
    "variance 1": GammaConfig(rule="variance", alpha=1.0),
    "variance -0.5": GammaConfig(rule="variance", alpha=-0.5),
    "gap": GammaConfig(rule="gap"),
    "whiten": GammaConfig(rule="whiten"),
}
KINDS: dict[str, list[dict[str, Any]]] = {
    "tied ReLU": [{"activation": "relu", "tied": True}],
    "ReLU + L1": [{"activation": "relu", "l1": c} for c in (0.1, 0.3, 1.0, 3.0)],
    "Top-k": [{"activation": "topk", "auxk": 1 / 32}],
    "batch Top-k": [{"activation": "batch_topk", "auxk": 1 / 32}],
    "JumpReLU": [{"activation": "jumprelu", "l0": c} for c in (0.03, 0.1, 0.3, 1.0)],
}
_TOY = (0.5, 0.9, 0.99)


def benchmark_methods(d_sae: int, lr: float = 3e-3) -> list[Method]:
    """Return every kind, penalty and rule as a method called "kind | rule | place in the grid"."""
    methods = []
    for kind, grid in KINDS.items():
        for place, settings in enumerate(grid):
            for rule, gamma in RULES.items():
                fields = {"auxk": 0.0, "lr": lr, "d_sae": d_sae, "gamma": gamma, **settings}
                fields["encoder_scale"] = 1.0
                fields["activation"] = make_activation(settings["activation"], 1)
                member = MemberConfig.parse(fields, where=kind)
                k = settings["activation"] in ("topk", "batch_topk")
                name = f"{kind} | {rule} | {place}"
                methods.append(Method(name=name, member=member, k_from_truth=k))
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
    rows = read_rows(settings, place)
    if rows is None:
        models = toy_models(toys, at.out / "toy-recovery", at.device, at.progress)
        rows = []
        for group in _groups(models, n, seeds, at.seed):
            width = group[0].features.n_features
            methods = benchmark_methods(width)
            at.say(f"{len(group) * len(methods)} SAEs on {len(group)} worlds of {width} features")
            trained = train_trials(group, methods, cfg, at.device, at.progress)
            rows += score_trials(group, trained, cfg, at.progress)
        write_rows(rows, settings, place)
    worlds = list(dict.fromkeys(row["world"] for row in rows))
    chosen = best_of_grid(rows)
    tables = {f"{score}, plain": plain_table(chosen, worlds, score) for score in SCORES}
    tables |= {f"{score}, rule minus plain": rule_table(chosen, worlds, score) for score in SCORES}
    return {"tables": tables, "saes": len(rows)}, [place / ROWS]


def _groups(models: ToyModels, n: int, seeds: int, seed: int) -> list[list[Trial]]:
    """Return the trials, those of one width together."""
    wide = []
    for W_p, cfg in zip(models.W_p, models.configs, strict=True):
        level = cfg.features.sparsity
        labels = {"world": f"toy, S = {level:g}", "sparsity": level, "seed": cfg.seed - seed}
        wide.append(Trial(W_p, cfg.features, cfg.seed, labels))
    narrow: list[Trial] = []
    for world in made_worlds(20, n):
        group = wide if world.features.n_features == n else narrow
        group += trials(world, seeds, seed)
    return [narrow, wide]


def best_of_grid(rows: Sequence[Row]) -> list[Row]:
    """Return, per world, kind and rule, the rows of the grid's best place (mean over seeds), named "kind | rule"."""
    out = [row for row in rows if row["method"] == RANDOM]
    for world in dict.fromkeys(row["world"] for row in rows):
        here = select(rows, world=world)
        for kind, grid in KINDS.items():
            for rule in RULES:
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

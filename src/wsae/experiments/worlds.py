"""The worlds of the recovery benchmark: geometries, and feature models that keep or break the paper's assumptions."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from wsae.core.seeds import seed_for
from wsae.experiments.sweep.trials import Trial
from wsae.theory import geometry
from wsae.toy.config import Correlated, FeatureConfig, Hierarchical, ZipfRates


class World(NamedTuple):
    """One kind of world: a recipe for W_p by seed, and how its features fire."""

    name: str
    words: str
    W_p: Callable[[int], Float[Tensor, "d_in n_features"]]
    features: FeatureConfig


def mixed() -> Float[Tensor, "d_in n_features"]:
    """Return 8 monosemantic dimensions, 6 digons, 3 planar triangles: 20 dimensions, 29 features, in their own axes."""
    blocks = [geometry.orthogonal(8), geometry.digons(6), *[geometry.polygon(3)] * 3]
    return geometry.direct_sum(*blocks)


def made_worlds(d_in: int, n: int) -> list[World]:
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
        World(
            "mixed", "29 features in digons, triangles and single axes", lambda _: mixed(), blocks
        ),
        World("random", "3 of n features active", random, base),
        World("random, dense", "a fifth active", random, base.model_copy(update={"sparsity": 0.8})),
        World(
            "zipf", "frequencies 1 / rank", random, base.model_copy(update={"rates": ZipfRates()})
        ),
        World("correlated", "groups of 5 fire together", random, base.model_copy(update=crowd)),
        World("hierarchical", "children need their parent", random, base.model_copy(update=family)),
        World("uneven", "dimensions' scales span a decade", uneven, base),
    ]


def trials(world: World, seeds: int, seed: int) -> list[Trial]:
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

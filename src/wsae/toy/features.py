"""Batches of ground-truth features of many worlds at once; a batch depends on (config, seed, step) alone."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from wsae.core.errors import UserError
from wsae.toy.config import FeatureConfig
from wsae.toy.draws import Draw, Recipe, generator

_Key = tuple[Draw, int]
_WORTH_THREADS = 1 << 20
"""Numbers in a batch from which drawing seeds side by side pays for starting threads."""


class FeatureStream:
    """Features x [worlds, rows, n_features] at any step: random access, nothing to save.

    Worlds with one seed share the underlying draws (common random numbers), so that levels of S differ by S alone; a
    world's batch equals its lone stream's to the bit. All worlds have the same number of features. Seeds of
    different streams are drawn in threads.
    """

    def __init__(
        self, cfgs: Sequence[FeatureConfig], seeds: Sequence[int], rows: int, device: str = "cpu"
    ) -> None:
        sizes = {cfg.n_features for cfg in cfgs}
        if len(cfgs) != len(seeds) or not cfgs:
            raise UserError(f"{len(cfgs)} worlds with {len(seeds)} seeds; give one seed per world")
        if len(sizes) != 1:
            raise UserError(f"worlds of {sorted(sizes)} features in one stream; give all the same")
        if rows < 1:
            raise UserError(f"rows = {rows}: a batch has at least one row")
        self.rows, self.n_features = rows, sizes.pop()
        self._recipes = [Recipe(cfg) for cfg in cfgs]
        self._seeds, self._device = list(seeds), device
        places = {seed: i for i, seed in enumerate(dict.fromkeys(seeds))}
        self._place = torch.tensor([places[seed] for seed in seeds])
        self._uniform = torch.empty(len(places), rows, self.n_features, dtype=torch.float32)
        self._rate = _stacked([recipe.rate for recipe in self._recipes], self.n_features)
        self._draws: dict[_Key, Tensor] = {
            ("uniform", seed): self._uniform[i] for seed, i in places.items()
        }
        self._drawn: dict[_Key, int] = {}
        self._out = torch.empty(0, rows, self.n_features, dtype=torch.float32)

    def batch(
        self, step: int, first: int = 0, last: int | None = None
    ) -> Float32[Tensor, "worlds rows n_features"]:
        """Return step `step` of the worlds first .. last - 1 (all by default), valid until the next call."""
        worlds = range(len(self._recipes))[first:last]
        if len(self._out) < len(worlds):
            self._out = torch.empty(len(worlds), self.rows, self.n_features, dtype=torch.float32)
        self._draw(
            step, [(kind, self._seeds[w]) for w in worlds for kind in self._recipes[w].needs]
        )
        out = self._out[: len(worlds)]
        torch.index_select(self._uniform, 0, self._place[first:last], out=out)
        # separate operations: a fused one would round differently at the ends of a vector
        out.mul_(self._rate[first:last]).add_(1.0).clamp_min_(0.0)
        for place, w in enumerate(worlds):
            recipe = self._recipes[w]
            if not recipe.finished:
                draws: dict[Draw, Tensor] = {
                    kind: self._draws[kind, self._seeds[w]] for kind in recipe.needs
                }
                recipe.finish(draws, out[place])
        return out.to(self._device)

    def _draw(self, step: int, keys: list[_Key]) -> None:
        """Fill the buffers of `keys` that hold another step."""
        missing = [key for key in dict.fromkeys(keys) if self._drawn.get(key) != step]
        for key in missing:
            self._draws.setdefault(
                key, torch.empty(self.rows, self.n_features, dtype=torch.float32)
            )
            self._drawn[key] = step
        work = len(missing) * self.rows * self.n_features
        threads = min(len(missing), torch.get_num_threads()) if work > _WORTH_THREADS else 1
        if threads <= 1:
            for key in missing:
                self._fill(key, step)
            return
        with ThreadPoolExecutor(threads) as pool:  # numpy lets go of the interpreter while it draws
            list(pool.map(self._fill, missing, [step] * len(missing)))

    def _fill(self, key: _Key, step: int) -> None:
        kind, seed = key
        stream, out = generator(seed, kind, self.n_features, step), self._draws[key].numpy()
        if kind == "uniform":
            stream.random(dtype=np.float32, out=out)
        else:
            stream.standard_normal(dtype=np.float32, out=out)


def _stacked(rates: list[Tensor], n: int) -> Float32[Tensor, "worlds 1 _"]:
    """Return the worlds' rates side by side, one number each where no world needs more."""
    wide = any(len(rate) > 1 for rate in rates)
    return torch.stack([rate.expand(n) if wide else rate for rate in rates])[:, None]

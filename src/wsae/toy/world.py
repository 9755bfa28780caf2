"""A world with known truth: features x by a law, and activations x_p = W_p x (paper Eq. 1), with noise or without."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int, Shaped
from torch import Tensor

from wsae.acts.flow import SourceStats, Tally
from wsae.acts.stream import Batch, HeldoutRows, State, check_batch_size, position, restored
from wsae.core.errors import UserError
from wsae.core.files import digest
from wsae.core.progress import Progress, quiet
from wsae.core.seeds import Permutation, seed_for
from wsae.kernels.eager import SparseCode
from wsae.theory.geometry import check_W_p, orthonormal
from wsae.toy.config import Anisotropic, FeatureConfig, Isotropic, LowRank, Noise
from wsae.toy.features import (
    FeatureStream,
    embed_sparse,
    feature_covariance,
    feature_moments,
    generator,
    sample_sparse,
)
from wsae.toy.model import ToyModels


@dataclass(frozen=True)
class Superposition:
    """Measures of a matrix W_p [d_in, n_features] whose columns W_i are feature directions."""

    norms: Float64[Tensor, " n_features"]
    """||W_i||: 1 for a feature that is represented, near 0 for one that is not."""
    dimensionality: Float64[Tensor, " n_features"]
    """D_i = ||W_i||^2 / sum_j (W_i . W_j / ||W_i||)^2, the share of a dimension that feature i has (Elhage et al.).

    1 alone, 1/2 in an antipodal pair, 2/5 in a pentagon; 0 for a zero column.
    """
    positive_share: float
    """Share of the pairs of represented features with W_i . W_j > `tolerance`: the paper's theory assumes 0."""
    negative_share: float
    """Share of those pairs with W_i . W_j < -`tolerance`."""
    represented: int
    """Number of features with ||W_i|| > `above`."""


def superposition(
    W_p: Float[Tensor, "d_in n_features"], above: float = 0.5, tolerance: float = 0.01
) -> Superposition:
    """Return the measures of one W_p; pairs are counted among features with ||W_i|| > `above`."""
    W = W_p.double().cpu()
    norms = W.norm(dim=0)
    gram = W.T @ W
    shared = gram.square().sum(1)  # ||W_i||^2 sum_j (W_i/||W_i|| . W_j)^2
    dimensionality = torch.where(shared > 0, norms.pow(4) / shared.clamp_min(1e-300), 0.0)
    kept = norms > above
    pairs = gram[kept][:, kept]
    upper = pairs[tuple(torch.triu_indices(*pairs.shape, offset=1))]
    positive, negative = (upper > tolerance).sum(), (upper < -tolerance).sum()
    count = max(1, len(upper))
    return Superposition(
        norms, dimensionality, int(positive) / count, int(negative) / count, int(kept.sum())
    )


def noise_shape(cfg: Noise, d_in: int) -> Float64[Tensor, "d_in d_in"]:
    """Return Sigma / tr(Sigma), positive definite; raises UserError for more loud directions than dimensions."""
    eye = torch.eye(d_in, dtype=torch.float64)
    match cfg:
        case Isotropic():
            shape = eye
        case Anisotropic(spread=spread):
            place = torch.arange(d_in, dtype=torch.float64) / max(1, d_in - 1)
            shape = torch.diag(spread ** (2 * place))
        case LowRank(rank=rank, floor=floor, seed=seed):
            if rank > d_in:
                raise UserError(f"noise of rank {rank} in {d_in} dimensions; at most {d_in}")
            U = orthonormal(seed_for(seed, "noise", d_in), d_in, rank)
            shape = (1 - floor) / rank * U @ U.T + floor / d_in * eye
    return shape / shape.trace()


@dataclass(frozen=True, eq=False)
class World:
    """A superposition matrix W_p [d_in, n_features], the law of its features, and the noise: x_p = W_p x + e.

    Rows depend on (seed, step) alone. With `sparse` they come from the sparse sampler, whose cost follows the number
    of active entries: the same law, other draws. Raises UserError for a W_p that is not a finite matrix of as many
    columns as there are features, or that has a zero column, and for sparsity 1.
    """

    W_p: Shaped[Tensor, "..."]
    """[d_in, n_features], kept in float32; column i is the direction of feature i."""
    features: FeatureConfig
    sparse: bool = False
    noise: Noise = field(default_factory=Isotropic)

    def __post_init__(self) -> None:
        """Check the matrix, and keep it in float32."""
        matrix = check_W_p(self.W_p)
        if matrix.shape[1] != self.features.n_features:
            raise UserError(
                f"W_p has {matrix.shape[1]} columns for n_features = {self.features.n_features}; one column per feature"
            )
        if self.features.sparsity == 1:
            raise UserError(
                "sparsity 1: no feature is ever active, so x_p is always 0; use less than 1"
            )
        object.__setattr__(self, "W_p", matrix.float())
        noise_shape(self.noise, self.d_in)
        if self.noise.level and not bool(self.signal_covariance.trace() > 0):
            raise UserError(
                f"noise of level {self.noise.level:g} over a signal that never varies; use a lower level of activity, "
                "or other magnitudes"
            )

    @classmethod
    def of_toy_model(cls, models: ToyModels, index: int) -> "World":
        """Return the world that toy model `index` was trained in, seen through its W_p."""
        if not -len(models.configs) <= index < len(models.configs):
            raise UserError(f"toy model {index}: there are only {len(models.configs)}")
        return cls(models.W_p[index], models.configs[index].features)

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.W_p.shape[0]

    @property
    def n_features(self) -> int:
        """Number of true features."""
        return self.W_p.shape[1]

    def sample(
        self, rows: int, seed: int, step: int = 0
    ) -> tuple[Float32[Tensor, "rows n_features"], Float32[Tensor, "rows d_in"]]:
        """Return features x [rows, n_features] and activations x_p = W_p x + e [rows, d_in]."""
        if self.sparse:
            code = self.sample_sparse(rows, seed, step)
            return code.dense(self.n_features), self.acts(code, seed, step)
        x = FeatureStream([self.features], [seed], rows).batch(step)[0]
        return x, self.acts(x, seed, step)

    def acts(
        self, features: Float[Tensor, "rows n_features"] | SparseCode, seed: int, step: int = 0
    ) -> Float32[Tensor, "rows d_in"]:
        """Return the activations of features: W_p x and the noise of (seed, step)."""
        x_p = self.embed(features)
        NoiseStream([self], [seed]).add_to(x_p[None], step)
        return x_p

    def sample_sparse(self, rows: int, seed: int, step: int = 0) -> SparseCode:
        """Return the active entries of x, by the sparse sampler (the features of `sample` where `sparse` is set)."""
        return sample_sparse(self.features, rows, seed, step)

    def embed(
        self, features: Float[Tensor, "rows n_features"] | SparseCode
    ) -> Float32[Tensor, "rows d_in"]:
        """Return W_p x (Eq. 1), without noise, of dense features or of active entries."""
        if isinstance(features, SparseCode):
            return embed_sparse(self._by_feature.T, features)
        return features @ self.W_p.T

    def describe(self) -> dict[str, Any]:
        """Return the world as JSON: sizes, the law of the features, a digest of W_p, and the noise if there is any."""
        noise = {"noise": self.noise.to_dict()} if self.noise.level else {}
        return {
            "d_in": self.d_in,
            "features": self.features.to_dict(),
            "sparse": self.sparse,
            "W_p": self.digest,
            **noise,
        }

    @cached_property
    def mean(self) -> Float64[Tensor, " d_in"]:
        """E[x_p] = W_p E[x], exact."""
        return self.W_p.double() @ feature_moments(self.features)[0]

    @cached_property
    def signal_covariance(self) -> Float64[Tensor, "d_in d_in"]:
        """Cov(W_p x) = W_p Cov(x) W_p^T, exact."""
        W_p, found = self.W_p.double(), feature_covariance(self.features)
        pairs = (W_p[:, found.first] * found.value) @ W_p[:, found.second].T
        return (W_p * found.variance) @ W_p.T + pairs + pairs.T

    @cached_property
    def noise_covariance(self) -> Float64[Tensor, "d_in d_in"]:
        """Sigma, exact: `level` times the signal's power, in the shape of the noise."""
        power = self.noise.level * self.signal_covariance.trace()
        return power * noise_shape(self.noise, self.d_in)

    @cached_property
    def noise_root(self) -> Float32[Tensor, "d_in d_in"]:
        """L, lower triangular with L L^T = Sigma; there must be noise."""
        return torch.linalg.cholesky(self.noise_covariance).float()

    @property
    def covariance(self) -> Float64[Tensor, "d_in d_in"]:
        """Cov(x_p) = W_p Cov(x) W_p^T + Sigma, exact."""
        return self.signal_covariance + self.noise_covariance

    @cached_property
    def digest(self) -> str:
        """A name for W_p, to the bit."""
        sha = hashlib.sha256(repr(tuple(self.W_p.shape)).encode())
        sha.update(self.W_p.contiguous().numpy().data)
        return sha.hexdigest()

    @cached_property
    def _by_feature(self) -> Float32[Tensor, "n_features d_in"]:
        """W_p with one row per feature: what the sparse product reads."""
        return self.W_p.T.contiguous()


class NoiseStream:
    """Noise e = L z of many worlds at any step, L L^T = Sigma and z normal; worlds of one seed share z.

    Worlds without noise draw none.
    """

    def __init__(self, worlds: Sequence[World], seeds: Sequence[int]) -> None:
        noisy = [i for i, world in enumerate(worlds) if world.noise.level]
        self._seeds = list(dict.fromkeys(seeds[i] for i in noisy))
        self._noisy = torch.tensor(noisy, dtype=torch.int64)
        self._place = torch.tensor([self._seeds.index(seeds[i]) for i in noisy], dtype=torch.int64)
        self._roots = torch.stack([worlds[i].noise_root for i in noisy]) if noisy else None

    def add_to(self, acts: Float32[Tensor, "worlds rows d_in"], step: int) -> None:
        """Add a step's noise to the activations, in place."""
        if self._roots is None:
            return
        shape = acts.shape[1:]
        drawn = [
            generator(seed, "noise", shape[1], step).standard_normal(shape, dtype=np.float32)
            for seed in self._seeds
        ]
        z = torch.from_numpy(np.stack(drawn))[self._place]
        acts.index_add_(0, self._noisy, torch.bmm(z, self._roots.mT))


Split = Literal["train", "heldout"]
_BLOCK_CELLS = 1 << 18
"""Features drawn at once, at most: a buffer of 1 MB."""


class SyntheticSource:
    """Rows of a world as the activations of one hook called `name`.

    `rows` training rows per epoch and `heldout_rows` others, of another seed; both exist by number only, so more rows
    cost nothing: with rows >= the rows trained on, every row is new. Statistics are exact over the first `stats_rows`
    (default: 65,536 or all). Raises UserError for counts below 1.
    """

    def __init__(
        self,
        world: World,
        rows: int = 1 << 20,
        heldout_rows: int = 1 << 14,
        stats_rows: int | None = None,
        seed: int = 0,
        name: str = "acts",
    ) -> None:
        stats_rows = min(rows, 1 << 16) if stats_rows is None else stats_rows
        counts = {"rows": rows, "heldout_rows": heldout_rows, "stats_rows": stats_rows}
        for what, count in counts.items():
            if count < 1:
                raise UserError(f"{what} = {count}: a source needs at least one")
        if stats_rows > rows:
            raise UserError(
                f"stats_rows = {stats_rows} of only {rows} training rows; ask for fewer"
            )
        self.world, self.hooks = world, {name: world.d_in}
        self._name, self._seed = name, seed
        self._rows: dict[Split, int] = {"train": rows, "heldout": heldout_rows}
        self._stats_rows = stats_rows
        fits = _BLOCK_CELLS // (1 if world.sparse else world.n_features)
        self.block = max(16, min(1024, fits))

    @property
    def n_rows(self) -> int:
        """Training rows per epoch."""
        return self._rows["train"]

    def features(
        self, index: Int[np.ndarray, " rows"] | Int[Tensor, " rows"], split: Split = "heldout"
    ) -> Float32[Tensor, "rows n_features"]:
        """Return the true features of rows by number: a held-out chunk's `seq` holds its row numbers."""

        def draw(split: Split, number: int) -> Tensor:
            return self.world.sample(self.block, self._seeds[split], number)[0]

        return self._gather(index, split, draw, self.world.n_features)

    def acts(
        self, index: Int[np.ndarray, " rows"] | Int[Tensor, " rows"], split: Split = "heldout"
    ) -> Float32[Tensor, "rows d_in"]:
        """Return the activations of rows by number."""
        return self._gather(index, split, self.block_acts, self.world.d_in)

    def stats(self, progress: Progress = quiet) -> dict[str, SourceStats]:
        """Return the statistics of the first `stats_rows` training rows."""
        tally = Tally(self.hooks)
        with progress("statistics", self._stats_rows, "rows") as tick:
            for first in range(0, self._stats_rows, self.block):
                count = min(self.block, self._stats_rows - first)
                x = self.block_acts("train", first // self.block)[:count]
                tally.update({self._name: x}, {}, {"kept": count})
                tick(count)
        return tally.result()

    def stream(self, batch_size: int, seed: int, state: State | None = None) -> "BlockStream":
        """Return training batches from the start or from a state."""
        return BlockStream(self, batch_size, seed, state)

    def heldout(self, batch_size: int) -> Iterator[HeldoutRows]:
        """Yield the held-out rows by number."""
        total = self._rows["heldout"]
        for first in range(0, total, batch_size):
            seq = torch.arange(first, min(first + batch_size, total))
            yield HeldoutRows({self._name: self.acts(seq)}, seq, torch.zeros_like(seq))

    def tokens(self) -> None:
        """Return none: there is no text."""

    def digest(self) -> str:
        """Return a name for the rows: world, counts, seed."""
        return digest([self.describe(), self._rows, self._stats_rows, self._seed, self.block])

    def describe(self) -> dict[str, Any]:
        """Return the world as JSON."""
        return {"kind": "synthetic", "world": self.world.describe(), "hooks": list(self.hooks)}

    def block_acts(self, split: Split, number: int) -> Float32[Tensor, "block d_in"]:
        """Return the activations of rows number * block ... of a split (past its end they are not part of it)."""
        if self.world.sparse:
            code = self.world.sample_sparse(self.block, self._seeds[split], number)
            return self.world.acts(code, self._seeds[split], number)
        return self.world.sample(self.block, self._seeds[split], number)[1]

    @cached_property
    def _seeds(self) -> dict[Split, int]:
        return {"train": seed_for(self._seed, "train"), "heldout": seed_for(self._seed, "heldout")}

    def _gather(
        self,
        index: Int[np.ndarray, " rows"] | Int[Tensor, " rows"],
        split: Split,
        draw: Callable[[Split, int], Tensor],
        width: int,
    ) -> Tensor:
        rows, total = torch.as_tensor(index, dtype=torch.int64), self._rows[split]
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < total:
            raise UserError(f"rows {int(rows.min())} to {int(rows.max())} of {total} {split} rows")
        out, blocks = torch.empty(len(rows), width, dtype=torch.float32), rows // self.block
        for number in blocks.unique().tolist():
            here = (blocks == number).nonzero()[:, 0]
            out[here] = draw(split, number)[rows[here] % self.block]
        return out


class BlockStream:
    """Batches of a synthetic source: blocks in an order of each epoch's own, rows shuffled inside each block.

    Rows are independent of each other, so this mixes as well as a full shuffle, and each block is drawn once an epoch.
    """

    def __init__(
        self, source: SyntheticSource, batch_size: int, seed: int, state: State | None = None
    ) -> None:
        check_batch_size(batch_size, source.n_rows)
        self._source, self._batch_size, self._seed = source, batch_size, seed
        self._epoch, self._batch = (0, 0) if state is None else restored(state, batch_size, seed)
        self._held: tuple[int, int, Tensor] | None = None

    def next(self) -> Batch:
        """Return the next batch, float32."""
        if self._batch >= self._source.n_rows // self._batch_size:
            self._epoch, self._batch = self._epoch + 1, 0
        first, block = self._batch * self._batch_size, self._source.block
        last, parts = first + self._batch_size, []
        for slot in range(first // block, -(-last // block)):
            start = slot * block
            parts.append(self._shuffled(slot)[max(0, first - start) : last - start])
        self._batch += 1
        (name,) = self._source.hooks
        return {name: torch.cat(parts)}

    def begin(self) -> None:
        """Do nothing: rows are drawn when they are wanted."""

    def state(self) -> State:
        """Return the exact position as JSON."""
        return position(self._batch_size, self._seed, self._epoch, self._batch)

    def _shuffled(self, slot: int) -> Float32[Tensor, "block d_in"]:
        """Return the block at position `slot` of this epoch; whole blocks change places, a last cut one stays last."""
        if self._held is not None and self._held[:2] == (self._epoch, slot):
            return self._held[2]
        n_rows, block = self._source.n_rows, self._source.block
        whole, epoch = n_rows // block, seed_for(self._seed, "epoch", self._epoch)
        number = int(Permutation(whole, epoch)(np.array([slot]))[0]) if slot < whole else slot
        size = min(block, n_rows - number * block)
        order = np.random.Generator(np.random.SFC64(seed_for(epoch, "rows", slot))).permutation(
            size
        )
        rows = self._source.block_acts("train", number)[torch.from_numpy(order)]
        self._held = (self._epoch, slot, rows)
        return rows

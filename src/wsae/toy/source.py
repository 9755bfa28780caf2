"""A world as a source of activations, as in `wsae.fit(SyntheticSource(world))`: rows are drawn when asked for."""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32, Int
from torch import Tensor

from wsae.acts.stream import Batch, Chunk, State, check_batch_size, position, restored
from wsae.acts.tally import SourceStats, Tally
from wsae.core.errors import UserError
from wsae.core.files import digest
from wsae.core.progress import Progress, quiet
from wsae.core.seeds import Permutation, seed_for
from wsae.toy.world import World

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
        for what, count in (
            ("rows", rows),
            ("heldout_rows", heldout_rows),
            ("stats_rows", stats_rows),
        ):
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
        return self._gather(index, split, self._block_features, self.world.n_features)

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

    def heldout(self, batch_size: int) -> Iterator[Chunk]:
        """Yield the held-out rows by number."""
        total = self._rows["heldout"]
        for first in range(0, total, batch_size):
            seq = torch.arange(first, min(first + batch_size, total))
            yield Chunk({self._name: self.acts(seq)}, seq, torch.zeros_like(seq))

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
            return self.world.embed(code)
        return self.world.sample(self.block, self._seeds[split], number)[1]

    def _block_features(self, split: Split, number: int) -> Float32[Tensor, "block n_features"]:
        return self.world.sample(self.block, self._seeds[split], number)[0]

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

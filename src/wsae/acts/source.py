"""Sources of activations for the trainer: a store on disk here, arrays beside it, one way to open either."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

from wsae.acts.arrays import READERS, ArraySource, as_path, is_folder_of_arrays
from wsae.acts.store import Store
from wsae.acts.stream import (
    ActivationSource,
    Batch,
    BatchStream,
    Chunk,
    ShuffledStream,
    State,
)
from wsae.acts.tally import SourceStats
from wsae.acts.tokens import TokenTable
from wsae.core.errors import UserError
from wsae.core.progress import Progress, quiet

__all__ = [
    "ActivationSource",
    "ArraySource",
    "Batch",
    "BatchStream",
    "Chunk",
    "ShuffledStream",
    "SourceStats",
    "State",
    "StoreSource",
    "TokenTable",
    "open_source",
]


class StoreSource:
    """A harvested store, shuffled over all its shards; `hooks` chooses some of its hooks."""

    def __init__(
        self, path: Path | str, hooks: tuple[str, ...] | None = None, verify: bool = True
    ) -> None:
        self.store = Store(path, hooks, verify)
        self.hooks = self.store.hooks

    @property
    def n_rows(self) -> int:
        """Training rows per epoch."""
        return self.store.n_rows["train"]

    def stats(self, progress: Progress = quiet) -> dict[str, SourceStats]:  # noqa: ARG002
        """Return the statistics taken while harvesting."""
        return self.store.stats()

    def stream(self, batch_size: int, seed: int, state: State | None = None) -> ShuffledStream:
        """Return training batches from the start or from a state."""
        return ShuffledStream(self.n_rows, self._train, batch_size, seed, state)

    def heldout(self, batch_size: int) -> Iterator[Chunk]:
        """Yield the held-out rows in the order of the text or the images."""
        n_rows = self.store.n_rows["heldout"]
        seq, pos = self.store.places("heldout")
        for first in range(0, n_rows, batch_size):
            index = np.arange(first, min(first + batch_size, n_rows))
            yield Chunk(self.store.rows("heldout", index), seq[index], pos[index])

    def labels(self) -> Int[Tensor, " rows"] | None:
        """Return the class of every held-out row (int64), or none where rows have none."""
        return self.store.labels("heldout")

    def tokens(self) -> TokenTable | None:
        """Return the held-out sequences' tokens; none for images."""
        return self.store.tokens("heldout")

    def digest(self) -> str:
        """Return the manifest's digest."""
        return self.store.manifest.digest()

    def describe(self) -> dict[str, Any]:
        """Return the store's place, the model it is of, and the hooks read."""
        place = {"kind": "store", "path": str(self.store.path.resolve())}
        return {**place, "model": self.store.manifest.config["model"], "hooks": list(self.hooks)}

    def _train(self, index: np.ndarray) -> Batch:
        return self.store.rows("train", index)


def open_source(
    spec: object,
    hooks: tuple[str, ...] | None = None,
    verify: bool = True,
    heldout_fraction: float = 0.1,
) -> ActivationSource:
    """Open a store, an array file (.npy, .npz, .safetensors, .pt), a folder of array files, or numbers in memory.

    `hooks` and `verify` concern stores, `heldout_fraction` arrays. Raises UserError when there is no such thing.
    """
    path = as_path(spec)
    if path is None:
        return ArraySource(spec, heldout_fraction)
    if not path.exists():
        raise UserError(f"{path}: no such store or array file")
    if not path.is_dir():
        return ArraySource(path, heldout_fraction, name=path.stem)
    if is_folder_of_arrays(path):
        return ArraySource(path, heldout_fraction, name=path.resolve().name or "acts")
    if not any(path.iterdir()):
        raise UserError(
            f"{path}: an empty folder; give a store, or a folder of {', '.join(READERS)}"
        )
    return StoreSource(path, hooks, verify)

"""Activations from one array: numpy, torch, a .npy file (memory-mapped) or a .safetensors file with one matrix."""

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from wsae.acts.images.labels import MOST_CLASSES
from wsae.acts.stream import Batch, Chunk, ShuffledStream, State
from wsae.acts.tally import SourceStats, Tally
from wsae.core.errors import UserError
from wsae.core.files import digest, sha256_file
from wsae.core.npy import mapped_npy
from wsae.core.progress import Progress, quiet
from wsae.core.seeds import Permutation, seed_for
from wsae.core.tensors import MappedTensor
from wsae.stats.consistency import ConsistencyCounts
from wsae.stats.moments import check_finite

_CHUNK_VALUES = 1 << 21


class ArraySource:
    """Rows of a matrix [rows, d_in] as the activations of one hook called `name`.

    A fixed random `heldout_fraction` of the rows (at least one, unless it is 0) is held out. `labels` [rows], if given,
    are kept beside the rows: a held-out chunk's `seq` holds row numbers. Raises UserError for a missing or unreadable
    file, another number of axes, an empty or non-numeric array, or labels of another length.
    """

    def __init__(
        self,
        x: Path | str | np.ndarray | Tensor,
        heldout_fraction: float = 0.1,
        name: str = "acts",
        labels: Int[np.ndarray, " rows"] | None = None,
        seed: int = 0,
    ) -> None:
        self._path = Path(x) if isinstance(x, str | Path) else None
        self._where = str(self._path or name)
        self._rows = _opened(x, self._where)
        total, d_in = self._rows.shape
        if not 0 <= heldout_fraction < 1:
            raise UserError(f"heldout_fraction {heldout_fraction}: must be at least 0 and under 1")
        self.hooks = {name: d_in}
        self._name, self._total, self._seed = name, total, seed
        self._n_heldout = max(1, round(total * heldout_fraction)) if heldout_fraction else 0
        self._split = Permutation(total, seed_for(seed, "heldout"))
        self.labels: Int[np.ndarray, " rows"] | None = None
        if labels is not None:
            self.with_labels(labels)
        if self._n_heldout >= total:
            raise UserError(
                f"{self._where}: {total} rows leave none to train on after holding out {self._n_heldout}"
            )

    def with_labels(self, labels: Int[np.ndarray, " rows"]) -> "ArraySource":
        """Keep a class beside every row, and return the source; raises UserError for another number of labels."""
        if len(labels) != self._total:
            raise UserError(f"{self._where}: {len(labels)} labels for {self._total} rows")
        if int(labels.max()) >= MOST_CLASSES:
            raise UserError(
                f"{self._where}: label {int(labels.max())}; number the classes from 0 (at most {MOST_CLASSES:,})"
            )
        self.labels = labels
        return self

    @property
    def n_rows(self) -> int:
        """Training rows per epoch."""
        return self._total - self._n_heldout

    @functools.cached_property
    def heldout_rows(self) -> Int[np.ndarray, " rows"]:
        """Row numbers that are never trained on, ascending."""
        return np.sort(self._split(np.arange(self._n_heldout)))

    def stats(self, progress: Progress = quiet) -> dict[str, SourceStats]:
        """Return the training rows' statistics; raises UserError at the first NaN or infinity of any row."""
        tally, counts = Tally(self.hooks), self._label_counts()
        train = np.ones(self._total, dtype=bool)
        train[self.heldout_rows] = False
        step = max(1, _CHUNK_VALUES // self.hooks[self._name])
        with progress("statistics", self._total, "rows") as tick:
            for first in range(0, self._total, step):
                x = self._take(np.arange(first, min(first + step, self._total)))
                check_finite(x, first, self._where)
                keep = torch.from_numpy(train[first : first + step])
                tally.update({self._name: x[keep]}, {}, {"kept": int(keep.sum())})
                if counts is not None and self.labels is not None:
                    labels = torch.from_numpy(self.labels[first : first + step].astype(np.int64))
                    counts.update(x[keep], labels[keep])
                tick(len(x))
        (stats,) = tally.result().values()
        beta = None if counts is None else counts.consistency()
        return {self._name: stats._replace(consistency=beta)}

    def _label_counts(self) -> ConsistencyCounts | None:
        if self.labels is None:
            return None
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0:
            raise UserError(f"{self._where}: label {low}; number the classes from 0")
        return ConsistencyCounts(self.hooks[self._name], high + 1)

    def stream(self, batch_size: int, seed: int, state: State | None = None) -> ShuffledStream:
        """Return training batches from the start or from a state."""
        return ShuffledStream(self.n_rows, self._train, batch_size, seed, state)

    def heldout(self, batch_size: int) -> Iterator[Chunk]:
        """Yield the held-out rows by ascending row number."""
        for first in range(0, self._n_heldout, batch_size):
            index = self.heldout_rows[first : first + batch_size]
            seq = torch.from_numpy(index.copy())
            yield Chunk({self._name: self._take(index)}, seq, torch.zeros_like(seq))

    def tokens(self) -> None:
        """Return none: an array has no text."""

    @functools.cache  # noqa: B019  (a source lives as long as its run)
    def digest(self) -> str:
        """Return a hash of the file or of the array's bytes, and of the split."""
        if self._path is not None:
            content = sha256_file(self._path)
        else:
            sha = hashlib.sha256(repr(self._rows.shape).encode())
            step = max(1, _CHUNK_VALUES // self.hooks[self._name])
            for first in range(0, self._total, step):
                sha.update(
                    self._take(np.arange(first, min(first + step, self._total))).numpy().data
                )
            content = sha.hexdigest()
        return digest([content, self._n_heldout, self._seed, self._name])

    def describe(self) -> dict[str, Any]:
        """Return the file's place, if it is one."""
        path = None if self._path is None else str(self._path.resolve())
        return {"kind": "array", "path": path, "hooks": [self._name]}

    def _train(self, index: Int[np.ndarray, " rows"]) -> Batch:
        return {self._name: self._take(self._split(index + self._n_heldout))}

    def _take(self, index: Int[np.ndarray, " rows"]) -> Float[Tensor, "rows d_in"]:
        return self._rows.take(index)


class _Matrix:
    """Rows of a numpy array (in memory or mapped), a tensor or a safetensors file, as float32 tensors."""

    def __init__(self, data: np.ndarray | Tensor | MappedTensor) -> None:
        self._data, self.shape = data, (int(data.shape[0]), int(data.shape[1]))

    def take(self, index: np.ndarray) -> Tensor:
        if isinstance(self._data, np.ndarray):
            return torch.from_numpy(self._data[index].astype(np.float32, copy=False))
        if isinstance(self._data, MappedTensor):
            return self._data.rows(index).float()
        return self._data[torch.from_numpy(index).to(self._data.device)].detach().float().cpu()


def _opened(x: Path | str | np.ndarray | Tensor, where: str) -> _Matrix:
    data = _file(Path(x)) if isinstance(x, str | Path) else x
    if len(data.shape) != 2:
        raise UserError(
            f"{where}: shape {tuple(data.shape)}; activations must be [rows, d_in], so reshape them"
        )
    if 0 in data.shape:
        raise UserError(f"{where}: shape {tuple(data.shape)}; there are no activations in it")
    if isinstance(data, np.ndarray):
        if data.dtype.kind not in "fiu":
            raise UserError(f"{where}: dtype {data.dtype}; activations must be real numbers")
        data = np.asarray(data)
    elif isinstance(data, Tensor) and (data.is_complex() or data.dtype == torch.bool):
        raise UserError(f"{where}: dtype {data.dtype}; activations must be real numbers")
    return _Matrix(data)


def _file(path: Path) -> np.ndarray | MappedTensor:
    if not path.is_file():
        raise UserError(f"{path}: no such array file")
    if path.suffix == ".npy":
        return mapped_npy(path, str(path))
    if path.suffix == ".safetensors":
        return MappedTensor(path, _only_matrix(path))
    raise UserError(f"{path}: unknown kind of array file; use .npy or .safetensors")


def _only_matrix(path: Path) -> str:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    if len(matrices) != 1:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "nothing"
        raise UserError(f"{path}: needs exactly one tensor of shape [rows, d_in], found {found}")
    return matrices[0]

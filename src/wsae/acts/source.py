"""Sources of activations for the trainer: a store on disk here, arrays beside it, one way to open either."""

import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from wsae.acts.flow import MOST_CLASSES, SourceStats, Tally
from wsae.acts.hooknames import natural_key
from wsae.acts.store import Store
from wsae.acts.stream import (
    ActivationSource,
    Batch,
    BatchStream,
    HeldOut,
    HeldoutRows,
    ShuffledStream,
    State,
)
from wsae.acts.tables import arrow_matrices
from wsae.acts.tokens import TokenTable
from wsae.core.artifact import CONFIG, MANIFEST
from wsae.core.cache import content_digest
from wsae.core.calls import numbers
from wsae.core.errors import UserError
from wsae.core.files import digest, whole
from wsae.core.progress import Progress, quiet
from wsae.core.seeds import Permutation, seed_for
from wsae.core.tensors import MappedTensor, mapped_npy, npz_arrays
from wsae.core.torchfile import map_tensors
from wsae.stats.moments import check_finite

# An array [n, seq, d_in] is read as n * seq rows. Files in a folder are one matrix, in the natural
# order of their names.

_CHUNK_VALUES = 1 << 21
NAMES = ("acts", "activations", "hidden_states", "features", "embeddings", "x", "X", "data")
"""What the matrix among several arrays of a file may be called, the first that is there."""
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class ArraySource:
    """Rows of a matrix [rows, d_in] as the activations of one hook called `name`.

    `x` is a file, a folder of files (see `open_matrix`) or whatever `wsae.core.calls.numbers` takes.

    A fixed random `heldout_fraction` of the rows (at least one, unless it is 0) is held out, of [n, seq, d_in] whole
    sequences where it comes to one. `labels` [rows], if given, are kept beside the rows: a held-out chunk's `seq` then
    holds row numbers. Raises UserError for a missing or unreadable file, another number of axes, an empty or
    non-numeric array, or labels of another length.
    """

    def __init__(
        self,
        x: object,
        heldout_fraction: float = 0.1,
        name: str = "acts",
        labels: Int[np.ndarray, " rows"] | None = None,
        seed: int = 0,
    ) -> None:
        self._path = as_path(x)
        self._where = str(self._path or name)
        self._rows = open_matrix(x, self._where)
        total, d_in = self._rows.shape
        if not 0 <= heldout_fraction < 1:
            raise UserError(f"heldout_fraction {heldout_fraction}: must be at least 0 and under 1")
        self.hooks = {name: d_in}
        self._name, self._total, self._seed = name, total, seed
        whole_sequences = round(total // self._rows.each * heldout_fraction) >= 1
        self._each = self._rows.each if whole_sequences else 1
        """Rows in a row that are held out together."""
        items = total // self._each
        held = max(1, round(items * heldout_fraction)) if heldout_fraction else 0
        self._n_heldout = held * self._each
        self._split = Permutation(items, seed_for(seed, "heldout"))
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

    @property
    def split(self) -> tuple[int, int, int, int]:
        """Rows in all, held out, and at a time, and the seed that chooses these: what row is where in an epoch."""
        return self._total, self._n_heldout, self._each, self._seed

    @functools.cached_property
    def heldout_rows(self) -> Int[np.ndarray, " rows"]:
        """Row numbers that are never trained on, ascending."""
        return np.sort(self._place(np.arange(self._n_heldout)))

    def stats(self, progress: Progress = quiet) -> dict[str, SourceStats]:
        """Return the training rows' statistics; raises UserError at the first NaN or infinity of any row."""
        n_classes, labels = 0, None
        if self.labels is not None:
            labels = torch.from_numpy(self.labels.astype(np.int64))
            n_classes = int(labels.max()) + 1
            if int(labels.min()) < 0:
                raise UserError(
                    f"{self._where}: label {int(labels.min())}; number the classes from 0"
                )
        tally = Tally(self.hooks, n_classes)
        train = np.ones(self._total, dtype=bool)
        train[self.heldout_rows] = False
        step = max(1, _CHUNK_VALUES // self.hooks[self._name])
        with progress("statistics", self._total, "rows") as tick:
            for first in range(0, self._total, step):
                x = self._take(np.arange(first, min(first + step, self._total)))
                check_finite(x, first, self._where)
                keep = torch.from_numpy(train[first : first + step])
                kept = None if labels is None else labels[first : first + step][keep]
                tally.update({self._name: x[keep]}, {}, {"kept": int(keep.sum())}, kept)
                tick(len(x))
        return tally.result()

    def stream(self, batch_size: int, seed: int, state: State | None = None) -> ShuffledStream:
        """Return training batches from the start or from a state."""
        return ShuffledStream(self.n_rows, self._train, batch_size, seed, state)

    def heldout(self, batch_size: int) -> Iterator[HeldoutRows]:
        """Yield the held-out rows by ascending row number."""
        for first in range(0, self._n_heldout, batch_size):
            index = self.heldout_rows[first : first + batch_size]
            each = self._rows.each if self.labels is None else 1
            yield _heldout(self._name, self._rows, index, each)

    def tokens(self) -> None:
        """Return none: an array has no text."""

    @functools.cache  # noqa: B019  (a source lives as long as its run)
    def digest(self) -> str:
        """Return a hash of the file or of the array's bytes, of the split, and of the labels if there are any."""
        if self._path is not None:
            content = self._rows.digest()
        else:
            sha = hashlib.sha256(repr(self._rows.shape).encode())
            step = max(1, _CHUNK_VALUES // self.hooks[self._name])
            for first in range(0, self._total, step):
                sha.update(
                    self._take(np.arange(first, min(first + step, self._total))).numpy().data
                )
            content = sha.hexdigest()
        more = [] if self.labels is None else [self.labels.tolist()]
        more += [] if self._rows.each == 1 else [self._rows.each]
        return digest([content, self._n_heldout, self._seed, self._name, *more])

    def describe(self) -> dict[str, Any]:
        """Return the place and content of the file, if it is one."""
        told = {"kind": "array", "path": None, "hooks": [self._name]}
        if self._path is None:
            return told
        return {**told, "path": whole(self._path), "content": self._rows.digest()}

    def _train(self, index: Int[np.ndarray, " rows"]) -> Batch:
        return {self._name: self._take(self._place(index + self._n_heldout))}

    def _place(self, index: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
        return self._split(index // self._each) * self._each + index % self._each

    def _take(self, index: Int[np.ndarray, " rows"]) -> Float[Tensor, "rows d_in"]:
        return self._rows.take(index)


def as_path(value: object) -> Path | None:
    """Return a path given in any of its forms, None for anything else."""
    return Path(value) if isinstance(value, str | os.PathLike) else None


Part = np.ndarray | Tensor | MappedTensor
"""A matrix in memory or on disk."""


class FlatPart(NamedTuple):
    """A matrix [rows, d_in], and how many items it has along its first axis: its rows, or n of [n, seq, d_in]."""

    rows: Part
    items: int


class RowMatrix:
    """Rows of one or several matrices of one width, as float32 tensors; `files` are those they lie in, if any."""

    def __init__(self, parts: list[FlatPart], files: list[Path]) -> None:
        self._parts, self._files = [part.rows for part in parts], files
        self._ends = np.cumsum([int(part.shape[0]) for part in self._parts])
        self.shape = (int(self._ends[-1]), int(self._parts[0].shape[1]))
        self.items = sum(part.items for part in parts)
        lengths = {int(part.rows.shape[0]) // part.items for part in parts if part.items}
        self.each = lengths.pop() if len(lengths) == 1 else 1
        """Rows of an item, 1 where files differ in it."""

    def take(self, index: np.ndarray) -> Tensor:
        """Return the rows at these numbers, in their order."""
        if len(self._parts) == 1:
            return _rows_of(self._parts[0], index)
        out = torch.empty(len(index), self.shape[1], dtype=torch.float32, device="cpu")
        part = np.searchsorted(self._ends, index, side="right")
        for number in np.unique(part).tolist():
            here = np.flatnonzero(part == number)
            first = int(self._ends[number]) - int(self._parts[number].shape[0])
            out[torch.from_numpy(here)] = _rows_of(self._parts[number], index[here] - first)
        return out

    def digest(self) -> str:
        """Return a hash of the files."""
        if len(self._files) == 1:
            return content_digest(self._files[0])
        return digest([[path.name, content_digest(path)] for path in self._files])


def _heldout(name: str, rows: RowMatrix, index: Int[np.ndarray, " rows"], each: int) -> HeldoutRows:
    """Return some rows, `each` in a row of one sequence."""
    seq, pos = (torch.from_numpy(at) for at in np.divmod(index, each))
    return HeldoutRows({name: rows.take(index)}, seq, pos)


def _rows_of(part: Part, index: np.ndarray) -> Tensor:
    if isinstance(part, np.ndarray):
        return torch.from_numpy(part[index].astype(np.float32, copy=False))
    if isinstance(part, MappedTensor):
        return part.rows(index).float()
    return part[torch.from_numpy(index).to(part.device)].detach().float().cpu()


def open_matrix(x: object, where: str) -> RowMatrix:
    """Return the activations at a path, or in memory, as one matrix [rows, d_in].

    Raises UserError, beginning with `where` or the file's name, for a missing or unreadable file, another number of
    axes, values that are no real numbers, none at all, or files of several widths.
    """
    path = as_path(x)
    if path is None:
        matrix = RowMatrix([_flat(numbers(x, where), where)], [])
    elif path.is_dir():
        matrix = _folder(path)
    else:
        matrix = RowMatrix(_file(path), [path])
    if 0 in matrix.shape:
        raise UserError(f"{where}: shape {matrix.shape}; there are no activations in it")
    return matrix


def _flat(part: Part, where: str) -> FlatPart:
    """Return a matrix [rows, d_in], of [n, seq, d_in] too."""
    shape = tuple(int(n) for n in part.shape)
    if len(shape) == 3:
        place = os.path.dirname(where) or where if os.path.isfile(where) else where
        _tell_axes(place, shape[1], shape[2])
        rows = (shape[0] * shape[1], shape[2])
        flat = part.as_rows() if isinstance(part, MappedTensor) else part.reshape(rows)
        return FlatPart(flat, shape[0])
    if len(shape) != 2:
        raise UserError(
            f"{where}: shape {shape}; activations must be [rows, d_in] or [n, seq, d_in], so reshape them"
        )
    if isinstance(part, np.ndarray):
        part = np.asarray(part)  # without the subclass of a map, which is slow to index
    if isinstance(part, Tensor) and part.is_floating_point() and part.element_size() == 1:
        part = part.float()  # 8-bit floats cannot be indexed
    return FlatPart(part, shape[0])


@functools.cache
def _tell_axes(where: str, seq: int, d_in: int) -> None:
    """Tell, once for the files of a folder, what is made of three axes."""
    _log.warning("%s: arrays [n, %d, %d], read as rows of width %d", where, seq, d_in, d_in)


def is_folder_of_arrays(folder: Path) -> bool:
    """Return whether a folder holds array files and nothing of ours: no store, finished or not, run or model."""
    own = (MANIFEST, "progress.json", CONFIG, "train")
    return not any((folder / name).exists() for name in own) and bool(_files(folder))


def _files(folder: Path) -> list[Path]:
    """Return the array files in a folder, those with numbers in their names by number."""
    found = [p for p in folder.iterdir() if p.suffix.lower() in READERS and p.name[0] != "."]
    return sorted(found, key=lambda path: natural_key(path.name))


def _folder(folder: Path) -> RowMatrix:
    files = _files(folder)
    if not files:
        known = ", ".join(READERS)
        raise UserError(f"{folder}: no array file in it ({known})")
    others = sorted(p.name for p in folder.iterdir() if p not in files and p.name[0] != ".")
    if others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        _log.warning("%s: not read: %d that are no array files (%s)", folder, len(others), shown)
    parts: list[FlatPart] = []
    for path in files:
        parts += (found := _file(path))
        width, first = found[0].rows.shape[1], parts[0].rows.shape[1]
        if width != first:
            raise UserError(
                f"{path}: rows of width {width} where {files[0].name} has {first}; give each width a folder of its own"
            )
    return RowMatrix(parts, files)


def _file(path: Path) -> list[FlatPart]:
    if not path.is_file():
        raise UserError(f"{path}: no such array file")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        instead = REFUSED.get(path.suffix.lower(), "save it as .npy")
        raise UserError(f"{path}: unknown kind of array file; use {', '.join(READERS)} ({instead})")
    return [
        _flat(part if isinstance(part, MappedTensor) else numbers(part, str(path)), str(path))
        for part in reader(path)
    ]


def _npz(path: Path) -> list[Part]:
    _, names = npz_arrays(path, (), str(path))
    name = _chosen({name: None for name in names}, path)
    return [npz_arrays(path, (name,), str(path))[0][name]]


def _torch(path: Path) -> list[Part]:
    tensors = map_tensors(path)
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if len(tensors) > 1 and set(tensors) == set(
        map(str, range(len(tensors)))
    ):  # a list: one a batch
        widths = {shape[-1:] for shape in shapes.values()}
        if len(widths) == 1 and len({len(shape) for shape in shapes.values()}) == 1:
            return list(tensors.values())
    return [tensors[_chosen(shapes, path)]]


def _safetensors(path: Path) -> list[Part]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error
    return [MappedTensor(path, _chosen(shapes, path))]


def _arrow(path: Path) -> list[Part]:
    found = arrow_matrices(path)
    return [*found[_chosen({name: parts[0].shape for name, parts in found.items()}, path)]]


def _chosen(shapes: Mapping[str, Sequence[int] | None], path: Path) -> str:
    """Return the name of the only matrix, or of the one that is called as activations are."""
    matrices = [name for name, shape in shapes.items() if shape is None or len(shape) in (2, 3)]
    named = [name for name in NAMES if name in matrices]
    if len(matrices) != 1 and not named:
        found = ", ".join(f"{n} {list(s)}" if s is not None else n for n, s in shapes.items())
        raise UserError(
            f"{path}: needs exactly one tensor of shape [rows, d_in], or one called {NAMES[0]}, "
            f"found {found or 'nothing'}"
        )
    return matrices[0] if len(matrices) == 1 else named[0]


READERS: dict[str, Callable[[Path], list[Part]]] = {
    ".npy": lambda path: [mapped_npy(path, str(path))],
    ".npz": _npz,
    ".safetensors": _safetensors,
    ".pt": _torch,
    ".pth": _torch,
    ".bin": _torch,
    ".arrow": _arrow,
}
"""The end of a file's name -> what reads it."""
REFUSED = {
    **dict.fromkeys((".csv", ".tsv", ".txt"), "np.save('x.npy', np.loadtxt(file, delimiter=','))"),
    **dict.fromkeys((".h5", ".hdf5"), "np.save('x.npy', h5py.File(file)[NAME][:])"),
    **dict.fromkeys((".parquet", ".feather"), "np.save('x.npy', pandas.read_parquet(file))"),
    **dict.fromkeys((".pkl", ".pickle"), "a pickle can run code and is not opened"),
}
"""The end of a name that is not read -> how to come to one that is."""


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

    def heldout(self, batch_size: int) -> Iterator[HeldoutRows]:
        """Yield the held-out rows in the order of the text or the images."""
        n_rows = self.store.n_rows["heldout"]
        seq, pos = self.store.places("heldout")
        for first in range(0, n_rows, batch_size):
            index = np.arange(first, min(first + batch_size, n_rows))
            yield HeldoutRows(self.store.rows("heldout", index), seq[index], pos[index])

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


class AlignedSource:
    """Sources of the same rows as one with the hooks of all: both sides of a module, or two models on one text.

    Row i of each is of the same token or image, and the same are held out. Raises UserError for a live model, whose
    rows have no numbers, for another number of rows, other sequences of a store, and a hook's name in two of them,
    unless each source has a name in `apart` that follows its hooks' names: layers.9@base.
    """

    def __init__(self, *sources: ActivationSource, apart: Sequence[str] = ()) -> None:
        self._sources, self.hooks = sources, dict[str, int]()
        self._apart = tuple(apart)
        first, n_rows = sources[0], [source.n_rows for source in sources]
        self.n_rows: int | None = n_rows[0]
        for source, rows in zip(sources, n_rows, strict=True):
            here, there = (next(iter(s.hooks)) for s in (source, first))
            if rows is None or rows != n_rows[0]:
                raise UserError(
                    f"{here} has {rows} training rows and {there} {n_rows[0]}: they are not of the same "
                    "tokens or images, row by row"
                )
            if not _same_places(source, first):
                raise UserError(
                    f"{here} and {there}: their rows are not of the same tokens; harvest both from one text with the "
                    "same settings, or give arrays of the same rows in one shape"
                )
        for named in self._named([source.hooks for source in sources]):
            if twice := self.hooks.keys() & named.keys():
                raise UserError(
                    f"hook {min(twice)!r}: is in two of the sources; name another, or rename one of the files"
                )
            self.hooks |= named

    def stats(self, progress: Progress = quiet) -> dict[str, SourceStats]:
        """Return the statistics of every hook."""
        return self._together([source.stats(progress) for source in self._sources])

    def stream(self, batch_size: int, seed: int, state: State | None = None) -> "_Stream":
        """Return training batches from the start or from a state."""
        return _Stream([s.stream(batch_size, seed, state) for s in self._sources], self._together)

    def heldout(self, batch_size: int) -> Iterator[HeldoutRows]:
        """Yield the held-out rows; raises UserError where they are not the same ones."""
        for parts in zip(*(s.heldout(batch_size) for s in self._sources), strict=False):
            if not all(torch.equal(part.seq, parts[0].seq) for part in parts):
                raise UserError(f"{', '.join(self.hooks)}: other rows are held out in each")
            x = self._together([part.x for part in parts])
            yield HeldoutRows(x, parts[0].seq, parts[0].pos)

    def tokens(self) -> TokenTable | None:
        """Return the held-out sequences' tokens, as the first source has them."""
        return self._sources[0].tokens()

    def digest(self) -> str:
        """Return a name for the data of all."""
        return digest([source.digest() for source in self._sources])

    def describe(self) -> dict[str, Any]:
        """Return where each source's data come from."""
        parts = [source.describe() for source in self._sources]
        apart = {"apart": list(self._apart)} if self._apart else {}
        return {"kind": "aligned", "sources": parts, "hooks": list(self.hooks), **apart}

    def _named(self, parts: Sequence[Mapping[str, _T]]) -> list[dict[str, _T]]:
        """Return what each source has by hook, under the hooks' names here."""
        ends = [f"@{name}" for name in self._apart] or [""] * len(parts)
        return [
            {f"{hook}{end}": value for hook, value in part.items()}
            for part, end in zip(parts, ends, strict=True)
        ]

    def _together(self, parts: Sequence[Mapping[str, _T]]) -> dict[str, _T]:
        return {hook: value for part in self._named(parts) for hook, value in part.items()}


class JoinedSource:
    """The hooks of a source side by side as one hook, whose rows a crosscoder reads: layers.9+layers.19.

    `parts` {hook: width} are the hooks in order, the source's own unless one is given. Raises UserError where there is
    one alone.
    """

    def __init__(self, source: ActivationSource, order: Sequence[str] = ()) -> None:
        self.whole = source
        self.parts = {hook: source.hooks[hook] for hook in order or source.hooks}
        names = [*self.parts]
        if len(names) < 2:
            raise UserError(
                f"a crosscoder reads several hooks, and there is {names[0]} alone; name another hook, or another store "
                "or array of the same rows"
            )
        name = "+".join(names)
        if len(name) > _LONGEST_NAME:
            name = f"{names[0]}+{len(names) - 2}more+{names[-1]}"
        self.name, self.hooks = name, {name: sum(self.parts.values())}

    @property
    def n_rows(self) -> int | None:
        """Training rows per epoch."""
        return self.whole.n_rows

    def stats(self, progress: Progress = quiet) -> dict[str, SourceStats]:
        """Return the statistics of the rows side by side."""
        found = self.whole.stats(progress)
        return {self.name: SourceStats.beside([found[hook] for hook in self.parts])}

    def stream(self, batch_size: int, seed: int, state: State | None = None) -> "_Stream":
        """Return training batches from the start or from a state."""
        return _Stream([self.whole.stream(batch_size, seed, state)], lambda got: self._join(got[0]))

    def heldout(self, batch_size: int) -> Iterator[HeldoutRows]:
        """Yield the held-out rows."""
        for chunk in self.whole.heldout(batch_size):
            yield chunk._replace(x=self._join(chunk.x))

    def tokens(self) -> TokenTable | None:
        """Return the held-out sequences' tokens, as the source has them."""
        return self.whole.tokens()

    def digest(self) -> str:
        """Return a name for the data and the order of the hooks."""
        return digest([self.whole.digest(), list(self.parts)])

    def describe(self) -> dict[str, Any]:
        """Return where the data come from."""
        return {"kind": "joined", "of": self.whole.describe(), "hooks": [self.name]}

    def _join(self, rows: Batch) -> Batch:
        return {self.name: torch.cat([rows[hook] for hook in self.parts], 1)}


_LONGEST_NAME = 120
"""A run keeps a hook's SAEs in a folder of its name."""


class BothSides:
    """Two sources of the same rows as one with the hooks of both: what a transcoder reads, and what it is to give."""

    def __init__(self, read: HeldOut, given: HeldOut) -> None:
        self._parts = (read, given)
        self.hooks = {**read.hooks, **given.hooks}

    def heldout(self, batch_size: int) -> Iterator[HeldoutRows]:
        """Yield the rows in order; raises UserError where one side has more of them."""
        for a, b in zip_longest(*(part.heldout(batch_size) for part in self._parts)):
            if a is None or b is None or len(a.seq) != len(b.seq):
                raise UserError(
                    f"{' and '.join(self.hooks)} have different numbers of rows; they must be of the same tokens"
                )
            yield HeldoutRows({**a.x, **b.x}, a.seq, a.pos)

    def tokens(self) -> TokenTable | None:
        """Return the tokens of what is read."""
        return self._parts[0].tokens()


class MatrixRows:
    """Activations in memory, in a file or a folder of files (`open_matrix`), all evaluated."""

    def __init__(self, x: object, name: str = "acts") -> None:
        self._x = open_matrix(x, str(as_path(x) or name))
        self._name = name
        self.hooks = {name: self._x.shape[1]}

    def heldout(self, batch_size: int) -> Iterator[HeldoutRows]:
        """Yield the rows in order, as fp32."""
        for start in range(0, self._x.shape[0], batch_size):
            index = np.arange(start, min(start + batch_size, self._x.shape[0]))
            yield _heldout(self._name, self._x, index, self._x.each)

    def tokens(self) -> TokenTable | None:
        """Arrays have no tokens."""
        return None


class _Stream:
    """Streams of the same rows step by step (of one seed and number of rows), each step's batches made one."""

    def __init__(
        self, streams: list[BatchStream], together: Callable[[list[Batch]], Batch]
    ) -> None:
        self._streams, self._together = streams, together

    def next(self) -> Batch:
        """Return the next batch by hook, float32."""
        return self._together([stream.next() for stream in self._streams])

    def begin(self) -> None:
        """Begin to read each stream's next batch."""
        for stream in self._streams:
            stream.begin()

    def state(self) -> State:
        """Return the exact position, which is that of each."""
        return self._streams[0].state()


def _same_places(a: ActivationSource, b: ActivationSource) -> bool:
    """Return whether the rows of two sources come from the same places, as far as they know.

    Stores know their tokens' places; arrays which of how many rows are held out, in what order.
    """
    if isinstance(a, ArraySource) and isinstance(b, ArraySource):
        return a.split == b.split
    if not isinstance(a, StoreSource) or not isinstance(b, StoreSource):
        return isinstance(a, StoreSource) == isinstance(b, StoreSource)
    if a is b:
        return True
    texts = [source.tokens() for source in (a, b)]
    ids = [torch.empty(0, dtype=torch.int64) if text is None else text.ids for text in texts]
    return torch.equal(*ids) and all(
        torch.equal(one, other)
        for split in ("train", "heldout")
        for one, other in zip(a.store.places(split), b.store.places(split), strict=True)
    )


def side_by_side(*sources: ActivationSource) -> JoinedSource:
    """Return the hooks of one or several sources of the same rows side by side, as a crosscoder reads them.

    Where two sources have a hook of the same name, the hooks get that of their model, or else of their place, too.
    Raises UserError as `JoinedSource` and `AlignedSource` do.
    """
    if len(sources) == 1:
        return JoinedSource(sources[0])
    hooks = [hook for source in sources for hook in source.hooks]
    if len({*hooks}) == len(hooks):
        return JoinedSource(AlignedSource(*sources))
    said = [source.describe() for source in sources]
    own = [Path(str(place.get("path") or "")) for place in said]
    models = [Path(str(place.get("model") or "")).name for place in said]
    for names in (models, [path.name for path in own], [path.parent.name for path in own]):
        apart = [re.sub(r"[^\w.-]", "-", name) for name in names]
        if all(apart) and len({*apart}) == len(apart):
            return JoinedSource(AlignedSource(*sources, apart=apart))
    return JoinedSource(AlignedSource(*sources))  # which says which hook is there twice


def as_described(source: ActivationSource, record: Mapping[str, Any], named: str | None) -> bool:
    """Return whether data are those of a `describe()`, which had the digest `named`.

    Arrays are compared by their files: labels and splits are no longer at hand.
    """
    if arrays := _contents(record):
        return all(
            a in (None, b) for a, b in zip(arrays, _contents(source.describe()), strict=True)
        )
    return named in (None, source.digest())


def _contents(record: Mapping[str, Any]) -> list[str | None]:
    """Return the digest of each array's files in a record of data; None where there is none."""
    parts = [record["of"]] if record.get("kind") == "joined" else record.get("sources", ())
    own = [record.get("content")] if record.get("kind") == "array" else []
    return own + [found for part in parts for found in _contents(part)]


def open_source(
    spec: object,
    hooks: tuple[str, ...] | None = None,
    verify: bool = True,
    heldout_fraction: float = 0.1,
) -> ActivationSource:
    """Open a store, an array file (its name ends as `READERS` says), a folder of array files, or numbers in memory.

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

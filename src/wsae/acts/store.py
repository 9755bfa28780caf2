"""A harvested store: checked when opened, memory-mapped, rows gathered from any shards in any order."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from wsae.acts.config import same_place
from wsae.acts.flow import NonFiniteError, SourceStats, Step, Tally
from wsae.acts.hooknames import among
from wsae.acts.text import Position
from wsae.acts.tokens import Texts, TokenTable, likely_ends, texts_of
from wsae.core.artifact import (
    MANIFEST,
    FileRecord,
    Manifest,
    check_file,
    read_manifest,
    record,
    write_manifest,
)
from wsae.core.config import Config
from wsae.core.errors import UserError, nearest, understood
from wsae.core.files import drop, locked, read_json, read_sealed, seal, write_json, writing
from wsae.core.progress import Progress, Tick
from wsae.core.tensors import DTYPE_NAMES, MappedTensor, load_tensors, save_tensors
from wsae.sae.config import OUTLIER_RATIO

# How far a harvest has come, on disk: written after each shard, so a killed harvest continues where
# it stood.

PROGRESS = "progress.json"
MOMENTS = "progress-*.safetensors"
"""Statistics of rows so far: written before the ledger that names them."""


class SplitState(Config):
    """One half of a store so far."""

    position: tuple[int, int, int] = (0, 0, 0)
    """Document, token and sequence number that come next."""
    rows: int = 0
    shard_rows: tuple[int, ...] = ()
    counts: dict[str, int] = {}
    files: dict[str, FileRecord] = {}
    done: bool = False
    exhausted: bool = False
    """The text ended before the rows wanted were there."""

    @property
    def start(self) -> Position:
        """Where the next sequence begins."""
        return Position(*self.position)


class Ledger(Config):
    """The whole state of an unfinished harvest."""

    config: dict[str, Any]
    inputs: dict[str, str]
    medians: dict[str, float] | None = None
    splits: dict[str, SplitState] = {"heldout": SplitState(), "train": SplitState()}
    stats: str | None = None
    """The file with the exact moments that belong to this state."""
    stats_record: FileRecord | None = None

    def save(self, out: Path, tally: Tally) -> "Ledger":
        """Write moments, then the ledger that names them, then remove the moments before; return what was written."""
        name = f"progress-{sum(len(s.shard_rows) for s in self.splits.values()):05d}.safetensors"
        save_tensors(out / name, tally.tensors())
        saved = self.model_copy(update={"stats": name, "stats_record": record(out / name)})
        write_json(out / PROGRESS, seal(saved.to_dict()))
        for old in out.glob(MOMENTS):
            if old.name != name:
                old.unlink()
        return saved

    def tally(self, out: Path, hooks: Mapping[str, int], n_classes: int = 0) -> Tally:
        """Return the statistics that belong to this ledger; with classes, those of labelled rows."""
        if self.stats is None:
            return Tally(hooks, n_classes)
        if self.stats_record is not None:
            check_file(out, self.stats, self.stats_record)
        return Tally.restore(hooks, load_tensors(out / self.stats), self.splits["train"].counts)


def open_ledger(out: Path, config: dict[str, Any], inputs: dict[str, str]) -> Ledger:
    """Return the ledger of an unfinished harvest, or a new one.

    Raises UserError when the directory holds a harvest of another config, or damaged shards.
    """
    path = out / PROGRESS
    if not path.exists():
        return Ledger(config=config, inputs=inputs)
    ledger = Ledger.parse(read_sealed(path), where=str(path))
    refuse_other(out, ledger, config, inputs)
    for temporary in out.rglob(".*.tmp"):
        drop(temporary)
    for state in ledger.splits.values():
        for name, expected in state.files.items():
            check_file(out, name, expected)
    return ledger


def drop_ledger(out: Path) -> None:
    """Remove the ledger of a finished harvest; a harvest killed just before this is finished too."""
    for leftover in (out / PROGRESS, *out.glob(MOMENTS)):
        leftover.unlink(missing_ok=True)


def refuse_foreign(out: Path) -> None:
    """Raise UserError when a directory holds files that no harvest wrote."""
    if not out.is_dir() or (out / PROGRESS).exists():
        return
    own = {p.name for pattern in (".*", MOMENTS) for p in out.glob(pattern)}
    foreign = [p.name for p in out.iterdir() if p.name not in own]
    if foreign:
        raise UserError(
            f"{out}: not empty and not a harvest ({foreign[0]}, ...); choose another --out"
        )


def refuse_other(
    out: Path, made: Ledger | Manifest, config: dict[str, Any], inputs: dict[str, str]
) -> None:
    """Raise UserError when a directory was made with another config or from other data."""
    for key in {**made.config, **config}:
        if not _alike(old := made.config.get(key), value := config.get(key)):
            raise UserError(
                f"{out}: was made with {key}={old!r}, not {value!r}; choose another --out or remove it"
            )
    for name, value in inputs.items():
        if made.inputs.get(name) != value:
            raise UserError(
                f"{out}: was made from another {name} (its files differ); choose another --out or remove it"
            )


def _alike(old: object, value: object) -> bool:
    """Return whether two settings say the same, however the place of a model, text or images is written."""
    if isinstance(old, dict) and isinstance(value, dict):
        return all(_alike(old.get(key), value.get(key)) for key in {**old, **value})
    return same_place(old, value)


def clean_up_if_nothing_done(out: Path, created: bool) -> None:
    """Remove what a failed harvest has left if it recorded no shard; the directory too if this run created it."""
    if (out / MANIFEST).exists():
        return
    if (out / PROGRESS).exists() and any(
        s.shard_rows
        for s in Ledger.parse(read_sealed(out / PROGRESS), str(out / PROGRESS)).splits.values()
    ):
        return
    unrecorded = (p for split in ("heldout", "train") for p in (out / split).rglob("*.safetensors"))
    progress = (out / PROGRESS, out / ".lock", *out.glob(MOMENTS))
    for path in (*progress, *out.rglob(".*.tmp"), *unrecorded):
        drop(path)
    folders = sorted((p for p in out.rglob("*") if p.is_dir()), reverse=True)
    for folder in [*folders, *([out] if created else [])]:
        with contextlib.suppress(OSError):  # holds someone else's files
            folder.rmdir()


# One shard of a store, written as rows arrive: memory does not grow with the shard.
#
# A safetensors header needs the sizes, so room for it is left at the start and filled in at the
# end.

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HEADER_BYTES = 512


def shard_name(split: str, hook: str | None, number: int) -> str:
    """Return the relative path of a shard of one hook's rows, or of the token ids (hook None)."""
    return (
        f"{split}/tokens-{number:05d}.safetensors"
        if hook is None
        else f"{split}/{hook}/acts-{number:05d}.safetensors"
    )


class ShardForm(NamedTuple):
    """What a store's shards look like."""

    dtype: str
    """Precision on disk."""
    shard_rows: int
    """Rows after which a shard is closed."""
    seq_len: int | None
    """Token ids kept per sequence; none where rows do not come from text."""


class _RowFile:
    """A safetensors file with one tensor that grows by rows and a few that are added at the end."""

    def __init__(self, file: BinaryIO, name: str, width: int, dtype: torch.dtype) -> None:
        self._file, self._name, self._width, self._dtype = file, name, width, dtype
        self._rows = 0
        file.write(bytes(8 + _HEADER_BYTES))

    def append(self, rows: Tensor) -> None:
        assert (rows.dtype, rows.shape[1]) == (self._dtype, self._width)
        self._file.write(_bytes(rows))
        self._rows += len(rows)

    def finish(self, extra: dict[str, Int[Tensor, " rows"]]) -> None:
        end = self._rows * self._width * self._dtype.itemsize
        entries = {self._name: _entry(self._dtype, (self._rows, self._width), 0, end)}
        for name, tensor in extra.items():
            self._file.write(_bytes(tensor))
            entries[name] = _entry(tensor.dtype, tuple(tensor.shape), end, end + tensor.nbytes)
            end += tensor.nbytes
        header = json.dumps(entries).encode().ljust(_HEADER_BYTES)
        assert len(header) == _HEADER_BYTES
        self._file.seek(0)
        self._file.write(_HEADER_BYTES.to_bytes(8, "little") + header)


class ShardWriter:
    """Writes one shard of every hook and of any token ids; all files appear at `finish`, none after `abort`."""

    def __init__(
        self, out: Path, split: str, number: int, hooks: dict[str, int], form: ShardForm
    ) -> None:
        self._out, self._dtype = out, DTYPES[form.dtype]
        self._names: list[str] = []
        self._seq, self._pos, self._lengths = [], [], []
        self._tokens, self.rows = None, 0
        with contextlib.ExitStack() as self._stack:
            if form.seq_len:
                name = shard_name(split, None, number)
                self._tokens = self._open(name, "ids", form.seq_len, torch.int32)
            self._acts = {
                hook: self._open(shard_name(split, hook, number), "acts", d_in, self._dtype)
                for hook, d_in in hooks.items()
            }
            self._stack = self._stack.pop_all()

    def append(self, step: Step) -> None:
        """Add a step's kept rows and its sequences."""
        if self._tokens is not None:
            self._tokens.append(step.ids)
        for hook, file in self._acts.items():
            file.append(step.x[hook].to(self._dtype))
        self._seq.append(step.seq.int())
        self._pos.append(step.pos.int())
        self._lengths.append(step.lengths)
        self.rows += len(step.seq)

    def finish(self) -> dict[str, FileRecord]:
        """Complete and rename every file; return their records by name."""
        if self._tokens is not None:
            self._tokens.finish({"lengths": torch.cat(self._lengths)})
        for file in self._acts.values():
            file.finish({"seq": torch.cat(self._seq), "pos": torch.cat(self._pos)})
        self._stack.close()
        return {name: record(self._out / name) for name in self._names}

    def abort(self, error: BaseException) -> None:
        """Remove the unfinished files (a full disk becomes a UserError here)."""
        self._stack.__exit__(type(error), error, error.__traceback__)

    def _open(self, name: str, tensor: str, width: int, dtype: torch.dtype) -> _RowFile:
        self._names.append(name)
        temporary = self._stack.enter_context(writing(self._out / name))
        return _RowFile(self._stack.enter_context(temporary.open("wb")), tensor, width, dtype)


def as_stored(step: Step, dtype: str) -> Step:
    """Return the step with kept rows rounded as stored; raises UserError when float16 cannot hold a value."""
    kind = DTYPES[dtype]
    if kind == torch.float32:
        return step
    rounded = {hook: x.to(kind).float() for hook, x in step.x.items()}
    if kind == torch.float16:
        for hook, y in rounded.items():
            if not bool(torch.isfinite(y.sum())) and not bool(torch.isfinite(y).all()):
                worst = float(step.x[hook].abs().max())
                raise UserError(
                    f"{hook}: activation of size {worst:.0f} does not fit float16; use --store-dtype bfloat16"
                )
    return step._replace(x=rounded)


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.contiguous()
    return (flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat).numpy().data


def _entry(dtype: torch.dtype, shape: tuple[int, ...], begin: int, end: int) -> dict[str, object]:
    return {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}


IMAGES = "images.safetensors"
STATS = "stats.safetensors"
TOKENS = "tokens.json"
SPLITS = ("train", "heldout")


class Store:
    """A finished harvest on disk.

    `hooks` {name: d_in}, `n_rows` {split: rows}, `info` (what the manifest says). Raises UserError when a file is
    missing, cut, altered or foreign; `verify=False` checks sizes but not checksums (stores of hundreds of gigabytes).
    """

    def __init__(
        self, path: Path | str, hooks: tuple[str, ...] | None = None, verify: bool = True
    ) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path, "store", verify)
        self.info = self.manifest.info
        with understood(self.path / MANIFEST):
            known = self.info["hooks"]
            chosen = {name: among(name, known) for name in hooks or known}
            for name, hook in chosen.items():
                if hook is None:
                    near = nearest(name, known)
                    raise UserError(f"{self.path}: no hook {name!r} in this store{near}")
            self.hooks = {hook: int(known[hook]) for hook in chosen.values() if hook is not None}
            self.n_rows: dict[str, int] = {split: int(self.info["rows"][split]) for split in SPLITS}
            self._shards: dict[str, list[int]] = {
                split: [int(n) for n in self.info["shard_rows"][split]] for split in SPLITS
            }
            if not self.hooks:
                raise ValueError("no hooks")
            for split, sizes in self._shards.items():
                if sum(sizes) != self.n_rows[split] or min(sizes, default=0) < 0:
                    raise ValueError(f"shards of {sizes} rows for {self.n_rows[split]}")
        self._maps = {
            (split, hook): self._open(split, hook) for split in SPLITS for hook in self.hooks
        }

    def rows(
        self, split: str, index: Int[np.ndarray, " rows"]
    ) -> dict[str, Float[Tensor, "rows _"]]:
        """Return the rows of a split at any positions, in that order, as float32 for every hook."""
        order = np.argsort(index, kind="stable")
        ordered = index[order]
        bounds = np.concatenate([[0], np.cumsum(self._shards[split], dtype=np.int64)])
        cuts = np.searchsorted(ordered, bounds)
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        places = list(zip(bounds, cuts, cuts[1:], strict=False))
        found = {
            hook: torch.empty(0, d_in, dtype=torch.float32) for hook, d_in in self.hooks.items()
        }
        for hook, d_in in self.hooks.items() if len(index) else ():
            maps = self._maps[split, hook]
            own = np.empty((len(index), d_in), maps[0].dtype)
            for shard, (first, lo, hi) in zip(maps, places, strict=False):
                shard.read(ordered[lo:hi] - first, own[lo:hi])
            found[hook] = torch.from_numpy(maps[0].wide(own[back]))
        return found

    def places(self, split: str) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]]:
        """Return sequence number and position of every row of a split (int64)."""
        hook = next(iter(self.hooks))
        paths = (self._shard(split, hook, k) for k in range(len(self._shards[split])))
        shards = [load_columns(path, ("seq", "pos")) for path in paths]
        empty = torch.empty(0, dtype=torch.long)
        return (
            torch.cat([empty, *(s["seq"].long() for s in shards)]),
            torch.cat([empty, *(s["pos"].long() for s in shards)]),
        )

    @property
    def of_images(self) -> bool:
        """Return whether rows come from images, so that a sequence's number is an image's."""
        return self.info.get("kind") == "images"

    def check_model(self, digest: str) -> None:
        """Raise UserError where a model of this digest is not the one that the activations are of."""
        if digest != self.manifest.inputs["model"]:
            raise UserError(
                f"{self.path}: its activations are of another model than {self.manifest.config['model']} is now "
                "(files differ); put it back, or harvest again"
            )

    def labels(self, split: str) -> Int[Tensor, " rows"] | None:
        """Return the class of every row of a split (int64), or none where rows have none."""
        if not self.of_images or not self.info.get("labelled"):
            return None
        found = load_tensors(self.path / split / IMAGES)
        place = torch.searchsorted(found["images"], self.places(split)[0])
        return found["labels"][place]

    def tokens(self, split: str = "heldout") -> TokenTable | None:
        """Return the token ids of a split's sequences and their strings; none for images."""
        if self.of_images:
            return None
        paths = (self._shard(split, None, k) for k in range(len(self._shards[split])))
        parts, read = [load_tensors(path) for path in paths], read_json(self.path / TOKENS)
        with understood(self.path / MANIFEST):
            first = torch.empty(0, int(self.info["seq_len"]), dtype=torch.int32)
            ids = torch.cat([first, *(p["ids"] for p in parts)])
            lengths = torch.cat([torch.empty(0, dtype=torch.int32), *(p["lengths"] for p in parts)])
            strings = texts_of(read)
            return TokenTable(ids, lengths, strings, self._document_ends(strings))

    def _document_ends(self, strings: Texts) -> tuple[int, ...] | None:
        """Return the ids that end a document as noted, or in older stores as they read."""
        if "document_ends" in self.info:
            noted = self.info["document_ends"]
            return None if noted is None else tuple(int(i) for i in noted)
        return likely_ends(strings) if self.manifest.config.get("pack", True) else ()

    def stats(self) -> dict[str, SourceStats]:
        """Return the exact statistics of the training rows, taken while harvesting."""
        tensors = load_tensors(self.path / STATS)
        with understood(self.path / MANIFEST):
            counts = {**self.info["skipped"]["train"], "kept": self.n_rows["train"]}
            return Tally.restore(self.hooks, tensors, counts).result()

    def _shard(self, split: str, hook: str | None, number: int) -> Path:
        return self.path / shard_name(split, hook, number)

    def _open(self, split: str, hook: str) -> list[MappedTensor]:
        maps = []
        for number, rows in enumerate(self._shards[split]):
            path = self._shard(split, hook, number)
            if str(path.relative_to(self.path)) not in self.manifest.files:
                raise UserError(f"{path}: not listed in the manifest; harvest the store again")
            mapped = MappedTensor(path, "acts")
            if mapped.shape != (rows, self.hooks[hook]):
                raise UserError(
                    f"{path}: shape {mapped.shape} where the manifest says {(rows, self.hooks[hook])}"
                )
            maps.append(mapped)
        return maps


def load_columns(path: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Return a shard's small tensors without reading its rows."""
    return {name: MappedTensor(path, name).rows(slice(None)) for name in names}


_MAX_OUTLIERS, _MAX_NAMED = 16, 20


@dataclass(frozen=True)
class Feed:
    """Rows for a store: where they come from, how many are wanted, and what is written after them."""

    hooks: dict[str, int]
    steps: Callable[[bool, Position], Iterator[Step]]
    """(held out?, where to begin) -> steps until the data end."""
    form: ShardForm
    wanted: dict[str, int]
    """Rows of each half, in the order they are written: a text too short for its held-out half fails early."""
    unit: str
    """What a row is, as progress tells it."""
    nothing: str
    """What to say when a half has no row at all; "{split}" stands for its name."""
    threaded: bool
    """Whether rows are written by another thread while the model runs; on a CPU it has every core in use already."""
    rest: Callable[[Ledger, Tally], tuple[list[str], dict[str, object]]]
    """Writes the files beside the shards; returns their names, and what the manifest says."""
    n_classes: int = 0
    medians: dict[str, float] | None = None


def write_store(
    out: Path,
    config: dict[str, Any],
    inputs: dict[str, str],
    feed_of: Callable[[Ledger], Feed],
    progress: Progress,
) -> "Store":
    """Write (or finish, or just open) the store of a config: both halves, then statistics, and last the manifest.

    A killed harvest continues after its last whole shard and ends with the same bytes; what fails before a shard is
    removed. Raises UserError when the directory holds something else, or another process is writing there.
    """
    if (out / MANIFEST).exists():
        manifest = read_manifest(out, "store", verify=False)
        refuse_other(out, manifest, config, inputs)
        drop_ledger(out)
        return Store(out, verify=False)
    refuse_foreign(out)
    created = not out.exists()
    with locked(out):
        ledger = open_ledger(out, config, inputs)
        try:
            feed = feed_of(ledger)
            tally = ledger.tally(out, feed.hooks, feed.n_classes)
            if feed.medians is not None:
                ledger = ledger.model_copy(update={"medians": feed.medians}).save(out, tally)
            done = sum(state.rows for state in ledger.splits.values())
            with progress("harvest", sum(feed.wanted.values()), feed.unit, done) as tick:
                for split in feed.wanted:
                    ledger = SplitWriter(feed, out, ledger, split, tally).run(tick)
            files, info = feed.rest(ledger, tally)
            save_tensors(out / STATS, tally.tensors())
            known = {n: r for state in ledger.splits.values() for n, r in state.files.items()}
            known |= {name: record(out / name) for name in [STATS, *files]}
            write_manifest(out, "store", ledger.config, known, inputs=ledger.inputs, info=info)
            drop_ledger(out)
        except BaseException:
            clean_up_if_nothing_done(out, created)
            raise
    return Store(out, verify=False)


class SplitWriter:
    """Writes one half of the store: `run` drives the model, `_add` runs in the writer thread."""

    def __init__(self, feed: Feed, out: Path, ledger: Ledger, split: str, tally: Tally) -> None:
        self._feed, self._out, self._ledger = feed, out, ledger
        self._name, self._tally = split, tally
        self._state = ledger.splits[split]
        self._shard: ShardWriter | None = None

    def run(self, tick: Tick) -> Ledger:
        """Write rows until there are as many as wanted or the data end; return the ledger."""
        if self._state.done:
            return self._ledger
        try:
            with ThreadPoolExecutor(1, "wsae-writer") as thread:
                exhausted = self._drive(thread, tick)
            self._commit(done=True, exhausted=exhausted)
        except BaseException as error:
            if self._shard is not None:
                self._shard.abort(error)
            if isinstance(error, NonFiniteError):
                row = (self._shard.rows if self._shard else 0) + error.row
                shard = len(self._state.shard_rows)
                place = f"{self._name} shard {shard}, row {row} ({error.place})"
                raise UserError(
                    f"{error.hook}: NaN or infinite activation in {place}{error.FIX}"
                ) from error
            raise
        return self._ledger

    def _drive(self, thread: ThreadPoolExecutor, tick: Tick) -> bool:
        """Run the model until there are rows enough; return whether the data ended before."""
        rows, wanted, added = self._state.rows, self._feed.wanted[self._name], None
        if rows >= wanted:
            return False
        for step in self._feed.steps(self._name == "heldout", self._state.start):
            part = step.head(wanted - rows)
            rows += len(part.seq)
            if added is not None:
                added.result()
            if self._feed.threaded:
                added = thread.submit(self._add, part)
            else:
                self._add(part)
            tick(len(part.seq))
            if rows >= wanted:
                break
        if added is not None:
            added.result()
        if rows == 0:
            raise UserError(self._feed.nothing.replace("{split}", self._name))
        return rows < wanted

    def _add(self, step: Step) -> None:
        form = self._feed.form
        step = as_stored(step, form.dtype)
        if self._shard is None:
            number = len(self._state.shard_rows)
            self._shard = ShardWriter(self._out, self._name, number, self._feed.hooks, form)
        self._shard.append(step)
        if self._name == "train":
            self._tally.update(step.x, step.skipped, step.counts, step.labels)
        counts = {
            reason: n + self._state.counts.get(reason, 0) for reason, n in step.counts.items()
        }
        self._state = self._state.model_copy(
            update={"counts": counts, "position": tuple(step.after)}
        )
        if self._shard.rows >= form.shard_rows:
            self._commit()

    def _commit(self, done: bool = False, exhausted: bool = False) -> None:
        state, shard = self._state, self._shard
        if shard is not None:
            files = {**state.files, **shard.finish()}
            self._shard = None
            shards = (*state.shard_rows, shard.rows)
            state = state.model_copy(
                update={"files": files, "shard_rows": shards, "rows": sum(shards)}
            )
        self._state = state.model_copy(update={"done": done, "exhausted": exhausted})
        splits = {**self._ledger.splits, self._name: self._state}
        changed = self._ledger.model_copy(update={"splits": splits})
        self._ledger = changed.save(self._out, self._tally)


def written(ledger: Ledger, dtype: str) -> dict[str, object]:
    """Return what every store's manifest says of its rows."""
    halves = {split: ledger.splits[split] for split in SPLITS}
    return {
        "store_dtype": dtype,
        "rows": {split: state.rows for split, state in halves.items()},
        "shard_rows": {split: list(state.shard_rows) for split, state in halves.items()},
    }


def lacking(not_loaded: Sequence[str]) -> dict[str, list[str]]:
    """Return a manifest's record of weights that the model's files lack (20 names at most), nothing where none are."""
    return {"not_loaded": [*not_loaded[:_MAX_NAMED]]} if not_loaded else {}


def outlier_dims(tally: Tally) -> dict[str, list[dict[str, int | float]]]:
    """Return each hook's dimensions of over 50 times the median variance, largest first (16 at most)."""
    found = {}
    for hook, moments in tally.kept.items():
        variance = moments.variance
        median = float(variance.median())
        order = torch.argsort(variance, descending=True)[:_MAX_OUTLIERS].tolist()
        values = [(dim, float(variance[dim])) for dim in order]
        found[hook] = [
            {"dim": dim, "variance": value, "over_median": value / median}
            for dim, value in values
            if median > 0 and value > OUTLIER_RATIO * median
        ]
    return found

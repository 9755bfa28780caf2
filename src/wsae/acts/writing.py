"""One half of a store, written shard by shard as rows arrive: wherever they come from."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from wsae.acts.background import Background
from wsae.acts.flow import NonFiniteError, Step
from wsae.acts.ledger import (
    Ledger,
    SplitState,
    clean_up_if_nothing_done,
    drop_ledger,
    open_ledger,
    refuse_foreign,
)
from wsae.acts.packing import Position
from wsae.acts.shards import Form, ShardWriter, as_stored
from wsae.acts.store import STATS
from wsae.acts.tally import Tally
from wsae.core.artifact import FileRecord, record, write_manifest
from wsae.core.errors import UserError
from wsae.core.files import locked
from wsae.core.progress import Tick
from wsae.core.tensors import save_tensors
from wsae.losses.config import OUTLIER_RATIO

_MAX_OUTLIERS, _MAX_NAMED = 16, 20


class Feed(NamedTuple):
    """Rows for a store: their widths, the steps of one half from any position on, and the form of the shards."""

    hooks: dict[str, int]
    steps: Callable[[bool, Position], Iterator[Step]]
    """(held out?, where to begin) -> steps until the data end."""
    form: Form
    nothing: str
    """What to say when a half has no row at all; "{split}" stands for its name."""
    threaded: bool
    """Whether rows are written by another thread while the model runs."""


class SplitWriter:
    """Writes one half of the store: `run` drives the model, `_add` runs in the writer thread."""

    def __init__(self, feed: Feed, out: Path, ledger: Ledger, split: str, tally: Tally) -> None:
        self._feed, self._out, self._ledger = feed, out, ledger
        self._name, self._tally = split, tally
        self._state = ledger.splits[split]
        self._shard: ShardWriter | None = None

    def run(self, wanted: int, tick: Tick) -> Ledger:
        """Write rows until there are `wanted` or the data end; return the ledger."""
        if self._state.done:
            return self._ledger
        try:
            with Background(self._add, threaded=self._feed.threaded) as worker:
                exhausted = self._drive(worker, wanted, tick)
            self._commit(done=True, exhausted=exhausted)
        except NonFiniteError as error:
            raise self._located(error) from error
        finally:
            if self._shard is not None:
                self._shard.abort(RuntimeError("harvest interrupted"))
        return self._ledger

    def _drive(self, worker: Background[Step], wanted: int, tick: Tick) -> bool:
        rows = self._state.rows
        if rows >= wanted:
            return False
        for step in self._feed.steps(self._name == "heldout", self._state.start):
            part = step.head(wanted - rows)
            rows += len(part.seq)
            worker.put(part)
            tick(len(part.seq))
            if rows >= wanted:
                return False
        if rows == 0:
            raise UserError(self._feed.nothing.replace("{split}", self._name))
        return True

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
            self._shard = None  # whatever happens in `finish`, it removes its own files
            files = {**state.files, **shard.finish()}
            shards = (*state.shard_rows, shard.rows)
            state = state.model_copy(
                update={"files": files, "shard_rows": shards, "rows": sum(shards)}
            )
        self._state = state.model_copy(update={"done": done, "exhausted": exhausted})
        self._ledger = self._ledger.with_split(self._name, self._state).save(self._out, self._tally)

    def _located(self, error: NonFiniteError) -> UserError:
        row = (self._shard.rows if self._shard else 0) + error.row
        place = f"{self._name} shard {len(self._state.shard_rows)}, row {row} ({error.place})"
        return UserError(f"{error.hook}: NaN or infinite activation in {place}{error.MEND}")


@contextlib.contextmanager
def unfinished(out: Path, config: dict[str, Any], inputs: dict[str, str]) -> Iterator[Ledger]:
    """Yield the ledger of a new or begun harvest and hold its directory; what fails before a shard is removed.

    Raises UserError when the directory holds something else, or another process is writing there.
    """
    refuse_foreign(out)
    created = not out.exists()
    with locked(out):
        ledger = open_ledger(out, config, inputs)
        try:
            yield ledger
        except BaseException:
            clean_up_if_nothing_done(out, created)
            raise


def finish(
    out: Path, ledger: Ledger, tally: Tally, files: list[str], info: dict[str, object]
) -> None:
    """Write the statistics and the manifest, with `files` beside the shards, and remove the ledger."""
    save_tensors(out / STATS, tally.tensors())
    known: dict[str, FileRecord] = {
        name: kept for state in ledger.splits.values() for name, kept in state.files.items()
    }
    known |= {name: record(out / name) for name in [STATS, *files]}
    write_manifest(out, "store", ledger.config, known, inputs=ledger.inputs, info=info)
    drop_ledger(out)


def skipped(state: SplitState) -> dict[str, int]:
    """Return how many rows one half left out, by reason."""
    return {reason: n for reason, n in state.counts.items() if reason != "kept"}


def lacking(not_loaded: Sequence[str]) -> dict[str, list[str]]:
    """Return a manifest's record of weights that the model's files lack (20 names at most), nothing where none are."""
    return {"not_loaded": [*not_loaded[:_MAX_NAMED]]} if not_loaded else {}


def outlier_dims(tally: Tally, hook: str) -> list[dict[str, int | float]]:
    """Return the dimensions whose variance exceeds 50 times the median one, largest first (16 at most)."""
    variance = tally.kept[hook].variance
    median = float(variance.median())
    order = torch.argsort(variance, descending=True)[:_MAX_OUTLIERS].tolist()
    return [
        {"dim": dim, "variance": float(variance[dim]), "over_median": float(variance[dim]) / median}
        for dim in order
        if median > 0 and float(variance[dim]) > OUTLIER_RATIO * median
    ]

"""How far a harvest has come, on disk: written after each shard, so a killed harvest continues where it stood."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wsae.acts.packing import Position
from wsae.acts.tally import Tally
from wsae.core.artifact import MANIFEST, FileRecord, check_file, record
from wsae.core.config import Config
from wsae.core.errors import UserError
from wsae.core.files import drop, read_sealed, seal, write_json
from wsae.core.tensors import load_tensors, save_tensors

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

    def with_split(self, split: str, state: SplitState) -> "Ledger":
        """Return the ledger with one half replaced."""
        return self.model_copy(update={"splits": {**self.splits, split: state}})

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
    refuse_other(out, ledger.config, config, ledger.inputs, inputs)
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
    out: Path,
    old: dict[str, Any],
    new: dict[str, Any],
    old_inputs: dict[str, str],
    new_inputs: dict[str, str],
) -> None:
    """Raise UserError when a directory was made with another config or from other data."""
    for key in new:
        if old.get(key) != new[key]:
            raise UserError(
                f"{out}: was made with {key}={old.get(key)!r}, not {new[key]!r}; choose another --out or remove it"
            )
    for name, value in new_inputs.items():
        if old_inputs.get(name) != value:
            raise UserError(
                f"{out}: was made from another {name} (its files differ); choose another --out or remove it"
            )


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

"""Activations of a model on a text to a store on disk: all hooks in one pass, resumable, ended by a manifest.

The held-out half is written first: a text too short for it fails before the long half starts.
"""

from pathlib import Path

import numpy as np
import torch

from wsae.acts.background import Background
from wsae.acts.config import HarvestConfig
from wsae.acts.decoding import decode_table
from wsae.acts.flow import Flow, NonFiniteError, Step
from wsae.acts.language import LanguageModel, load_language, locate
from wsae.acts.language import fingerprint as model_fingerprint
from wsae.acts.ledger import (
    PROGRESS,
    Ledger,
    SplitState,
    clean_up_if_nothing_done,
    open_ledger,
    refuse_foreign,
    refuse_other,
)
from wsae.acts.packing import Packer
from wsae.acts.shards import ShardWriter, as_stored, shard_name
from wsae.acts.store import STATS, TOKENS, Store
from wsae.acts.tally import Tally
from wsae.acts.text import documents
from wsae.acts.text import fingerprint as text_fingerprint
from wsae.core.artifact import MANIFEST, locked, read_manifest, record, write_json, write_manifest
from wsae.core.errors import UserError
from wsae.core.progress import Progress, Tick, quiet
from wsae.core.tensors import load_tensors, save_tensors
from wsae.losses.config import OUTLIER_RATIO

_MAX_OUTLIERS = 16


def harvest(
    cfg: HarvestConfig,
    out: Path | str,
    progress: Progress = quiet,
    language: LanguageModel | None = None,
) -> Store:
    """Write (or finish, or just open) the store of `cfg` at `out`.

    The same command on a killed harvest continues after its last whole shard and ends with the same bytes. `language`
    saves loading the model that `cfg` names a second time. Raises UserError for a missing or empty text, a bad line, a
    hook the model lacks, NaN or infinite activations (hook, shard, row, dimension), a full disk, or a directory that
    belongs to another config.
    """
    out = Path(out)
    config = cfg.to_dict()
    inputs = {"model": model_fingerprint(locate(cfg.model)), "text": text_fingerprint(cfg.text)}
    if (out / MANIFEST).exists():
        manifest = read_manifest(out, "store", verify=False)
        refuse_other(out, manifest.config, config, manifest.inputs, inputs)
        return Store(out, verify=False)
    if next(documents(cfg.text), None) is None:
        raise UserError(f"text {cfg.text.path}: no documents in it")
    flow = Flow(cfg, language or load_language(cfg.model, cfg.dtype, cfg.device))
    refuse_foreign(out)
    created = not out.exists()
    with locked(out):
        ledger = open_ledger(out, config, inputs)
        try:
            _run(flow, out, ledger, progress)
        except BaseException:
            clean_up_if_nothing_done(out, created)
            raise
    return Store(out, verify=False)


def _run(flow: Flow, out: Path, ledger: Ledger, progress: Progress) -> None:
    cfg = flow.cfg
    ledger = ledger.model_copy(update={"medians": flow.calibrate(ledger.medians)})
    tally = ledger.tally(out, flow.hooks)
    ledger = ledger.save(out, tally)
    wanted = {"heldout": cfg.heldout_tokens, "train": cfg.tokens}
    done = sum(state.rows for state in ledger.splits.values())
    with progress("harvest", sum(wanted.values()), "tokens", done) as tick:
        for split, rows in wanted.items():
            ledger = _Split(flow, out, ledger, split, tally).run(rows, tick)
    _finish(flow, out, ledger, tally)


class _Split:
    """Writes one half of the store: `run` drives the model, `_add` runs in the writer thread."""

    def __init__(self, flow: Flow, out: Path, ledger: Ledger, split: str, tally: Tally) -> None:
        self._flow, self._out, self._ledger, self._name, self._tally = (
            flow,
            out,
            ledger,
            split,
            tally,
        )
        self._state = ledger.splits[split]
        self._shard: ShardWriter | None = None

    def run(self, wanted: int, tick: Tick) -> Ledger:
        """Write rows until there are `wanted` or the text ends; return the ledger."""
        if self._state.done:
            return self._ledger
        try:
            with Background(self._add, threaded=self._flow.cfg.device != "cpu") as worker:
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
        for step in self._flow.steps(self._name == "heldout", self._state.start):
            part = step.head(wanted - rows)
            rows += len(part.seq)
            worker.put(part)
            tick(len(part.seq))
            if rows >= wanted:
                return False
        if rows == 0:
            cfg = self._flow.cfg
            raise UserError(
                f"text {cfg.text.path}: no {self._name} token is left (heldout_fraction {cfg.heldout_fraction}, "
                "padding, special and first positions skipped); give more text"
            )
        return True

    def _add(self, step: Step) -> None:
        cfg = self._flow.cfg
        step = as_stored(step, cfg.store_dtype)
        if self._shard is None:
            self._shard = ShardWriter(
                self._out, self._name, len(self._state.shard_rows), self._flow.hooks, cfg
            )
        self._shard.append(step)
        if self._name == "train":
            self._tally.update(step.x, step.skipped, step.counts)
        counts = {
            reason: n + self._state.counts.get(reason, 0) for reason, n in step.counts.items()
        }
        self._state = self._state.model_copy(
            update={"counts": counts, "position": tuple(step.after)}
        )
        if self._shard.rows >= cfg.shard_tokens:
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


def _finish(flow: Flow, out: Path, ledger: Ledger, tally: Tally) -> None:
    save_tensors(out / STATS, tally.tensors())
    write_json(out / TOKENS, decode_table(flow.language.tokenizer, _used_ids(out, ledger)))
    known = {name: kept for state in ledger.splits.values() for name, kept in state.files.items()}
    write_manifest(
        out,
        "store",
        config=ledger.config,
        files={**known, STATS: record(out / STATS), TOKENS: record(out / TOKENS)},
        inputs=ledger.inputs,
        info=_info(flow, ledger, tally),
    )
    for leftover in (out / PROGRESS, *out.glob("progress-*.safetensors")):
        leftover.unlink()


def _used_ids(out: Path, ledger: Ledger) -> list[int]:
    used: set[int] = set()
    for split, state in ledger.splits.items():
        for number in range(len(state.shard_rows)):
            ids = load_tensors(out / shard_name(split, None, number))["ids"]
            used.update(np.unique(ids.numpy()).tolist())
    return sorted(used)


def _info(flow: Flow, ledger: Ledger, tally: Tally) -> dict[str, object]:
    train, heldout = ledger.splits["train"], ledger.splits["heldout"]
    return {
        "hooks": flow.hooks,
        "model": flow.language.name,
        "tokenizer": type(flow.language.tokenizer).__name__,
        "document_ends": Packer(flow.cfg, flow.language.tokenizer, heldout=True).ends,
        "seq_len": flow.cfg.seq_len,
        "store_dtype": flow.cfg.store_dtype,
        "rows": {"train": train.rows, "heldout": heldout.rows},
        "shard_rows": {"train": list(train.shard_rows), "heldout": list(heldout.shard_rows)},
        "sequences": {"train": train.position[2], "heldout": heldout.position[2]},
        "exhausted": train.exhausted,
        "heldout_exhausted": heldout.exhausted,
        "skipped": {"train": _skipped(train), "heldout": _skipped(heldout)},
        "median_norm": ledger.medians,
        "outlier_dims": {hook: outlier_dims(tally, hook) for hook in flow.hooks},
    }


def _skipped(state: SplitState) -> dict[str, int]:
    return {reason: n for reason, n in state.counts.items() if reason != "kept"}


def outlier_dims(tally: Tally, hook: str) -> list[dict[str, float]]:
    """Return the dimensions whose variance exceeds 50 times the median one, largest first (16 at most)."""
    variance = tally.kept[hook].variance
    median = float(variance.median())
    order = torch.argsort(variance, descending=True)[:_MAX_OUTLIERS].tolist()
    return [
        {"dim": dim, "variance": float(variance[dim]), "over_median": float(variance[dim]) / median}
        for dim in order
        if median > 0 and float(variance[dim]) > OUTLIER_RATIO * median
    ]

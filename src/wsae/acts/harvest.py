"""Activations of a model on a text to a store on disk: all hooks in one pass, resumable, ended by a manifest.

The held-out half is written first: a text too short for it fails before the long half starts.
"""

from pathlib import Path

import numpy as np

from wsae.acts.config import HarvestConfig
from wsae.acts.flow import Flow
from wsae.acts.language import LanguageModel, load_language, locate
from wsae.acts.language import fingerprint as model_fingerprint
from wsae.acts.store import (
    TOKENS,
    Feed,
    Ledger,
    ShardForm,
    Store,
    drop_ledger,
    finish,
    lacking,
    outlier_dims,
    refuse_other,
    shard_name,
    skipped,
    unfinished,
    write_halves,
)
from wsae.acts.tally import Tally
from wsae.acts.text import Packer, TextCounts, documents, survey, told
from wsae.acts.text import fingerprint as text_fingerprint
from wsae.acts.tokens import decode_table, texts_json
from wsae.core.artifact import MANIFEST, read_manifest
from wsae.core.errors import UserError
from wsae.core.files import write_json
from wsae.core.progress import Progress, quiet
from wsae.core.tensors import load_tensors


def harvest(
    cfg: HarvestConfig,
    out: Path | str,
    progress: Progress = quiet,
    language: LanguageModel | None = None,
) -> Store:
    """Write (or finish, or just open) the store of `cfg` at `out`.

    The same command on a killed harvest continues after its last whole shard and ends with the same bytes. `language`
    saves loading the model that `cfg` names a second time. Raises UserError for a missing or empty text, a bad line, a
    hook the model lacks or that has no row for each token, sequences longer than the model's positions, NaN or infinite
    activations (hook, shard, row, dimension), a full disk, or a directory that belongs to another config.
    """
    out = Path(out)
    config = cfg.to_dict()
    inputs = {"model": model_fingerprint(locate(cfg.model)), "text": text_fingerprint(cfg.text)}
    if (out / MANIFEST).exists():
        manifest = read_manifest(out, "store", verify=False)
        refuse_other(out, manifest.config, config, manifest.inputs, inputs)
        drop_ledger(out)
        return Store(out, verify=False)
    reading = TextCounts()
    if next(documents(cfg.text, reading=reading), None) is None:
        without = "".join(f" ({line})" for line in told(reading.info()))
        raise UserError(f"text {cfg.text.path}: no documents in it{without}")
    flow = Flow(cfg, language or load_language(cfg.model, cfg.dtype, cfg.device))
    with unfinished(out, config, inputs) as ledger:
        _run(flow, out, ledger, progress)
    return Store(out, verify=False)


def _run(flow: Flow, out: Path, ledger: Ledger, progress: Progress) -> None:
    cfg = flow.cfg
    ledger = ledger.model_copy(update={"medians": flow.calibrate(ledger.medians)})
    tally = ledger.tally(out, flow.hooks)
    ledger = ledger.save(out, tally)
    wanted = {"heldout": cfg.heldout_tokens, "train": cfg.tokens}
    form = ShardForm(cfg.store_dtype, cfg.shard_tokens, cfg.seq_len)
    feed = Feed(flow.hooks, flow.steps, form, _nothing(cfg), threaded=cfg.device != "cpu")
    ledger = write_halves(feed, out, ledger, tally, wanted, "tokens", progress)
    _finish(flow, out, ledger, tally)


def _nothing(cfg: HarvestConfig) -> str:
    return (
        f"text {cfg.text.path}: no {{split}} token is left (heldout_fraction {cfg.heldout_fraction}, "
        "padding, special and first positions skipped); give more text"
    )


def _finish(flow: Flow, out: Path, ledger: Ledger, tally: Tally) -> None:
    texts = decode_table(flow.language.tokenizer, _used_ids(out, ledger))
    write_json(out / TOKENS, texts_json(texts))
    finish(out, ledger, tally, [TOKENS], _info(flow, ledger, tally))


def _used_ids(out: Path, ledger: Ledger) -> list[int]:
    used: set[int] = set()
    for split, state in ledger.splits.items():
        for number in range(len(state.shard_rows)):
            ids = load_tensors(out / shard_name(split, None, number))["ids"]
            used.update(np.unique(ids.numpy()).tolist())
    return sorted(used)


def _info(flow: Flow, ledger: Ledger, tally: Tally) -> dict[str, object]:
    train, heldout = ledger.splits["train"], ledger.splits["heldout"]
    packer = Packer(flow.cfg, flow.language.tokenizer, heldout=True)
    ends = {name: None if s.exhausted else s.start.documents for name, s in ledger.splits.items()}
    return {
        "hooks": flow.hooks,
        "model": flow.language.name,
        "tokenizer": type(flow.language.tokenizer).__name__,
        "document_ends": packer.ends,
        "seq_len": flow.cfg.seq_len,
        "store_dtype": flow.cfg.store_dtype,
        "rows": {"train": train.rows, "heldout": heldout.rows},
        "shard_rows": {"train": list(train.shard_rows), "heldout": list(heldout.shard_rows)},
        "sequences": {"train": train.position[2], "heldout": heldout.position[2]},
        "exhausted": train.exhausted,
        "heldout_exhausted": heldout.exhausted,
        "skipped": {"train": skipped(train), "heldout": skipped(heldout)},
        "text": survey(flow.cfg, ends, packer.refuses),
        "median_norm": ledger.medians,
        "outlier_dims": {hook: outlier_dims(tally, hook) for hook in flow.hooks},
        **flow.probed.record(),
        **lacking(flow.language.not_loaded),
    }

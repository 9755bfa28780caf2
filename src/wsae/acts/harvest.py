"""Activations of a model on a text to a store on disk: all hooks in one pass, resumable, ended by a manifest.

The held-out half is written first: a text too short for it fails before the long half starts.
"""

from pathlib import Path

import numpy as np

from wsae.acts.config import HarvestConfig
from wsae.acts.flow import Flow, Tally
from wsae.acts.language import LanguageModel, language_for, locate
from wsae.acts.language import fingerprint as model_fingerprint
from wsae.acts.store import (
    TOKENS,
    Feed,
    Ledger,
    ShardForm,
    Store,
    lacking,
    outlier_dims,
    shard_name,
    write_store,
    written,
)
from wsae.acts.text import Packer, TextCounts, documents, survey, told
from wsae.acts.text import fingerprint as text_fingerprint
from wsae.acts.tokens import decode_table, texts_json
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
    inputs = {"model": model_fingerprint(locate(cfg.model)), "text": text_fingerprint(cfg.text)}

    def feed(ledger: Ledger) -> Feed:
        reading = TextCounts()
        if next(documents(cfg.text, reading=reading), None) is None:
            without = "".join(f" ({line})" for line in told(reading.info()))
            raise UserError(f"text {cfg.text.path}: no documents in it{without}")
        flow = Flow(cfg, language or language_for(cfg))
        medians = flow.calibrate(ledger.medians)
        return Feed(
            flow.hooks,
            flow.steps,
            ShardForm(cfg.store_dtype, cfg.shard_tokens, cfg.seq_len),
            {"heldout": cfg.heldout_tokens, "train": cfg.tokens},
            "tokens",
            f"text {cfg.text.path}: no {{split}} token is left (heldout_fraction {cfg.heldout_fraction}, "
            "padding, special and first positions skipped); give more text",
            threaded=cfg.device != "cpu",
            rest=lambda ledger, tally: _rest(flow, out, ledger, tally),
            medians=medians,
        )

    return write_store(out, cfg.located().to_dict(), inputs, feed, progress)


def _rest(
    flow: Flow, out: Path, ledger: Ledger, tally: Tally
) -> tuple[list[str], dict[str, object]]:
    """Write what the token ids read, and return what the manifest says."""
    cfg, tokenizer, splits, used = flow.cfg, flow.language.tokenizer, ledger.splits, set[int]()
    for split, state in splits.items():
        for number in range(len(state.shard_rows)):
            ids = load_tensors(out / shard_name(split, None, number))["ids"]
            used.update(np.unique(ids.numpy()).tolist())
    write_json(out / TOKENS, texts_json(decode_table(tokenizer, sorted(used))))
    packer = Packer(cfg, tokenizer, heldout=True)
    ends = {name: None if s.exhausted else s.start.documents for name, s in splits.items()}
    train, heldout = splits["train"], splits["heldout"]
    return [TOKENS], {
        "hooks": flow.hooks,
        "model": flow.language.name,
        "tokenizer": type(tokenizer).__name__,
        "document_ends": packer.ends,
        "seq_len": cfg.seq_len,
        **written(ledger, cfg.store_dtype),
        "sequences": {"train": train.position[2], "heldout": heldout.position[2]},
        "exhausted": train.exhausted,
        "heldout_exhausted": heldout.exhausted,
        "skipped": {
            name: {reason: n for reason, n in half.counts.items() if reason != "kept"}
            for name, half in (("train", train), ("heldout", heldout))
        },
        "text": survey(cfg, ends, packer.refuses),
        "median_norm": ledger.medians,
        "outlier_dims": outlier_dims(tally),
        **flow.probed.record(),
        **lacking(flow.language.not_loaded),
    }

"""The pre-flight: a model with its text and hooks; and the check-up of a store, a run or an array on disk."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from wsae.acts.source import StoreSource, open_source
from wsae.acts.store import Store
from wsae.acts.text import told
from wsae.acts.tokens import TokenTable
from wsae.core.artifact import MANIFEST, read_manifest
from wsae.core.errors import UserError, understood
from wsae.core.files import read_json
from wsae.core.progress import Progress, quiet
from wsae.doctor import activations, machine
from wsae.doctor.check import Check, report
from wsae.doctor.config import DoctorConfig
from wsae.doctor.plan import check_costs, check_shapes
from wsae.train.config import FEW_STEPS, TrainConfig

SAMPLE_ROWS = 4096
"""Rows of a store or array that are looked at for outliers and rounding."""
_BEGINNING = 32
"""Tokens by which a document is recognised."""
_MOST_ROWS = 5_000_000
"""Training rows up to which a store's documents are compared."""


def examine(cfg: DoctorConfig, progress: Progress = quiet) -> dict[str, Any]:
    """Return the report: subject, checks (name, status, value, advice), number of warnings and failures.

    Raises UserError when the subject itself cannot be read (no such model, file or text).
    """
    if cfg.harvest is not None:
        from wsae.doctor.model import examine_model  # brings transformers, which data do not need

        with progress("doctor", 4, "stages") as tick:
            return report(cfg.harvest.model, examine_model(cfg, cfg.harvest, tick))
    assert cfg.data is not None, "a subject: harvest or data"
    look = _examine_run if _is_run(cfg.data) else examine_data
    return report(cfg.data, look(cfg, cfg.data, progress)) | {"on_disk": True}


def examine_data(cfg: DoctorConfig, path: str, progress: Progress = quiet) -> list[Check]:
    """Read a store or array: checksums, every value, widths, then the same shape and cost checks.

    Of a store also what can be wrong in it, and a few of its rows against those of its model.
    """
    checks = [machine.check_versions(), machine.check_device(cfg.device)]
    try:
        source = open_source(path)
        stats = source.stats(progress)
    except UserError as error:
        return [*checks, Check("data", "fail", str(error))]
    rows = source.n_rows or 0
    status = "warn" if rows < cfg.train.batch_size else "ok"
    mend = (
        f"fewer than one batch of {cfg.train.batch_size}: lower --batch-size"
        if status == "warn"
        else ""
    )
    checks.append(Check("data", status, f"{rows:,} training rows, all values finite", mend))
    if isinstance(source, StoreSource):
        checks += check_store(source.store, cfg.device)
    checks += check_shapes(cfg, source.hooks)
    size = min(SAMPLE_ROWS, rows)
    batch = source.stream(size, cfg.train.seed).next() if size else {}
    for hook, x in batch.items():
        gammas = [member.gamma for member in cfg.train.members]
        variance = stats[hook].kept.variance
        checks += [activations.check_constant(hook, variance), _check_norms(hook, x)]
        checks += activations.check_outliers(hook, variance, gammas)
        checks += activations.check_rounding(hook, x, "float32")
    return checks + check_costs(cfg, batch, rows, None)


def check_store(store: Store, device: str) -> list[Check]:
    """Return what can be wrong in a store: how it was made, its rows, its tokens, its halves."""
    checks = [_check_made(store)]
    if lacking := store.info.get("not_loaded"):
        named = ", ".join(map(str, lacking)) if isinstance(lacking, list) else str(lacking)
        mend = "get the whole checkpoint and harvest again"
        checks.append(Check("weights", "warn", f"not in the model's files: {named}", mend))
    if store.of_images:
        return checks
    from wsae.doctor.model import compare_rows  # brings transformers

    checks += compare_rows(store, device)
    table = store.tokens("heldout") if store.n_rows["heldout"] else store.tokens("train")
    assert table is not None, "a store of text"
    checks.append(_check_texts(table))
    if "text" not in store.info:
        value = "made by an older wsae, which did not count what it left out of the text"
        older = Check("text", "warn", value, "harvest again to know")
        return [*checks, older, *_check_documents(store)]
    with understood(store.path / MANIFEST):
        return [*checks, *(Check("text", "warn", line) for line in told(store.info["text"]))]


def _check_made(store: Store) -> Check:
    version = store.manifest.wsae_version
    if "probe" in store.info or store.of_images:
        return Check("made by", "ok", f"wsae {version}")
    value = f"wsae {version}, which did not probe its hooks: order and repeatability were taken on trust"
    return Check("made by", "warn", value, "trust it where its rows agree with the model's")


def _check_norms(hook: str, x: Float[Tensor, "rows d_in"]) -> Check:
    norm = x.double().norm(dim=1)
    ratio = float(norm.max()) / max(float(norm.median()), 1e-300)
    if ratio > activations.SINK_RATIO:
        mend = "attention sinks are among them: harvest with --sink-norm-ratio 10"
        return Check(f"norms at {hook}", "warn", f"the largest is {ratio:.3g} x the median", mend)
    return Check(f"norms at {hook}", "ok", f"the largest is {ratio:.3g} x the median")


def _check_texts(table: TokenTable) -> Check:
    ids, counts = np.unique(_flat(table), return_counts=True)
    broken = [n for i, n in zip(ids, counts, strict=True) if "\ufffd" in table.decode([int(i)])[0]]
    share = sum(broken) / max(1, int(counts.sum()))
    if share:
        mend = "an older wsae wrote characters split over tokens so; harvest again to read them"
        return Check("token texts", "warn", f"{100 * share:.2g} % read as U+FFFD", mend)
    return Check("token texts", "ok", "no U+FFFD in them")


def _check_documents(store: Store) -> list[Check]:
    """Compare how the documents of both halves begin."""
    name = "documents in both halves"
    if not store.n_rows["heldout"]:
        return []
    if store.n_rows["train"] > _MOST_ROWS:
        return [Check(name, "ok", f"not compared: more than {_MOST_ROWS:,} training rows")]
    halves = [_beginnings(store.tokens(split)) for split in ("train", "heldout")]
    if not halves[0] or not halves[1]:
        return [Check(name, "ok", f"not compared: too few of {_BEGINNING} tokens or more")]
    seen = set(halves[0])
    both = sum(start in seen for start in halves[1])
    value = f"{both} of {len(halves[1])} held-out ones begin like one that is trained on"
    if both > 0.01 * len(halves[1]):
        mend = "scores on them are of seen text: remove duplicates from the text and harvest again"
        return [Check(name, "warn", value, mend)]
    return [Check(name, "ok", value)]


def _flat(table: TokenTable) -> np.ndarray:
    """Return all ids but padding, sequence after sequence."""
    mask = torch.arange(table.ids.shape[1]) < table.lengths[:, None]
    return table.ids[mask].numpy()


def _beginnings(table: TokenTable | None) -> list[bytes]:
    """Return the first ids of every document that is long enough, as bytes; none where no id ends documents."""
    if table is None or table.ends is None or not len(table.ids):
        return []
    if not table.ends:
        rows = zip(table.ids.numpy(), table.lengths.tolist(), strict=True)
        return [row[:_BEGINNING].tobytes() for row, n in rows if n >= _BEGINNING]
    first = table.ids[:, 0]
    put_before = bool((first == first[0]).all()) and len(first) > 1
    kept = TokenTable(table.ids[:, 1:], table.lengths - 1, {}) if put_before else table
    flat = _flat(kept)
    ends = np.flatnonzero(np.isin(flat, table.ends))
    starts, stops = np.r_[0, ends + 1], np.r_[ends, len(flat)]
    long = stops - starts >= _BEGINNING
    return [flat[start : start + _BEGINNING].tobytes() for start in starts[long]]


def _is_run(path: str) -> bool:
    place = Path(path) / MANIFEST
    data = read_json(place) if place.is_file() else None
    return isinstance(data, dict) and data.get("kind") == "run"


def _examine_run(cfg: DoctorConfig, path: str, progress: Progress) -> list[Check]:
    """Check a run: its files, how long it was trained, the data it is of, and what its evaluation says."""
    checks = [machine.check_versions(), machine.check_device(cfg.device)]
    try:
        manifest = read_manifest(path, "run")
        config = read_json(Path(path) / "config.json")
        with understood(Path(path) / "config.json"):
            train = TrainConfig.parse(config["train"], where=str(Path(path) / "config.json"))
            source = dict(config.get("source") or {})
    except UserError as error:
        return [*checks, Check("run", "fail", str(error))]
    checks.append(Check("run", "ok", f"whole, made by wsae {manifest.wsae_version}"))
    checks.append(_check_steps(train))
    data = _run_data(cfg, source, progress)
    checks += data
    sees_later = any(check.name == "later tokens" and check.status == "warn" for check in data)
    return checks + _check_evaluation(Path(path), sees_later)


def _check_steps(train: TrainConfig) -> Check:
    value = f"{train.steps:,} of {train.batch_size:,} rows"
    if train.steps < FEW_STEPS:
        return Check(
            "steps", "warn", value, "hardly trained: give more --tokens, or a smaller --batch-size"
        )
    return Check("steps", "ok", value)


def _run_data(cfg: DoctorConfig, source: dict[str, Any], progress: Progress) -> list[Check]:
    """Check the data that a run was trained on: its store, its array, or its model's hooks."""
    if source.get("kind") == "live":
        from wsae.doctor.model import examine_live  # brings transformers

        return examine_live(source.get("harvest"), cfg.device)
    path = source.get("path")
    if path is None or not Path(path).exists():
        value = "an array in memory" if path is None else f"{path}: no longer there"
        return [Check("data", "warn", f"not looked at: {value}", "")]
    try:
        data = open_source(path)
        data.stats(progress)
    except UserError as error:
        return [Check("data", "fail", str(error))]
    checks = [Check("data", "ok", f"{path}: {data.n_rows or 0:,} training rows, all values finite")]
    return checks + (check_store(data.store, cfg.device) if isinstance(data, StoreSource) else [])


def _check_evaluation(run: Path, sees_later: bool) -> list[Check]:
    """Find cross-entropies of a model that reads the token it is asked for."""
    place = run / "evaluation" / "evaluation.json"
    if not sees_later or not place.is_file():
        return []
    record = read_json(place)
    with understood(place):
        members = [m for hook in record["hooks"].values() for m in hook["members"].values()]
        wrong = any("ce_clean" in member["metrics"] for member in members)
    if not wrong:
        return [Check("evaluation", "ok", "no next-token cross-entropy in it")]
    value = "has a next-token cross-entropy, of a model that reads that token"
    return [Check("evaluation", "fail", value, f"evaluate again: wsae evaluate {run}")]

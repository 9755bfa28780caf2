"""The pre-flight: a model with its text and hooks; and the check-up of a store, a run or an array on disk."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor

from wsae.acts.capture import Capture, tokens
from wsae.acts.config import HarvestConfig, LiveConfig
from wsae.acts.hookpoints import SEES_LATER, HookPoint, Probed
from wsae.acts.hookpoints import probe as probe_hooks
from wsae.acts.language import LanguageModel, language_for, locate
from wsae.acts.source import StoreSource, open_source
from wsae.acts.store import Store
from wsae.acts.text import told
from wsae.acts.tokens import TokenTable
from wsae.core.artifact import MANIFEST, kind_of, read_manifest
from wsae.core.config import Config
from wsae.core.errors import UserError, named, understood
from wsae.core.progress import Progress, Tick, quiet
from wsae.doctor import measure
from wsae.doctor.measure import Check, report, warned
from wsae.run import EVALUATION_PART, Run
from wsae.train.config import FEW_STEPS, TrainConfig

# The planned SAEs: do their shapes fit, and what will they take of memory and time?


class DoctorConfig(Config):
    """The run to be examined, and how long to look."""

    train: TrainConfig
    """The SAEs and the training that are planned."""
    harvest: HarvestConfig | None = None
    """The model, text and hook points; none when the subject is a store or an array."""
    mixing: LiveConfig = LiveConfig()
    """How its rows are mixed when they go straight to training."""
    data: str | None = None
    """A store's directory or an array file."""
    d_in: PositiveInt | None = None
    """The width the caller expects, if any."""
    out: str = "."
    """Where a store would be written (free space is looked up there)."""
    device: str = "cpu"
    """Where the model and the SAEs would run."""
    probe_seqs: PositiveInt = 8
    """Sequences run through the model."""
    probe_seconds: float = Field(default=2.0, gt=0)
    """Time spent on measuring training steps, about."""


class LiveCost(NamedTuple):
    """What training from a model adds: the speed of its forward pass, and the rows that wait to be mixed."""

    tokens_per_s: float
    mixed_rows: int


def check_shapes(cfg: DoctorConfig, widths: dict[str, int]) -> list[Check]:
    """Check each hook's width and every form of SAE on it."""
    checks: list[Check] = []
    for hook, d_in in widths.items():
        checks.append(measure.check_width(hook, d_in, cfg.d_in))
        found = (measure.check_member(hook, d_in, member) for member in cfg.train.members)
        checks += dict.fromkeys(found)  # members of one form say the same
    return checks


def check_costs(
    cfg: DoctorConfig,
    sample: dict[str, Float[Tensor, "rows _"]],
    rows: int,
    live: LiveCost | None,
) -> list[Check]:
    """Check covariances, memory and time of the planned training, when its shapes fit the sample.

    `rows` is how many rows the statistics will see.
    """
    widths = [x.shape[1] for x in sample.values()]
    try:
        saes = [m.sae_config(d) for d in widths for m in cfg.train.members]
    except UserError:
        return []
    if not saes:
        return []
    held = measure.held_memory(cfg.device)
    # a live model's first block exists twice: as the rows behind the statistics, and in the block
    mixing = 2 * 4 * live.mixed_rows * sum(widths) if live else 0
    need = measure.planned(cfg.train, saes, cfg.device)._replace(held=int(held), rows=mixing)
    checks = [measure.check_memory(need, measure.free_memory(cfg.device) + held)]
    finite = all(bool(torch.isfinite(x).all()) for x in sample.values())
    if checks[0].status == "fail" or not finite:
        return checks
    for hook, x in sample.items():
        checks += measure.check_covariance(hook, x, cfg.train.members, rows)
    per_step = sum(
        measure.seconds_per_step(x, cfg.train, cfg.device, cfg.probe_seconds / len(sample))
        for x in sample.values()
    )
    return [*checks, measure.check_time(cfg.train, per_step, live and live.tokens_per_s)]


# The pre-flight of a language model, its text and its hook points; a store's rows against its
# model's.


def examine_model(cfg: DoctorConfig, harvest: HarvestConfig, tick: Tick) -> list[Check]:
    """Load the model, run a few sequences and a few training steps."""
    language = language_for(harvest, cfg.device)
    tick(1)
    lacking = named(language.not_loaded)
    checks = [_check_weights(lacking, "a hook or a prediction that depends on them is refused")]
    tokenizer = language.tokenizer
    ids = tokenizer("a", verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id is not None and ids and ids[0] == tokenizer.bos_token_id
    said = f"adds {tokenizer.bos_token}; the mask drops it" if bos else "adds none"
    checks.append(Check("begin-of-text token", "ok", f"the tokenizer {said}"))
    have = measure.text_size(harvest, language)
    checks.append(measure.check_text(have.tokens, harvest.tokens, have.whole))
    checks += [Check("text", "warn", line) for line in have.told]
    try:
        probed = probe_hooks(language.model, harvest.hooks, tokens(harvest.seq_len))
    except UserError as error:
        return [*checks, Check("hooks", "fail", str(error))]
    hooks = probed.hooks
    checks += check_probed(probed, harvest.seq_len)
    checks += check_shapes(cfg, {hook.name: hook.d_in for hook in hooks})
    tick(1)
    look = measure.probe_model(harvest, language, hooks, cfg.probe_seqs)
    tick(1)
    for hook in hooks:
        checks += _check_hook(cfg, harvest, look, hook)
    rows = {hook.name: look.rows(hook.name) for hook in hooks}
    mixed = min(cfg.mixing.shuffle_tokens, harvest.tokens)
    behind_stats = min(cfg.mixing.stats_tokens, harvest.tokens)
    checks += check_costs(cfg, rows, behind_stats, LiveCost(look.tokens_per_s, mixed))
    need = measure.store_bytes(harvest, [hook.d_in for hook in hooks])
    tick(1)
    return [*checks, measure.check_disk(need, measure.free_disk(cfg.out))]


def check_probed(probed: Probed, seq_len: int) -> list[Check]:
    """Tell what a probe found: the form of each hook's rows, later tokens, the model's positions."""
    checks = [
        Check(
            f"rows of {hook.name}", "ok", f"{hook.layout}: one for each token, the same each time"
        )
        for hook in probed.hooks
    ]
    if probed.causal is False:
        checks.append(Check("later tokens", "warn", SEES_LATER, "fvu and the others are"))
    elif probed.causal:
        checks.append(Check("later tokens", "ok", "no row depends on them (the model is causal)"))
    beyond = [note for note in probed.notes if note != SEES_LATER]
    shown = "no table of positions" if probed.limit is None else f"{probed.limit} in its table"
    shown = beyond[0] if beyond else f"{shown}, sequences of {seq_len}"
    return [*checks, warned("positions", shown, "lower --seq-len" if beyond else "")]


AGREES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""Difference of a stored row from the model's, as a share of its norm, that rounding may make."""
ROWS_AGAINST = "rows against the model"
_COMPARED = 8
"""Sequences that are run through the model again."""


def compare_rows(store: Store, device: str) -> list[Check]:
    """Run a few of a store's sequences through its model again and compare the rows."""
    cfg = HarvestConfig.parse(store.manifest.config, where=str(store.path / MANIFEST))
    advice = f"to compare them, bring the model back to {cfg.model}"
    try:
        place = locate(cfg.model)
    except UserError as error:
        return [Check(ROWS_AGAINST, "warn", f"not compared: {error}", advice)]
    try:
        language = language_for(cfg, device)
        probed = probe_hooks(language.model, list(store.hooks), tokens(cfg.seq_len))
    except UserError as error:
        if isinstance(place, Path):
            return [Check(ROWS_AGAINST, "fail", str(error), "do not use rows of this model")]
        return [Check(ROWS_AGAINST, "warn", f"not compared: {error}", advice)]
    checks = _differences(store, cfg, language, probed)
    if probed.causal is False:
        checks.append(Check("later tokens", "warn", SEES_LATER, "evaluate runs on it again"))
    return checks


def examine_live(harvest: object, device: str) -> list[Check]:
    """Probe the hooks of a run that was trained straight from a model."""
    try:
        cfg = HarvestConfig.parse({**dict(harvest or {}), "device": device}, where="run")  # pyright: ignore
        language = language_for(cfg, device)
        return check_probed(
            probe_hooks(language.model, cfg.hooks, tokens(cfg.seq_len)), cfg.seq_len
        )
    except UserError as error:
        return [Check("hooks", "fail", str(error))]


def _differences(
    store: Store, cfg: HarvestConfig, language: LanguageModel, probed: Probed
) -> list[Check]:
    split = "heldout" if store.n_rows["heldout"] else "train"
    table, (seq, pos) = store.tokens(split), store.places(split)
    assert table is not None, "a store of text"
    chosen = (seq < seq.min() + _COMPARED).nonzero()[:, 0].numpy()
    first, seq, pos = int(seq.min()), seq[chosen], pos[chosen]
    ids = table.ids[first : first + _COMPARED].long()
    mask = torch.arange(ids.shape[1]) < table.lengths[first : first + _COMPARED, None]
    capture = Capture(language.model, probed.hooks)
    now = capture(ids.to(language.device), mask.to(language.device))
    stored = store.rows(split, np.asarray(chosen))
    limit = max(AGREES[cfg.dtype], AGREES[cfg.store_dtype])
    checks = []
    for hook in probed.hooks:
        a, b = stored[hook.name].double(), now[hook.name].float().cpu()[seq - first, pos].double()
        apart = (a - b).norm(dim=1) / torch.maximum(a.norm(dim=1), b.norm(dim=1)).clamp_min(1e-300)
        bad = int((apart > limit).sum())
        value = (
            f"{bad} of {len(a)} differ; by {float(apart.median()):.2g} of their norm in the median"
        )
        wrong = bad > 0.05 * len(a)
        fix = (
            f"these rows are not {cfg.model}'s activations at their tokens (other or random weights, or another "
            "order): harvest again, and train again what was trained on them"
        )
        name = f"{ROWS_AGAINST} at {hook.name}"
        checks.append(Check(name, "fail" if wrong else "ok", value, fix if wrong else ""))
    return checks


def _check_weights(lacking: str, fix: str) -> Check:
    if not lacking:
        return Check("weights", "ok", "all are in the model's files")
    return Check("weights", "warn", f"not in the model's files: {lacking}", fix)


def _check_hook(
    cfg: DoctorConfig, harvest: HarvestConfig, look: measure.Probe, hook: HookPoint
) -> Iterable[Check]:
    rows = look.rows(hook.name)
    finite = measure.check_finite(hook.name, look.x[hook.name].flatten(0, 1))
    if finite.status == "fail":
        return [finite]
    variance = rows.double().var(0, correction=0)
    gammas = [member.gamma for member in cfg.train.members]
    return [
        finite,
        measure.check_sinks(hook.name, look.x[hook.name], look.kept),
        *measure.check_outliers(hook.name, variance, gammas),
        *measure.check_rounding(hook.name, rows, harvest.store_dtype),
    ]


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
    checks = [measure.check_versions(), measure.check_device(cfg.device)]
    if cfg.harvest is not None:
        with progress("doctor", 4, "stages") as tick:
            return report(cfg.harvest.model, checks + examine_model(cfg, cfg.harvest, tick))
    assert cfg.data is not None, "a subject: harvest or data"
    look = _examine_run if kind_of(Path(cfg.data)) == "run" else examine_data
    return report(cfg.data, checks + look(cfg, cfg.data, progress)) | {"on_disk": True}


def examine_data(cfg: DoctorConfig, path: str, progress: Progress = quiet) -> list[Check]:
    """Read a store or array: checksums, every value, widths, then the same shape and cost checks.

    Of a store also what can be wrong in it, and a few of its rows against those of its model.
    """
    try:
        source = open_source(path)
        stats = source.stats(progress)
    except UserError as error:
        return [Check("data", "fail", str(error))]
    rows, batch_size = source.n_rows or 0, cfg.train.batch_size
    few = f"fewer than one batch of {batch_size}: lower --batch-size" if rows < batch_size else ""
    checks = [warned("data", f"{rows:,} training rows, all values finite", few)]
    if isinstance(source, StoreSource):
        checks += check_store(source.store, cfg.device)
    checks += check_shapes(cfg, source.hooks)
    size = min(SAMPLE_ROWS, rows)
    batch = source.stream(size, cfg.train.seed).next() if size else {}
    for hook, x in batch.items():
        gammas = [member.gamma for member in cfg.train.members]
        variance = stats[hook].kept.variance
        norm = x.double().norm(dim=1)
        ratio = float(norm.max()) / max(float(norm.median()), 1e-300)
        sinks = ratio > measure.SINK_RATIO
        fix = "attention sinks are among them: harvest with --sink-norm-ratio 10" if sinks else ""
        norms = warned(f"norms at {hook}", f"the largest is {ratio:.3g} x the median", fix)
        checks += [measure.check_constant(hook, variance), norms]
        checks += measure.check_outliers(hook, variance, gammas)
        checks += measure.check_rounding(hook, x, "float32")
    return checks + check_costs(cfg, batch, rows, None)


def check_store(store: Store, device: str) -> list[Check]:
    """Return what can be wrong in a store: how it was made, its rows, its tokens, its halves."""
    made, probed = f"wsae {store.manifest.wsae_version}", "probe" in store.info or store.of_images
    if not probed:
        made += ", which did not probe its hooks: order and repeatability were taken on trust"
    trust = "" if probed else "trust it where its rows agree with the model's"
    checks = [warned("made by", made, trust)]
    if lacking := store.info.get("not_loaded"):
        names = ", ".join(map(str, lacking)) if isinstance(lacking, list) else str(lacking)
        checks.append(_check_weights(names, "get the whole checkpoint and harvest again"))
    if store.of_images:
        return checks

    checks += compare_rows(store, device)
    table = store.tokens("heldout") if store.n_rows["heldout"] else store.tokens("train")
    assert table is not None, "a store of text"
    ids, counts = np.unique(_flat(table), return_counts=True)
    broken = [n for i, n in zip(ids, counts, strict=True) if "\ufffd" in table.decode([int(i)])[0]]
    share = 100 * sum(broken) / max(1, int(counts.sum()))
    fix = "an older wsae wrote characters split over tokens so; harvest again to read them"
    shown = f"{share:.2g} % read as U+FFFD" if share else "no U+FFFD in them"
    checks.append(warned("token texts", shown, fix if share else ""))
    if "text" not in store.info:
        value = "made by an older wsae, which did not count what it left out of the text"
        older = Check("text", "warn", value, "harvest again to know")
        return [*checks, older, *_check_documents(store)]
    with understood(store.path / MANIFEST):
        return [*checks, *(Check("text", "warn", line) for line in told(store.info["text"]))]


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
    fix = "scores on them are of seen text: remove duplicates from the text and harvest again"
    return [warned(name, value, fix if both > 0.01 * len(halves[1]) else "")]


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


def _examine_run(cfg: DoctorConfig, path: str, progress: Progress) -> list[Check]:
    """Check a run: its files, how long it was trained, the data it is of, and what its evaluation says."""
    try:
        manifest = read_manifest(path, "run")
        run = Run(path)
        train, source = run.config, run.source
    except UserError as error:
        return [Check("run", "fail", str(error))]
    assert isinstance(train, TrainConfig), "one SAE alone is not examined as a run"
    value = f"{train.steps:,} of {train.batch_size:,} rows"
    fix = "hardly trained: give more --tokens, or a smaller --batch-size"
    checks = [
        Check("run", "ok", f"whole, made by wsae {manifest.wsae_version}"),
        warned("steps", value, fix if train.steps < FEW_STEPS else ""),
        *_run_data(cfg, source, progress),
    ]
    sees_later = any(check.name == "later tokens" and check.status == "warn" for check in checks)
    return checks + _check_evaluation(run, sees_later)


def _run_data(cfg: DoctorConfig, source: dict[str, Any], progress: Progress) -> list[Check]:
    """Check the data that a run was trained on: its stores, its arrays, or its model's hooks."""
    if source.get("kind") == "live":
        return examine_live(source.get("harvest"), cfg.device)
    if parts := source.get("sources") or ([source["of"]] if "of" in source else []):
        return [check for part in parts for check in _run_data(cfg, part, progress)]
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


def _check_evaluation(run: Run, sees_later: bool) -> list[Check]:
    """Find cross-entropies of a model that reads the token it is asked for."""
    if not sees_later or not run.has(EVALUATION_PART):
        return []
    try:
        hooks = run.evaluation.hooks.values()
    except UserError as error:
        return [Check("evaluation", "fail", str(error))]
    members = (member for hook in hooks for member in hook.members.values())
    if not any("ce_clean" in member.metrics for member in members):
        return [Check("evaluation", "ok", "no next-token cross-entropy in it")]
    value = "has a next-token cross-entropy, of a model that reads that token"
    return [Check("evaluation", "fail", value, f"evaluate again: wsae evaluate {run.path}")]

"""The pre-flight: a model with its text and hooks; and the check-up of a store, a run or an array on disk."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from wsae.acts.capture import Capture, tokens
from wsae.acts.config import HarvestConfig, LiveConfig
from wsae.acts.hookpoints import SEES_LATER, HookPoint, Probed
from wsae.acts.hookpoints import probe as probe_hooks
from wsae.acts.language import LanguageModel, load_language, locate
from wsae.acts.source import StoreSource, open_source
from wsae.acts.store import Store
from wsae.acts.text import told
from wsae.acts.tokens import TokenTable
from wsae.core.artifact import MANIFEST, read_manifest
from wsae.core.errors import UserError, named, understood
from wsae.core.files import read_json
from wsae.core.progress import Progress, Tick, quiet
from wsae.doctor import cost, probe
from wsae.doctor.config import DoctorConfig
from wsae.doctor.probe import Check, report
from wsae.run import EVALUATION_PART, Run
from wsae.train.config import FEW_STEPS, MemberConfig, TrainConfig

# The planned SAEs: do their shapes fit, and what will they take of memory and time?


class LiveCost(NamedTuple):
    """What training from a model adds: the speed of its forward pass, and the rows that wait to be mixed."""

    tokens_per_s: float
    mixed_rows: int


def check_shapes(cfg: DoctorConfig, widths: dict[str, int]) -> list[Check]:
    """Check each hook's width and every form of SAE on it."""
    checks: list[Check] = []
    for hook, d_in in widths.items():
        checks.append(probe.check_width(hook, d_in, cfg.d_in))
        forms = {
            m.sae_config(d_in).model_dump_json() if _fits(m, d_in) else str(m.activation): m
            for m in cfg.train.members
        }
        checks += [probe.check_member(hook, d_in, member) for member in forms.values()]
    return checks


def _fits(member: MemberConfig, d_in: int) -> bool:
    try:
        member.sae_config(d_in)
    except UserError:
        return False
    return True


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
    if not widths or not all(_fits(m, d) for m in cfg.train.members for d in widths):
        return []
    checks = [_check_memory(cfg, widths, live)]
    finite = all(bool(torch.isfinite(x).all()) for x in sample.values())
    if checks[0].status == "fail" or not finite:
        return checks
    gammas = [member.gamma for member in cfg.train.members]
    for hook, x in sample.items():
        checks += cost.check_covariance(hook, x, gammas, rows)
    per_step = sum(
        cost.seconds_per_step(x, cfg.train, cfg.device, cfg.probe_seconds / len(sample))
        for x in sample.values()
    )
    return [*checks, cost.check_time(cfg.train, per_step, live and live.tokens_per_s)]


def _check_memory(cfg: DoctorConfig, widths: list[int], live: LiveCost | None) -> Check:
    saes = [m.sae_config(d) for d in widths for m in cfg.train.members]
    held = cost.held_memory(cfg.device)
    # a live model's first block exists twice: as the rows behind the statistics, and in the block
    mixing = 2 * 4 * live.mixed_rows * sum(widths) if live else 0
    need = cost.memory(
        saes,
        [cost.kernels_of(cfg.train.kernels, cfg.device, sae) for sae in saes],
        cfg.train.batch_size,
        bf16=cfg.train.dtype == "bfloat16",
        together=min(torch.get_num_threads(), len(cfg.train.members)),
    )
    need = need._replace(held=int(held), rows=mixing)
    return cost.check_memory(need, cost.free_memory(cfg.device) + held)


# The pre-flight of a language model, its text and its hook points; a store's rows against its
# model's.


def examine_model(cfg: DoctorConfig, harvest: HarvestConfig, tick: Tick) -> list[Check]:
    """Load the model, run a few sequences and a few training steps."""
    checks = [cost.check_versions(), cost.check_device(cfg.device)]
    language = load_language(harvest.model, harvest.dtype, cfg.device)
    tick(1)
    checks += [_check_weights(language), _check_bos(language), *_check_text(harvest, language)]
    try:
        probed = probe_hooks(language.model, harvest.hooks, tokens(harvest.seq_len))
    except UserError as error:
        return [*checks, Check("hooks", "fail", str(error))]
    hooks = probed.hooks
    checks += check_probed(probed, harvest.seq_len)
    checks += check_shapes(cfg, {hook.name: hook.d_in for hook in hooks})
    tick(1)
    look = probe.probe_model(harvest, language, hooks, cfg.probe_seqs)
    tick(1)
    for hook in hooks:
        checks += _check_hook(cfg, harvest, look, hook)
    rows = {hook.name: look.rows(hook.name) for hook in hooks}
    mixed = min(LiveConfig().shuffle_tokens, harvest.tokens)
    behind_stats = min(LiveConfig().stats_tokens, harvest.tokens)
    checks += check_costs(cfg, rows, behind_stats, LiveCost(look.tokens_per_s, mixed))
    need = cost.store_bytes(harvest, [hook.d_in for hook in hooks])
    tick(1)
    return [*checks, cost.check_disk(need, cost.free_disk(cfg.out))]


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
    if beyond:
        checks.append(Check("positions", "warn", beyond[0], "lower --seq-len"))
    else:
        checks.append(Check("positions", "ok", f"{shown}, sequences of {seq_len}"))
    return checks


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
        language = load_language(cfg.model, cfg.dtype, device)
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
        language = load_language(cfg.model, cfg.dtype, device)
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


def _check_weights(language: LanguageModel) -> Check:
    lacking = language.not_loaded
    if not lacking:
        return Check("weights", "ok", "all are in the model's files")
    fix = "a hook or a prediction that depends on them is refused"
    return Check("weights", "warn", f"not in the model's files: {named(lacking)}", fix)


def _check_bos(language: LanguageModel) -> Check:
    bos = probe.adds_bos(language)
    if bos is None:
        return Check("begin-of-text token", "ok", "the tokenizer adds none")
    return Check("begin-of-text token", "ok", f"the tokenizer adds {bos}; the mask drops it")


def _check_text(harvest: HarvestConfig, language: LanguageModel) -> list[Check]:
    have = probe.text_size(harvest, language)
    enough = probe.check_text(have.tokens, harvest.tokens, have.whole)
    return [enough, *(Check("text", "warn", line) for line in have.told)]


def _check_hook(
    cfg: DoctorConfig, harvest: HarvestConfig, look: probe.Probe, hook: HookPoint
) -> Iterable[Check]:
    rows = look.rows(hook.name)
    finite = probe.check_finite(hook.name, look.x[hook.name].flatten(0, 1))
    if finite.status == "fail":
        return [finite]
    variance = rows.double().var(0, correction=0)
    gammas = [member.gamma for member in cfg.train.members]
    return [
        finite,
        probe.check_sinks(hook.name, look.x[hook.name], look.kept),
        *probe.check_outliers(hook.name, variance, gammas),
        *probe.check_rounding(hook.name, rows, harvest.store_dtype),
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
    if cfg.harvest is not None:
        with progress("doctor", 4, "stages") as tick:
            return report(cfg.harvest.model, examine_model(cfg, cfg.harvest, tick))
    assert cfg.data is not None, "a subject: harvest or data"
    look = _examine_run if _is_run(cfg.data) else examine_data
    return report(cfg.data, look(cfg, cfg.data, progress)) | {"on_disk": True}


def examine_data(cfg: DoctorConfig, path: str, progress: Progress = quiet) -> list[Check]:
    """Read a store or array: checksums, every value, widths, then the same shape and cost checks.

    Of a store also what can be wrong in it, and a few of its rows against those of its model.
    """
    checks = [cost.check_versions(), cost.check_device(cfg.device)]
    try:
        source = open_source(path)
        stats = source.stats(progress)
    except UserError as error:
        return [*checks, Check("data", "fail", str(error))]
    rows = source.n_rows or 0
    status = "warn" if rows < cfg.train.batch_size else "ok"
    fix = (
        f"fewer than one batch of {cfg.train.batch_size}: lower --batch-size"
        if status == "warn"
        else ""
    )
    checks.append(Check("data", status, f"{rows:,} training rows, all values finite", fix))
    if isinstance(source, StoreSource):
        checks += check_store(source.store, cfg.device)
    checks += check_shapes(cfg, source.hooks)
    size = min(SAMPLE_ROWS, rows)
    batch = source.stream(size, cfg.train.seed).next() if size else {}
    for hook, x in batch.items():
        gammas = [member.gamma for member in cfg.train.members]
        variance = stats[hook].kept.variance
        checks += [probe.check_constant(hook, variance), _check_norms(hook, x)]
        checks += probe.check_outliers(hook, variance, gammas)
        checks += probe.check_rounding(hook, x, "float32")
    return checks + check_costs(cfg, batch, rows, None)


def check_store(store: Store, device: str) -> list[Check]:
    """Return what can be wrong in a store: how it was made, its rows, its tokens, its halves."""
    checks = [_check_made(store)]
    if lacking := store.info.get("not_loaded"):
        named = ", ".join(map(str, lacking)) if isinstance(lacking, list) else str(lacking)
        fix = "get the whole checkpoint and harvest again"
        checks.append(Check("weights", "warn", f"not in the model's files: {named}", fix))
    if store.of_images:
        return checks

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
    if ratio > probe.SINK_RATIO:
        fix = "attention sinks are among them: harvest with --sink-norm-ratio 10"
        return Check(f"norms at {hook}", "warn", f"the largest is {ratio:.3g} x the median", fix)
    return Check(f"norms at {hook}", "ok", f"the largest is {ratio:.3g} x the median")


def _check_texts(table: TokenTable) -> Check:
    ids, counts = np.unique(_flat(table), return_counts=True)
    broken = [n for i, n in zip(ids, counts, strict=True) if "\ufffd" in table.decode([int(i)])[0]]
    share = sum(broken) / max(1, int(counts.sum()))
    if share:
        fix = "an older wsae wrote characters split over tokens so; harvest again to read them"
        return Check("token texts", "warn", f"{100 * share:.2g} % read as U+FFFD", fix)
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
        fix = "scores on them are of seen text: remove duplicates from the text and harvest again"
        return [Check(name, "warn", value, fix)]
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
    checks = [cost.check_versions(), cost.check_device(cfg.device)]
    try:
        manifest = read_manifest(path, "run")
        run = Run(path)
        train, source = run.config, run.source
    except UserError as error:
        return [*checks, Check("run", "fail", str(error))]
    checks.append(Check("run", "ok", f"whole, made by wsae {manifest.wsae_version}"))
    assert isinstance(train, TrainConfig), "one SAE alone is not examined as a run"
    checks.append(_check_steps(train))
    data = _run_data(cfg, source, progress)
    checks += data
    sees_later = any(check.name == "later tokens" and check.status == "warn" for check in data)
    return checks + _check_evaluation(run, sees_later)


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

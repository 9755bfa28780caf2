"""The pre-flight of a language model, its text and its hook points; a store's rows against its model's."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from wsae.acts.capture import Capture
from wsae.acts.config import HarvestConfig, LiveConfig
from wsae.acts.hookpoints import SEES_LATER, HookPoint, Probed
from wsae.acts.hookpoints import probe as probe_hooks
from wsae.acts.language import LanguageModel, load_language, locate
from wsae.acts.layout import tokens
from wsae.acts.store import MANIFEST, Store
from wsae.core.errors import UserError, named
from wsae.core.progress import Tick
from wsae.doctor import activations, cost, machine, probe, shape
from wsae.doctor.check import Check
from wsae.doctor.config import DoctorConfig
from wsae.doctor.plan import Live, check_costs, check_shapes


def examine_model(cfg: DoctorConfig, harvest: HarvestConfig, tick: Tick) -> list[Check]:
    """Load the model, run a few sequences and a few training steps."""
    checks = [machine.check_versions(), machine.check_device(cfg.device)]
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
    checks += check_costs(cfg, rows, behind_stats, Live(look.tokens_per_s, mixed))
    need = cost.store_bytes(harvest, [hook.d_in for hook in hooks])
    tick(1)
    return [*checks, cost.check_disk(need, machine.free_disk(cfg.out))]


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
        mend = (
            f"these rows are not {cfg.model}'s activations at their tokens (other or random weights, or another "
            "order): harvest again, and train again what was trained on them"
        )
        name = f"{ROWS_AGAINST} at {hook.name}"
        checks.append(Check(name, "fail" if wrong else "ok", value, mend if wrong else ""))
    return checks


def _check_weights(language: LanguageModel) -> Check:
    lacking = language.not_loaded
    if not lacking:
        return Check("weights", "ok", "all are in the model's files")
    mend = "a hook or a prediction that depends on them is refused"
    return Check("weights", "warn", f"not in the model's files: {named(lacking)}", mend)


def _check_bos(language: LanguageModel) -> Check:
    bos = probe.adds_bos(language)
    if bos is None:
        return Check("begin-of-text token", "ok", "the tokenizer adds none")
    return Check("begin-of-text token", "ok", f"the tokenizer adds {bos}; the mask drops it")


def _check_text(harvest: HarvestConfig, language: LanguageModel) -> list[Check]:
    have = probe.text_size(harvest, language)
    enough = shape.check_text(have.tokens, harvest.tokens, have.whole)
    return [enough, *(Check("text", "warn", line) for line in have.told)]


def _check_hook(
    cfg: DoctorConfig, harvest: HarvestConfig, look: probe.Probe, hook: HookPoint
) -> Iterable[Check]:
    rows = look.rows(hook.name)
    finite = activations.check_finite(hook.name, look.x[hook.name].flatten(0, 1))
    if finite.status == "fail":
        return [finite]
    variance = rows.double().var(0, correction=0)
    gammas = [member.gamma for member in cfg.train.members]
    return [
        finite,
        activations.check_sinks(hook.name, look.x[hook.name], look.kept),
        *activations.check_outliers(hook.name, variance, gammas),
        *activations.check_rounding(hook.name, rows, harvest.store_dtype),
    ]

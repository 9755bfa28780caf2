"""The pre-flight: a model with its text and hooks, or data that lie on disk already."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from wsae.acts.config import HarvestConfig
from wsae.acts.hookpoints import HookPoint, resolve
from wsae.acts.language import LanguageModel, load_language
from wsae.acts.source import open_source
from wsae.core.errors import UserError
from wsae.core.progress import Progress, quiet
from wsae.doctor import activations, cost, machine, probe, shape
from wsae.doctor.check import Check, report
from wsae.doctor.config import DoctorConfig

SAMPLE_ROWS = 4096
"""Rows of a store or array that are looked at for outliers and rounding."""


def examine(cfg: DoctorConfig, progress: Progress = quiet) -> dict[str, Any]:
    """Return the report: subject, checks (name, status, value, advice), number of warnings and failures.

    Raises UserError when the subject itself cannot be read (no such model, file or text).
    """
    if cfg.harvest is not None:
        with progress("doctor", 4, "stages") as tick:
            return report(cfg.harvest.model, examine_model(cfg, cfg.harvest, tick))
    assert cfg.data is not None, "a subject: harvest or data"
    return report(cfg.data, examine_data(cfg, cfg.data, progress))


def examine_model(cfg: DoctorConfig, harvest: HarvestConfig, tick) -> list[Check]:
    """Load the model, run a few sequences and a few training steps."""
    checks = [machine.check_versions(), machine.check_device(cfg.device)]
    language = load_language(harvest.model, harvest.dtype, cfg.device)
    tick(1)
    checks += [_check_bos(language), _check_text(harvest, language)]
    try:
        hooks = resolve(language.model, harvest.hooks)
    except UserError as error:
        return [*checks, Check("hooks", "fail", str(error), "name one of the nearest")]
    checks += _check_shapes(cfg, {hook.name: hook.d_in for hook in hooks})
    tick(1)
    look = probe.probe_model(harvest, language, hooks, cfg.probe_seqs)
    tick(1)
    for hook in hooks:
        checks += _check_hook(cfg, harvest, look, hook)
    model_bytes = sum(p.numel() * p.element_size() for p in language.model.parameters())
    rows = {hook.name: look.rows(hook.name) for hook in hooks}
    checks += _check_costs(cfg, rows, model_bytes, look.tokens_per_s)
    need = cost.store_bytes(harvest, [hook.d_in for hook in hooks])
    tick(1)
    return [*checks, cost.check_disk(need, machine.free_disk(cfg.out))]


def examine_data(cfg: DoctorConfig, path: str, progress: Progress = quiet) -> list[Check]:
    """Read a store or array: checksums, every value, widths, then the same shape and cost checks."""
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
    checks += _check_shapes(cfg, source.hooks)
    size = min(SAMPLE_ROWS, rows)
    batch = source.stream(size, cfg.train.seed).next() if size else {}
    for hook, x in batch.items():
        gammas = [member.gamma for member in cfg.train.members]
        checks += activations.check_outliers(hook, stats[hook].kept.variance, gammas)
        checks += activations.check_rounding(hook, x, "float32")
    return checks + _check_costs(cfg, batch, 0, None)


def _check_bos(language: LanguageModel) -> Check:
    bos = probe.adds_bos(language)
    if bos is None:
        return Check("begin-of-text token", "ok", "the tokenizer adds none")
    return Check("begin-of-text token", "ok", f"the tokenizer adds {bos}; the mask drops it")


def _check_text(harvest: HarvestConfig, language: LanguageModel) -> Check:
    have = probe.text_size(harvest, language)
    return shape.check_text(have.tokens, harvest.tokens, have.whole)


def _check_shapes(cfg: DoctorConfig, widths: dict[str, int]) -> list[Check]:
    checks: list[Check] = []
    for hook, d_in in widths.items():
        checks.append(shape.check_width(hook, d_in, cfg.d_in))
        forms = {
            m.sae_config(d_in).model_dump_json() if _fits(m, d_in) else str(m.activation): m
            for m in cfg.train.members
        }
        checks += [shape.check_member(hook, d_in, member) for member in forms.values()]
    return checks


def _fits(member, d_in: int) -> bool:
    try:
        member.sae_config(d_in)
    except UserError:
        return False
    return True


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


def _check_costs(
    cfg: DoctorConfig,
    rows: dict[str, Float[Tensor, "rows d_in"]],
    model_bytes: int,
    tokens_per_s: float | None,
) -> list[Check]:
    """Memory and time of the planned training, when its shapes fit the rows."""
    widths = [x.shape[1] for x in rows.values()]
    if not widths or not all(_fits(m, d) for m in cfg.train.members for d in widths):
        return []
    saes = [m.sae_config(d) for m in cfg.train.members for d in widths]
    need = cost.memory(saes, widths, cfg.train.batch_size, model_bytes)
    # the model is loaded already: its share is no longer among what is free
    checks = [cost.check_memory(need, machine.free_memory(cfg.device) + model_bytes)]
    if checks[0].status == "fail" or not all(bool(torch.isfinite(x).all()) for x in rows.values()):
        return checks
    per_step = sum(
        cost.seconds_per_step(x, cfg.train, cfg.device, cfg.probe_seconds / len(rows))
        for x in rows.values()
    )
    return [*checks, cost.check_time(cfg.train, per_step, tokens_per_s)]

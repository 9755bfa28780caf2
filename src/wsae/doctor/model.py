"""The pre-flight of a language model, its text and its hook points."""

from collections.abc import Iterable

from wsae.acts.config import HarvestConfig, LiveConfig
from wsae.acts.hookpoints import HookPoint, resolve
from wsae.acts.language import LanguageModel, load_language
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
    checks += [_check_weights(language), _check_bos(language), _check_text(harvest, language)]
    try:
        hooks = resolve(language.model, harvest.hooks)
    except UserError as error:
        return [*checks, Check("hooks", "fail", str(error), "name one of the nearest")]
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


def _check_text(harvest: HarvestConfig, language: LanguageModel) -> Check:
    have = probe.text_size(harvest, language)
    return shape.check_text(have.tokens, harvest.tokens, have.whole)


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

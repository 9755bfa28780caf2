"""The pre-flight: a model with its text and hooks, or data that lie on disk already."""

from typing import Any

from wsae.acts.source import StoreSource, open_source
from wsae.acts.store import TOKENS, Store
from wsae.acts.text import told
from wsae.core.artifact import MANIFEST
from wsae.core.errors import UserError, understood
from wsae.core.files import read_json
from wsae.core.progress import Progress, quiet
from wsae.doctor import activations, machine
from wsae.doctor.check import Check, report
from wsae.doctor.config import DoctorConfig
from wsae.doctor.plan import check_costs, check_shapes

SAMPLE_ROWS = 4096
"""Rows of a store or array that are looked at for outliers and rounding."""


def examine(cfg: DoctorConfig, progress: Progress = quiet) -> dict[str, Any]:
    """Return the report: subject, checks (name, status, value, advice), number of warnings and failures.

    Raises UserError when the subject itself cannot be read (no such model, file or text).
    """
    if cfg.harvest is not None:
        from wsae.doctor.model import examine_model  # brings transformers, which data do not need

        with progress("doctor", 4, "stages") as tick:
            return report(cfg.harvest.model, examine_model(cfg, cfg.harvest, tick))
    assert cfg.data is not None, "a subject: harvest or data"
    return report(cfg.data, examine_data(cfg, cfg.data, progress))


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
    if isinstance(source, StoreSource) and not source.store.of_images:
        checks += _check_text(source.store)
    checks += check_shapes(cfg, source.hooks)
    size = min(SAMPLE_ROWS, rows)
    batch = source.stream(size, cfg.train.seed).next() if size else {}
    for hook, x in batch.items():
        gammas = [member.gamma for member in cfg.train.members]
        checks += activations.check_outliers(hook, stats[hook].kept.variance, gammas)
        checks += activations.check_rounding(hook, x, "float32")
    return checks + check_costs(cfg, batch, rows, None)


def _check_text(store: Store) -> list[Check]:
    """Tell what a store's text left out or repeats, and whether its tokens are those of before bytes were kept."""
    if "text" in store.info:
        with understood(store.path / MANIFEST):
            checks = [Check("text", "warn", line) for line in told(store.info["text"])]
    else:
        known = (
            "made by an older wsae, which counted neither what it left out nor repeated documents"
        )
        checks = [Check("text", "warn", known, "harvest again to know")]
    with understood(store.path / TOKENS):
        tokens = read_json(store.path / TOKENS).values()
        split = sum(isinstance(token, str) and "\ufffd" in token for token in tokens)
    if split:
        known = f"{split:,} tokens hold part of a character and are kept as U+FFFD"
        checks.append(Check("tokens", "warn", known, "harvest again to see characters whole"))
    return checks

"""The one call from the tables to auto-interpretability: a run's SAEs are scored and RUN/interpretation is written."""

from pathlib import Path
from typing import TYPE_CHECKING

from wsae.core.errors import UserError
from wsae.experiments.tables.tiny import BagEncoder

if TYPE_CHECKING:
    from wsae.evals.data import HeldOut
    from wsae.experiments.tables.pipeline import Workshop


def score_run(shop: "Workshop", run: Path, source: "HeldOut") -> None:
    """Score every member of a run; the judge's answers are cached, so a killed run repeats no paid call."""
    from wsae.evals.autointerp.run import interpret_run

    cfg = shop.cfg.interpret
    if shop.cfg.judge is not None:
        raise UserError("--endpoint: not wired yet")
    language = shop.language if "surprisal" in cfg.scores else None
    encoder = BagEncoder() if shop.cfg.made_here else None
    interpret_run(run, source, cfg, language=language, encoder=encoder, progress=shop.progress)

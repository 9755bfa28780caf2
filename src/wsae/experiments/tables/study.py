"""`wsae reproduce table1|table2|table3|language`: the study from settings to tables and figures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wsae.core.files import write_json, write_text
from wsae.core.progress import Progress
from wsae.experiments.presets import Preset
from wsae.experiments.sweep.table import select
from wsae.experiments.tables import analysis, text
from wsae.experiments.tables.config import Choices, StudyConfig
from wsae.experiments.tables.estimate import refuse_or_estimate
from wsae.experiments.tables.paper import ONE, PAPER, PLAIN
from wsae.experiments.tables.pictures import draw
from wsae.experiments.tables.pipeline import Job, run_study
from wsae.experiments.tables.plan import StudyName
from wsae.experiments.tables.presets import SAES, study_config
from wsae.experiments.tables.rows import Row, run_rows, scores_of

ROWS, TABLES = "rows.json", "tables.md"


class Place(NamedTuple):
    """Where a study lives, what the user chose, and whom it tells how far it is."""

    out: Path
    choices: Choices
    progress: Progress
    say: Callable[[str], None]


def reproduce_study(
    name: StudyName, preset: Preset, place: Place, seed: int = 0, device: str = "cpu"
) -> tuple[dict[str, Any], list[Path]]:
    """Run what is missing of a study and return its tables and the files written: rows.json, tables.md, figures.

    Raises UserError as the stages do, and, before anything starts, where the model or the room for it is missing.
    """
    cfg = study_config(name, preset, place.out, place.choices, seed, device)
    place.say(announce(cfg))
    out = place.out / name
    refuse_or_estimate(cfg, out, place.progress, place.say)
    jobs = run_study(cfg, out, place.choices, place.progress, place.say)
    rows = [row for job in jobs for row in job_rows(cfg, job)]
    result = results(cfg, preset, rows)
    write_json(out / ROWS, rows)
    write_text(out / TABLES, result["markdown"])
    pictures = draw(rows, cfg.plan.hooks, SAES[preset], out)
    done = {"runs": [str(job.path) for job in jobs], "config": cfg.to_dict()}
    return {**result, **done}, [out / ROWS, out / TABLES, *pictures]


def job_rows(cfg: StudyConfig, job: Job) -> list[Row]:
    """Return the rows of one run."""
    return run_rows(cfg, job.hooks, job.number, job.path)


def results(cfg: StudyConfig, preset: Preset, rows: list[Row]) -> dict[str, Any]:
    """Return differences, means and tables of a study's rows."""
    sae, hooks = SAES[preset], cfg.plan.hooks
    analysis.add_matched_fvu(rows, sae, cfg.interpret)
    lines = analysis.over_seeds(rows)
    means = analysis.over_hooks(lines, len(hooks))
    paper = {}
    if cfg.plan.name != "language":
        name = cfg.plan.name
        paper = {f"the paper's {PAPER[name].title}, score in %": text.paper_table(name)}
    ours = text.tables(rows, lines, means, hooks)
    return {
        "tables": paper | ours,
        "markdown": text.markdown(paper | ours),
        "differences": lines,
        "means": means,
        "moved": analysis.density_and_fvu(rows, sae),
        "by_baseline": {score: _by_baseline(rows, hooks, score) for score in scores_of(rows)},
    }


def _by_baseline(rows: Sequence[Row], hooks: Sequence[str], score: str) -> float | None:
    plain, gains = [], []
    for hook in hooks:
        pair = [select(rows, hook=hook, member=name) for name in (PLAIN, ONE)]
        found = [p[0]["scores"].get(score, {}).get("value") if p else None for p in pair]
        values = [float(value) for value in found if value is not None]
        if len(values) == len(pair):
            plain.append(values[0])
            gains.append(values[1] - values[0])
    return analysis.by_baseline(plain, gains)


def announce(cfg: StudyConfig) -> str:
    """Return what will be done, in words."""
    plan, harvest = cfg.plan, cfg.harvest
    rows = cfg.tokens or harvest.tokens
    way = "one by one from a store" if cfg.live is None else "all hooks at once from the model"
    return (
        f"{plan.name}: {plan.n_members} SAEs of {harvest.model}, hooks: {len(plan.hooks)}, families: {len(plan.runs)}; "
        f"up to {rows:,} training rows each, {way}; finished stages are not run again"
    )

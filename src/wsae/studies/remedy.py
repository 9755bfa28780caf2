"""`wsae reproduce remedy`: does any weighting or preconditioner make latents better? The plan is in docs/remedy.md.

Each arm is compared with the plain SAE of the same block and seed; the mean over a block's seeds, then over the blocks,
with Student's interval over blocks, and Holm's correction over the arms. What is decided rests on one measure alone,
the probes on the single best latent.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from wsae.core.config import Config
from wsae.core.seeds import seed_for
from wsae.evals.config import ProbeConfig
from wsae.evals.control import CONTROL
from wsae.evals.latents import unit_rows
from wsae.evals.probing.reading import RAW
from wsae.evals.probing.run import TOKENS, probe_run
from wsae.run import Run
from wsae.studies.drawing import forest_figure
from wsae.studies.engine import PaperStudy, Stage, StudyRun, markdown
from wsae.studies.results import Mean, Row, Table, cell, mean_interval, select, span
from wsae.studies.tables import TableStudy
from wsae.studies.tables_config import STAGES
from wsae.theory.record import PLAIN

PRIMARY = "probe_1"
ALL = ("probe_1", "probe_16", "fvu", "dead_frac")
"""What is compared: probes in points (accuracy in %), FVU, and the dead share in points."""
LEVEL = 0.05
"""Of all arms together."""
UNSURE = "no difference shown"
WORSE_FVU, MORE_DEAD = 1.1, 1.0
"""The largest ratio of plain FVU, and the largest gain in dead latents (points), of an arm that helps."""


@dataclass
class RemedyStudy(TableStudy):
    """The recipe of the study of remedies: trained, evaluated, probed."""

    def stages(self) -> list[Stage]:
        """Return the stages up to the last one asked for."""
        cfg = self.probing

        def probe(run: StudyRun) -> None:
            probe_run(run.path, self.source(run), cfg, progress=self.progress)

        stages = [
            self.trained(),
            self.evaluated(self.cfg.evaluation, lambda: None),
            Stage("probe", probe, lambda _: cfg, "probing"),
        ]
        return stages[: STAGES.index(self.choices.until)]

    @property
    def probing(self) -> ProbeConfig:
        """The settings of the rule tasks."""
        least = 2 if self.preset == "tiny" else ProbeConfig().least
        return ProbeConfig(k=(1, 16), least=least)

    def rows(self, run: StudyRun) -> list[Row]:
        """Return one row per SAE, random SAE and raw activations of a run: what was measured."""
        opened, planned, rows = Run(run.path), self.cfg.plan.runs[run.number], []
        evaluated = opened.evaluation_record["hooks"]
        probed = opened.probing_record[TOKENS]["hooks"]
        for hook in run.hooks:
            entries = probed[hook]["members"] | probed[hook]["controls"]
            for name, entry in entries.items():
                metrics = evaluated[hook]["members"].get(name, {}).get("metrics", {})
                row: Row = {"hook": hook, "seed": planned.seed, "member": name}
                for key in ("probe_1", "probe_16"):
                    score = entry["summary"].get(key)
                    row[key] = None if score is None else 100 * score["value"]
                    row[f"{key}_by_task"] = None if score is None else score["by_task"]
                for key, unit in (("fvu", 1.0), ("dead_frac", 100.0)):
                    found = metrics.get(key, {}).get("value")
                    row[key] = None if found is None else unit * found
                rows.append(row)
        return rows

    def results(self, rows: list[Row]) -> dict[str, Any]:
        """Return each arm's differences and verdict, the blocks at which the measure tells anything, and tables."""
        hooks = self.cfg.plan.hooks
        arms = judged_arms(rows, hooks)
        told = {hook: told_from_random(rows, hook) for hook in hooks}
        agreement = list(seed_agreement(self))
        tables = {
            "Every arm against its plain twin": arm_table(arms),
            "Probes on one latent, %": level_table(rows, hooks, PRIMARY, ".1f"),
            "Fraction of variance unexplained": level_table(rows, hooks, "fvu", ".3f"),
            "Agreement of two seeds, cosine above chance": agreement_table(agreement, hooks),
        }
        return {
            "arms": [arm.to_dict() for arm in arms],
            "told_from_random": {hook: mean._asdict() for hook, mean in told.items()},
            "agreement": agreement,
            "tables": tables,
            "markdown": markdown(tables),
        }

    def draw(self, rows: list[Row], out: Path) -> list[Path]:
        """Draw each arm's difference from plain: its mean over the blocks with its interval, and every block."""
        hooks, panels = self.cfg.plan.hooks, []
        arms = sorted(judged_arms(rows, hooks), key=lambda arm: arm.differences[PRIMARY].value)
        for key, label in ((PRIMARY, "1 latent, points"), ("probe_16", "16 latents, points")):
            lines = []
            for arm in arms:
                mean, blocks = arm.differences[key], []
                for hook in hooks:
                    if values := by_hook(rows, hook, arm.name, key):
                        blocks.append(float(np.mean(values)))
                sure = arm.verdict != UNSURE
                lines.append({"name": arm.name, "points": blocks, "mean": mean, "sure": sure})
            panels.append({"title": f"{label} above plain", "lines": lines})
        return forest_figure(panels, out / "remedies")


class Arm(Config):
    """One arm's differences from plain, over the blocks, and what they come to."""

    name: str
    differences: dict[str, Mean]
    """Measure -> mean over blocks with Student's interval."""
    fvu_ratio: float
    p: float
    """Of the primary measure, two-sided, uncorrected."""
    corrected: float
    """The same by Holm's method over all arms."""
    detectable: float
    """The smallest difference that would be seen with 80 % probability, uncorrected."""
    verdict: str = UNSURE

    def at(self, corrected: float) -> "Arm":
        """Return the arm with this corrected p-value and the verdict that follows."""
        verdict = UNSURE
        if corrected < LEVEL and self.differences[PRIMARY].value < 0:
            verdict = "hurts"
        elif corrected < LEVEL:
            cheap = self.fvu_ratio <= WORSE_FVU and self.differences["dead_frac"].value <= MORE_DEAD
            verdict = "helps" if cheap else "better probes at a price"
        return self.model_copy(update={"corrected": corrected, "verdict": verdict})


def arm_names(rows: Sequence[Row]) -> list[str]:
    """Return the arms in order: everything trained but plain."""
    names = dict.fromkeys(row["member"] for row in rows)
    return [name for name in names if name not in (PLAIN, CONTROL, RAW)]


def by_hook(rows: Sequence[Row], hook: str, name: str, key: str) -> list[float]:
    """Return an arm's differences from plain at a block, one a seed."""
    out = []
    for row in select(rows, hook=hook, member=name):
        (plain,) = select(rows, hook=hook, seed=row["seed"], member=PLAIN)
        if row[key] is not None and plain[key] is not None:
            out.append(row[key] - plain[key])
    return out


def judged_arms(rows: Sequence[Row], hooks: Sequence[str]) -> list[Arm]:
    """Return every arm with its verdict; see docs/remedy.md for the rule."""
    names, found = arm_names(rows), {}
    for name in names:
        found[name] = {
            key: [float(np.mean(d)) for hook in hooks if (d := by_hook(rows, hook, name, key))]
            for key in ALL
        }
    p = [_p_value(mean_interval(found[name][PRIMARY]), found[name][PRIMARY]) for name in names]
    arms = []
    for name, own, corrected in zip(names, p, holm(p), strict=True):
        means = {key: mean_interval(values) for key, values in found[name].items()}
        n, spread = len(found[name][PRIMARY]), float(np.std(found[name][PRIMARY], ddof=1))
        seen = float(stats.t.ppf(1 - LEVEL / 2, n - 1) + stats.t.ppf(0.8, n - 1)) * spread / n**0.5
        ratio = float(np.mean([*_ratios(rows, hooks, name)]))
        arm = Arm(
            name=name,
            differences=means,
            fvu_ratio=ratio,
            p=own,
            corrected=corrected,
            detectable=seen,
        )
        arms.append(arm.at(corrected))
    return arms


def _p_value(mean: Mean, values: Sequence[float]) -> float:
    """Return the two-sided p-value of Student's test that values have mean 0."""
    error = float(np.std(values, ddof=1)) / mean.n**0.5
    if error == 0:
        return float(mean.value == 0)
    return 2 * float(stats.t.sf(abs(mean.value) / error, mean.n - 1))


def _ratios(rows: Sequence[Row], hooks: Sequence[str], name: str) -> Iterator[float]:
    for hook in hooks:
        for row in select(rows, hook=hook, member=name):
            (plain,) = select(rows, hook=hook, seed=row["seed"], member=PLAIN)
            yield row["fvu"] / plain["fvu"]


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values corrected by Holm (1979): the i-th smallest times m - i + 1, never falling, at most 1."""
    order, out, least = sorted(range(len(p)), key=p.__getitem__), [0.0] * len(p), 0.0
    for place, i in enumerate(order):
        least = max(least, min(1.0, (len(p) - place) * p[i]))
        out[i] = least
    return out


def told_from_random(rows: Sequence[Row], hook: str) -> Mean:
    """Return plain minus random, points of the primary measure: mean over the tasks with Student's interval."""
    seed = min(row["seed"] for row in select(rows, hook=hook))
    by_task = f"{PRIMARY}_by_task"
    (plain,), (random,) = (
        select(rows, hook=hook, seed=seed, member=name) for name in (PLAIN, CONTROL)
    )
    return mean_interval(list(100 * (np.array(plain[by_task]) - np.array(random[by_task]))))


def seed_agreement(study: PaperStudy[Any]) -> Iterator[Row]:
    """Yield, for each arm and block with several seeds, how alike the decoders of the first two seeds are.

    The mean over latents of the largest cosine with a latent of the other seed, less the same of as many random rows
    with the decoders' second moments.
    """
    runs: dict[str, list[StudyRun]] = {}
    for run in study.runs():
        runs.setdefault(run.hooks[0], []).append(run)
    for hook, found in runs.items():
        if len(found) < 2:
            continue
        first, second = (Run(run.path).saes[hook] for run in found[:2])
        for name in second:
            a, b = (saes[name].W_dec.detach().float() for saes in (first, second))
            a, b = unit_rows(a), unit_rows(b)
            chance = nearest_cosine(_like(a, hook, name, 0), _like(b, hook, name, 1))
            value = nearest_cosine(a, b)
            row: Row = {"hook": hook, "member": name, "cosine": value, "chance": chance}
            yield row | {"above": value - chance}


def nearest_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the mean over rows of a of the largest cosine with a row of b, both of unit rows."""
    return float(torch.cat([(part @ b.T).amax(1) for part in a.split(1024)]).mean())


def _like(rows: torch.Tensor, *what: object) -> torch.Tensor:
    """Return as many random unit rows, normal with the rows' second moments."""
    values, vectors = torch.linalg.eigh(rows.double().T @ rows.double() / len(rows))
    generator = torch.Generator().manual_seed(seed_for(0, "agreement", *map(str, what)))
    drawn = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    return unit_rows((drawn * values.clamp_min(0).sqrt() @ vectors.T).float())


def arm_table(arms: Sequence[Arm]) -> Table:
    """Return the arms with their differences, p-values and verdicts, best first."""
    header = [
        "arm",
        "1 latent, points",
        "corrected p (alone)",
        "seen at 80 %",
        "16 latents",
        "FVU, ratio",
    ]
    rows = []
    for arm in sorted(arms, key=lambda arm: -arm.differences[PRIMARY].value):
        d = arm.differences
        rows.append(
            [
                arm.name,
                f"{d[PRIMARY].value:+.1f}{span(d[PRIMARY], 1.0, '+.1f')}",
                f"{arm.corrected:.2g} ({arm.p:.2g})",
                f"{arm.detectable:.1f}",
                f"{d['probe_16'].value:+.1f}{span(d['probe_16'], 1.0, '+.1f')}",
                f"{arm.fvu_ratio:.2f}",
                cell(d["dead_frac"], form="+.1f"),
                arm.verdict,
            ]
        )
    return {"header": [*header, "dead, points", "verdict"], "rows": rows}


def level_table(rows: Sequence[Row], hooks: Sequence[str], key: str, form: str) -> Table:
    """Return a measure of every arm and control at every block, the mean over seeds."""
    out = []
    for name in dict.fromkeys(row["member"] for row in rows):
        here = [[r[key] for r in select(rows, hook=hook, member=name)] for hook in hooks]
        values = [[v for v in found if v is not None] for found in here]
        if any(values):
            out.append([name, *(format(np.mean(v), form) if v else "-" for v in values)])
    return {"header": ["", *(hook.removeprefix("layers.") for hook in hooks)], "rows": out}


def agreement_table(agreement: Sequence[Row], hooks: Sequence[str]) -> Table:
    """Return the agreement of seeds, one row an arm."""
    kept = [hook for hook in hooks if select(agreement, hook=hook)]
    rows = []
    for name in dict.fromkeys(row["member"] for row in agreement):
        found = [select(agreement, hook=hook, member=name) for hook in kept]
        rows.append([name, *(f"{row[0]['above']:.3f}" if row else "-" for row in found)])
    return {"header": ["", *(hook.removeprefix("layers.") for hook in kept)], "rows": rows}

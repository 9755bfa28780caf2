"""Does any loss weight or preconditioner make latents of images better? The plan is in docs/remedy.md.

    python benchmarks/remedy_images.py STORE OUT

STORE is a store harvested from images with classes (`wsae harvest RUN --images PATH --hook pooler projector`). Each arm
is compared with the plain SAE of the same hook and seed; intervals are over seeds and, apart, over held-out images;
Holm's correction is over all pairs of arm and hook. What is finished in OUT is not run again. 22 SAEs of 1,024 latents
on 16,000 rows of two hooks, evaluated, scored and probed: some four minutes a seed on a core.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import wsae
from wsae.acts.source import StoreSource
from wsae.core.artifact import write_manifest
from wsae.core.config import Config
from wsae.core.errors import UserError
from wsae.core.files import read_json, write_json
from wsae.evals.classes import labels_of, score_run
from wsae.evals.config import CONTROL, ClassesConfig, EvalConfig, ProbeConfig
from wsae.evals.intervals import Difference, Ratio, paired_difference
from wsae.run import Run
from wsae.sae.config import GammaConfig, PreconditionConfig, TopK
from wsae.studies.engine import (
    Mean,
    PaperStudy,
    Row,
    Stage,
    StudyRun,
    Table,
    cell,
    markdown,
    mean_interval,
    reproduce_study,
    select,
    span,
)
from wsae.studies.tables import (
    UNSURE,
    Arm,
    agreement_table,
    by_hook,
    holm,
    judged_arms,
    level_table,
    seed_agreement,
)
from wsae.theory.record import PLAIN
from wsae.train.config import MemberConfig, TrainConfig

PROBES, FOUND = "class-probes", "found.json"
CLASS = ("consistency_top", "consistency_corrected")
"""The paper's semantic consistency, of the strongest images and above chance."""


def whitened(power: float) -> PreconditionConfig:
    return PreconditionConfig(kind="whiten", power=power)


ARMS: tuple[dict[str, Any], ...] = (
    {},
    *({"gamma": GammaConfig(rule="variance", alpha=alpha)} for alpha in (0.5, 1.0)),
    {"gamma": GammaConfig(rule="variance", alpha=1.0, robust="rank")},
    {"gamma": GammaConfig(rule="variance", alpha=-0.5)},
    {"gamma": GammaConfig(rule="consistency", alpha=1.0)},
    *({"precondition": whitened(power)} for power in (0.5, 1.0)),
    {"gamma": GammaConfig(rule="residual"), "precondition": whitened(0.5)},
    *({"gamma": GammaConfig(rule=rule)} for rule in ("residual", "residual_covariance")),
)


class ImageRemedyConfig(Config):
    """The study's settings; its results follow from them and the store."""

    store: Path
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    d_sae: int = 1024
    k: int = 16
    lr: float = 2e-3
    passes: int = 8
    batch_size: int = 1024
    evaluation: EvalConfig = EvalConfig(splice_tokens=0, n_latents=0, assignment_max=0, draws=200)
    classes: ClassesConfig = ClassesConfig(
        groups=0, permutations=200, draws=200, assignment_max=1, minibatch=0
    )
    probing: ProbeConfig = ProbeConfig(k=(1, 16), documents=1000, ablated=())

    def members(self, constant: bool) -> tuple[MemberConfig, ...]:
        """Return the arms; a constant dimension has no finite weight under a negative power of its variance."""
        common = {"d_sae": self.d_sae, "activation": TopK(k=self.k), "lr": self.lr, "auxk": 0.0}
        made = [MemberConfig(**common, **arm) for arm in ARMS]
        return tuple(m for m in made if not (constant and m.gamma.alpha < 0))


class ImageRemedy(PaperStudy[ImageRemedyConfig]):
    """The recipe: trained, evaluated, scored against the classes, probed by class."""

    def introduce(self) -> None:
        """Tell what will be done; raises UserError for a store without classes."""
        if StoreSource(self.cfg.store, verify=False).labels() is None:
            raise UserError(f"{self.cfg.store}: its rows have no classes; harvest labelled images")
        self.say(f"{len(self.runs())} families of up to {len(ARMS)} SAEs on {self.cfg.store}")

    def prepare(self) -> None:
        """Make nothing: the store is there."""

    @property
    def hooks(self) -> list[str]:
        """The store's hooks."""
        return list(StoreSource(self.cfg.store, verify=False).hooks)

    def runs(self) -> list[StudyRun]:
        """Return the runs, all hooks of a seed before the next."""
        pairs = [(seed, hook) for seed in self.cfg.seeds for hook in self.hooks]
        return [
            StudyRun(i, (hook,), self.out / hook / f"seed-{seed}", f"{hook}, seed {seed}")
            for i, (seed, hook) in enumerate(pairs)
        ]

    def source(self, run: StudyRun) -> StoreSource:
        """Return a run's embeddings."""
        return StoreSource(self.cfg.store, run.hooks, verify=False)

    def training(self, run: StudyRun) -> TrainConfig:
        """Return a run's training."""
        source, (hook,) = self.source(run), run.hooks
        constant = bool((source.stats()[hook].kept.variance == 0).any())
        return TrainConfig(
            members=self.cfg.members(constant),
            tokens=source.n_rows * self.cfg.passes,
            batch_size=self.cfg.batch_size,
            seed=self.cfg.seeds[run.number // len(self.hooks)],
        )

    def stages(self) -> list[Stage]:
        """Return the stages in order."""
        cfg = self.cfg

        def score(run: StudyRun) -> None:
            source = self.source(run)
            score_run(run.path, source, labels_of(source), cfg.classes, self.progress)

        return [
            self.trained(),
            self.evaluated(cfg.evaluation, lambda: None),
            Stage("score", score, lambda _: cfg.classes, "classes"),
            Stage("probe", self._probe, lambda _: cfg.probing, PROBES),
        ]

    def _probe(self, run: StudyRun) -> None:
        """Probe the held-out images' classes; keep accuracies by task, and the primary one spread over images."""
        source, opened, (hook,) = self.source(run), Run(run.path), run.hooks
        x = np.concatenate([chunk.x[hook].numpy() for chunk in source.heldout(4096)])
        named = {name: opened.saes[hook][name] for name in opened.config.names()}  # plain first
        found = wsae.probe(named, x, source.labels().tolist(), self.cfg.probing).hooks["acts"]
        rows = {}
        for name, scores in found.scores.items():
            one = scores["probe_1"].by_unit
            rows[name] = {key: scores[key].by_task.tolist() for key in ("probe_1", "probe_16")}
            rows[name] |= {"right": one.num.tolist(), "seen": one.den.tolist()}
        place = run.path / PROBES
        write_json(place / FOUND, {"tasks": found.tasks, "members": rows})
        inputs = {"run": opened.manifest.digest()}
        write_manifest(place, PROBES, self.cfg.probing.to_dict(), [FOUND], inputs=inputs)

    def rows(self, run: StudyRun) -> list[Row]:
        """Return one row per SAE, random SAE and raw activations of a run: what was measured."""
        opened, (hook,), rows = Run(run.path), run.hooks, []
        evaluated = opened.evaluation_record["hooks"][hook]["members"]
        scored = opened.class_record["hooks"][hook]["members"]
        for name, probed in read_json(run.path / PROBES / FOUND)["members"].items():
            row: Row = {"hook": hook, "seed": opened.config.seed, "member": name, "probed": probed}
            for key in ("probe_1", "probe_16"):
                row[key] = 100 * float(np.mean(probed[key]))
            metrics = evaluated.get(name, {}).get("metrics", {})
            found = {key: metrics.get(key, {}) for key in ("fvu", "dead_frac")}
            found |= {key: scored.get(name, {}).get("scores", {}).get(key, {}) for key in CLASS}
            for key, entry in found.items():
                value = entry.get("value")
                row[key] = None if value is None else (1 if key == "fvu" else 100) * value
            rows.append(row)
        return rows

    def results(self, rows: list[Row]) -> dict[str, Any]:
        """Return every arm's differences, by hook, whether the measure tells anything there, and tables."""
        told = {hook: told_from_random(rows, hook) for hook in self.hooks}
        arms, tables = judged(rows, self.hooks), {}
        for hook in self.hooks:
            mark = "" if told[hook].sure and told[hook].value > 0 else " (marked)"
            title = f"{hook}{mark}: plain above random {cell(told[hook], form='+.1f')}"
            tables[title] = self._arm_table(rows, hook, arms[hook], not mark)
        for key, title, form in (
            ("probe_1", "1 latent, accuracy in %", ".1f"),
            ("probe_16", "16 latents, accuracy in %", ".1f"),
            ("fvu", "Fraction of variance unexplained", ".3f"),
            ("dead_frac", "Dead latents, %", ".0f"),
            *((key, key.replace("_", ", ") + ", %", ".1f") for key in CLASS),
        ):
            tables[title] = level_table(rows, self.hooks, key, form)
        agreement = list(seed_agreement(self))
        tables["Agreement of two seeds, cosine above chance"] = agreement_table(
            agreement, self.hooks
        )
        return {
            "arms": {hook: [arm.to_dict() for arm in found] for hook, found in arms.items()},
            "told_from_random": {hook: mean._asdict() for hook, mean in told.items()},
            "agreement": agreement,
            "tables": tables,
        }

    def _arm_table(self, rows: list[Row], hook: str, arms: Sequence[Arm], told: bool) -> Table:
        """Return the arms of a hook with their differences from plain, best first."""
        shown = []
        for arm in sorted(arms, key=lambda arm: -arm.differences["probe_1"].value):
            gap, by_class = over_images(rows, hook, arm.name, self.cfg.probing), []
            for key in CLASS:
                found = by_hook(rows, hook, arm.name, key)
                by_class.append(cell(mean_interval(found) if found else None, form="+.1f"))
            sure = gap.low * gap.high > 0
            shown.append(
                [
                    arm.name,
                    cell(arm.differences["probe_1"], form="+.1f"),
                    span(Mean(gap.difference, gap.low, gap.high, gap.n), 100.0, "+.1f").strip(),
                    f"{arm.corrected:.2g}",
                    f"{arm.detectable:.1f}",
                    cell(arm.differences["probe_16"], form="+.1f"),
                    *by_class,
                    f"{arm.fvu_ratio:.2f}",
                    f"{arm.differences['dead_frac'].value:+.1f}",
                    "-" if not told else arm.verdict if sure else UNSURE,
                ]
            )
        header = ["arm", "1 latent, points", "over images", "corrected p", "seen at 80 %"]
        header += ["16 latents", "consistency, strongest", "above chance", "FVU, ratio"]
        return {"header": [*header, "dead, points", "verdict"], "rows": shown}

    def draw(self, rows: list[Row], out: Path) -> list[Path]:  # noqa: ARG002
        """Draw nothing."""
        return []


def told_from_random(rows: list[Row], hook: str) -> Mean:
    """Return plain minus random, points of the primary measure, mean over seeds: over classes, Student's interval."""
    by_task = [
        np.mean([r["probed"]["probe_1"] for r in select(rows, hook=hook, member=name)], axis=0)
        for name in (PLAIN, CONTROL)
    ]
    return mean_interval(list(100 * (by_task[0] - by_task[1])))


def judged(rows: list[Row], hooks: list[str]) -> dict[str, list[Arm]]:
    """Return every arm by hook; seeds are what is independent, Holm's correction is over all arms of all hooks.

    An arm that a hook cannot have counts there as untested (p = 1).
    """
    found = {}
    for hook in hooks:
        here = [row | {"hook": f"seed {row['seed']}"} for row in select(rows, hook=hook)]
        found[hook] = judged_arms(here, list(dict.fromkeys(row["hook"] for row in here)))
    p = [arm.p for arms in found.values() for arm in arms]
    untested = [1.0] * (len(hooks) * (len(ARMS) - 1) - len(p))
    corrected = iter(holm([*p, *untested]))
    return {hook: [arm.at(next(corrected)) for arm in arms] for hook, arms in found.items()}


def over_images(rows: list[Row], hook: str, name: str, cfg: ProbeConfig) -> Difference:
    """Return an arm's difference from plain, averaged over seeds, with the interval over test images."""

    def share(member: str) -> Ratio:
        found = [row["probed"] for row in select(rows, hook=hook, member=member)]
        return Ratio(np.mean([one["right"] for one in found], axis=0), np.array(found[0]["seen"]))

    return paired_difference(share(name), share(PLAIN), cfg.bootstrap())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    cfg = ImageRemedyConfig(store=args.store)
    results, files = reproduce_study(ImageRemedy(cfg, args.out / "runs", say=print), args.out)
    print(markdown(results["tables"]))
    print("files:", ", ".join(map(str, files)))


if __name__ == "__main__":
    main()

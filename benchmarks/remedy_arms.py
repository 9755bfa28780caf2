"""Arms of the study of remedies on measures that decide nothing there: docs/remedy.md, "By arm" and what follows it.

    python benchmarks/remedy_arms.py STORE OUT --arms plain residual-map --seeds 0 1 --measures rules

STORE is a store harvested from text. Each arm is trained beside the plain SAE of the same hook and seed; a table gives
its difference from that, the mean over a hook's seeds, and the mean over the hooks with Student's interval and p-value,
corrected by Holm over the arms named by `--tested`. What is finished in OUT is not run again. Tables have the hooks of
other finished OUTs too (`--beside`), those of another model, say.
"""

import argparse
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from wsae.acts.config import HarvestConfig, TextConfig
from wsae.acts.language import language_for
from wsae.acts.source import StoreSource
from wsae.core.config import Config
from wsae.core.files import read_json
from wsae.evals.config import ContextConfig, EvalConfig, InterpretConfig, ProbeConfig
from wsae.evals.interpret.run import interpret_run
from wsae.evals.probing.reading import read_corpus
from wsae.evals.probing.run import DOCUMENTS, TOKENS, probe_run
from wsae.run import Run
from wsae.sae.config import GammaConfig, PreconditionConfig
from wsae.studies.engine import (
    ROWS,
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
)
from wsae.studies.reproduce_config import TABLE_SAES
from wsae.studies.tables import by_hook, holm, level_table, p_value
from wsae.theory.record import PLAIN
from wsae.train.config import MemberConfig, TrainConfig

Measure = Literal["rules", "ce", "documents", "detection"]


def whitened(power: float) -> PreconditionConfig:
    return PreconditionConfig(kind="whiten", power=power)


ARMS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "half": {"expansion": 4},
    **{
        f"alpha{alpha:g}": {"gamma": GammaConfig(rule="variance", alpha=alpha)}
        for alpha in (0.5, 1.0, -0.5)
    },
    "residual": {"gamma": GammaConfig(rule="residual")},
    "residual-covariance": {"gamma": GammaConfig(rule="residual_covariance")},
    "residual-map": {"precondition": PreconditionConfig(kind="residual", power=0.5)},
    "residual-map-ridge1": {"precondition": PreconditionConfig(kind="residual", shrinkage=1.0)},
    "whiten-loss": {"gamma": GammaConfig(rule="whiten")},
    "standardise": {"precondition": PreconditionConfig(kind="standardise")},
    **{f"whiten{power:g}": {"precondition": whitened(power)} for power in (0.25, 0.5, 1.0)},
    "whiten0.5-residual": {
        "gamma": GammaConfig(rule="residual"),
        "precondition": whitened(0.5),
    },
}
SHOWN: dict[str, tuple[str, float, str]] = {
    "fvu": ("FVU", 1.0, ".3f"),
    "fvu_ratio": ("FVU, ratio to plain's", 1.0, ".3f"),
    "dead_frac": ("dead latents, %", 100.0, ".1f"),
    "ce_delta": ("rise of cross-entropy, nats", 1.0, ".3f"),
    "probe_1": ("rule tasks, 1 latent, %", 100.0, ".1f"),
    "probe_16": ("rule tasks, 16 latents, %", 100.0, ".1f"),
    "absorption_full": ("absorption, full, %", 100.0, ".2f"),
    "absorption_share": ("absorption, share, %", 100.0, ".1f"),
    "documents_probe_1": ("documents, 1 latent, %", 100.0, ".1f"),
    "documents_probe_16": ("documents, 16 latents, %", 100.0, ".1f"),
    "documents_tpp_20": ("documents, TPP with 20 latents, points", 100.0, ".1f"),
    "detection": ("embedding detection, AUC in %", 100.0, ".1f"),
    "skipped": ("latents too rare for detection, %", 100.0, ".1f"),
}
"""Measure -> how a table calls it, its unit, its digits."""


class ArmsConfig(Config):
    """What is trained and measured; results follow from it, the store and the labelled documents."""

    store: Path
    hooks: tuple[str, ...] = ()
    arms: tuple[str, ...] = tuple(ARMS)
    seeds: tuple[int, ...] = (0,)
    passes: int = 6
    measures: tuple[Measure, ...] = ("rules",)
    text: Path | None = None
    """Labelled documents, for the measure of that name."""
    label: str = "source"
    tested: tuple[str, ...] = ()
    beside: tuple[Path, ...] = ()
    evaluation: EvalConfig = EvalConfig(splice_tokens=0, n_latents=0, rows=16_384, draws=200)
    splicing: EvalConfig = EvalConfig(splice_tokens=4096, n_latents=0, draws=200)
    probing: ProbeConfig = ProbeConfig(k=(1, 16), tokens=196_608, ablated=(20,), draws=200)
    detection: InterpretConfig = InterpretConfig(
        contexts=ContextConfig(n_latents=300), scores=("embedding",), controls=("random_sae",)
    )

    def members(self) -> tuple[MemberConfig, ...]:
        """Return the SAEs of a family, named as the arms are."""
        common = TABLE_SAES["small"].member().to_dict()
        return tuple(
            MemberConfig.parse(common | ARMS[name] | {"label": name}, where=name)
            for name in self.arms
        )


class Arms(PaperStudy[ArmsConfig]):
    """The recipe: trained, evaluated, and measured as asked."""

    def introduce(self) -> None:
        """Tell what will be done."""
        self.say(f"{len(self.runs())} families of {len(self.cfg.arms)} SAEs on {self.cfg.store}")

    def prepare(self) -> None:
        """Make nothing: the store is there."""

    @property
    def hooks(self) -> tuple[str, ...]:
        """The hooks asked for, or all of the store."""
        return self.cfg.hooks or tuple(StoreSource(self.cfg.store, verify=False).hooks)

    def runs(self) -> list[StudyRun]:
        """Return the runs, all hooks of a seed before the next."""
        pairs = [(seed, hook) for seed in self.cfg.seeds for hook in self.hooks]
        return [
            StudyRun(i, (hook,), self.out / hook / f"seed-{seed}", f"{hook}, seed {seed}")
            for i, (seed, hook) in enumerate(pairs)
        ]

    def source(self, run: StudyRun) -> StoreSource:
        """Return a run's activations."""
        return StoreSource(self.cfg.store, run.hooks, verify=False)

    def training(self, run: StudyRun) -> TrainConfig:
        """Return a run's training."""
        return TrainConfig(
            members=self.cfg.members(),
            tokens=self.source(run).n_rows * self.cfg.passes,
            seed=self.cfg.seeds[run.number // len(self.hooks)],
        )

    def stages(self) -> list[Stage]:
        """Return the stages in order."""
        cfg, wanted = self.cfg, self.cfg.measures
        spliced = self.evaluated(cfg.splicing, lambda: self.language)
        plain = self.evaluated(cfg.evaluation, lambda: None)
        stages = [self.trained(), spliced if "ce" in wanted else plain]
        if {"rules", "documents"} & set(wanted):
            stages.append(Stage("probe", self._probe, lambda _: cfg.probing, "probing"))
        if "detection" in wanted:

            def detect(run: StudyRun) -> None:
                interpret_run(run.path, self.source(run), cfg.detection, self.progress)

            stages.append(Stage("detect", detect, lambda _: cfg.detection, "interpretation"))
        return stages

    @property
    def language(self) -> Any:
        """The model behind the store."""
        made = StoreSource(self.cfg.store, verify=False).store.manifest.config
        return language_for(HarvestConfig.parse(made, where=str(self.cfg.store)))

    def _probe(self, run: StudyRun) -> None:
        cfg, source = self.cfg.probing, self.source(run)
        if "rules" in self.cfg.measures:
            probe_run(run.path, source, cfg, progress=self.progress)
        if "documents" in self.cfg.measures:
            text = TextConfig(path=str(self.cfg.text))
            corpus = read_corpus(text, self.cfg.label, None, cfg, self.progress)
            probe_run(run.path, source, cfg, corpus, self.language, self.progress)

    def rows(self, run: StudyRun) -> list[Row]:
        """Return one row per SAE, random SAE and raw activations of a run: what was measured."""
        opened, (hook,), found = Run(run.path), run.hooks, {}
        for name, entry in opened.evaluation_record["hooks"][hook]["members"].items():
            metrics = entry["metrics"]
            found[name] = {key: metrics[key]["value"] for key in SHOWN if key in metrics}
        probed = opened.probing_record if opened.has("probing") else {}
        for kind, prefix in ((TOKENS, ""), (DOCUMENTS, "documents_")):
            here = probed.get(kind, {}).get("hooks", {}).get(hook, {"members": {}, "controls": {}})
            for name, entry in (here["members"] | here["controls"]).items():
                scores = {prefix + key: score["value"] for key, score in entry["summary"].items()}
                found.setdefault(name, {}).update(scores)
        if opened.has("interpretation"):
            members = opened.interpretation_record["hooks"][hook]["members"]
            for name, entry in members.items():
                score = entry["summary"]["embedding"]
                found.setdefault(name, {})["detection"] = score["value"]
        seed = self.training(run).seed
        return [
            {"hook": hook, "seed": seed, "member": name}
            | {
                key: None if values.get(key) is None else unit * values[key]
                for key, (_, unit, _) in SHOWN.items()
            }
            for name, values in found.items()
        ]

    def results(self, rows: list[Row]) -> dict[str, Any]:
        """Return levels of every measure that was taken, and every arm's differences from plain."""
        for other in self.cfg.beside:
            rows = rows + [
                row | {"hook": f"{other.name}/{row['hook']}"} for row in read_json(other / ROWS)
            ]
        hooks, tables = list(dict.fromkeys(row["hook"] for row in rows)), {}
        for row in rows:
            (plain,) = select(rows, hook=row["hook"], seed=row["seed"], member=PLAIN)
            row["fvu_ratio"] = row["fvu"] and row["fvu"] / plain["fvu"]
        for key, (title, _, form) in SHOWN.items():
            if any(row[key] is not None for row in rows):
                tables[title] = level_table(rows, hooks, key, form)
                tables[f"{title}, less plain"] = self._less_plain(rows, hooks, key, form)
        return {"tables": tables}

    def _less_plain(self, rows: list[Row], hooks: list[str], key: str, form: str) -> Table:
        """Return every arm's differences from plain; Student's test over hooks, Holm's correction."""
        names = dict.fromkeys(row["member"] for row in rows if row["member"] != PLAIN)
        found = {name: [by_hook(rows, hook, name, key) for hook in hooks] for name in names}
        means = {name: [float(np.mean(d)) for d in each if d] for name, each in found.items()}
        p = {name: p_value(mean_interval(d), d) for name, d in means.items() if len(d) > 1}
        tested = [name for name in self.cfg.tested if name in p]
        corrected = dict(zip(tested, holm([p[name] for name in tested]), strict=True))
        shown = []
        for name, each in found.items():
            if means[name]:
                sure = f"{corrected[name]:.2g}" if name in corrected else "-"
                by_each = [f"{np.mean(d):+{form}}" if d else "-" for d in each]
                mean = cell(mean_interval(means[name]), form=f"+{form}")
                shown.append([name, mean, sure, *by_each])
        return {"header": ["", "mean over hooks", "corrected p", *hooks], "rows": shown}

    def draw(self, rows: list[Row], out: Path) -> list[Path]:  # noqa: ARG002
        """Draw nothing."""
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--hooks", nargs="+", default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--passes", type=int, default=6)
    parser.add_argument("--measures", nargs="+", choices=get_args(Measure), default=["rules"])
    parser.add_argument("--text", type=Path, help="labelled documents, JSONL")
    parser.add_argument("--label", default="source", help="the column that is their label")
    parser.add_argument("--tested", nargs="+", choices=list(ARMS), default=[])
    parser.add_argument("--beside", nargs="+", type=Path, default=[], metavar="OUT")
    args = vars(parser.parse_args())
    out: Path = args.pop("out")
    study = Arms(ArmsConfig.parse(args, where="remedy_arms"), out / "runs", say=print)
    results, files = reproduce_study(study, out)
    print(markdown(results["tables"]))
    print("files:", ", ".join(map(str, files)))


if __name__ == "__main__":
    main()

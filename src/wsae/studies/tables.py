"""`wsae reproduce table1|table2|table3|language|remedy`: the study from settings to tables and figures.

`remedy` asks whether any weighting or preconditioner makes latents better; the plan is in docs/remedy.md. Each arm is
compared with the plain SAE of the same block and seed; the mean over a block's seeds, then over the blocks, with
Student's interval over blocks, and Holm's correction over the arms. What is decided rests on one measure alone, the
probes on the single best latent.
"""

import itertools
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from scipy import stats

from wsae.acts.config import TextConfig
from wsae.acts.harvest import harvest
from wsae.acts.language import LanguageModel, language_for, load_tokenizer, locate
from wsae.acts.live import LiveSource
from wsae.acts.source import StoreSource
from wsae.acts.text import documents
from wsae.core.artifact import MANIFEST, TINY_MODEL, read_manifest, write_manifest
from wsae.core.config import Config
from wsae.core.errors import UserError
from wsae.core.hub import hub_reachable, quiet_hub
from wsae.core.progress import Progress, quiet
from wsae.core.seeds import seed_for
from wsae.doctor.run import DoctorConfig, examine
from wsae.evals.config import CONTROL, FREE, InterpretConfig, ProbeConfig, Score
from wsae.evals.latents import unit_rows
from wsae.evals.probing.reading import RAW
from wsae.evals.probing.run import TOKENS, probe_run
from wsae.run import Run
from wsae.studies import tables_analysis as analysis
from wsae.studies.drawing import forest_figure
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
    select,
    span,
)
from wsae.studies.reproduce_config import STAGES, TABLE_SAES, StudyConfig, TableChoices
from wsae.studies.sweep_config import Preset
from wsae.studies.tables_analysis import draw, run_rows, scores_of
from wsae.theory.record import ONE, PAPER, PLAIN
from wsae.train.config import TrainConfig

SHOWN = ("memory", "disk", "time")
"""What `wsae doctor` finds that is told before a long study."""


def refuse_or_estimate(
    cfg: StudyConfig, out: Path, progress: Progress, say: Callable[[str], None]
) -> None:
    """Before a study on a live model: tell memory, disk and time; raises UserError where it cannot work.

    Studies by way of a store are small enough to find out, and the harvest checks its own disk.
    """
    if cfg.live is None:
        return
    if any((out / "runs").glob("*/*/config.json")):
        return  # under way: it was estimated before
    _reachable(cfg)
    wanted = DoctorConfig(
        train=cfg.training(0, None),
        harvest=cfg.harvest,
        out=str(out),
        device=cfg.harvest.device,
    )
    found = examine(wanted, progress)
    for check in found["checks"]:
        if check["name"] in SHOWN or check["status"] == "fail":
            say(f"{check['name']}: {check['value']}")
        if check["status"] == "fail" and check["name"] != "disk":  # nothing is stored
            fix = check["advice"] or "see `wsae doctor`"
            raise UserError(f"{cfg.plan.name}: {check['name']}: {check['value']}; {fix}")


def _reachable(cfg: StudyConfig) -> None:
    """Raise UserError in one line when the model or the text can only come from a hub that is not there."""
    model, text = cfg.harvest.model, cfg.harvest.text.path
    if hub_reachable():
        return
    if isinstance(locate(model), str):
        try:
            load_tokenizer(model)  # perhaps it is in the hub's cache
        except UserError as error:
            raise UserError(
                f"{cfg.plan.name}: the hub is not reachable and {model} is not here; "
                "give --model DIRECTORY, or use --preset small"
            ) from error
    if text != "builtin" and not Path(text).exists():
        raise UserError(
            f"{cfg.plan.name}: the hub is not reachable and the text {text} is not here; give --text FILE"
        )


# What the preset tiny makes for itself: a language model of random weights with a tokenizer, and a
# text encoder.
#
# Its latents mean little; it is there to try every stage from the model to the table, in seconds
# and offline.

WIDTH, LAYERS, VOCABULARY = 32, 2, 512
_DOCUMENTS = 200
"""Documents the tokenizer is trained on."""


def tiny_model(place: Path, seed: int = 0) -> Path:
    """Write a GPT-NeoX model (as Pythia) of random weights with a tokenizer to `place`, unless it is there."""
    if place.exists() and (place / MANIFEST).exists():
        read_manifest(place, TINY_MODEL)
        return place
    shutil.rmtree(place, ignore_errors=True)  # what a killed command left
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    tokenizer = _tokenizer()
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=256,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPTNeoXForCausalLM(config)
    with quiet_hub():
        model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    files = [path.name for path in place.iterdir() if path.is_file()]
    write_manifest(place, TINY_MODEL, {"seed": seed, "width": WIDTH, "layers": LAYERS}, files)
    return place


def _tokenizer():  # transformers' class, which may be missing at import time
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (document.text for document in itertools.islice(documents(TextConfig()), _DOCUMENTS))
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>")


class BagEncoder:
    """Texts as unit vectors of hashed character trigrams: a sentence encoder that needs no package and no download."""

    name = "hashed trigrams"
    DIM = 256

    def encode(
        self,
        texts: Sequence[str],
        progress: Progress = quiet,  # noqa: ARG002
    ) -> Float32[np.ndarray, "texts dim"]:
        """Return one row per text: v = sum of e_hash(trigram), v / |v|; NaN for a text without trigrams."""
        out = np.zeros((len(texts), self.DIM), dtype=np.float32)
        for row, content in zip(out, texts, strict=True):
            for start in range(len(content) - 2):
                row[zlib.crc32(content[start : start + 3].encode()) % self.DIM] += 1
        norm = np.linalg.norm(out, axis=1, keepdims=True)
        return np.where(norm > 0, out / np.maximum(norm, 1), np.nan).astype(np.float32)


# From a model to scored SAEs: harvest once, then train, evaluate and interpret run after run.
#
# By way of a store every run has one hook: at most its rows are in the page cache and its members in memory, whatever
# the number of hooks. Training from a live model needs no disk, but every hook's members in memory at once.


@dataclass
class TableStudy(PaperStudy[StudyConfig]):
    """The recipe of the tables and of the wider study."""

    choices: TableChoices = TableChoices()
    preset: Preset = "small"

    @property
    def store(self) -> Path:
        """The harvest of every hook, or the user's."""
        return self.choices.store or self.out.parent / "store"

    @cached_property
    def language(self) -> LanguageModel:
        """The model under study, loaded once, when first needed."""
        return language_for(self.cfg.harvest)

    def introduce(self) -> None:
        """Tell what will be done; on a live model its memory, disk and time too."""
        self.say(announce(self.cfg))
        refuse_or_estimate(self.cfg, self.out, self.progress, self.say)

    def prepare(self) -> None:
        """Make the tiny model where the preset asks for it, and harvest its activations."""
        if self.cfg.made_here:
            tiny_model(Path(self.cfg.harvest.model), self.cfg.harvest.seed)
        if self.cfg.live is None and self.choices.store is None:
            harvest(self.cfg.harvest, self.store, self.progress)

    def runs(self) -> list[StudyRun]:
        """Return the runs in the plan's order; live training has one for each seed, with every hook."""
        planned, live = self.cfg.plan.runs, self.cfg.live is not None
        numbers = {run.seed: i for i, run in reversed(list(enumerate(planned)))}
        found = []
        for i in (numbers[seed] for seed in sorted(numbers)) if live else range(len(planned)):
            hook, seed = "all" if live else planned[i].hook, planned[i].seed
            hooks = self.cfg.plan.hooks if live else (hook,)
            path = self.out / "runs" / hook / f"seed-{seed}"
            found.append(StudyRun(i, hooks, path, f"{', '.join(hooks)}, seed {seed}"))
        return found

    def source(self, run: StudyRun) -> "StoreSource | LiveSource":
        """Return the activations of a run's hooks."""
        if self.cfg.live is None:
            return StoreSource(self.store, run.hooks, verify=False)  # the harvest has checked them
        wanted = self.cfg.harvest.model_copy(update={"hooks": run.hooks})
        return LiveSource(wanted, self.cfg.live, self.language)

    def training(self, run: StudyRun) -> TrainConfig:
        """Return a run's training."""
        return self.cfg.training(run.number, self.source(run).n_rows)

    def stages(self) -> list[Stage]:
        """Return the stages up to the last one asked for."""
        stages = [self.trained(), self.evaluated(self.cfg.evaluation, lambda: None), self.scored()]
        return stages[: STAGES.index(self.choices.until)]

    def scored(self) -> Stage:
        """Return the stage that interprets a run."""

        def settings(run: StudyRun) -> InterpretConfig:
            return self.cfg.interpretation(run.number)

        return Stage(
            "interpret", self._interpret, settings, "interpretation", lambda _: self._judges
        )

    @cached_property
    def _judges(self) -> dict[str, str]:
        """Who judges the asked scores, as manifests have it."""
        from wsae.evals.interpret.local import open_llm
        from wsae.evals.interpret.run import judges_of

        asked: list[Score] = [s for s in self.cfg.interpret.scores if s not in FREE]
        judge = open_llm(self.cfg.judge) if asked and self.cfg.judge else None
        return judges_of(asked, lambda _: judge)

    def _interpret(self, run: StudyRun) -> None:
        from wsae.evals.interpret.local import open_llm
        from wsae.evals.interpret.run import interpret_run

        cfg, judge = self.cfg.interpretation(run.number), self.cfg.judge
        own = {"surprisal"} & set(cfg.scores) or {"random_model"} & set(cfg.controls)
        interpret_run(
            run.path,
            self.source(run),
            cfg,
            self.progress,
            language=self.language if own else None,
            encoder=BagEncoder() if self.cfg.made_here else None,
            llm=None if judge is None else open_llm(judge),
        )

    def rows(self, run: StudyRun) -> list[Row]:
        """Return the rows of one run."""
        return run_rows(self.cfg, run.hooks, run.number, run.path)

    def results(self, rows: list[Row]) -> dict[str, Any]:
        """Return differences, means and tables of a study's rows."""
        sae, hooks = TABLE_SAES[self.preset], self.cfg.plan.hooks
        analysis.add_matched_fvu(rows, sae, self.cfg.interpret)
        lines = analysis.over_seeds(rows)
        means = analysis.over_hooks(lines, len(hooks))
        paper = {}
        name = self.cfg.plan.name
        if name in PAPER:
            paper = {f"the paper's {PAPER[name].title}, score in %": analysis.paper_table(name)}
        ours = analysis.tables(rows, lines, means, hooks)
        return {
            "tables": paper | ours,
            "markdown": markdown(paper | ours),
            "differences": lines,
            "means": means,
            "moved": analysis.density_and_fvu(rows, sae),
            "by_baseline": {score: _by_baseline(rows, hooks, score) for score in scores_of(rows)},
        }

    def draw(self, rows: list[Row], out: Path) -> list[Path]:
        """Draw every score against the layer, the FVU and the density."""
        return draw(rows, self.cfg.plan.hooks, TABLE_SAES[self.preset], out)


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


# The study of remedies.

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

    def scored(self) -> Stage:
        """Return the stage that probes a run by the rule tasks."""
        cfg = ProbeConfig(k=(1, 16), least=2 if self.preset == "tiny" else ProbeConfig().least)

        def probe(run: StudyRun) -> None:
            probe_run(run.path, self.source(run), cfg, progress=self.progress)

        return Stage("probe", probe, lambda _: cfg, "probing")

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
    values = [(row[key], plain[key]) for row, plain in _beside_plain(rows, hook, name)]
    return [own - plain for own, plain in values if own is not None and plain is not None]


def _beside_plain(rows: Sequence[Row], hook: str, name: str) -> Iterator[tuple[Row, Row]]:
    """Yield an arm's rows at a block, one a seed, each with the plain one of its seed."""
    for row in select(rows, hook=hook, member=name):
        (plain,) = select(rows, hook=hook, seed=row["seed"], member=PLAIN)
        yield row, plain


def judged_arms(rows: Sequence[Row], hooks: Sequence[str]) -> list[Arm]:
    """Return every arm with its verdict; see docs/remedy.md for the rule."""
    names, found = arm_names(rows), {}
    for name in names:
        found[name] = {
            key: [float(np.mean(d)) for hook in hooks if (d := by_hook(rows, hook, name, key))]
            for key in ALL
        }
    p = [p_value(mean_interval(found[name][PRIMARY]), found[name][PRIMARY]) for name in names]
    arms = []
    for name, own, corrected in zip(names, p, holm(p), strict=True):
        means = {key: mean_interval(values) for key, values in found[name].items()}
        n, spread = len(found[name][PRIMARY]), float(np.std(found[name][PRIMARY], ddof=1))
        seen = float(stats.t.ppf(1 - LEVEL / 2, n - 1) + stats.t.ppf(0.8, n - 1)) * spread / n**0.5
        pairs = (pair for hook in hooks for pair in _beside_plain(rows, hook, name))
        arm = Arm(
            name=name,
            differences=means,
            fvu_ratio=float(np.mean([row["fvu"] / plain["fvu"] for row, plain in pairs])),
            p=own,
            corrected=corrected,
            detectable=seen,
        )
        arms.append(arm.at(corrected))
    return arms


def p_value(mean: Mean, values: Sequence[float]) -> float:
    """Return the two-sided p-value of Student's test that values have mean 0."""
    error = float(np.std(values, ddof=1)) / mean.n**0.5
    if error == 0:
        return float(mean.value == 0)
    return 2 * float(stats.t.sf(abs(mean.value) / error, mean.n - 1))


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

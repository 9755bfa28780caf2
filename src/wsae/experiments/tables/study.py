"""`wsae reproduce table1|table2|table3|language`: the study from settings to tables and figures."""

import itertools
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from wsae.acts.config import TextConfig
from wsae.acts.harvest import harvest
from wsae.acts.language import LanguageModel, load_language, load_tokenizer, locate
from wsae.acts.live import LiveSource
from wsae.acts.source import StoreSource
from wsae.acts.text import documents
from wsae.core.artifact import MANIFEST, read_manifest, write_manifest
from wsae.core.errors import UserError
from wsae.core.files import write_json, write_text
from wsae.core.hub import hub_reachable, quiet_hub
from wsae.core.progress import Progress, quiet
from wsae.doctor.config import DoctorConfig
from wsae.doctor.run import examine
from wsae.evals.run import evaluate_run
from wsae.experiments.presets import Preset
from wsae.experiments.sweep.table import select
from wsae.experiments.tables import analysis
from wsae.experiments.tables import analysis as text
from wsae.experiments.tables.analysis import Row, draw, run_rows, scores_of
from wsae.experiments.tables.config import SAES, STAGES, Choices, Stage, StudyConfig, study_config
from wsae.experiments.tables.plan import ONE, PAPER, PLAIN, StudyName
from wsae.train.run import train_run

# Before hours are spent: is the model there, and what will it take of memory, disk and time?

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
    found = examine(doctor_config(cfg, out), progress)
    for check in found["checks"]:
        if check["name"] in SHOWN or check["status"] == "fail":
            say(f"{check['name']}: {check['value']}")
        if check["status"] == "fail" and check["name"] != "disk":  # nothing is stored
            mend = check["advice"] or "see `wsae doctor`"
            raise UserError(f"{cfg.plan.name}: {check['name']}: {check['value']}; {mend}")


def doctor_config(cfg: StudyConfig, out: Path) -> DoctorConfig:
    """Return what the doctor examines: the model and one family at every hook."""
    return DoctorConfig(
        train=cfg.training(0, None),
        harvest=cfg.harvest,
        out=str(out),
        device=cfg.harvest.device,
    )


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
READY = "tiny-model"


def tiny_model(place: Path, seed: int = 0) -> Path:
    """Write a GPT-NeoX model (as Pythia) of random weights with a tokenizer to `place`, unless it is there."""
    if place.exists() and (place / "manifest.json").exists():
        read_manifest(place, READY)
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
    write_manifest(place, READY, {"seed": seed, "width": WIDTH, "layers": LAYERS}, files)
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
# Each stage reads directories and writes one; a finished stage is not run again, and a killed one
# goes on. By way of a store every run has one hook: at most its rows are in the page cache and its
# members in memory, whatever the number of hooks. Training from a live model needs no disk, but
# every hook's members in memory at once.

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """One run: its number in the plan, its hooks and its directory."""

    number: int
    hooks: tuple[str, ...]
    path: Path


@dataclass
class Workshop:
    """What the stages share: places, the model (loaded once, when first needed) and whom to tell."""

    cfg: StudyConfig
    out: Path
    store: Path
    progress: Progress = quiet
    say: Say = lambda _: None
    _checked: set[Path] = field(default_factory=set)

    @cached_property
    def language(self) -> LanguageModel:
        """The model under study."""
        wanted = self.cfg.harvest
        return load_language(wanted.model, wanted.dtype, wanted.device)

    def jobs(self) -> list[Job]:
        """Return the runs in the plan's order; live training has one for each seed, with every hook."""
        runs = self.cfg.plan.runs
        if self.cfg.live is None:
            return [
                Job(i, (run.hook,), self.out / "runs" / run.hook / f"seed-{run.seed}")
                for i, run in enumerate(runs)
            ]
        seeds = {run.seed: i for i, run in reversed(list(enumerate(runs)))}
        hooks = self.cfg.plan.hooks
        return [
            Job(i, hooks, self.out / "runs" / "all" / f"seed-{s}") for s, i in sorted(seeds.items())
        ]

    def source(self, job: Job) -> "StoreSource | LiveSource":
        """Return the activations of a run's hooks."""
        if self.cfg.live is None:
            return StoreSource(self.store, job.hooks, verify=False)  # the harvest has checked them
        wanted = self.cfg.harvest.model_copy(update={"hooks": job.hooks})
        return LiveSource(wanted, self.cfg.live, self.language)


def run_study(
    cfg: StudyConfig,
    out: Path,
    choices: Choices,
    progress: Progress = quiet,
    say: Say = lambda _: None,
) -> list[Job]:
    """Run the stages up to `choices.until` and return the runs, in the plan's order.

    Raises UserError as the stages do, and KeyboardInterrupt after what is written is whole.
    """
    shop = Workshop(cfg, out, choices.store or out.parent / "store", progress, say)
    if cfg.made_here:
        tiny_model(Path(cfg.harvest.model), cfg.harvest.seed)
    if cfg.live is None and choices.store is None:
        harvest(cfg.harvest, shop.store, progress)
    jobs = shop.jobs()
    for stage in STAGES[1 : STAGES.index(choices.until) + 1]:
        for place, job in enumerate(jobs, start=1):
            if not finished(shop, job, stage):
                names = ", ".join(job.hooks)
                seed = cfg.plan.runs[job.number].seed
                say(f"{stage} {place} of {len(jobs)}: {names}, seed {seed}")
                WORK[stage](shop, job)
    return jobs


def finished(shop: Workshop, job: Job, stage: Stage) -> bool:
    """Say whether a stage of a run is there, made with this study's settings from what is there now."""
    if stage == "train":
        return (job.path / MANIFEST).exists() and not _changed(shop, job)
    kind, settings = {
        "evaluate": ("evaluation", shop.cfg.evaluation),
        "interpret": ("interpretation", shop.cfg.interpretation(job.number)),
    }[stage]
    place = job.path / kind
    if not (place / MANIFEST).exists():
        return False
    manifest = read_manifest(place, kind, verify=False)
    return manifest.config == settings.to_dict() and not manifest.info.get("unfinished")


def _changed(shop: Workshop, job: Job) -> bool:
    """Say whether the run that is there is another one; `train_run` then refuses it by the first difference."""
    manifest = read_manifest(job.path, "run", verify=False)
    return manifest.config["train"] != _training(shop, job, shop.source(job)).to_dict()


def _training(shop: Workshop, job: Job, source: "StoreSource | LiveSource") -> Any:
    return shop.cfg.training(job.number, source.n_rows)


def _train(shop: Workshop, job: Job) -> None:
    source = shop.source(job)
    cfg = _training(shop, job, source)
    train_run(cfg, source, job.path, shop.progress, resume=True, device=shop.cfg.harvest.device)


def _evaluate(shop: Workshop, job: Job) -> None:
    evaluate_run(job.path, shop.source(job), shop.cfg.evaluation, None, shop.progress)


def _interpret(shop: Workshop, job: Job) -> None:
    from wsae.evals.autointerp.llm.local import open_llm
    from wsae.evals.autointerp.run import interpret_run

    cfg, judge = shop.cfg.interpretation(job.number), shop.cfg.judge
    own = {"surprisal"} & set(cfg.scores) or {"random_model"} & set(cfg.controls)
    interpret_run(
        job.path,
        shop.source(job),
        cfg,
        shop.progress,
        language=shop.language if own else None,
        encoder=BagEncoder() if shop.cfg.made_here else None,
        llm=None if judge is None else open_llm(judge),
    )


WORK: dict[Stage, Callable[[Workshop, Job], None]] = {
    "train": _train,
    "evaluate": _evaluate,
    "interpret": _interpret,
}

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

"""`wsae reproduce table1|table2|table3|language`: the study from settings to tables and figures."""

import itertools
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from wsae.acts.config import TextConfig
from wsae.acts.harvest import harvest
from wsae.acts.language import LanguageModel, language_for, load_tokenizer, locate
from wsae.acts.live import LiveSource
from wsae.acts.source import StoreSource
from wsae.acts.text import documents
from wsae.core.artifact import MANIFEST, read_manifest, write_manifest
from wsae.core.errors import UserError
from wsae.core.hub import hub_reachable, quiet_hub
from wsae.core.progress import Progress, quiet
from wsae.doctor.run import DoctorConfig, examine
from wsae.evals.config import InterpretConfig
from wsae.studies import tables_analysis as analysis
from wsae.studies.engine import PaperStudy, Stage, StudyRun, markdown
from wsae.studies.results import Row, select
from wsae.studies.sweep_config import Preset
from wsae.studies.tables_analysis import draw, run_rows, scores_of
from wsae.studies.tables_config import SAES, STAGES, StudyConfig, TableChoices
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
READY = "tiny-model"


def tiny_model(place: Path, seed: int = 0) -> Path:
    """Write a GPT-NeoX model (as Pythia) of random weights with a tokenizer to `place`, unless it is there."""
    if place.exists() and (place / MANIFEST).exists():
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
        wanted = self.cfg.harvest
        return language_for(wanted)

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

        def settings(run: StudyRun) -> InterpretConfig:
            return self.cfg.interpretation(run.number)

        stages = [
            self.trained(),
            self.evaluated(self.cfg.evaluation, lambda: None),
            Stage("interpret", self._interpret, settings, "interpretation"),
        ]
        return stages[: STAGES.index(self.choices.until)]

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
        sae, hooks = SAES[self.preset], self.cfg.plan.hooks
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
        return draw(rows, self.cfg.plan.hooks, SAES[self.preset], out)


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

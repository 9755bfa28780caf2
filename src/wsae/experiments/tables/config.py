"""Settings of a table or of the wider study: what is harvested, trained and scored. No torch here."""

from pathlib import Path
from typing import Literal

from pydantic import PositiveInt, model_validator

from wsae.acts.config import HarvestConfig, LiveConfig
from wsae.core.config import Config
from wsae.evals.autointerp.config import Control, InterpretConfig, Score
from wsae.evals.autointerp.llm.config import LlmConfig
from wsae.evals.config import EvalConfig
from wsae.experiments.tables.plan import Plan
from wsae.train.config import TrainConfig

Stage = Literal["harvest", "train", "evaluate", "interpret"]
STAGES: tuple[Stage, ...] = ("harvest", "train", "evaluate", "interpret")


class Choices(Config):
    """What a user may change of a preset."""

    model: str | None = None
    text: str | None = None
    hooks: tuple[str, ...] = ()
    store: Path | None = None
    """A finished store to use in place of a harvest; its hooks are used where none are named."""
    judge: LlmConfig | None = None
    """A language model that explains latents and judges contexts; none: the scores that need none."""
    scores: tuple[Score, ...] = ()
    """none: embedding, and with a judge detection."""
    controls: tuple[Control, ...] | None = None
    """None: those that cost no model pass."""
    until: Stage = "interpret"
    """The last stage to run."""

    def given(self) -> bool:
        """Say whether anything is chosen."""
        return self != Choices()


class StudyConfig(Config):
    """One study, complete: its results follow from this and the files it names."""

    plan: Plan
    harvest: HarvestConfig
    live: LiveConfig | None = None
    """Train straight from the model, all hooks in one run; none: by way of a store, a run for each hook."""
    tokens: PositiveInt | None = None
    """Training rows per SAE; none means once through the store."""
    batch_size: PositiveInt = 2048
    evaluation: EvalConfig = EvalConfig()
    interpret: InterpretConfig = InterpretConfig()
    judge: LlmConfig | None = None
    made_here: bool = False
    """The model is a tiny one, made in the output directory (preset tiny)."""

    @model_validator(mode="after")
    def _live_runs_share_members(self) -> "StudyConfig":
        if self.live is not None and len({run.members for run in self.plan.runs}) > 1:
            raise ValueError("training from a live model needs the same members at every hook")
        return self

    def interpretation(self, run: int) -> InterpretConfig:
        """Return how run number `run` is interpreted: controls stand beside the first seed of a hook alone."""
        planned = self.plan.runs[run]
        first = min(other.seed for other in self.plan.runs if other.hook == planned.hook)
        if planned.seed == first:
            return self.interpret
        return self.interpret.model_copy(update={"controls": ()})

    def training(self, run: int, rows: int | None) -> TrainConfig:
        """Return run number `run`'s training over `rows` stored rows."""
        planned = self.plan.runs[run]
        tokens = self.tokens or rows
        data = {
            "members": planned.members,
            "tokens": tokens,
            "batch_size": min(self.batch_size, tokens or self.batch_size),
            "seed": planned.seed,
        }
        return TrainConfig.parse(data, where=f"{self.plan.name}, {planned.hook}")

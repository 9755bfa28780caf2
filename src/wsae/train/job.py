"""A family of SAEs as what a run trains."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from wsae.acts.stream import ActivationSource
from wsae.core.progress import Tick
from wsae.train.checkpoint import family_tensors, set_family_tensors
from wsae.train.config import TrainConfig
from wsae.train.counters import metrics_row
from wsae.train.family import Family
from wsae.train.loop import run_steps
from wsae.train.schedule import lr_factor


class FamilyJob:
    """Trains a family on a source's batches; see `wsae.train.loop.Job`."""

    task, unit = "train", "tokens"

    def __init__(self, cfg: TrainConfig, family: Family, source: ActivationSource) -> None:
        self.cfg, self.family, self.source = cfg, family, source
        self.per_step, self.steps = cfg.batch_size, cfg.steps
        self.fields: dict[str, float] = {}

    def tensors(self) -> dict[str, Tensor]:
        """Return every member's weights, optimiser and counters."""
        return family_tensors(self.family)

    def restore(self, tensors: dict[str, Tensor], where: str) -> None:
        """Take back what `tensors` returned; raises UserError when the members are others."""
        set_family_tensors(self.family, tensors, where)

    def position(self) -> dict[str, Any]:
        """Return the stream's place."""
        return {"stream": self.stream.state()}

    def run(
        self, position: dict[str, Any] | None, tick: Tick, on_step: Callable[[int], None]
    ) -> None:
        """Train from a checkpoint's position, or from the start."""
        place, first = (position["stream"], int(position["step"])) if position else (None, 0)
        self.stream = self.source.stream(self.cfg.batch_size, self.cfg.seed, place)
        run_steps(self.cfg, self.family, self.stream, first, tick, on_step)

    def due(self, done: int) -> bool:
        """Return whether a row of metrics is due: every `log_every` steps and at the end."""
        return done % self.cfg.log_every == 0 or done == self.steps

    def rows(self, done: int) -> Iterator[dict[str, Any]]:
        """Yield each member's metrics since its last row."""
        for hook, member in self.family.all():
            rate = member.cfg.learning_rate(member.sae.cfg.d_in)
            rate *= lr_factor(done - 1, self.cfg.steps, self.cfg.warmup, self.cfg.decay)
            head = {"step": done, "tokens": done * self.cfg.batch_size, "hook": hook}
            row = metrics_row(member)
            yield {**head, "member": member.name, **row, "lr": rate}
            member.reset_sums()
            self.fields = {"fvu": row["fvu"], "l0": row["l0"]}

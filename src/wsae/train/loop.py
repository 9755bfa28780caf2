"""The loop: one batch, every member's step, a row of metrics now and then, a checkpoint now and then."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from wsae.acts.stream import BatchStream
from wsae.core.progress import Tick
from wsae.train.checkpoint import save_checkpoint
from wsae.train.config import TrainConfig
from wsae.train.family import Family
from wsae.train.loggers.mirror import current
from wsae.train.metrics import JsonLines
from wsae.train.side_by_side import side_by_side
from wsae.train.state import make_batch

CHECKPOINT_SECONDS = 60.0
"""A checkpoint is due after this long, or after 20 times what the last one took to write, if that is longer."""


class Stopped(KeyboardInterrupt):
    """Training was asked to stop; a checkpoint holds everything up to `step`."""

    def __init__(self, step: int, steps: int) -> None:
        super().__init__(f"stopped after step {step} of {steps}")
        self.step, self.steps = step, steps


@runtime_checkable
class Job(Protocol):
    """What a run trains: its steps, everything that changes in them, and what is said of them."""

    task: str
    """What the progress bar calls it."""
    unit: str
    """What a step takes `per_step` of."""
    per_step: int
    steps: int
    fields: dict[str, float]
    """Shown beside the progress bar."""

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that changes while training."""
        ...

    def restore(self, tensors: dict[str, Tensor], where: str) -> None:
        """Take back what `tensors` returned; raises UserError naming `where` when they are of another run."""
        ...

    def position(self) -> dict[str, Any]:
        """Return what a checkpoint keeps beside the tensors, JSON-ready."""
        ...

    def run(
        self, position: dict[str, Any] | None, tick: Tick, on_step: Callable[[int], None]
    ) -> None:
        """Train from a checkpoint's position (its `step` steps are done) or from the start.

        `on_step(n)` follows each step with the number done, before `tick`.
        """
        ...

    def due(self, done: int) -> bool:
        """Return whether a row of metrics is due after `done` steps."""
        ...

    def rows(self, done: int) -> Iterable[dict[str, Any]]:
        """Return the rows of metrics since the last ones and begin new ones."""
        ...


@runtime_checkable
class Team(Protocol):
    """The processes that train a job together; one of them writes."""

    @property
    def first(self) -> bool:
        """Whether this one writes."""
        ...

    def agree(self, stop: bool, due: bool) -> tuple[bool, bool]:
        """Return whether all stop after this step, and whether a checkpoint is due; called by all after every step."""
        ...


class Alone:
    """One process."""

    first = True

    def agree(self, stop: bool, due: bool) -> tuple[bool, bool]:
        """Return what this process wants."""
        return stop, due


ALONE = Alone()


def run_steps(
    cfg: TrainConfig,
    family: Family,
    stream: BatchStream,
    first: int,
    tick: Tick,
    on_step: Callable[[int], None],
) -> None:
    """Train from step `first` to the end; `on_step(n)` is called after each step with the number done."""
    with side_by_side(cfg, family) as step_all:
        for step in range(first, cfg.steps):
            batch = stream.next()
            rows = 0
            for hook, members in family.members.items():
                x = batch[hook].to(members[0].mean.device)
                rows, shared = len(x), make_batch(x, members[0])
                step_all(members, shared, step)
            on_step(step + 1)
            tick(rows)


class Recorder:
    """Writes a run's metrics and checkpoints between steps, and stops it between steps when asked."""

    def __init__(self, run: Path, job: Job, team: Team = ALONE) -> None:
        self.run, self.job, self.team = run, job, team
        self.metrics = JsonLines(run / "metrics.jsonl")
        self.speed = JsonLines(run / "speed.jsonl")
        self.mirror = current()
        self.stop = False
        self._saved_at = self._logged_at = time.monotonic()
        self._cost = 0.0
        self._logged_step: int | None = None

    def on_step(self, done: int) -> None:
        """Log when a row is due; checkpoint when one is due; raise Stopped when asked to stop."""
        last = done == self.job.steps
        if self.job.due(done):
            self._log(done)
        due = time.monotonic() - self._saved_at > max(CHECKPOINT_SECONDS, 20 * self._cost)
        stop, due = self.team.agree(self.stop, due and not last)
        if stop or due:
            self.save(done)
        if stop and not last:
            raise Stopped(done, self.job.steps)

    def save(self, done: int) -> None:
        """Write a checkpoint of the state after `done` steps."""
        begin = time.monotonic()
        if self.team.first:
            place = {**self.job.position(), **self.metrics.mark()}
            save_checkpoint(self.run, done, self.job.tensors(), place)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - begin

    def _log(self, done: int) -> None:
        rows = list(self.job.rows(done))
        if self.team.first:
            for row in rows:
                self.metrics.write(row)
            self.mirror.write(rows)
        now = time.monotonic()
        steps = done - (self._logged_step or 0) if self._logged_step is not None else 0
        if steps and self.team.first:
            rate = steps * self.job.per_step / (now - self._logged_at)
            self.speed.write({"step": done, f"{self.job.unit}_per_s": rate})
        self._logged_at, self._logged_step = now, done

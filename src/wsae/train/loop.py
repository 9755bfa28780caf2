"""The loop: one batch, every member's step, a row of metrics now and then, a checkpoint now and then."""

import time
from collections.abc import Callable
from pathlib import Path

from wsae.acts.stream import BatchStream
from wsae.core.progress import Tick
from wsae.train.checkpoint import save_checkpoint
from wsae.train.config import TrainConfig
from wsae.train.counters import metrics_row
from wsae.train.family import Family
from wsae.train.metrics import JsonLines
from wsae.train.schedule import lr_factor
from wsae.train.side_by_side import side_by_side
from wsae.train.state import make_batch

CHECKPOINT_SECONDS = 60.0
"""A checkpoint is due after this long, or after 20 times what the last one took to write, if that is longer."""


class Stopped(KeyboardInterrupt):
    """Training was asked to stop; a checkpoint holds everything up to `step`."""

    def __init__(self, step: int, steps: int) -> None:
        super().__init__(f"stopped after step {step} of {steps}")
        self.step, self.steps = step, steps


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

    def __init__(self, run: Path, cfg: TrainConfig, family: Family, stream: BatchStream) -> None:
        self.run, self.cfg, self.family, self.stream = run, cfg, family, stream
        self.metrics = JsonLines(run / "metrics.jsonl")
        self.speed = JsonLines(run / "speed.jsonl")
        self.stop = False
        self.fields: dict[str, float] = {}
        self._saved_at = self._logged_at = time.monotonic()
        self._cost = 0.0
        self._logged_step: int | None = None

    def on_step(self, done: int) -> None:
        """Log every `log_every` steps and at the end; checkpoint when due; raise Stopped when asked to stop."""
        last = done == self.cfg.steps
        if done % self.cfg.log_every == 0 or last:
            self._log(done)
        due = time.monotonic() - self._saved_at > max(CHECKPOINT_SECONDS, 20 * self._cost)
        if self.stop or (due and not last):
            self.save(done)
        if self.stop and not last:
            raise Stopped(done, self.cfg.steps)

    def save(self, done: int) -> None:
        """Write a checkpoint of the state after `done` steps."""
        begin = time.monotonic()
        place = {"stream": self.stream.state(), "metrics_bytes": self.metrics.size()}
        save_checkpoint(self.run, done, self.family, place)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - begin

    def _log(self, done: int) -> None:
        for hook, member in self.family.all():
            rate = member.cfg.learning_rate(member.sae.cfg.d_in)
            rate *= lr_factor(done - 1, self.cfg.steps, self.cfg.warmup, self.cfg.decay)
            head = {"step": done, "tokens": done * self.cfg.batch_size, "hook": hook}
            row = metrics_row(member)
            self.metrics.write({**head, "member": member.name, **row, "lr": rate})
            member.reset_sums()
            self.fields = {"fvu": row["fvu"], "l0": row["l0"]}
        now = time.monotonic()
        steps = done - (self._logged_step or 0) if self._logged_step is not None else 0
        if steps:
            tokens = steps * self.cfg.batch_size
            self.speed.write({"step": done, "tokens_per_s": tokens / (now - self._logged_at)})
        self._logged_at, self._logged_step = now, done

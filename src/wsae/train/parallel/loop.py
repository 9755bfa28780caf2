"""The loop of a run on many ranks: all take the same steps, agree when to save and stop, and rank 0 writes metrics."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from wsae.acts.stream import BatchStream
from wsae.core.progress import Tick
from wsae.train.config import TrainConfig
from wsae.train.counters import metrics_row
from wsae.train.loggers.mirror import current
from wsae.train.loop import CHECKPOINT_SECONDS, Stopped
from wsae.train.metrics import JsonLines
from wsae.train.parallel.checkpoint import save
from wsae.train.parallel.shard import Shard
from wsae.train.parallel.step import shared_step
from wsae.train.parallel.world import MAX, World
from wsae.train.schedule import lr_factor
from wsae.train.state import make_batch

AGREE_S, AGREE_STEPS = 1.0, 100
"""Ranks ask each other whether to save or stop about so often, and at least every so many steps."""
METRICS = ("loss", "reconstruction", "auxk", "fvu", "fvu_weighted", "l0", "dead_frac")


def run_steps(
    cfg: TrainConfig,
    shards: list[Shard],
    stream: BatchStream,
    first: int,
    tick: Tick,
    on_step: Callable[[int], None],
) -> None:
    """Train this rank's shards from step `first` to the end; `on_step(n)` follows each step with the number done."""
    hooks: dict[str, list[Shard]] = {}
    for shard in shards:
        hooks.setdefault(shard.hook, []).append(shard)
    for step in range(first, cfg.steps):
        batch = stream.next()
        for hook, own in hooks.items():
            x = batch[hook].to(own[0].window.device)
            common = make_batch(x, own[0].member)
            for shard in own:
                shared_step(shard, common, step, cfg)
        on_step(step + 1)
        tick(cfg.batch_size)


class Recorder:
    """Writes metrics and checkpoints between steps, and stops all ranks between steps when one is asked to."""

    def __init__(
        self,
        run: Path,
        cfg: TrainConfig,
        shards: list[Shard],
        rates: dict[str, float],
        world: World,
    ) -> None:
        self.run, self.cfg, self.shards, self.world = run, cfg, shards, world
        self.rates = rates
        """Peak learning rate of every member of the run, by its name in checkpoints, in the order of one process."""
        self.metrics, self.speed = JsonLines(run / "metrics.jsonl"), JsonLines(run / "speed.jsonl")
        self.mirror = current()
        self.stream: BatchStream | None = None
        self.stop = False
        self.fields: dict[str, float] = {}
        self._saved_at = self._logged_at = self._asked_at = time.monotonic()
        self._cost = 0.0
        self._logged = self._asked = self._ask_at = 0

    def begin(self, stream: BatchStream, first: int) -> None:
        """Start at step `first` of a stream."""
        self.stream, self._logged, self._asked, self._ask_at = stream, first, first, first + 1
        self._saved_at = self._logged_at = self._asked_at = time.monotonic()

    def on_step(self, done: int) -> None:
        """Log every `log_every` steps and at the end; save when due or asked to stop, then raise Stopped."""
        last = done == self.cfg.steps
        if done % self.cfg.log_every == 0 or last:
            self._log(done)
        if last or done < self._ask_at:
            return
        stop, due = self._agree(done)
        if stop or due:
            self.save(done)
        if stop:
            raise Stopped(done, self.cfg.steps)

    def save(self, done: int) -> Path:
        """Write a checkpoint of the state after `done` steps."""
        assert self.stream is not None
        begin = time.monotonic()
        for shard in self.shards:
            shard.show_sums()
        place = {"stream": self.stream.state(), **self.metrics.mark()}
        path = save(self.run, done, self.shards, place, self.world)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - begin
        return path

    def _agree(self, done: int) -> tuple[bool, bool]:
        """Return whether any rank was asked to stop, and whether rank 0's clock says a checkpoint is due."""
        now = time.monotonic()
        ask = torch.tensor([int(self.stop), 0, 0], device=self.world.device)
        if self.world.first:
            due = now - self._saved_at > max(CHECKPOINT_SECONDS, 20 * self._cost)
            a_step = (now - self._asked_at) / max(1, done - self._asked)
            ask[1], ask[2] = int(due), max(1, min(AGREE_STEPS, int(AGREE_S / max(a_step, 1e-9))))
        stop, due, steps = self.world.reduce_(ask, MAX).tolist()
        self._asked, self._asked_at, self._ask_at = done, now, done + steps
        return bool(stop), bool(due)

    def _log(self, done: int) -> None:
        keys = list(self.rates)
        table = torch.zeros(len(keys), len(METRICS), dtype=torch.float64)
        for shard in self.shards:
            shard.show_sums()
            row = metrics_row(shard.member) | {"dead_frac": shard.dead / shard.piece.d_sae}
            if shard.piece.place.leads:
                values = [row[name] for name in METRICS]
                table[keys.index(shard.key)] = torch.tensor(values, dtype=torch.float64)
            shard.window.zero_()
        rows = self.world.reduce_(table.to(self.world.device)).tolist()
        if self.world.first:
            self._write(done, rows)

    def _write(self, done: int, rows: list[list[float]]) -> None:
        cfg = self.cfg
        factor = lr_factor(done - 1, cfg.steps, cfg.warmup, cfg.decay)
        written = []
        for (key, rate), values in zip(self.rates.items(), rows, strict=True):
            hook, name = key.rsplit("|", 1)
            row = dict(zip(METRICS, values, strict=True))
            head = {"step": done, "tokens": done * cfg.batch_size, "hook": hook, "member": name}
            written.append({**head, **row, "lr": rate * factor})
            self.metrics.write(written[-1])
            self.fields = {"fvu": row["fvu"], "l0": row["l0"]}
        self.mirror.write(written)
        now = time.monotonic()
        if done > self._logged:
            tokens = (done - self._logged) * cfg.batch_size
            self.speed.write({"step": done, "tokens_per_s": tokens / (now - self._logged_at)})
        self._logged_at, self._logged = now, done


@contextlib.contextmanager
def stopping(recorder: Recorder) -> Iterator[None]:
    """Let Ctrl-C or SIGTERM on any rank stop all of them between steps, after a checkpoint.

    Never at once: torchrun sends a second signal to the ranks that heard the first, and kills those that linger.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: object) -> None:  # noqa: ARG001
        recorder.stop = True

    old = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)

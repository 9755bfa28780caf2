"""The loop: one batch, every member's step, a row of metrics now and then, a checkpoint now and then.

A checkpoint holds the whole state of a run at a step, so that a killed run continues bit for bit.
"""

import contextlib
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from wsae.acts.stream import ActivationSource, BatchStream
from wsae.core.artifact import (
    CHECKPOINTS,
    CONFIG,
    MANIFEST,
    METRICS_FILE,
    SPEED,
    FileRecord,
    read_manifest,
    write_manifest,
)
from wsae.core.errors import UserError, understood
from wsae.core.files import is_temporary, locked, read_json, write_json
from wsae.core.progress import Progress, Tick
from wsae.core.tensors import load_tensors, save_tensors
from wsae.train.config import TrainConfig
from wsae.train.family import FamilyState
from wsae.train.loggers import JsonLines, current
from wsae.train.native import as_usual, leave
from wsae.train.state import SUMS, MemberState, make_batches, metrics_row, refuse_lost
from wsae.train.step import chosen, lr_factor, side_by_side

if TYPE_CHECKING:
    from wsae.acts.live import SequenceStream


KEEP = 2
PLACE, _STATE = "position.json", "state.safetensors"


def save_checkpoint(
    run: Path, step: int, tensors: dict[str, Tensor], place: dict[str, Any]
) -> None:
    """Write `run/checkpoints/step-N`, manifest last, then drop all but the newest two.

    `place` is JSON-ready: the position in the data and the length of metrics.jsonl.
    """
    path = place_of(run, step)
    save_tensors(path / _STATE, tensors)
    write_json(path / PLACE, {"step": step, **place})
    finish_checkpoint(run, step, [_STATE, PLACE])


def place_of(run: Path, step: int) -> Path:
    """Return the directory of the checkpoint after `step` steps."""
    return run / CHECKPOINTS / f"step-{step:09d}"


def finish_checkpoint(run: Path, step: int, files: list[str] | dict[str, FileRecord]) -> None:
    """Write a checkpoint's manifest, then drop all but the newest two."""
    write_manifest(place_of(run, step), "checkpoint", {"step": step}, files)
    for old in checkpoints(run)[:-KEEP]:
        (old / MANIFEST).unlink()  # first: half a removal must not look whole
        shutil.rmtree(old)


def checkpoints(run: Path) -> list[Path]:
    """Return the finished checkpoints, oldest first; unfinished ones (no manifest) are not counted."""
    found = (run / CHECKPOINTS).glob("step-*")
    return sorted(p for p in found if (p / MANIFEST).exists())


def load_checkpoint(
    run: Path, restore: Callable[[dict[str, Tensor], str], None]
) -> dict[str, Any] | None:
    """Hand the newest checkpoint's tensors and its path to `restore`; return its place, or None when there is none.

    Raises UserError naming the file when the checkpoint is cut or altered.
    """
    found = checkpoints(run)
    if not found:
        return None
    path = found[-1]
    try:
        read_manifest(path, "checkpoint")
        tensors = load_tensors(path / _STATE)
        place = read_json(path / PLACE)
    except UserError as error:
        raise UserError(f"{error}; remove {path} to resume from the checkpoint before") from error
    with understood(path / _STATE):
        restore(tensors, str(path))
    return place


def family_tensors(family: FamilyState) -> dict[str, Tensor]:
    """Return everything of a family that changes during training."""
    return {
        f"{hook}|{m.name}|{key}": value
        for hook, m in family.all()
        for key, value in member_tensors(m).items()
    }


def set_family_tensors(family: FamilyState, tensors: dict[str, Tensor], where: str) -> None:
    """Restore what `family_tensors` returned; raises UserError when the members are others."""
    expected = {f"{hook}|{m.name}" for hook, m in family.all()}
    if {key.rsplit("|", 1)[0] for key in tensors} != expected:
        raise UserError(f"{where}: holds other members than this run's config; use another --out")
    for hook, member in family.all():
        prefix = f"{hook}|{member.name}|"
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        set_member_tensors(member, own, where)


def member_tensors(member: MemberState) -> dict[str, Tensor]:
    """Return everything of a member that changes during training."""
    with as_usual(member):
        tensors = {f"sae.{k}": v for k, v in member.sae.tensors().items()}
        for i, parameter in enumerate(member.optimizer.parameters):
            for key, value in member.optimizer.state.get(parameter, {}).items():
                tensors[f"adam.{i}.{key}"] = value
    tensors |= {f"sum.{k}": v for k, v in member.sums.items()}
    tensors["since_fired"], tensors["dead"] = member.since_fired, member.dead
    tensors["sparse"] = member.sparse
    tensors["latent_moments"] = member.latent_moments
    for name in ("annealed", "norm"):
        if (value := getattr(member, name)) is not None:
            tensors[name] = value
    return tensors


def set_member_tensors(member: MemberState, tensors: dict[str, Tensor], where: str) -> None:
    """Restore what `member_tensors` returned."""
    leave(member)
    parts: dict[str, dict[str, Tensor]] = {"sae": {}, "adam": {}, "sum": {}}
    for key, value in tensors.items():
        head, _, rest = key.partition(".")
        if rest:
            parts[head][rest] = value
    member.sae.set_tensors(parts["sae"], where)
    for i, parameter in enumerate(member.optimizer.parameters):
        prefix = f"{i}."
        state = {
            k.removeprefix(prefix): v for k, v in parts["adam"].items() if k.startswith(prefix)
        }
        if state:
            member.optimizer.state[parameter] = {
                k: v if k == "step" else v.to(parameter.device) for k, v in state.items()
            }
    device = member.since_fired.device
    member.window = torch.stack([parts["sum"][name] for name in SUMS]).to(device)
    for name in ("since_fired", "dead", "latent_moments", "sparse"):
        value = tensors[name]
        assert isinstance(value, torch.Tensor)
        setattr(member, name, value.to(device))
    # a run that began without a limit to its gradients goes on so
    for name in ("annealed", "norm"):
        setattr(member, name, tensors[name].to(device) if name in tensors else None)


# The loop.

CHECKPOINT_SECONDS = 60.0
"""A checkpoint is due after this long, or after 20 times what the last one took to write, if that is longer."""


class Stopped(KeyboardInterrupt):
    """Training was asked to stop; a checkpoint holds everything up to `step`."""

    def __init__(self, step: int, steps: int) -> None:
        super().__init__(f"stopped after step {step} of {steps}")
        self.step, self.steps = step, steps


@runtime_checkable
class TrainJob(Protocol):
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


class Team:
    """The processes that train a job together; one of them writes. This is one process, the whole team."""

    ends_saved = False
    """Whether a checkpoint is written after the last step."""

    @property
    def first(self) -> bool:
        """Whether this process writes."""
        return True

    def agree(self, stop: bool, due: bool) -> tuple[bool, bool]:
        """Return whether all stop after this step, and whether a checkpoint is due; called by all after every step."""
        return stop, due

    def load(self, run: Path, job: TrainJob) -> dict[str, Any] | None:
        """Restore the newest checkpoint and return its place, or None when there is none."""
        return load_checkpoint(run, job.restore)

    def save(self, run: Path, done: int, job: TrainJob, place: dict[str, Any]) -> None:
        """Write the checkpoint after `done` steps."""
        if self.first:
            save_checkpoint(run, done, job.tensors(), place)


ALONE = Team()


def batches(
    cfg: TrainConfig, source: ActivationSource, place: dict[str, Any] | None = None
) -> "BatchStream | SequenceStream":
    """Return a run's batches from a place on: rows, or sequences for a loss through the model.

    Raises UserError for such a loss without a live model.
    """
    if cfg.loss is None:
        return source.stream(cfg.batch_size, cfg.seed, place)
    from wsae.acts.live import SequenceStream  # transformers are slow to import
    from wsae.train.endtoend import live

    return SequenceStream(live(cfg, source), cfg.batch_size, cfg.seed, place)


def run_steps(
    cfg: TrainConfig,
    family: FamilyState,
    stream: "BatchStream | SequenceStream",
    first: int,
    tick: Tick,
    on_step: Callable[[int], None],
) -> None:
    """Train from step `first` to the end; `on_step(n)` is called after each step with the number done.

    Raises UserError where `kernels` cannot train a member, or a member's loss is not finite.
    """
    if cfg.loss is not None:
        from wsae.train.endtoend import run_spliced

        run_spliced(cfg, family, cast("SequenceStream", stream), first, tick, on_step)
        return
    stream = cast(BatchStream, stream)
    for _, member in family.all():
        chosen(member, cfg, member.mean)  # refuses before any of them takes a step
    with side_by_side(cfg, family) as step_all:
        for step in range(first, cfg.steps):
            batch = stream.next()
            for hook, members in family.members.items():
                device, out = members[0].mean.device, cfg.given(hook)
                y = None if out is None else batch[out].to(device)
                made = make_batches(batch[hook].to(device), members, y)
                if (
                    step + 1 < cfg.steps
                ):  # not before: PyTorch's threads would wait for a core that reading has
                    stream.begin()
                step_all(members, made, step)
            if (step + 1) % cfg.log_every == 0 or step + 1 == cfg.steps:
                for _, member in family.all():
                    refuse_lost(member, step + 1)
            on_step(step + 1)
            tick(cfg.batch_size)


class Recorder:
    """Writes a run's metrics and checkpoints between steps, and stops it between steps when asked."""

    def __init__(self, run: Path, job: TrainJob, team: Team = ALONE) -> None:
        self.run, self.job, self.team = run, job, team
        self.metrics = JsonLines(run / METRICS_FILE)
        self.speed = JsonLines(run / SPEED)
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
        if stop or due or (last and self.team.ends_saved):
            self.save(done)
        if stop and not last:
            raise Stopped(done, self.job.steps)

    def save(self, done: int) -> None:
        """Write a checkpoint of the state after `done` steps."""
        begin = time.monotonic()
        place = {**self.job.position(), **self.metrics.mark()} if self.team.first else {}
        self.team.save(self.run, done, self.job, place)
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


def train_job(job: TrainJob, out: Path, progress: Progress, team: Team = ALONE) -> None:
    """Train from the newest checkpoint in `out`, or from the start, to the end, with metrics and checkpoints in `out`.

    Every process of a team calls this; only its first writes. Raises `Stopped` (a KeyboardInterrupt) when interrupted,
    after writing a checkpoint.
    """
    place = team.load(out, job)
    first = int(place["step"]) if place else 0
    recorder = Recorder(out, job, team)
    if team.first:
        recorder.metrics.back_to(place)
    total = job.steps * job.per_step
    with (
        stopping(recorder),
        recorder.mirror.following(out) if team.first else contextlib.nullcontext(),
        progress(job.task, total, job.unit, first * job.per_step) as tick,
    ):
        job.run(place, lambda n, **fields: tick(n, **job.fields, **fields), recorder.on_step)


@contextlib.contextmanager
def stopping(recorder: Recorder) -> Iterator[None]:
    """Let the first Ctrl-C (or SIGTERM) stop training between steps, after a checkpoint; a second one at once.

    Never at once for a team: torchrun sends a second signal to those that heard the first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: object) -> None:  # noqa: ARG001
        if recorder.stop and recorder.team is ALONE:
            raise KeyboardInterrupt
        recorder.stop = True

    old = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """Hold a run's directory for this process, and remove one made in vain.

    That is one that was not there before and has no checkpoint when work ends early. A second process is refused with a
    UserError, and removes nothing.
    """
    created = not out.exists()
    with locked(out):
        created = created and [path.name for path in out.iterdir()] == [".lock"]
        try:
            yield
        except BaseException:
            if created and not checkpoints(out):
                shutil.rmtree(out, ignore_errors=True)
            raise


def enter(out: Path, kind: str, identity: dict[str, Any], resume: bool) -> bool:
    """Begin or go on with a run of this identity; return False where it is finished already.

    Raises UserError when `out` holds anything else.
    """
    identity = _as_begun(out, identity)
    if (out / MANIFEST).exists():
        read_manifest(out, kind)
        same_run(out, identity)
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)  # killed before it could
        return False
    if (out / CONFIG).exists():
        same_run(out, identity)
        if checkpoints(out) and not resume:
            raise UserError(
                f"{out}: holds an unfinished run of this config; add --resume to continue it, or use another --out"
            )
    elif any(p.name != ".lock" and not is_temporary(p) for p in out.iterdir()):
        raise UserError(f"{out}: is not empty and not a wsae run; use another --out")
    write_json(out / CONFIG, identity)  # also anew: the data may lie elsewhere now
    return True


def _as_begun(out: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Return the identity as the run in `out` has it: one of an earlier release goes on with unlimited gradients."""
    limit, begun = "max_grad_norm", (out / MANIFEST).exists() or bool(checkpoints(out))
    if "train" not in identity or not begun or not (out / CONFIG).exists():
        return identity
    with understood(out / CONFIG):
        there = read_json(out / CONFIG).get("train", {})
    return identity if limit in there else {**identity, "train": {**identity["train"], limit: None}}


def same_run(out: Path, identity: dict[str, Any]) -> None:
    """Raise UserError naming the first setting in which `out` differs from this run.

    Data may move: they are compared by digest and by the hooks that are read of them, not by path.
    """
    path, here = out / CONFIG, json.loads(json.dumps(identity))
    with understood(path):
        there = _anywhere(read_json(path))
    for key, a, b in _differences(there, _anywhere(here)):
        raise UserError(
            f"{path}: holds a run of another config ({key} is {a!r} there, {b!r} here); use another --out"
        )


def _anywhere(identity: dict[str, Any]) -> dict[str, Any]:
    source = identity.get("source") or {}
    return {**identity, "source": {"hooks": source.get("hooks")}}


def _differences(a: object, b: object, place: str = "") -> Iterator[tuple[str, object, object]]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            inner = f"{place}.{key}" if place else str(key)
            yield from _differences(a.get(key), b.get(key), inner)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (u, v) in enumerate(zip(a, b, strict=True)):
            yield from _differences(u, v, f"{place}.{i}")
    elif isinstance(a, list) and isinstance(b, list):
        yield f"{place} (how many)", len(a), len(b)
    elif a != b:
        yield place, a, b


class FamilyJob:
    """Trains a family on a source's batches; see `TrainJob`."""

    task, unit = "train", "tokens"

    def __init__(self, cfg: TrainConfig, family: FamilyState, source: ActivationSource) -> None:
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
        self.stream = self.open(place)
        run_steps(self.cfg, self.family, self.stream, first, tick, on_step)

    def open(self, place: dict[str, Any] | None) -> "BatchStream | SequenceStream":
        """Return the batches from a stream's place on, or from the start."""
        return batches(self.cfg, self.source, place)

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
            member.window.zero_()
            self.fields = {"fvu": row["fvu"], "l0": row["l0"]}

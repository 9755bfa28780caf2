"""A run's directory: which run it holds, and what happens in it from the first step to the last."""

import contextlib
import json
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wsae.core.errors import UserError, understood
from wsae.core.files import is_temporary, locked, read_json, write_json
from wsae.core.progress import Progress
from wsae.train.checkpoint import checkpoints, load_checkpoint
from wsae.train.loop import ALONE, Job, Recorder, Team


def train_job(job: Job, out: Path, progress: Progress, team: Team = ALONE) -> None:
    """Train from the newest checkpoint in `out`, or from the start, to the end, with metrics and checkpoints in `out`.

    Every process of a team calls this; only its first writes. Raises `Stopped` (a KeyboardInterrupt) when interrupted,
    after writing a checkpoint.
    """
    place = load_checkpoint(out, job.restore)
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


def enter(out: Path, identity: dict[str, Any], resume: bool) -> None:
    """Begin or go on with a run of this identity; raises UserError when `out` holds anything else."""
    if (out / "config.json").exists():
        same_run(out, identity)
        if checkpoints(out) and not resume:
            raise UserError(
                f"{out}: holds an unfinished run of this config; add --resume to continue it, or use another --out"
            )
        write_json(out / "config.json", identity)  # the data may lie elsewhere now
    elif any(p.name != ".lock" and not is_temporary(p) for p in out.iterdir()):
        raise UserError(f"{out}: is not empty and not a wsae run; use another --out")
    else:
        write_json(out / "config.json", identity)


def same_run(out: Path, identity: dict[str, Any]) -> None:
    """Raise UserError naming the first setting in which `out` differs from this run.

    Data may move: they are compared by digest, not by path.
    """
    path, here = out / "config.json", json.loads(json.dumps(identity))
    with understood(path):
        there = {**read_json(path), "source": None}
    for key, a, b in _differences(there, here | {"source": None}):
        raise UserError(
            f"{path}: holds a run of another config ({key} is {a!r} there, {b!r} here); use another --out"
        )


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

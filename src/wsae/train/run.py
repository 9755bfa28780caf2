"""A training run as a directory: config first, checkpoints on the way, members and manifest last."""

import contextlib
import json
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsae.acts.stream import ActivationSource
from wsae.acts.tally import SourceStats
from wsae.core.artifact import (
    MANIFEST,
    locked,
    read_json,
    read_manifest,
    write_json,
    write_manifest,
)
from wsae.core.errors import UserError
from wsae.core.memory import explained
from wsae.core.progress import Progress, quiet
from wsae.losses.gamma import describe_gamma
from wsae.sae.model import SparseAutoencoder
from wsae.train.checkpoint import checkpoints, load_checkpoint
from wsae.train.config import TrainConfig
from wsae.train.covariance import covariances
from wsae.train.family import Family, finished, make_family
from wsae.train.loop import Recorder, run_steps
from wsae.train.memory import training_buffers


@dataclass(frozen=True)
class RunResult:
    """A finished run: its directory and every member's SAE, by hook and name."""

    path: Path
    saes: dict[str, dict[str, SparseAutoencoder]]


def train_run(
    cfg: TrainConfig,
    source: ActivationSource,
    out: Path,
    progress: Progress = quiet,
    resume: bool = False,
    device: str = "cpu",
) -> RunResult:
    """Train a family into the directory `out`; a killed run continues bit for bit with `resume`.

    A finished run of the same config and data is returned as it is. Raises UserError when `out` holds another run
    or an unfinished one and `resume` is not set, and `Stopped` (a KeyboardInterrupt) when interrupted, after
    writing a checkpoint.
    """
    identity = {"train": cfg.to_dict(), "data": source.digest(), "source": source.describe()}
    with _nothing_left(out), locked(out):
        if (out / MANIFEST).exists():
            read_manifest(out, "run")
            _same_run(out, identity)
            return load_run(out)
        _enter(out, identity, resume)
        with explained("training", lambda: training_buffers(cfg, source.hooks)):
            stats = source.stats(progress)
            family = make_family(cfg, stats, device, covariances(cfg, source, stats, progress))
            write_json(out / "gamma.json", family.gamma_record)
            _train(cfg, family, source, out, progress)
            return _finish(out, identity, family, stats)


@contextlib.contextmanager
def _nothing_left(out: Path) -> Iterator[None]:
    """Remove a directory made in vain: one that was not there before and has no checkpoint when work ends early."""
    created = not out.exists()
    try:
        yield
    except BaseException:
        if created and not checkpoints(out):
            shutil.rmtree(out, ignore_errors=True)
        raise


def load_run(path: Path) -> RunResult:
    """Read a finished run; raises UserError when it is not one, or a file was cut or altered."""
    manifest = read_manifest(path, "run")
    saes = {
        hook: {name: SparseAutoencoder.load(path / "members" / hook / name) for name in names}
        for hook, names in manifest.info["members"].items()
    }
    return RunResult(path, saes)


def _enter(out: Path, identity: dict[str, Any], resume: bool) -> None:
    if (out / "config.json").exists():
        _same_run(out, identity)
        if checkpoints(out) and not resume:
            raise UserError(
                f"{out}: holds an unfinished run of this config; add --resume to continue it, or use another --out"
            )
    elif any(p for p in out.iterdir() if p.name != ".lock"):
        raise UserError(f"{out}: is not empty and not a wsae run; use another --out")
    else:
        write_json(out / "config.json", identity)


def _same_run(out: Path, identity: dict[str, Any]) -> None:
    """Raise UserError naming the first setting in which `out` differs from this run.

    Data may move: they are compared by digest, not by path.
    """
    there = read_json(out / "config.json")
    here = json.loads(json.dumps(identity))
    for key, a, b in _differences(there | {"source": None}, here | {"source": None}):
        raise UserError(
            f"{out}: holds a run of another config ({key} is {a!r} there, {b!r} here); use another --out"
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


def _train(
    cfg: TrainConfig, family: Family, source: ActivationSource, out: Path, progress: Progress
) -> None:
    place = load_checkpoint(out, family)
    first = int(place["step"]) if place else 0
    stream = source.stream(cfg.batch_size, cfg.seed, place["stream"] if place else None)
    recorder = Recorder(out, cfg, family, stream)
    recorder.metrics.cut(int(place["metrics_bytes"]) if place else 0)
    total = cfg.steps * cfg.batch_size
    with (
        _stopping(recorder),
        progress("train", total, "tokens", first * cfg.batch_size) as tick,
    ):
        run_steps(
            cfg,
            family,
            stream,
            first,
            lambda n, **fields: tick(n, **recorder.fields, **fields),
            recorder.on_step,
        )


@contextlib.contextmanager
def _stopping(recorder: Recorder) -> Iterator[None]:
    """Let the first Ctrl-C (or SIGTERM) stop training between steps, after a checkpoint; a second one at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: object) -> None:  # noqa: ARG001
        if recorder.stop:
            raise KeyboardInterrupt
        recorder.stop = True

    old = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _finish(
    out: Path, identity: dict[str, Any], family: Family, stats: dict[str, SourceStats]
) -> RunResult:
    """Write the members (scale folded in) and the manifest, then drop the checkpoints."""
    files = ["config.json", "gamma.json", "metrics.jsonl"]
    saes: dict[str, dict[str, SparseAutoencoder]] = {}
    for hook, member in family.all():
        sae = finished(member)
        saes.setdefault(hook, {})[member.name] = sae
        place = Path("members") / hook / member.name
        sae.save(out / place)
        files += [str(place / name) for name in ("config.json", "sae.safetensors", MANIFEST)]
        if member.cfg.gamma.rule == "latent_variance":
            final = describe_gamma(member.cfg.gamma, sae.gamma)
            family.gamma_record[hook][member.name] |= final
    write_json(out / "gamma.json", family.gamma_record)
    info = {
        "members": {hook: list(named) for hook, named in saes.items()},
        "d_in": {hook: stats[hook].kept.d_in for hook in saes},
        "scale": {hook: members[0].scale for hook, members in family.members.items()},
        "rows": {hook: stats[hook].kept.n for hook in saes},
    }
    write_manifest(out, "run", identity, files, inputs={"data": identity["data"]}, info=info)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return RunResult(out, saes)

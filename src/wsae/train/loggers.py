"""A run's metrics: lines of JSON, and copies of them for TensorBoard and Weights & Biases. No torch here.

`metrics.jsonl` is the truth: appended and flushed, cut back to a checkpoint's length on resume.

with mirrored([tensorboard()], warn=print):
    train_run(cfg, source, out)

A logger begins by taking all rows that the file holds, so that its copy has each step once, whatever came before: a
killed run, another logger, none. One that fails is left alone for a while and then begins anew in the same way;
training does not wait for it.
"""

import contextlib
import hashlib
import importlib
import itertools
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from wsae.core.artifact import CONFIG, METRICS_FILE
from wsae.core.config import Config
from wsae.core.errors import UserError
from wsae.core.files import (
    flush,
    growing,
    parse_json,
    read_json,
    read_lines,
    refusals,
    sha256_file,
    write_json,
)


class JsonLines:
    """A file of JSON objects, one a line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, row: dict[str, Any]) -> None:
        """Append one row, or none of it: a full disk is a UserError."""
        with refusals(self.path), growing(self.path) as file:
            size = os.fstat(file.fileno()).st_size
            line = json.dumps(row).encode() + b"\n"
            try:
                while line:
                    line = line[file.write(line) :]
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(size)
                raise

    def size(self) -> int:
        """Return the file's length in bytes."""
        return self.path.stat().st_size if self.path.exists() else 0

    def mark(self) -> dict[str, Any]:
        """Flush the rows to disk; return what a checkpoint keeps of them, for `back_to`."""
        if not self.path.exists():
            return {"metrics_bytes": 0, "metrics_sha256": hashlib.sha256().hexdigest()}
        with refusals(self.path):
            flush(self.path)
        return {"metrics_bytes": self.size(), "metrics_sha256": sha256_file(self.path)}

    def back_to(self, mark: dict[str, Any] | None) -> None:
        """Drop the rows since a mark (none: all); raises UserError when those before are not what they were."""
        size = 0 if mark is None else int(mark["metrics_bytes"])
        self.cut(size)
        expected = None if mark is None else mark.get("metrics_sha256")
        if size and expected is not None and sha256_file(self.path) != expected:
            raise UserError(f"{self.path}: altered since its checkpoint; use another --out")

    def cut(self, size: int) -> None:
        """Drop everything past `size` bytes; raises UserError when the file is already shorter."""
        if self.size() < size:
            raise UserError(
                f"{self.path}: {self.size()} bytes where {size} were written (cut or altered)"
            )
        if self.path.exists():
            with refusals(self.path), growing(self.path) as file:
                file.truncate(size)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows; raises UserError naming the first damaged line."""
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            row = parse_json(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is damaged, not JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is damaged, not a JSON object")
        rows.append(row)
    return rows


# Rows of `metrics.jsonl` as the scalars of one step, named as loggers show them.

_KEYS = ("step", "hook", "member")


def scalars(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Return name -> value of one step's rows: `member/metric`, with several hooks `hook/member/metric`."""
    rows = list(rows)
    several = len({row.get("hook") for row in rows}) > 1
    found: dict[str, float] = {}
    for row in rows:
        place = [row["hook"]] if several else []
        place += [row["member"]] if "member" in row else []
        for key, value in row.items():
            if key not in _KEYS and isinstance(value, int | float):
                found["/".join([*place, key])] = float(value)
    return found


def steps_of(run: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield step and scalars of all rows that the run has so far; raises UserError for a damaged line."""
    path = run / METRICS_FILE
    rows = read_json_lines(path) if path.exists() else []
    for step, of_step in itertools.groupby(rows, key=lambda row: int(row["step"])):
        yield step, scalars(of_step)


# Copies of the metrics elsewhere.

LoggerName = Literal["tensorboard", "wandb"]
WandbMode = Literal["online", "offline"]


class WandbConfig(Config):
    """Where a Weights & Biases run goes."""

    project: str = "wsae"
    """Project of the W&B run."""
    name: str | None = None
    """Name of the W&B run; default: that of the run's directory."""
    mode: WandbMode | None = None
    """online uploads with the user's own key, offline writes files; default: what WANDB_MODE says, else online."""


RETRY_S, MOST_S = 30.0, 600.0
"""A logger that failed is tried again after so long, twice as long after every further failure, at most so long."""
_log = logging.getLogger(__name__)


@runtime_checkable
class Sink(Protocol):
    """An open copy of a run's metrics."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take one step's scalars; steps increase."""
        ...

    def close(self, finished: bool) -> None:
        """Write what is left; `finished`: whether the run came to its end."""
        ...


class Logger(NamedTuple):
    """A kind of copy, as a value."""

    name: str
    check: Callable[[], None]
    """Raises UserError when it cannot work here: nothing is installed, no key."""
    open: Callable[[Path], Sink]
    """Begins the copy of the run in a directory anew, without its former rows."""


class Copy:
    """One logger's copy of a run."""

    def __init__(self, logger: Logger, run: Path, warn: Callable[[str], None]) -> None:
        self.logger, self.run, self.warn = logger, run, warn
        self.sink: Sink | None = None
        self.failures = 0
        self.last = ""
        self._retry_at, self._wait = 0.0, RETRY_S

    def write(self, step: int, values: dict[str, float]) -> None:
        """Hand on one step; where the copy is behind, all steps, if it is time to try again."""
        sink = self.sink
        if sink is not None:
            self._attempt(lambda: sink.log(step, values))
        elif time.monotonic() >= self._retry_at:
            self.catch_up()

    def catch_up(self) -> None:
        """Begin anew and take every row there is."""
        self._attempt(self._begin)

    def _begin(self) -> None:
        sink = self.logger.open(self.run)
        try:
            for step, values in steps_of(self.run):
                sink.log(step, values)
        except BaseException:
            with contextlib.suppress(Exception):  # what matters is the first failure
                sink.close(finished=False)
            raise
        self.sink = sink

    def close(self, finished: bool) -> None:
        """Close the copy; one that is behind is tried a last time."""
        if self.sink is None:
            self.catch_up()
        sink = self.sink
        if sink is not None:
            self._attempt(lambda: sink.close(finished))

    def _attempt(self, act: Callable[[], None]) -> None:
        try:
            act()
            return
        except Exception as caught:  # counted and told; training goes on
            error = caught
        self.failures += 1
        self.last = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
        sink, self.sink = self.sink, None
        if sink is not None:
            with contextlib.suppress(Exception):  # already counted
                sink.close(finished=False)
        self._retry_at = time.monotonic() + self._wait
        self._wait = min(2 * self._wait, MOST_S)
        if self.failures == 1:
            self.warn(
                f"logger {self.logger.name}: {self.last}; training goes on, metrics.jsonl has every row"
            )


class Mirror:
    """The loggers of a run, or none."""

    def __init__(
        self, loggers: Sequence[Logger] = (), warn: Callable[[str], None] = _log.warning
    ) -> None:
        self.loggers, self.warn = tuple(loggers), warn
        self.copies: list[Copy] = []

    @contextlib.contextmanager
    def following(self, run: Path) -> Iterator[None]:
        """Copy what `metrics.jsonl` of the run holds and, until the end, every row that `write` is told of."""
        self.copies = [Copy(logger, run, self.warn) for logger in self.loggers]
        finished = False
        try:
            for copy in self.copies:
                copy.catch_up()
            yield
            finished = True
        finally:
            for copy in self.copies:
                copy.close(finished)

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Hand on one step's rows, which are in `metrics.jsonl` already."""
        if not self.copies or not rows:
            return
        step, values = int(rows[0]["step"]), scalars(rows)
        for copy in self.copies:
            copy.write(step, values)

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return logger -> how often it failed, the last failure, whether its copy is complete."""
        return {
            copy.logger.name: {
                "failures": copy.failures,
                "last": copy.last or None,
                "complete": copy.sink is not None,
            }
            for copy in self.copies
        }


_NONE = Mirror()
_current: ContextVar[Mirror] = ContextVar("mirror", default=_NONE)


def current() -> Mirror:
    """Return the mirror of the runs trained here, by default one without loggers."""
    return _current.get()


@contextlib.contextmanager
def mirrored(
    loggers: Sequence[Logger], warn: Callable[[str], None] = _log.warning
) -> Iterator[Mirror]:
    """Copy the metrics of the run trained inside to these loggers, and tell `warn` at the end what failed.

    Raises UserError at once for a logger that cannot work here.
    """
    for logger in loggers:
        logger.check()
    mirror = Mirror(loggers, warn)
    token = _current.set(mirror)
    try:
        yield mirror
    finally:
        _current.reset(token)
        for name, told in mirror.summary().items():
            if told["failures"]:
                state = "has every row" if told["complete"] else "lacks rows that metrics.jsonl has"
                warn(
                    f"logger {name}: failed {told['failures']} times, last {told['last']}; its copy {state}"
                )


def needed(module: str, extra: str) -> ModuleType:
    """Import a logger's library; raises UserError naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"--logger {extra}: {module.split('.')[0]} is not installed; pip install 'wsae[{extra}]'"
        ) from error


# TensorBoard: one event file in `tensorboard/` of the run directory.


def tensorboard() -> Logger:
    """Return the logger that writes TensorBoard's event files."""

    def check() -> None:
        needed("tensorboard", "tensorboard")

    return Logger("tensorboard", check, EventFile)


class EventFile:
    """An event file of the scalars of a run; it takes the place of those that were there.

    A step that the former files had keeps its time there.
    """

    def __init__(self, run: Path) -> None:
        reading: Any = needed(
            "tensorboard.backend.event_processing.event_file_loader", "tensorboard"
        )
        writing: Any = needed("torch.utils.tensorboard", "tensorboard")
        place = run / "tensorboard"
        place.mkdir(exist_ok=True)
        former = sorted(place.glob("events.out.tfevents.*"))
        self._times: dict[int, float] = {}
        for path in former:  # a damaged one is read up to the damage; its later steps get new times
            for event in reading.LegacyEventFileLoader(str(path)).Load():
                if event.summary.value:
                    self._times[event.step] = event.wall_time
        # a TensorBoard that looks on forgets the steps of former files from this one on
        self._writer = writing.SummaryWriter(str(place), purge_step=0)
        for path in former:
            path.unlink()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one step's scalars."""
        when = self._times.get(step, time.time())
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=when)
        self._writer.flush()

    def close(self, finished: bool) -> None:  # noqa: ARG002
        """Close the file."""
        self._writer.close()


# Weights & Biases: a run under `wandb/` of the run directory, uploaded only where the user is logged in.

_ID = "wandb.json"


def wandb(cfg: WandbConfig | None = None) -> Logger:
    """Return the logger that writes or uploads a W&B run."""
    chosen = cfg or WandbConfig()

    def check() -> None:
        module: Any = needed("wandb", "wandb")
        mode = chosen.mode or os.environ.get("WANDB_MODE") or "online"
        if mode == "online" and not module.login(prompt=False, verify=False):
            raise UserError(
                "--logger wandb: no W&B key here; run `wandb login`, set WANDB_API_KEY, or add --wandb-mode offline"
            )

    return Logger("wandb", check, lambda run: WandbRun(run, chosen))


class WandbRun:
    """A W&B run with the id that the run directory keeps, so that a resumed run goes on in it.

    Online, steps that the server has already are left out. Offline there is no server to ask: a run begun again takes
    the place of the former files, and holds every step.
    """

    def __init__(self, run: Path, cfg: WandbConfig) -> None:
        module: Any = needed("wandb", "wandb")
        key = run_id(run)
        former = list((run / "wandb").glob(f"offline-run-*-{key}"))
        self._run = module.init(
            project=cfg.project,
            name=cfg.name or run.resolve().name,
            id=key,
            resume="allow",
            dir=str(run),
            mode=cfg.mode,
            config=read_json(run / CONFIG),
            settings=module.Settings(
                console="off", silent=True, disable_git=True, disable_code=True, save_code=False
            ),
        )
        self._first = int(self._run.step)
        for path in former if self._run.offline else []:
            if path.name != Path(self._run.dir).parent.name:
                shutil.rmtree(path)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log one step's scalars, unless the server has them."""
        if step >= self._first:
            self._run.log(values, step=step)

    def close(self, finished: bool) -> None:
        """Write or upload what is left."""
        self._run.finish(exit_code=0 if finished else 1)


def run_id(run: Path) -> str:
    """Return the W&B id of the run in a directory, made once and kept there."""
    path = run / _ID
    if not path.exists():
        write_json(path, {"id": secrets.token_hex(4)})
    data = read_json(path)
    key = data.get("id") if isinstance(data, dict) else None
    if not isinstance(key, str) or not key.isalnum():
        raise UserError(f"{path}: holds no W&B id; remove it to begin another W&B run")
    return key

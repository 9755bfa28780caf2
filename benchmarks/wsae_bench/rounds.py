"""Runs a block: every job in a process of its own, stepping in turn, the others idle meanwhile."""

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wsae.core.errors import UserError
from wsae.core.progress import Progress, Tick, quiet
from wsae.doctor.measure import free_memory
from wsae_bench.config import HELDOUT, LIMITS, Block, Job

# The parent's side of a worker: requests with a time limit, and every ending of the process as one
# line.

WORKER = Path(__file__).with_name("worker.py")
CALM = {
    "CUDA_VISIBLE_DEVICES": "",  # this measures CPUs
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait starve the others
    "PYTHONSAFEPATH": "1",  # the worker's own folder is no place to import from
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
}


class WorkerFailed(Exception):
    """A worker cannot go on; the message says why in one line."""


class WorkerProcess:
    """A worker: `send` a request, `receive` its answer within a time limit, `close` it."""

    def __init__(self, python: str, threads: int = 1) -> None:
        count = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        with contextlib.ExitStack() as kept:
            self._stderr = kept.enter_context(tempfile.TemporaryFile())
            self._process = subprocess.Popen(
                [python, str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                bufsize=0,
                env={**os.environ, **CALM, **count},
            )
            kept.pop_all()  # from here on `close` closes it
        self._buffer = b""

    def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send a request and return its answer; raises WorkerFailed."""
        self.send(request)
        return self.receive(timeout_s, str(request["do"]))

    def send(self, request: dict[str, Any]) -> None:
        """Send a request; a process that has died is found out by `receive`."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")

    def receive(self, timeout_s: float, what: str) -> dict[str, Any]:
        """Return the answer to the last request; raises WorkerFailed for an error, a silence or a death."""
        line = self._line(timeout_s)
        if line is None:
            self.close()
            raise WorkerFailed(f"no answer to '{what}' in {timeout_s:g} s, so it was ended")
        if not line:
            raise WorkerFailed(self._death())
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(answer["error"])
        return answer

    def close(self) -> None:
        """End the process and free what it held."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def _line(self, timeout_s: float) -> bytes | None:
        """Return the next line, b"" at the end of the stream, None when the time is up."""
        assert self._process.stdout is not None
        end = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                return None
            read = os.read(self._process.stdout.fileno(), 1 << 16)
            if not read:
                return b""
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _death(self) -> str:
        """Return how a process ended that said nothing."""
        code = self._process.wait()
        if code == -9:
            return "killed (signal 9), most likely for lack of memory; lower --batch or --d-sae"
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        ending = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"the worker died ({ending}){': ' + lines[-1][:300] if lines else ''}"


def installed(python: Path | None, names: list[str]) -> dict[str, str]:
    """Return the versions of those packages in an interpreter's environment; raises UserError if it cannot run."""
    try:
        worker = WorkerProcess(str(python or sys.executable))
    except OSError as error:
        raise UserError(
            f"--peers-python {python}: cannot be run ({error.strerror}); name a Python interpreter"
        ) from error
    try:
        return dict(worker.ask({"do": "versions", "names": names}, 60.0)["versions"])
    except WorkerFailed as error:
        raise UserError(f"--peers-python {python}: no Python interpreter ({error})") from error
    finally:
        worker.close()


IMPORTS = 0.8e9
"""Bytes that a worker takes before it trains."""
WORDS = 5 * 2 * 4
"""Bytes that stay between steps, per entry of a weight matrix: two matrices, gradients, Adam's moments, a copy."""
DENSE = 10 * 4
"""Bytes at the height of a step per entry of the [batch, d_sae] matrix; one job steps at a time."""


Step = dict[str, int | float]
"""step, s, cpu_s, other_load, and the seconds of its parts if it has some."""


@dataclass
class Setting:
    """Where rows lie, which interpreter a library runs in, and when to give up."""

    data: dict[int, tuple[str, int]]
    """d_in -> file of rows and their number."""
    peers_python: str = sys.executable
    timeout_s: float = 600.0
    deadline: float | None = None
    """On time.monotonic(): no round begins later, but one is always run."""
    seed: int = 0
    say: Callable[[str], None] = lambda _: None


@dataclass
class Samples:
    """What was measured of one job."""

    job: Job
    built: dict[str, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    """The measured steps, warm-up left out."""
    peak_mib: float = 0.0
    fit: dict[str, Any] = field(default_factory=dict)
    """fvu and l0 on the held-out rows."""
    trained: int = 0
    """Steps taken, warm-up included."""
    error: str = ""


def run_block(block: Block, at: Setting, progress: Progress = quiet) -> list[Samples]:
    """Measure every job of a block; a job that fails is marked, the others go on.

    Where memory does not hold all jobs at once they run in several waves. The floor and our first job are in each, so
    that every ratio has both sides in one wave; their steps are pooled.
    """
    samples = {job.name: Samples(job) for job in block.jobs}
    groups = waves(list(block.jobs), free_memory("cpu"))
    turns = (block.size.rounds + 1) * sum(map(len, groups))
    with progress(block.title.partition(":")[0], turns, "turns") as tick:
        for wave in groups:
            Wave(block, at, samples, tick).run(wave)
    return list(samples.values())


def waves(jobs: list[Job], free: float) -> list[list[Job]]:
    """Return the jobs in groups that fit into `free` bytes, the floor and our first job leading each."""
    limit = max(3, min((_fitting(job, free) for job in jobs), default=3))
    if len(jobs) <= limit:
        return [jobs]
    ours = next((job for job in jobs if job.variant.library == "wsae"), None)
    anchors = [job for job in jobs if job.name == LIMITS or job is ours]
    rest = [job for job in jobs if job not in anchors]
    step = limit - len(anchors)
    return [[*anchors, *rest[i : i + step]] for i in range(0, len(rest), step)]


def _fitting(job: Job, free: float) -> int:
    size = job.size
    members = job.variant.settings.get("members", 1)
    idle = IMPORTS + WORDS * size.d_in * size.d_sae * members
    return int((free - DENSE * size.batch * size.d_sae) / idle)


class Wave:
    """Jobs alive at once, each in its worker; what they measure goes to `samples`."""

    def __init__(self, block: Block, at: Setting, samples: dict[str, Samples], tick: Tick) -> None:
        self.block, self.at, self.samples, self.tick = block, at, samples, tick
        self.workers: dict[str, WorkerProcess] = {}

    def run(self, jobs: list[Job]) -> None:
        """Start the jobs, let them step in turn, measure their fit and end them."""
        try:
            self._start(jobs)
            self._rounds()
            for name in list(self.workers):
                fit = self._ask(name, {"do": "evaluate"})
                self.samples[name].fit = self.samples[name].fit or fit or {}
        finally:
            for worker in self.workers.values():
                worker.close()

    def _start(self, jobs: list[Job]) -> None:
        """Start the workers, as many at a time as there are cores: importing a peer takes ten seconds."""
        together = min(4, os.cpu_count() or 1)
        for first in range(0, len(jobs), together):
            group = jobs[first : first + together]
            for job in group:
                ours = job.variant.library in ("wsae", "limits")
                python = sys.executable if ours else self.at.peers_python
                self.workers[job.name] = WorkerProcess(python, job.threads)
                request = {"do": "build", "job": described(job, self.block, self.at)}
                self.workers[job.name].send(request)
            for job in group:
                self.samples[job.name].built = self._receive(job.name, "build") or {}

    def _rounds(self) -> None:
        """Let every worker warm up, then step in rounds that each begin with another worker."""
        size, deadline = self.block.size, self.at.deadline
        for name in list(self.workers):
            self._step(name, 0, size.warmup)
        for r in range(size.rounds):
            if r and deadline is not None and time.monotonic() > deadline:
                self.at.say(f"out of time after {r} of {size.rounds} rounds")
                break
            names = list(self.workers)
            shift = r % max(1, len(names))
            for name in names[shift:] + names[:shift]:
                steps = self._step(name, size.warmup + r * size.turn, size.turn)
                self.samples[name].steps += steps

    def _step(self, name: str, first: int, count: int) -> list[Step]:
        """Return what `count` steps measured, nothing when the worker fails."""
        answer = self._ask(name, {"do": "step", "first": first, "count": count})
        self.tick(1, variant=name)
        if answer is None:
            return []
        of = self.samples[name]
        of.trained = max(of.trained, first + count)
        of.peak_mib = max(of.peak_mib, answer["peak_mib"])
        return answer["steps"]

    def _ask(self, name: str, request: dict[str, Any]) -> dict[str, Any] | None:
        self.workers[name].send(request)
        return self._receive(name, request["do"])

    def _receive(self, name: str, what: str) -> dict[str, Any] | None:
        """Return an answer; a failure is kept and told, and its worker leaves the wave."""
        try:
            return self.workers[name].receive(self.at.timeout_s, what)
        except WorkerFailed as failure:
            self.samples[name].error = str(failure)
            self.at.say(f"{name} failed: {failure}")
            self.workers.pop(name).close()
            return None


def described(job: Job, block: Block, at: Setting) -> dict[str, Any]:
    """Return the job as its worker reads it."""
    path, rows = at.data[job.size.d_in]
    size = job.size
    return {
        **{"name": job.name, "library": job.variant.library, "settings": job.variant.settings},
        **{"d_in": size.d_in, "d_sae": size.d_sae, "k": size.k, "batch": size.batch},
        **{"dtype": job.dtype, "threads": job.threads, "lr": job.lr, "seed": at.seed},
        **{"data": path, "rows": rows, "heldout": HELDOUT, "steps": block.steps},
    }

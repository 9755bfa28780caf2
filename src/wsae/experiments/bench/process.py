"""The parent's side of a worker: requests with a time limit, and every ending of the process as one line."""

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from wsae.core.errors import UserError

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


def installed(python: str | None, names: list[str]) -> dict[str, str]:
    """Return the versions of those packages in an interpreter's environment; raises UserError if it cannot run."""
    try:
        worker = WorkerProcess(python or sys.executable)
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

"""One variant in a process of its own: `wsae bench` starts this file by path, with any interpreter that has torch.

It imports the standard library, torch and what its variant needs (a peer, or wsae); a peer's environment need not have
wsae. Requests come as JSON lines on stdin, one JSON line on the real stdout answers each; what a library prints goes to
stderr. It ends with its stdin or with its parent.
"""

import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

MIB = 1024.0
PR_SET_PDEATHSIG = 1
DRIVERS = {"limits": "limits.py", "wsae": "ours.py"}
"""Library -> its driver, a file beside this one; those of all others are in peers.py."""


def main() -> None:
    """Answer requests until stdin ends."""
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the libraries print
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [place for place in sys.path if place != here]  # else peers could import ours
    worker = Worker()
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": in_one_line(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def die_with_parent() -> None:
    """Leave Ctrl-C to the parent, and let the kernel end this process with it, in the middle of a step too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(OSError, AttributeError):  # Linux alone has prctl
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Worker:
    """Builds one subject, steps it and measures what it leaves."""

    def __init__(self) -> None:
        self.job: Any = None
        self.subject: Any = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to one request: versions, build, step or evaluate."""
        match request["do"]:
            case "versions":
                return {"versions": versions(request["names"]), "python": sys.version.split()[0]}
            case "build":
                return self.build(SimpleNamespace(**request["job"]))
            case "step":
                return self.step(request["first"], request["count"])
            case "evaluate":
                return self.evaluate()
        raise ValueError(f"no request '{request['do']}'")

    def build(self, job: Any) -> dict[str, Any]:
        """Import, read a batch, note the memory, then make the subject."""
        import torch

        torch.set_num_threads(job.threads)
        torch.manual_seed(job.seed)
        module, self.job = driver(job.library), job
        load = getattr(module, "load", None)
        state = load(job) if load else None  # imports belong to the base, not to the variant
        x = self.batch(0)
        first_step()
        gc.collect()
        base = memory()["VmRSS"]
        reset_peak()
        self.subject = module.make(job, state, x)
        return {
            "base_mib": base,
            "lr": self.subject.lr,
            "torch": torch.__version__,
            "version": versions([job.library]).get(job.library, ""),
        }

    def step(self, first: int, count: int) -> dict[str, Any]:
        """Take `count` steps, each on its own batch, read before the clock starts."""
        steps = []
        for i in range(first, first + count):
            x = self.batch(i)
            busy, cpu, wall = machine_seconds(), time.process_time(), time.perf_counter()
            parts = self.subject.step(i, x)
            wall = time.perf_counter() - wall
            cpu = time.process_time() - cpu
            foreign = max(0.0, machine_seconds() - busy - cpu) / wall
            steps.append(
                {"step": i, "s": wall, "cpu_s": cpu, "other_load": foreign, **(parts or {})}
            )
        return {"steps": steps, "peak_mib": memory()["VmHWM"]}

    def evaluate(self) -> dict[str, Any]:
        """Return FVU = sum |x - x_hat|^2 / sum |x - mean|^2 and L0 on the held-out rows, in fp32."""
        import torch

        job, error, active = self.job, 0.0, 0.0
        rows = read_rows(job.data, 0, job.heldout, job.d_in)
        spread = float((rows - rows.mean(0)).double().square().sum())
        with torch.no_grad():
            for x in rows.split(job.batch):
                made = self.subject.reconstruct(x.clone())
                if made is None:
                    return {}
                x_hat, l0 = made
                error += float((x - x_hat.float()).double().square().sum())
                active += float(l0)
        return {"fvu": error / spread, "l0": active / len(rows)}

    def batch(self, i: int) -> Any:
        """Return step i's rows [batch, d_in]; the training rows repeat when they run out."""
        job = self.job
        count = max(1, (job.rows - job.heldout) // job.batch)
        return read_rows(job.data, job.heldout + (i % count) * job.batch, job.batch, job.d_in)


def driver(library: str) -> ModuleType:
    """Return the module that makes this library's subject, loaded by path: a peer's environment has no wsae."""
    path = Path(__file__).with_name(DRIVERS.get(library, "peers.py"))
    spec = importlib.util.spec_from_file_location(f"wsae_bench_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def first_step() -> None:
    """Let torch import what it imports at the first step of an optimiser: 100 MiB that are no variant's own."""
    import torch

    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float32))
    weight.square().sum().backward()
    torch.optim.Adam([weight]).step()


def in_one_line(error: Exception) -> str:
    """Return an error's kind and message; one without a message is known by its place."""
    text = " ".join(str(error).split())
    if not text:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"at {'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}: {frame.line}"
    return f"{type(error).__name__}: {text}"[:400]


def read_rows(path: str, first: int, count: int, d_in: int) -> Any:
    """Return rows [count, d_in] of a file of float32, in memory of their own."""
    import torch

    raw = bytearray(4 * count * d_in)
    with open(path, "rb") as file:
        file.seek(4 * first * d_in)
        if file.readinto(raw) != len(raw):
            raise EOFError(f"{path}: fewer than {first + count} rows")
    return torch.frombuffer(raw, dtype=torch.float32).view(count, d_in).clone()


def versions(names: list[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def memory() -> dict[str, float]:
    """Return this process's resident memory now and at its highest (VmRSS, VmHWM) in MiB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        unit = MIB * MIB if sys.platform == "darwin" else MIB  # bytes there, KiB elsewhere
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        return {"VmRSS": peak, "VmHWM": peak}
    sizes = (line.split() for line in lines if line.startswith(("VmRSS", "VmHWM")))
    return {name.rstrip(":"): float(size) / MIB for name, size, _ in sizes}


def reset_peak() -> None:
    """Forget the high-water mark of the imports, where the kernel lets us."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def machine_seconds() -> float:
    """Return the CPU seconds the whole machine has worked, time stolen by a hypervisor included; 0 if unknown."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _, _, irq, soft, steal, *_ = map(int, file.readline().split()[1:])
    except (OSError, ValueError):
        return 0.0
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()

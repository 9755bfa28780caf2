"""The long form of the fuzz tests: changed files into every reader, words into the command line.

    python -m benchmarks.reliability.fuzz [--seconds 600] [--seed 0] [--out fuzz.json] [--only NAME ...]

Every reader (`readers.py`) gets sound files with one to four changes (`mutate.py`) in a process of its own, whose
address space is bounded by what it held before and ROOM, and in which one file may take SLOW seconds of processor time.
The command line gets words drawn from its commands' examples and nonsense. Right are a result, and one line of a
UserError (code 2) that names the folder. Wrong: any other exception, out of memory, a file over SLOW, a dead process.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.reliability.common import ENVIRONMENT, write
from benchmarks.reliability.mutate import mutated
from benchmarks.reliability.readers import READERS, Reader

ROOM, SLOW, KEPT = 1 << 30, 10, 20
NONSENSE = (
    "",
    "-1",
    "nan",
    "1e999",
    "../..",
    "/dev/null",
    "{}",
    "[",
    "--",
    "-",
    "\udcff",
    "9" * 400,
    "a\nb",
    "%s",
    "=",
)


class Slow(BaseException):
    """A single input took too much processor time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600, help="of processor time, for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    names = [reader.name for reader in READERS] + ["command line"]
    parser.add_argument("--only", nargs="*", choices=names, default=names, metavar="NAME")
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    jobs: dict[str, Callable[[Path, int], str]] = {
        reader.name: file_job(reader) for reader in READERS if reader.name in args.only
    }
    if "command line" in args.only:
        jobs["command line"] = words_job()
    found: dict[str, dict[str, Any]] = {}
    for name, job in jobs.items():
        found[name] = run(job, args.seconds / len(jobs), args.seed)
        print(name, found[name]["outcomes"], *found[name]["wrong"], sep="\n  ", file=sys.stderr)
    total: Counter[str] = sum((Counter(one["outcomes"]) for one in found.values()), Counter())
    wrong = sum(len(one["wrong"]) for one in found.values())
    write(
        args.out,
        {"inputs": total.total(), "outcomes": dict(total), "seed": args.seed, "by_reader": found},
    )
    raise SystemExit(1 if wrong else 0)


def run(job: Callable[[Path, int], str], seconds: float, seed: int) -> dict[str, Any]:
    """Run a job with many seeds in a child; return the counts, the worst cases, its seconds and its memory."""
    read, write_end = os.pipe()
    child = os.fork()
    if not child:
        with os.fdopen(write_end, "w") as answer, tempfile.TemporaryDirectory() as folder:
            json.dump(_fuzzed(job, Path(folder) / "evaluation", seconds, seed), answer)
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read) as answer:
        told = answer.read()
    status = os.waitpid(child, 0)[1]
    if not told:
        return {"outcomes": {"died": 1}, "wrong": [f"the process ended with status {status}"]}
    return json.loads(told)


def _fuzzed(
    job: Callable[[Path, int], str], folder: Path, seconds: float, seed: int
) -> dict[str, Any]:
    folder.mkdir()
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    slowest = 0.0
    _attempt(job, folder, seed)  # loads what it needs before memory is bounded
    before = _rss()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    signal.signal(signal.SIGPROF, _too_slow)
    begin = time.process_time()
    while (spent := time.process_time() - begin) < seconds:
        seed += 1
        outcome, words = _attempt(job, folder, seed)
        outcomes[outcome] += 1
        slowest = max(slowest, time.process_time() - begin - spent)
        if outcome not in ("read", "refused") and len(wrong) < KEPT:
            wrong.append(f"seed {seed}: {outcome}: {words[:300]}")
    grown = (_rss() - before) >> 10
    return {
        "outcomes": dict(outcomes),
        "slowest_s": round(slowest, 2),
        "rss_grew_mb": grown,
        "wrong": wrong,
    }


def _attempt(job: Callable[[Path, int], str], folder: Path, seed: int) -> tuple[str, str]:
    from wsae.core.errors import UserError

    signal.setitimer(signal.ITIMER_PROF, SLOW)
    try:
        return "read", job(folder, seed)
    except UserError as error:
        words = str(error)
        return ("refused" if str(folder) in words and "\n" not in words else "unnamed"), words
    except Slow:
        return "slow", ""
    except MemoryError as error:
        return "out of memory", str(error)
    except Exception as error:
        return "crashed", f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def file_job(reader: Reader) -> Callable[[Path, int], str]:
    """Return what writes a changed file and reads it."""
    seeds = reader.seeds()

    def job(folder: Path, seed: int) -> str:
        path = folder / reader.name
        path.write_bytes(mutated(seeds[seed % len(seeds)], seed))
        reader.call(path)
        return ""

    return job


def words_job() -> Callable[[Path, int], str]:
    """Return what calls the command line with words of its own and others; `--print-config` keeps it from working."""
    from wsae.cli import table
    from wsae.cli.main import main as command_line
    from wsae.core.errors import UserError

    words = sorted(
        {word for c in table.COMMANDS for example in c.examples for word in example.split()}
    )

    def job(folder: Path, seed: int) -> str:
        pick = random.Random(seed)
        chosen = [
            pick.choice(words if pick.random() < 0.7 else NONSENSE)
            for _ in range(pick.randint(0, 6))
        ]
        told = io.StringIO()
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
            code = command_line([pick.choice(table.names()), *chosen, "--print-config"])
        lines = told.getvalue().splitlines()
        if code == 0:
            return ""
        if code == 2 and len(lines) == 1:
            raise UserError(f"{folder}: {lines[0]}")
        raise RuntimeError(f"{chosen}: code {code}: {told.getvalue()}")

    return job


def _too_slow(*_: object) -> None:
    raise Slow


def _rss() -> int:
    """Return the most memory this process has held, in kilobytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    sys.exit(main())

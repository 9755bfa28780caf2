"""Real places that refuse, and two processes on one directory.

    python -m benchmarks.reliability.places [--out places.json]

Every stage writes to a tmpfs too small for it, then to one mounted read-only (both where mounting is allowed, as root),
and must end with code 2 and one line; with room again the same command must end with the undisturbed result. Then every
stage is started twice at once: the first is stopped (SIGSTOP) as soon as it holds the directory, the second must be
refused with code 2 and one line, and the first, going on, must end with the undisturbed result. Where one file is
renamed into place (a report, the browser's index) both must succeed.
"""

import argparse
import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.reliability.common import write
from benchmarks.reliability.world import (
    OUTPUTS,
    Reference,
    commands,
    contents,
    finish,
    forget,
    prepare,
    start,
    undisturbed,
)

BUSY = "another wsae process is writing here"
BOTH = {"report": "both write the page", "index": "the second waits for the first one's index"}
"""Stages whose second process is not refused."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    prepare()
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder).resolve()
        result = every_stage(at, undisturbed(at))
    write(args.out, result)
    raise SystemExit(1 if result["wrong"] else 0)


def every_stage(
    at: Path, reference: Reference, mounts: bool = True, stages: tuple[str, ...] = tuple(OUTPUTS)
) -> dict[str, Any]:
    """Try stages in every place; return the lines they ended with and what went wrong."""
    said: dict[str, dict[str, str]] = {}
    wrong: list[str] = []
    for stage in stages:
        words = commands(at)[stage]
        place, expected = at / OUTPUTS[stage], reference[stage][1]
        kept = at / "kept"
        shutil.copytree(place, kept)
        found = said.setdefault(stage, {})
        for name, refused in (("full", small(place, expected)), ("read-only", locked(place))):
            if mounts and can_mount(at):
                forget(at, stage)
                with refused:
                    found[name] = line(words, at / "line", wrong)
                wrong += again(at, stage, words, expected)
        found["second process"] = second(at, stage, words, wrong)
        if contents(place) != expected:
            wrong.append(f"{stage}: another result after two processes")
        forget(at, stage)
        kept.rename(place)
    return {"said": said, "wrong": wrong, "mounted": mounts and can_mount(at)}


def line(words: list[str], log: Path, wrong: list[str]) -> str:
    """Run a command that must be refused; return its line."""
    log.unlink(missing_ok=True)
    code = os.waitstatus_to_exitcode(os.waitpid(start(words, log), 0)[1])
    lines = [one for one in log.read_text().splitlines() if one.startswith("wsae: ")]
    if code != 2 or len(lines) != 1 or "Traceback" in log.read_text():
        wrong.append(f"{words[0]}: code {code}: {log.read_text()[-500:]!r}")
    return lines[-1] if lines else ""


def again(at: Path, stage: str, words: list[str], expected: dict[str, bytes]) -> list[str]:
    """Run a command where there is room; return what is wrong with its result."""
    finish(words, at / "log")
    same = contents(at / OUTPUTS[stage]) == expected
    return [] if same else [f"{stage}: another result once there was room"]


@contextlib.contextmanager
def small(place: Path, expected: dict[str, bytes]) -> Iterator[None]:
    """Mount a file system with room for half of what the stage writes."""
    half = max(4096, sum(map(len, expected.values())) // 2 // 4096 * 4096)
    with mounted(place, f"size={half}"):
        yield


@contextlib.contextmanager
def locked(place: Path) -> Iterator[None]:
    """Mount a file system that cannot be written."""
    with mounted(place, "size=64k,ro"):
        yield


@contextlib.contextmanager
def mounted(place: Path, options: str) -> Iterator[None]:
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


def can_mount(at: Path) -> bool:
    """Whether this process may mount."""
    try:
        with mounted(at / "try", "size=64k"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        (at / "try").rmdir()


def second(at: Path, stage: str, words: list[str], wrong: list[str]) -> str:
    """Start a command twice; return what the second says while the first holds the directory."""
    forget(at, stage)
    child = start(words, at / "log", before=int if stage in BOTH else stop_with_the_lock)
    if stage in BOTH:
        finish(words, at / "log")
        told = BOTH[stage]
    else:
        assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1]), (at / "log").read_text()
        told = line(words, at / "line", wrong)
        os.kill(child, signal.SIGCONT)
        if BUSY not in told:
            wrong.append(f"{stage}: a second process was not refused: {told!r}")
    if os.waitpid(child, 0)[1]:
        wrong.append(f"{stage}: the first of two processes failed")
    return told


def stop_with_the_lock() -> None:
    """Have this process stop as soon as it holds a directory."""
    flock = fcntl.flock

    def stopping(file: Any, how: int) -> None:
        flock(file, how)
        fcntl.flock = flock
        os.kill(os.getpid(), signal.SIGSTOP)

    fcntl.flock = stopping


if __name__ == "__main__":
    main()

"""A disk that is full, or turns read-only, at every write of every stage, from harvest to the browser's index.

    python -m benchmarks.reliability.full [--points 0] [--out full.json]

A preloaded library (fault.c, built with cc) refuses the n-th and every later write below the stage's directory: opening
to write, mkdir, write, fsync, growing, rename, whether Python or a library asks. For n = 1, 2, ... until the command
succeeds (or for --points of them, spread evenly) the command must end with code 2 and one line, leave no temporary
file, and leave nothing that a reader takes for finished unless it is the undisturbed result. With space again, the same
command must end with the undisturbed result byte for byte. `places.py` has real mounts and two processes.
"""

import argparse
import errno
import os
import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.reliability.common import write
from benchmarks.reliability.preload import arm, preload, spread, writes
from benchmarks.reliability.world import (
    OUTPUTS,
    Reference,
    commands,
    contents,
    finish,
    forget,
    prepare,
    restored,
    start,
    undisturbed,
)

KINDS = {"full": errno.ENOSPC, "read-only": errno.EROFS}
SAYS = {"full": "the disk is full", "read-only": "cannot write here"}
MANIFEST_KINDS = {
    "harvest": "store", "train": "run", "evaluate": "evaluation", "interpret": "interpretation", "export": "export",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=0, help="writes to refuse per stage; 0: all")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--stages", nargs="*", choices=OUTPUTS, default=list(OUTPUTS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    preload()
    prepare()
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder).resolve()
        result = every_write(at, undisturbed(at), args.points, args.kinds, args.stages)
    write(args.out, result)
    raise SystemExit(1 if result["wrong"] else 0)


def every_write(
    at: Path, reference: Reference, points: int, kinds: list[str], stages: list[str]
) -> dict[str, Any]:
    """Refuse the writes of stages; return the counts and what went wrong."""
    begin, wrong, found = time.monotonic(), [], {}
    for stage in stages:
        words, expected = commands(at)[stage], reference[stage][1]
        with restored(at, stage):
            for kind in kinds:
                counts, worse = refuse(at, stage, words, (kind, points, expected))
                found.setdefault(stage, {})[kind] = counts
                wrong += worse
    minutes = round((time.monotonic() - begin) / 60, 2)
    total = sum(c["refused"] for kinds_of in found.values() for c in kinds_of.values())
    return {"refused": total, "by_stage": found, "wrong": wrong, "minutes": minutes}


def refuse(
    at: Path, stage: str, words: list[str], how: tuple[str, int, dict[str, bytes]]
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Refuse one write after the other of a stage; return counts and what went wrong."""
    kind, points, expected = how
    log = at / "refused.log"
    total = writes(at, stage, words)
    chosen = spread(total, points)
    counts, wrong = Counter(writes=total), []
    for point in chosen:
        forget(at, stage)
        log.unlink(missing_ok=True)
        code = ended(words, log, at / OUTPUTS[stage], point, KINDS[kind])
        problems = judged(at, stage, (kind, code, log.read_text()), expected)
        finish(words, log)
        problems += [] if contents(at / OUTPUTS[stage]) == expected else ["differs afterwards"]
        counts["refused" if code else "succeeded"] += 1
        wrong += [{"stage": stage, "kind": kind, "write": point, "what": w} for w in problems]
    return dict(counts), wrong


def ended(words: list[str], log: Path, place: Path, point: int, code: int) -> int:
    """Run a command with its writes refused from a point on; return its exit code."""
    status = os.waitpid(start(words, log, before=lambda: arm(place, point, code)), 0)[1]
    return os.waitstatus_to_exitcode(status)


def judged(
    at: Path, stage: str, told: tuple[str, int, str], expected: dict[str, bytes]
) -> list[str]:
    """Return what is wrong with how a refused command ended."""
    kind, code, text = told
    place, problems = at / OUTPUTS[stage], []
    lines = [line for line in text.splitlines() if line.startswith("wsae: ")]
    if code == 0:  # the last writes may be ones that it can do without
        return [] if contents(place) == expected else ["succeeded with another result"]
    if code != 2 or len(lines) != 1 or "Traceback" in text or SAYS[kind] not in lines[-1]:
        problems.append(f"code {code}: {text[-300:]!r}")
    left = [str(p.relative_to(place)) for p in place.rglob("*") if re.search(r"\.tmp$", p.name)]
    problems += [f"left behind: {', '.join(left)}"] if left else []
    return problems + accepted(place, stage, expected)


def accepted(place: Path, stage: str, expected: dict[str, bytes]) -> list[str]:
    """Return what is wrong with what a reader takes for finished."""
    from wsae.core.artifact import read_manifest
    from wsae.core.errors import UserError

    found = {name: data for name, data in contents(place).items() if name in expected}
    if stage not in MANIFEST_KINDS:  # files that are whole, each for itself
        return [f"{name} is not whole" for name, data in found.items() if data != expected[name]]
    try:
        read_manifest(place, MANIFEST_KINDS[stage])
    except UserError:
        return []
    return [] if found == expected else ["accepted, but not the undisturbed result"]


if __name__ == "__main__":
    main()

"""The power fails at any write of every stage, from harvest to the browser's index; then the same command again.

    python -m benchmarks.reliability.power [--points 0] [--draws 1] [--seed 0] [--no-flush] [--stages ...] [--out ...]

A preloaded library (fault.c, built with cc) ends the process at its n-th write and has noted what was done before. Then
everything that no flush had made sure of is put at risk, as a journaling file system may (ext4, XFS: names change in
their order, content in any):

- names: of the creations, renames and removals since the last flush of any file, a number drawn from the seed is
  undone, from the last one backwards;
- content: of what was written into a file since its own last flush, one of three is drawn: it is there, it is zeros, or
  the file ends at a random place in it.

The same command must then end with the undisturbed result byte for byte. --points: that many writes of a stage, spread
evenly, and not every one; --draws: losses drawn for each. --no-flush is the control: what if wsae flushed nothing?
"""

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.reliability.common import write
from benchmarks.reliability.preload import arm_power, preload, spread, writes
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

NAMES = ("create", "mkdir", "rename", "unlink", "rmdir")


@dataclass
class Notes:
    """What a process had done when it ended."""

    names: list[list[str]] = field(default_factory=list)
    """Creations, renames and removals since the last flush, which makes sure of all before it."""
    flushed: dict[int, int] = field(default_factory=dict)
    """Inode -> its size when it was flushed last, less what was cut off since."""
    dirty: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    """Inode -> the ranges written since."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=0, help="writes per stage; 0: all")
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-flush", action="store_true")
    parser.add_argument("--stages", nargs="*", choices=OUTPUTS, default=list(OUTPUTS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    preload()
    prepare()
    if args.no_flush:
        os.fsync = lambda _: None
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder).resolve()
        result = every_stage(at, undisturbed(at), args)
    write(args.out, result)
    raise SystemExit(1 if result["wrong"] else 0)


def every_stage(at: Path, reference: Reference, args: argparse.Namespace) -> dict[str, Any]:
    """Cut the power in stages; return the counts and what went wrong."""
    begin, wrong, found = time.monotonic(), [], {}
    for stage in args.stages:
        with restored(at, stage):
            found[stage], worse = cuts_of(at, stage, args, reference[stage][1])
        wrong += worse
    minutes = round((time.monotonic() - begin) / 60, 2)
    total = {key: sum(f[key] for f in found.values()) for key in ("cuts", "names", "content")}
    return total | {"by_stage": found, "wrong": wrong, "seed": args.seed, "minutes": minutes}


def cuts_of(
    at: Path, stage: str, args: argparse.Namespace, expected: dict[str, bytes]
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Cut the power at one write after the other of a stage; return counts and what went wrong."""
    words, wrong = commands(at)[stage], []
    total = writes(at, stage, words)
    cuts = names = content = 0
    for point in spread(total, args.points):
        for draw in range(args.draws):
            pick = random.Random(f"{args.seed} {stage} {point} {draw}")
            lost = cut(at, stage, words, point, pick)
            cuts, names, content = cuts + 1, names + lost[0], content + lost[1]
            wrong += [
                {"stage": stage, "write": point, "draw": draw, "lost": lost, "what": what}
                for what in repeated(at, stage, words, expected)
            ]
    return {"writes": total, "cuts": cuts, "names": names, "content": content}, wrong


def cut(at: Path, stage: str, words: list[str], point: int, pick: random.Random) -> tuple[int, int]:
    """End a command at one of its writes and lose what was not flushed; return how many names and files were hit."""
    forget(at, stage)
    place, attic, noted = at / OUTPUTS[stage], at / "attic", at / "notes"
    shutil.rmtree(attic, ignore_errors=True)
    attic.mkdir()
    file = os.open(noted, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    child = start(words, at / "log", before=lambda: arm_power(place, point, file, attic))
    status = os.waitpid(child, 0)[1]
    os.close(file)
    if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
        raise SystemExit(f"{stage}: not ended by write {point} (status {status})")
    notes = read(noted)
    undone = pick.randint(0, len(notes.names))
    for change in reversed(notes.names[len(notes.names) - undone :]):
        undo(change, attic)
    return undone, sum(spoil(path, notes, pick) for path in sorted(place.rglob("*")))


def read(noted: Path) -> Notes:
    """Return the notes of a process that has ended."""
    found = Notes()
    for line in noted.read_text().splitlines():
        kind, *words = line.split("\t")
        if kind in NAMES:
            found.names.append([kind, *words])
        elif kind == "write":
            inode, first, count = map(int, words)
            found.dirty[inode].append((first, first + count))
        elif kind == "cut":
            inode, size = map(int, words)
            found.flushed[inode] = min(found.flushed.get(inode, 0), size)
        elif kind == "flush":
            inode, size = map(int, words)
            found.flushed[inode] = size
            found.dirty.pop(inode, None)
            found.names.clear()
        else:
            raise SystemExit(f"{noted}: no such note: {line!r}")
    return found


def undo(change: list[str], attic: Path) -> None:
    """Take back one change of names, the newest that has not been."""
    kind, name, *more = change[0], Path(change[1]), *change[2:]
    if kind == "create":
        name.unlink()
    elif kind == "mkdir":
        name.rmdir()
    elif kind == "rmdir":
        name.mkdir()
    elif kind == "unlink":
        os.link(attic / more[0], name)
    else:
        to, old = Path(more[0]), attic / more[1]
        to.rename(name)
        if old.exists():
            os.link(old, to)


def spoil(path: Path, notes: Notes, pick: random.Random) -> bool:
    """Lose what of a file was not flushed, in one of three ways; return whether anything could be and was."""
    if not path.is_file():
        return False
    status = path.stat()
    safe = min(notes.flushed.get(status.st_ino, 0), status.st_size)
    ranges = [*notes.dirty.get(status.st_ino, []), (safe, status.st_size)]
    ranges = [(first, min(last, status.st_size)) for first, last in ranges if first < last]
    how = pick.choice(("there", "zeros", "cut"))
    if not ranges or how == "there":
        return False
    with path.open("rb+") as file:
        for first, last in ranges:
            file.seek(first)
            file.write(bytes(max(last - first, 0)))
        if how == "cut" and safe < status.st_size:
            file.truncate(pick.randrange(safe, status.st_size))
    return True


def repeated(at: Path, stage: str, words: list[str], expected: dict[str, bytes]) -> list[str]:
    """Run the command again after the cut; return what is wrong with how it ended."""
    (at / "log").write_text("")
    try:
        finish(words, at / "log")
    except SystemExit as error:
        return [str(error)[-600:]]
    found = contents(at / OUTPUTS[stage])
    if found == expected:
        return []
    names = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
    return [f"differs: {', '.join(names)[:300]}"]


if __name__ == "__main__":
    main()

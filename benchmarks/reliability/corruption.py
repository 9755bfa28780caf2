"""Random damage to every kind of file that wsae writes, each read back by the command or reader it is for.

    python -m benchmarks.reliability.corruption [--cases 1000] [--seed 0] [--out corruption.json] [--only TARGET]

Small artifacts are made first, on models built from a config (see `targets.py`). Then, in turn, every file of every
artifact is damaged: one bit flipped (twice as likely), eight bits flipped, cut at a random place (twice as likely), or
512 bytes zeroed. What the reader does decides:

    detected   one line (UserError; exit code 2 of a command) that names the damaged file
    same       read, and everything it gives equals the undamaged reading (1e-05 became 1E-05; a file made again)
    unnamed    refused in one line, but the file is not in it
    silent     read with other values
    crashed    any other exception

Only the first two are right. A new kind of file is a few lines in `targets.py`.
"""

import argparse
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.reliability.common import write
from benchmarks.reliability.targets import Target, make_targets

OUTCOMES = ("detected", "same", "unnamed", "silent", "crashed")
RIGHT = ("detected", "same")
SECTOR = 512


class Case(NamedTuple):
    """One damaged file and what became of it."""

    target: str
    file: str
    damage: str
    how: str
    outcome: str
    words: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", help="damage the targets whose name has this in it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        targets = [t for t in make_targets(Path(folder)) if (args.only or "") in t.name]
        made = time.monotonic() - begin
        cases = run(targets, args.cases, args.seed, Path(folder) / "case")
    found = {"seed": args.seed, "seconds_making": round(made, 1), **summary(cases)}
    write(args.out, found | {"minutes": round((time.monotonic() - begin) / 60, 2)})
    raise SystemExit(1 if found["wrong"] else 0)


def run(targets: list[Target], cases: int, seed: int, scratch: Path) -> list[Case]:
    """Damage every file of every target in turn, in an order drawn from the seed, until there are `cases`."""
    pick = random.Random(seed)
    whole = {target.name: target.read(copied(target, scratch)) for target in targets}
    pairs = [(target, name) for target in targets for name in target.files]
    found: list[Case] = []
    while len(found) < cases:
        pick.shuffle(pairs)
        for target, name in pairs[: cases - len(found)]:
            # a generator for each: a file whose size differs between two runs moves no other damage
            one = random.Random(pick.getrandbits(64))
            found.append(trial(target, name, one, whole[target.name], scratch))
    return found


def copied(target: Target, scratch: Path) -> Path:
    """Return a fresh copy of an artifact, in a folder of its own."""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(target.place, scratch / target.place.name, symlinks=True)
    return scratch / target.place.name


def trial(target: Target, name: str, pick: random.Random, whole: Any, scratch: Path) -> Case:
    """Damage one file of a copy and read it."""
    place = copied(target, scratch)
    path = place / name
    data, damage, how = damaged(path.read_bytes(), pick)
    path.write_bytes(data)
    outcome, words = outcome_of(target.read, place, path, whole)
    return Case(target.name, name, damage, how, outcome, words.replace(str(scratch), "..."))


def outcome_of(read: Callable[[Path], Any], place: Path, path: Path, whole: Any) -> tuple[str, str]:
    """Read a place with one damaged file; return the outcome and what was said."""
    from wsae.core.errors import UserError

    try:
        found = read(place)
    except UserError as error:
        words = str(error)
        named = str(path) in words and "\n" not in words
        return ("detected" if named else "unnamed"), words
    except Exception as error:  # what this is here to find
        return "crashed", f"{type(error).__name__}: {error}"
    return ("same" if found == whole else "silent"), ""


def damaged(data: bytes, pick: random.Random) -> tuple[bytes, str, str]:
    """Return other bytes in place of `data`, the kind of damage, and where it was done."""
    out, kind = bytearray(data), pick.choice(("flip", "flip", "flips", "cut", "cut", "zeros"))
    if kind == "cut":
        size = pick.randrange(len(data))
        return data[:size], kind, f"cut to {size} of {len(data)} bytes"
    if kind == "zeros":
        first = pick.randrange(len(data))
        out[first : first + SECTOR] = bytes(len(out[first : first + SECTOR]))
        if bytes(out) != data:
            return bytes(out), kind, f"{SECTOR} bytes zeroed at {first} of {len(data)}"
        kind = "flip"
    bits = pick.sample(range(8 * len(data)), k=8 if kind == "flips" else 1)
    for bit in bits:
        out[bit // 8] ^= 1 << (bit % 8)
    return bytes(out), kind, f"bits {', '.join(map(str, bits))} of {8 * len(data)} flipped"


def summary(cases: list[Case]) -> dict[str, Any]:
    """Return the counts, by target and by damage, and every case that went wrong."""
    targets = list(dict.fromkeys(case.target for case in cases))
    return {
        "cases": len(cases),
        **{name: sum(case.outcome == name for case in cases) for name in OUTCOMES},
        "files": len({(case.target, case.file) for case in cases}),
        "by_damage": dict(Counter(case.damage for case in cases)),
        "by_target": {
            name: dict(Counter(case.outcome for case in cases if case.target == name))
            for name in sorted(targets)
        },
        "wrong": [case._asdict() for case in cases if case.outcome not in RIGHT],
    }


if __name__ == "__main__":
    main()

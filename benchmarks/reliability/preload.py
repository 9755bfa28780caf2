"""The library that counts writes and acts at one of them (fault.c, built with cc), and what calls it."""

import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

from benchmarks.reliability.common import environment
from benchmarks.reliability.world import OUTPUTS, forget, start

LIBRARY = "WSAE_FAULT_LIBRARY"


def preload() -> None:
    """Build the library and run this script again with it in place, unless it is; does not return then."""
    if LIBRARY in os.environ:
        return
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fault.so"
        source = Path(__file__).with_name("fault.c")
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        own = environment() | {LIBRARY: str(library), "LD_PRELOAD": str(library)}
        code = subprocess.run([sys.executable, *sys.orig_argv[1:]], env=own, check=False).returncode
    raise SystemExit(code)


def arm(place: Path, first: int, code: int) -> None:
    """Refuse writes below a place from the first-th on, with an errno (0: only count them)."""
    arm_ = ctypes.CDLL(None).fault_arm
    arm_.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int]
    arm_(str(place).encode(), first, code)


def arm_power(place: Path, first: int, notes: int, attic: Path) -> None:
    """Kill this process at the first-th write below a place; note what is written and flushed until then."""
    arm_ = ctypes.CDLL(None).power_arm
    arm_.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_char_p]
    arm_(str(place).encode(), first, notes, str(attic).encode())


def writes(at: Path, stage: str, words: list[str]) -> int:
    """Return how many writes a stage makes."""
    forget(at, stage)
    log = at / "count.log"
    with tempfile.TemporaryFile() as told:
        child = start(
            words, log, before=lambda: arm(at / OUTPUTS[stage], 0, 0), after=count_to(told)
        )
        assert os.waitpid(child, 0)[1] == 0, log.read_text()[-2000:]
        told.seek(0)
        return int(told.read())


def count_to(file: IO[bytes]) -> Callable[[], int]:
    """Return what writes the number of writes so far into a file."""
    return lambda: os.write(file.fileno(), str(ctypes.CDLL(None).fault_count()).encode())


def spread(total: int, points: int) -> Iterable[int]:
    """Return so many of the writes 1 ... total, evenly spread (0: all)."""
    if not points or points >= total:
        return range(1, total + 1)
    return sorted({1 + (2 * i + 1) * total // (2 * points) for i in range(points)})

"""One clear line when a job of many ranks ends early, whichever of them notices first."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

PATIENCE_S = 3.0
"""How long the rank that speaks looks for the one that is gone."""
SPEAKER = "speaker"
"""Key of the store that is there once a rank has failed."""
_SIGNS = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe")


class RankLost(RuntimeError):
    """Another rank ended without a word, or stopped answering."""


@contextlib.contextmanager
def one_voice(store: dist.Store, rank: int, ranks: int) -> Iterator[None]:
    """Let the first rank that fails inside the block report it, and close the stderr of every later one.

    A collective that broke because another rank is gone becomes a `RankLost` naming that rank where it ran on the same
    machine. SIGTERM, which torchrun sends to the ranks that are left, interrupts the block; it cannot cut the report.
    """
    main = threading.current_thread() is threading.main_thread()
    old = signal.signal(signal.SIGTERM, _interrupt) if main else None
    store.set(f"who/{rank}", f"{_machine()} {os.getpid()}")
    try:
        yield
        store.set(f"leaves/{rank}", "1")
    except BaseException as error:
        if main:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not _speaks(store, rank):
            _mute()
        elif _is_loss(error):
            raise RankLost(_report(store, rank, ranks)) from error
        raise
    finally:
        if main and signal.getsignal(signal.SIGTERM) is _interrupt:
            signal.signal(signal.SIGTERM, old)


def _interrupt(number: int, frame: object) -> None:  # noqa: ARG001
    raise KeyboardInterrupt


def _speaks(store: dist.Store, rank: int) -> bool:
    """Say that this rank leaves in order, and whether it is the first to."""
    try:
        store.set(f"leaves/{rank}", "1")
        return store.add(SPEAKER, 1) == 1
    except RuntimeError:  # the store went with the rank or the torchrun that kept it
        return True


def _is_loss(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)


def check_alive(store: dist.Store, rank: int, ranks: int) -> None:
    """Raise RankLost when another rank has failed, or ended without a word on this machine."""
    gone = _gone(store, rank, ranks)
    if gone:
        raise RankLost(_named(gone, ranks))
    if store.check([SPEAKER]):
        raise RankLost("another rank has ended the job")


def _report(store: dist.Store, rank: int, ranks: int) -> str:
    until = time.monotonic() + PATIENCE_S
    try:
        while time.monotonic() < until:
            gone = _gone(store, rank, ranks)
            if gone:
                return _named(gone, ranks)
            time.sleep(0.05)
    except RuntimeError:  # as above
        return "the rank that keeps the job's addresses is gone"
    return "a rank on another machine is gone, or did not answer in time"


def _named(gone: list[int], ranks: int) -> str:
    if len(gone) == 1:
        return f"rank {gone[0]} of {ranks} is gone (killed, or out of memory)"
    return f"ranks {', '.join(map(str, gone))} of {ranks} are gone (killed, or out of memory)"


def _gone(store: dist.Store, rank: int, ranks: int) -> list[int]:
    """Return the ranks of this machine whose process ended without leaving in order."""
    here, found = _machine(), []
    for other in range(ranks):
        known = store.check([f"who/{other}"]) and not store.check([f"leaves/{other}"])
        if other == rank or not known:
            continue
        place, _, pid = store.get(f"who/{other}").decode().partition(" ")
        if place == here and _ended(int(pid)):
            found.append(other)
    return found


def _machine() -> str:
    """Name what makes two process numbers comparable: the host, and on Linux the container's view of processes."""
    view = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()}/{os.readlink(view) if view.exists() else ''}"


def _ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    status = Path(
        f"/proc/{pid}/stat"
    )  # a zombie still has a pid; elsewhere than on Linux it is reaped soon
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z"


def _mute() -> None:
    sys.stderr.flush()
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)

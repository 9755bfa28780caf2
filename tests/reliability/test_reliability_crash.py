"""What a kill may leave, and two processes in one place; test_reliability_stages.py kills whole stages."""

import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from wsae.acts.source import ArraySource
from wsae.core.errors import UserError
from wsae.core.files import is_temporary, locked, writing
from wsae.sae import TopK
from wsae.train import loop as directory
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.loggers import JsonLines
from wsae.train.run import train_run


def leave_a_temporary_file(path: Path) -> Path:
    """Have another process die while it writes `path`; return what it leaves."""
    before = set(path.parent.iterdir())
    child = os.fork()
    if child == 0:
        with writing(path) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = set(path.parent.iterdir()) - before
    assert left.name.startswith(f".{path.name}.{child}.")
    assert is_temporary(left)
    return left


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    left = leave_a_temporary_file(tmp_path / "a.json")
    other = leave_a_temporary_file(tmp_path / "b.json")
    living = tmp_path / f".a.json.{os.getppid()}.tmp"
    living.write_text("being written")
    assert left.exists()
    with writing(tmp_path / "a.json") as temporary:
        temporary.write_text("whole")
    assert not left.exists()
    assert other.exists(), "another file's"
    assert living.exists(), "its writer lives"


CFG = TrainConfig(
    members=(MemberConfig(d_sae=16, activation=TopK(k=2)),), tokens=640, batch_size=64
)


def acts(seed: int = 0) -> ArraySource:
    return ArraySource(np.random.default_rng(seed).normal(size=(200, 8)).astype(np.float32))


def test_a_second_process_that_comes_as_the_directory_is_made_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first makes the directory between the second's look at it and its lock."""
    out = tmp_path / "run"
    ready, done = threading.Event(), threading.Event()

    def first() -> None:
        with locked(out):
            (out / "config.json").write_text("{}")
            ready.set()
            done.wait(30)

    thread = threading.Thread(target=first)

    def late(path: Path):
        thread.start()
        ready.wait(30)
        return locked(path)

    monkeypatch.setattr(directory, "locked", late)
    with pytest.raises(UserError, match="another wsae process is writing here"):
        train_run(CFG, acts(), out)
    assert (out / "config.json").exists()
    done.set()
    thread.join()


def test_a_directory_removed_while_its_lock_was_waited_for_is_locked_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl
    import shutil

    out, flock, calls = tmp_path / "run", fcntl.flock, []

    def removed_first(*args: int) -> None:
        if not calls:
            shutil.rmtree(out)
        calls.append(args)
        flock(*args)

    monkeypatch.setattr("wsae.core.files.fcntl.flock", removed_first)
    with locked(out):
        assert len(calls) == 2
        assert (out / ".lock").exists()
        with pytest.raises(UserError, match="another wsae process"), locked(out):
            pass


def test_rows_changed_since_their_checkpoint_are_refused(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.write({"step": 1, "fvu": 0.25})
    mark = lines.mark()
    lines.write({"step": 2, "fvu": 0.125})
    lines.back_to(mark)
    assert lines.path.read_text() == '{"step": 1, "fvu": 0.25}\n'
    lines.path.write_text('{"step": 1, "fvu": 0.26}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: altered"):
        lines.back_to(mark)
    lines.back_to(None)
    assert lines.size() == 0


def test_a_run_killed_after_its_manifest_is_tidied_by_the_same_command(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train_run(CFG, acts(), out)
    (out / "checkpoints" / "step-1").mkdir(parents=True)
    train_run(CFG, acts(), out)
    assert not (out / "checkpoints").exists()

"""Copies of the metrics: every scalar of metrics.jsonl once, whatever happened to the run or to the logger."""

import json
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from halting import Halting
from hypothesis import given
from hypothesis import strategies as st
from test_train import ArraySource, config, family, weighted, world
from test_train_parallel import a_world_of_one
from test_vision_pretrain import config as vision_config
from test_vision_pretrain import stripes

from wsae.cli import main
from wsae.core.errors import UserError
from wsae.core.files import read_json
from wsae.train import loggers
from wsae.train.loggers import (
    JsonLines,
    Logger,
    WandbConfig,
    mirrored,
    read_json_lines,
    scalars,
    tensorboard,
    wandb,
)
from wsae.train.loop import Stopped
from wsae.train.parallel.run import train_parallel
from wsae.train.run import train_run
from wsae.vision.pretrain import pretrain

CFG = config(*family([weighted()]), tokens=12_000, dead_after=600, log_every=5)
Copied = dict[str, list[tuple[int, float]]]


def accumulated(run: Path) -> Copied:
    """Return tag -> (step, value) as TensorBoard itself reads the run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    everything.Reload()
    tags = everything.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in everything.Scalars(tag)] for tag in tags}


def written(run: Path, single: bool = True) -> Copied:
    """Return the same from metrics.jsonl, by other code than the logger's; `single`: as 32-bit floats."""
    found: Copied = {}
    for row in read_json_lines(run / "metrics.jsonl"):
        for key in set(row) - {"step", "hook", "member"}:
            tag = f"{row['member']}/{key}" if "member" in row else key
            value = struct.unpack("f", struct.pack("f", row[key]))[0] if single else row[key]
            found.setdefault(tag, []).append((row["step"], value))
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with mirrored([tensorboard()]):
        return train_run(CFG, ArraySource(world()), tmp_path_factory.mktemp("whole") / "run").path


def test_tensorboard_reads_every_scalar_of_the_metrics(whole: Path) -> None:
    copied = accumulated(whole)
    assert copied == written(whole)
    assert {"plain/fvu", "variance-a1/fvu", "plain/lr", "plain/tokens"} <= set(copied)
    assert [step for step, _ in copied["plain/fvu"]] == list(range(5, 61, 5))


def test_a_run_without_loggers_has_the_same_files_but_theirs(whole: Path, tmp_path: Path) -> None:
    bare = train_run(CFG, ArraySource(world()), tmp_path / "run").path

    def files(run: Path) -> dict[str, bytes]:
        found = (
            p for p in run.rglob("*") if p.is_file() and p.name not in (".lock", "speed.jsonl")
        )
        return {str(p.relative_to(run)): p.read_bytes() for p in found if "tensorboard" not in str(p)}  # fmt: skip

    assert files(bare) == files(whole)


@pytest.mark.parametrize("first", [[tensorboard()], []], ids=["from the start", "on resume"])
def test_a_resumed_run_has_each_step_once(whole: Path, tmp_path: Path, first: list[Logger]) -> None:
    out = tmp_path / "run"
    with pytest.raises(Stopped), mirrored(first):
        train_run(CFG, Halting(world(), 23), out)
    rows = (out / "metrics.jsonl").read_text()
    if first:  # rows past the checkpoint, as a kill leaves them: in the event file, to be cut from the metrics
        assert accumulated(out) == written(out)
        JsonLines(out / "metrics.jsonl").write({**json.loads(rows.splitlines()[-1]), "step": 25})
    times = {step: wall for step, wall in steps_and_times(out)}
    with mirrored([tensorboard()]):
        train_run(CFG, ArraySource(world()), out, resume=True)
    assert accumulated(out) == accumulated(whole) == written(out)
    assert len(list((out / "tensorboard").iterdir())) == 1
    kept = {step: wall for step, wall in steps_and_times(out) if step in times}
    assert kept == times, "a step keeps the time at which it was made"


def steps_and_times(run: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    files = (run / "tensorboard").glob("*")
    events = [event for file in files for event in LegacyEventFileLoader(str(file)).Load()]
    return [(event.step, event.wall_time) for event in events if event.summary.value]


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
import wsae.train.loop as loop
from test_loggers import CFG, ArraySource, mirrored, tensorboard, train_run, world

torch.set_num_threads(1)
loop.CHECKPOINT_SECONDS = 0.0
loop.Recorder._cost = property(lambda self: 0.0, lambda self, value: None)
out, pick, kills, status = Path(sys.argv[2]), random.Random(1), 0, None
while status != 0:
    child = os.fork()
    if child == 0:
        with mirrored([tensorboard()]):
            train_run(CFG, ArraySource(world()), out, resume=True)
        os._exit(0)
    while not (out / "checkpoints").exists():
        time.sleep(0.001)
    if kills < 3:
        time.sleep(pick.random() * 0.2)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    kills += status != 0
print(kills)
"""


def test_a_run_killed_at_random_moments_shows_the_same_scalars(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-c", KILLER, str(Path(__file__).parent), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0, "no run was killed: the test showed nothing"
    assert accumulated(out) == accumulated(whole)


def test_a_cut_or_altered_event_file_is_no_obstacle(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Stopped), mirrored([tensorboard()]):
        train_run(CFG, Halting(world(), 23), out)
    (file,) = (out / "tensorboard").iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 40] = b"\xff" * 40
    file.write_bytes(data[:-7])
    told: list[str] = []
    with mirrored([tensorboard()], told.append):
        train_run(CFG, ArraySource(world()), out, resume=True)
    assert (accumulated(out), told) == (accumulated(whole), [])


def test_several_ranks_write_one_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with a_world_of_one(monkeypatch) as ranks, mirrored([tensorboard()]):
        train_parallel(CFG, ArraySource(world()), tmp_path / "run", ranks)
    copied = accumulated(tmp_path / "run")
    assert copied == written(tmp_path / "run")
    assert len(copied["plain/fvu"]) == 12


def test_pretraining_is_copied_too(tmp_path: Path) -> None:
    with mirrored([tensorboard()]):
        run = pretrain(vision_config(), stripes(), tmp_path / "run").path
    copied = accumulated(run)
    assert copied == written(run)
    assert {"loss", "accuracy", "heldout_accuracy", "lr"} <= set(copied)
    assert len(copied["heldout_accuracy"]) == 2 < len(copied["loss"])


class Flaky:
    """A sink that fails at the steps it is told of, and otherwise keeps what it is given."""

    opened: list["Flaky"]

    def __init__(self, fails: Callable[[int, int], bool]) -> None:
        self.rows: dict[int, dict[str, float]] = {}
        self.fails = fails
        self.closed: bool | None = None

    def log(self, step: int, values: dict[str, float]) -> None:
        if self.fails(len(Flaky.opened), step):
            raise OSError(28, "No space left on device")
        self.rows[step] = values

    def close(self, finished: bool) -> None:
        self.closed = finished


def flaky(fails: Callable[[int, int], bool]) -> Logger:
    Flaky.opened = []

    def begin(_: Path) -> Flaky:
        Flaky.opened.append(Flaky(fails))
        return Flaky.opened[-1]

    return Logger("flaky", lambda: None, begin)


def test_a_logger_that_fails_once_is_told_of_once_and_catches_up(
    whole: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    with mirrored([flaky(lambda opened, step: opened == 1 and step == 20)], told.append):
        run = train_run(CFG, ArraySource(world()), tmp_path / "run").path
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert [sorted(sink.rows) for sink in Flaky.opened] == [[5, 10, 15], list(range(5, 61, 5))]
    assert [sink.closed for sink in Flaky.opened] == [False, True]
    assert told == [
        "logger flaky: OSError: [Errno 28] No space left on device; training goes on, metrics.jsonl has every row",
        "logger flaky: failed 1 times, last OSError: [Errno 28] No space left on device; its copy has every row",
    ]


def test_a_logger_is_tried_again_ever_more_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(loggers, "RETRY_S", 0.0)
    with mirrored([flaky(lambda opened, _: opened <= 3)], told.append):
        train_run(CFG, ArraySource(world()), tmp_path / "run")
    assert [len(sink.rows) for sink in Flaky.opened] == [0, 0, 0, 12]
    assert told[-1].startswith("logger flaky: failed 3 times")
    with mirrored([flaky(lambda *_: True)], told.append) as copying:
        train_run(CFG, ArraySource(world()), tmp_path / "other")
    assert told[-1].endswith("its copy lacks rows that metrics.jsonl has")
    assert copying.summary()["flaky"]["complete"] is False
    clock = [0.0]
    monkeypatch.setattr(loggers, "RETRY_S", 30.0)
    monkeypatch.setattr(loggers.time, "monotonic", lambda: clock[0])
    copy = loggers.Copy(flaky(lambda *_: True), tmp_path / "other", told.append)
    attempts = []
    for second in range(4000):
        clock[0] = float(second)
        before = copy.failures
        copy.write(1, {})
        attempts += [second] * (copy.failures - before)
    waits = np.diff(attempts)
    assert list(waits[:6]) == [30, 60, 120, 240, 480, 600]
    assert set(waits[6:]) == {600}


def test_a_real_logger_that_cannot_write_does_not_stop_the_run(tmp_path: Path, capsys) -> None:
    np.save(tmp_path / "x.npy", world().numpy())
    out = tmp_path / "run"
    words = ["--d-sae", "32", "--k", "4", "--tokens", "2000", "--batch-size", "200"]
    command = ["train", str(tmp_path / "x.npy"), "--out", str(out), *words, "--device", "cpu"]
    out.mkdir()
    (out / ".lock").touch()
    script = f"""
import sys, wsae.train.loop as directory
enter = directory.enter
def blocked(out, *rest):
    begun = enter(out, *rest)
    (out / "tensorboard").write_text("in the way")
    return begun
import wsae.train.run
wsae.train.run.enter = blocked
from wsae.cli.main import main
sys.exit(main({[*command, "--logger", "tensorboard", "--json"]!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)  # noqa: PLW1510
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == str(out)
    lines = [line for line in done.stderr.splitlines() if line.startswith("wsae: logger")]
    assert "FileExistsError" in lines[0]
    assert lines[1].endswith("its copy lacks rows that metrics.jsonl has")
    assert len(lines) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_a_logger_that_is_not_installed_names_its_extra(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    for loaded in [m for m in sys.modules if m.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    assert main.main(["train", "acts.npy", "--out", "run", "--logger", name]) == 2
    err = capsys.readouterr().err
    assert err == f"wsae: error: --logger {name}: {module} is not installed; pip install 'wsae[{name}]'\n"  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_logger_named_twice_or_unknown_is_refused(capsys) -> None:
    words = ["train", "acts.npy", "--out", "run", "--logger"]
    assert main.main([*words, "tensorboard", "tensorboard"]) == 2
    assert "name each logger once" in capsys.readouterr().err
    assert main.main([*words, "tensorbord"]) == 2
    assert "'tensorbord' is not one of" in capsys.readouterr().err


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xy"), st.floats(-9, 9)), max_size=4,
             unique_by=lambda row: row[:2])
)  # fmt: skip
def test_names_are_members_and_where_there_are_several_hooks_also_hooks(rows: list) -> None:
    found = scalars({"step": 3, "hook": h, "member": m, "v": v, "why": "text"} for h, m, v in rows)
    several = len({h for h, _, _ in rows}) > 1
    assert found == {(f"{h}/" if several else "") + f"{m}/v": v for h, m, v in rows}


def wandb_history(run: Path) -> tuple[dict[int, dict[str, float]], str]:
    """Return step -> scalars of the one offline W&B run of a directory, and its id, once W&B's process has written."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = (run / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 30
    found: list = []
    while not any(r.HasField("exit") for r in found) and time.monotonic() < deadline:
        time.sleep(0.05)
        found = [Record.FromString(data) for data in leveldb(file.read_bytes())]
    history: dict[int, dict[str, float]] = {}
    for record in found:
        if record.HasField("history"):
            items = {i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
            values = {k: v for k, v in items.items() if not k.startswith("_")}
            assert record.history.step.num not in history, "a step was logged twice"
            history[record.history.step.num] = values
    return history, file.name.removeprefix("run-").removesuffix(".wandb")


def leveldb(data: bytes) -> list[bytes]:
    """Return the records of a LevelDB log whose first seven bytes are W&B's: blocks of 32 KiB, fragments joined."""
    found, joined, place = [], b"", 7
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if kind == 0:
            break
        joined += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found, joined = [*found, joined], b""
    return found


def test_wandb_offline_holds_every_scalar_also_when_resumed(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    out, logger = tmp_path / "run", wandb(WandbConfig(mode="offline"))
    told: list[str] = []
    with pytest.raises(Stopped), mirrored([logger], told.append):
        train_run(CFG, Halting(world(), 23), out)
    history, first = wandb_history(out)
    assert sorted(history) == [5, 10, 15, 20]
    with mirrored([logger], told.append):
        train_run(CFG, ArraySource(world()), out, resume=True)
    history, second = wandb_history(out)
    expected: dict[int, dict[str, float]] = {}
    for tag, pairs in written(out, single=False).items():
        for step, value in pairs:
            expected.setdefault(step, {})[tag] = value
    assert history == expected
    assert second == first == read_json(out / "wandb.json")["id"]
    assert told == []


def test_wandb_online_without_a_key_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(UserError, match="no W&B key here; run `wandb login`"):
        wandb().check()
    wandb(WandbConfig(mode="offline")).check()


def test_a_damaged_wandb_id_is_refused(tmp_path: Path) -> None:
    from wsae.train.loggers import run_id

    first = run_id(tmp_path)
    assert run_id(tmp_path) == first
    assert first.isalnum()
    (tmp_path / "wandb.json").write_text('{"id": "../../etc"}')
    with pytest.raises(UserError, match=r"wandb.json: holds no W&B id"):
        run_id(tmp_path)

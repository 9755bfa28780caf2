"""Full and read-only disks, and two processes in one place; `benchmarks.reliability.full` and `.places`: long forms."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FULL = Path("/dev/full")
needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to build fault.c")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")


def long_form(name: str, *words: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"benchmarks.reliability.{name}", *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(Path(words[-1]).read_text())


@needs_cc
def test_a_disk_that_fills_up_leaves_nothing_half_and_costs_nothing(tmp_path: Path) -> None:
    out = str(tmp_path / "full.json")
    found = long_form(
        "full", "--points", "1", "--kinds", "full", "--stages", "train", "report", "--out", out
    )
    assert not found["wrong"]
    assert all(kinds["full"]["refused"] == 1 for kinds in found["by_stage"].values())


def test_a_second_process_in_the_same_place_is_refused(tmp_path: Path) -> None:
    code = (
        "import sys, json, pathlib\n"
        "from benchmarks.reliability.places import every_stage, prepare\n"
        "prepare()\n"
        "found = every_stage(pathlib.Path(sys.argv[1]), False, ('train', 'interpret'))\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["wrong"]
    for stage in ("train", "interpret"):
        said = found["said"][stage]["second process"]
        assert "another wsae process is writing here" in said


@needs_full
@pytest.mark.parametrize("words", [["version"], ["train", "--help"]])
def test_a_result_that_cannot_be_printed_is_one_line(words: list[str]) -> None:
    with FULL.open("w") as stdout:
        done = subprocess.run(
            [sys.executable, "-m", "wsae.cli", *words],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode in (1, 2)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("wsae: error: ")


HALF_A_ROW = """
import resource, signal, sys
from pathlib import Path
from wsae.core.errors import UserError
from wsae.train.metrics import JsonLines
lines = JsonLines(Path(sys.argv[1]))
lines.write({"step": 1})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (lines.size() + 4, lines.size() + 4))
try:
    lines.write({"step": 2})
except UserError as error:
    print(error)
"""


def test_a_row_of_metrics_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """The system takes four bytes of the second row for real, as a disk that fills up does."""
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", HALF_A_ROW, path], capture_output=True, text=True, check=True
    )
    assert "metrics.jsonl: larger than this system lets a file be" in done.stdout
    assert path.read_text() == '{"step": 1}\n'

"""Stages from harvest to report that are killed, cut off, refused a write or started twice.

The short forms of `benchmarks.reliability.crash`, `.places`, `.full` and `.power`, in one process of their own and
beside one undisturbed world: what they import and make costs more than what they try.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to build fault.c")

SHORT = """
import json, shutil, sys
from argparse import Namespace
from pathlib import Path
from benchmarks.reliability import crash, full, places, power, preload, world

if shutil.which("cc"):
    preload.preload()
world.prepare()
at = Path(sys.argv[1]).resolve()
reference = world.undisturbed(at)
found = {
    "crash": crash.matrix(at, reference, 5, 1, list(world.OUTPUTS)),
    "places": places.every_stage(at, reference, False, ("train", "interpret")),
}
if shutil.which("cc"):
    stages = ["train", "report"]
    found["full"] = full.every_write(at, reference, 1, ["full"], stages)
    found["power"] = power.every_stage(at, reference, Namespace(points=3, draws=1, seed=0, stages=stages))
Path(sys.argv[2]).write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("stages")
    out = place / "found.json"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SHORT, str(place), str(out)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": _path()},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


def _path() -> str:
    return os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])


def test_stages_killed_at_random_moments_end_with_the_same_bytes(found: dict[str, Any]) -> None:
    crash = found["crash"]
    assert crash["kills"] >= 5
    assert all(counts["kills"] for counts in crash["by_stage"].values()), crash["by_stage"]
    assert not crash["differ"]


def test_a_second_process_in_the_same_place_is_refused(found: dict[str, Any]) -> None:
    assert not found["places"]["wrong"]
    for stage in ("train", "interpret"):
        said = found["places"]["said"][stage]["second process"]
        assert "another wsae process is writing here" in said


@needs_cc
def test_a_disk_that_fills_up_leaves_nothing_half_and_costs_nothing(found: dict[str, Any]) -> None:
    assert not found["full"]["wrong"]
    assert all(kinds["full"]["refused"] == 1 for kinds in found["full"]["by_stage"].values())


@needs_cc
def test_after_a_power_cut_the_same_command_ends_with_the_same_bytes(found: dict[str, Any]) -> None:
    power = found["power"]
    assert not power["wrong"]
    assert power["cuts"] == 6
    assert power["names"] > 0  # something was lost at all

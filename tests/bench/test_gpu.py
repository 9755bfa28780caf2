"""The script for a GPU's first minutes, rehearsed on a CPU: the Triton kernels' cases under Triton's interpreter too.

Triton decides once per process whether it interprets, so the cases run in one of their own.
"""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest

from wsae.sae.config import Kind

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.skipif(find_spec("triton") is None, reason="triton runs on Linux")
def test_the_kernels_equal_their_definitions_and_a_rehearsal_writes_the_tables(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--rehearse", "--minutes", "30", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    told = tmp_path / "tests.txt"
    assert done.returncode == 0, told.read_text()[-8000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert re.fullmatch(r"\d\d+ passed in .*", report["tests"]["summary"])
    (step,), (kinds,), (kernels,) = report["steps"], report["kinds"], report["kernels"]
    row = step["rows"]["wsae"]
    assert row["tokens_per_s"] == pytest.approx(1e3 * step["batch"] / row["ms"])
    assert {"topk_encode", "update_rows_", "train_step"} <= kernels["rows"].keys()
    assert set(get_args(Kind)) < kinds["rows"].keys()
    for row in kinds["rows"].values():
        assert row["eager_over_triton"] == pytest.approx(row["eager_ms"] / row["triton_ms"])
    text = (tmp_path / "gpu.md").read_text()
    assert text.strip() == done.stdout.strip()
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) == sum(2 + len(found["rows"]) for found in (step, kinds, kernels))

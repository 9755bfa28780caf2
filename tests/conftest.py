"""Shared by all tests: no network, one fixed number of threads."""

import os

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

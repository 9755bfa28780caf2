"""The model hub's manners: is it there at all, and its libraries' chatter."""

import contextlib
import logging
import os
import socket
import sys
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlparse

_NOISY = ("huggingface_hub", "datasets", "transformers", "httpx")


def hub_reachable() -> bool:
    """Return whether the hub's name resolves (or a proxy is set): a machine without network then fails at once."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if urllib.request.getproxies():
        return True
    host = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Silence advisory messages and progress bars of the hub's libraries while loading, errors excepted."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with _no_bars():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    hub_had_bars = not are_progress_bars_disabled()
    transformers = sys.modules.get("transformers.utils.logging")
    switch = transformers if transformers and transformers.is_progress_bar_enabled() else None
    disable_progress_bars()
    if switch:
        switch.disable_progress_bar()
    try:
        yield
    finally:
        if switch:
            switch.enable_progress_bar()
        if hub_had_bars:
            enable_progress_bars()

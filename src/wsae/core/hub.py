"""The model hub: is it there at all, its libraries' chatter, folders fetched from it; keys of servers."""

import contextlib
import logging
import os
import re
import socket
import sys
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

from wsae.core.errors import UserError, first_line, reason

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
def quiet_hub(bars: bool = False) -> Iterator[None]:
    """Silence advisory messages and, without `bars`, progress of the hub's libraries while loading, errors excepted."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with contextlib.nullcontext() if bars else _no_bars():
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


@contextlib.contextmanager
def hub_dataset(what: str, name: str, split: str) -> Iterator[str]:
    """Yield how a data set of the hub is named, while the block opens it; a UserError says why it cannot be read."""
    if find_spec("datasets") is None:
        raise UserError(f"{what} {name}: a hub dataset needs datasets; pip install 'wsae[hub]'")
    where = f"{what} {name}: no such file here, and as a hub dataset (split {split!r})"
    if not hub_reachable():
        raise UserError(f"{where} it cannot be read: there is no network")
    try:
        with quiet_hub():
            yield where
    except Exception as error:  # the library raises its own, httpx's, OSError and ValueError
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{where} it cannot be read ({why})") from error


def is_hub_name(name: str, suffixes: tuple[str, ...]) -> bool:
    """Return whether a name that is none of a file here may be one on the hub: files have one of the suffixes."""
    looks_local = name.startswith(("/", ".", "~")) or name.lower().endswith(suffixes)
    return not looks_local and name.count("/") <= 1 and bool(name.strip())


def key_from(variable: str) -> str:
    """Return the key in a variable of the environment, "" without one; raises UserError for what no header carries."""
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable():
        raise UserError(f"{variable}: holds characters that no key has; set it again")
    return key


_PLACE = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.*))?", flags=re.ASCII)


LLAMA_CONFIG, LLAMA_WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
"""A folder with this file keeps its weights in a folder below."""


class HubPlace(NamedTuple):
    """`hub:owner/name[@revision][/subfolder]`: a repository of the model hub, or a folder in it."""

    repo: str
    revision: str | None
    subfolder: str

    @property
    def patterns(self) -> tuple[list[str], list[str]]:
        """The file names to fetch and those not to: safetensors, JSON and Gemma Scope's arrays of this folder."""
        at = f"{self.subfolder}/" if self.subfolder else ""
        return [f"{at}*.json", f"{at}*.safetensors", f"{at}params.npz"], [f"{at}*/*"]


def hub_place(place: Path | str) -> HubPlace | None:
    """Return what a `hub:` address names, None for anything else; raises UserError for a malformed one."""
    text = str(place)
    if not text.startswith("hub:"):
        return None
    found = _PLACE.fullmatch(text)
    subfolder = (found[3] or "").strip("/") if found else ""
    if not found or any(part in ("", "..", ".") for part in subfolder.split("/") if subfolder):
        raise UserError(f"{text}: an address on the hub is hub:owner/name[@revision][/folder]")
    if any(mark in subfolder for mark in "*?[]"):
        raise UserError(f"{text}: a folder's name on the hub has none of * ? [ ]")
    return HubPlace(found[1], found[2], subfolder)


def local_folder(place: Path | str) -> Path:
    """Return a path as it is, and for `hub:owner/name[@revision][/folder]` the folder fetched from the hub.

    Only .safetensors, .json and params.npz files are fetched (and Llama Scope's weights), into the hub library's cache.
    HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are heeded. Raises UserError when it is not there or cannot be reached.
    """
    there = hub_place(place)
    if there is None:
        return Path(place)
    wanted, unwanted = there.patterns
    root = snapshot(there.repo, wanted, unwanted, there.revision, str(place))
    folder = root / there.subfolder
    if not folder.is_dir():
        raise UserError(f"{place}: no folder {there.subfolder!r} with an SAE in {there.repo}")
    if (folder / LLAMA_CONFIG).is_file():
        below = f"{there.subfolder}/{LLAMA_WEIGHTS}".lstrip("/")
        snapshot(there.repo, [below], [], there.revision, str(place))
    return folder


def snapshot(
    repo: str, wanted: list[str], unwanted: list[str], revision: str | None, place: str
) -> Path:
    """Return the folder of a repository in the hub library's cache, files of these names fetched into it.

    Raises UserError naming `place` when the repository is not there, or cannot be reached and is not in the cache.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise UserError(f"{place}: needs the extra hub (pip install 'wsae[hub]')") from error
    token = key_from("HF_TOKEN") or False
    try:
        with quiet_hub(bars=sys.stderr.isatty()):
            found = snapshot_download(
                repo,
                revision=revision,
                allow_patterns=wanted,
                ignore_patterns=unwanted,
                token=token,
            )
    except Exception as error:  # the library's own, httpx's, OSError; KeyError of a proxy's page
        absent = isinstance(error, LocalEntryNotFoundError)
        if absent and not isinstance(error.__cause__, HfHubHTTPError):
            raise UserError(
                f"{place}: the hub cannot be reached and it is not in the cache"
            ) from error
        said = told(error.__cause__ if absent and error.__cause__ else error)
        raise UserError(f"{place}: not to be had from the hub ({said})") from error
    return Path(found)


def told(error: BaseException) -> str:
    """Return what the hub's library says, without the advice where to read about a status."""
    text = reason(error).split(" For more information check", 1)[0]
    return text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"

"""Sending an SAE to Neuronpedia: each batch once, over a network that times out, refuses and breaks off.

The site adds what it gets a second time to what it got the first time, so it is asked of each latent whether it is
there, unless the set was made just now: before each first attempt, as batches of an earlier upload may have begun
elsewhere, and before each later one, as a request that timed out may have arrived. That is also how a killed upload
goes on, without notes of its own. Nothing the site says is trusted, and the key is in no message.
"""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from wsae.core.errors import UserError
from wsae.core.files import Json
from wsae.core.hub import key_from
from wsae.core.progress import Progress, quiet
from wsae.evals.interpret.asking import one_line
from wsae.evals.interpret.endpoint import (
    MAX_REPLY_BYTES,
    TryAgain,
    error_text,
    passing,
    retry_after,
)
from wsae.serve.neuronpedia import Latent, Source, upload_body

KEY = "NEURONPEDIA_API_KEY"
SITE = "https://www.neuronpedia.org"
MOST_DESCRIPTION = 127
T = TypeVar("T")
_LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Patience:
    """How long a request may take, how often it is tried, and how long to wait in between."""

    timeout_s: float = 120.0
    attempts: int = 8
    first_wait_s: float = 1.0
    longest_wait_s: float = 300.0


@dataclass
class Sent:
    """Latents that were sent, and those that were there already."""

    new: int = 0
    there: int = 0


@contextlib.contextmanager
def site_at(
    url: str, patience: Patience = Patience(), note: Callable[[str], None] = lambda _: None
) -> Iterator["Neuronpedia"]:
    """Yield a site, with the key from the environment; `note` is told of waits.

    Raises UserError without a key, or where it would be sent in the clear to another machine.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--url {url!r}: give an address such as {SITE}")
    if parts.scheme == "http" and parts.hostname not in _LOCAL:
        raise UserError(f"--url {url}: the key would be sent in the clear; give an https address")
    key = key_from(KEY)
    if not key:
        raise UserError(
            f"no key for {parts.hostname}: put one into {KEY}, or add --dry-run to write the files only"
        )
    secure = parts.scheme == "https"  # certificates take time to load
    with httpx.Client(timeout=patience.timeout_s, verify=secure) as http:
        yield Neuronpedia(http, url.rstrip("/"), key, patience, note)


class Neuronpedia:
    """A Neuronpedia that is asked with a key."""

    def __init__(
        self,
        http: httpx.Client,
        url: str,
        key: str,
        patience: Patience,
        note: Callable[[str], None],
    ) -> None:
        self.url, self._http, self._key = url, http, key
        self._patience, self._note = patience, note

    def send(
        self,
        source: Source,
        batches: Iterable[list[Latent]],
        total: int,
        progress: Progress = quiet,
    ) -> Sent:
        """Make the set of sources if need be and send every batch that is not there yet.

        Raises UserError when the site refuses, holds other latents in that place, or cannot be reached for long.
        """
        fresh = False

        def prepare() -> None:
            nonlocal fresh
            if not self._has_source(source):
                fresh = True
                self._make_set(source)

        self._patiently(prepare)
        sent = Sent()
        with progress("upload", total, "latents") as tick:
            for batch in batches:
                try:
                    new = self._send(batch, source, fresh)
                except UserError as error:
                    raise UserError(
                        f"{error}; {sent.new + sent.there} latents are there, the same command goes on"
                    ) from error
                sent.new += new
                sent.there += len(batch) - new
                tick(len(batch))
        return sent

    def _send(self, batch: list[Latent], source: Source, fresh: bool) -> int:
        """Send what is not there of a batch, and return how many latents that are."""
        left = batch if fresh else self._missing(batch, source)
        new, tried = len(left), False

        def post() -> None:
            nonlocal left, tried
            left = self._missing(left, source) if tried else left
            tried = True
            if left:
                self._ask("POST", "feature/upload-batch", upload_body(left, source))

        self._patiently(post)
        return new

    def _missing(self, batch: list[Latent], source: Source) -> list[Latent]:
        return [one for one in batch if not self._patiently(partial(self._has, one, source))]

    def _has_source(self, source: Source) -> bool:
        """Return whether the set is there; raises UserError when it has no source for the layer."""
        found = self._ask("GET", f"source-set/{source.model}/{source.set}")
        return isinstance(found, dict) and self._lists(found, source)

    def _lists(self, found: Json, source: Source) -> bool:
        names = [s.get("id") for s in _objects(found, "sources")]
        if source.id not in names:
            raise UserError(
                f"{self.url}: {source.set!r} of {source.model} has {len(names)} sources and no {source.id!r}; "
                "is it the model that the SAE was trained on? (--model-id)"
            )
        return True

    def _make_set(self, source: Source) -> None:
        said = one_line(source.words, MOST_DESCRIPTION)
        body = {"name": source.set, "modelId": source.model, "description": said, "url": None}
        made = self._ask("POST", "source-set/new", body)
        self._lists(made if isinstance(made, dict) else {}, source)

    def _has(self, latent: Latent, source: Source) -> bool:
        """Return whether a latent is there; raises UserError when it is another one's."""
        found = self._ask("GET", f"feature/{source.model}/{source.id}/{latent.number}")
        if not isinstance(found, dict):
            return False
        there = Counter(json.dumps(a.get("tokens")) for a in _objects(found, "activations"))
        if there != Counter(json.dumps(window.tokens) for window in latent.windows):
            raise UserError(
                f"{self.url}: latent {latent.number} of {source.id} is there with other contexts; give another --set"
            )
        return True

    def _patiently(self, work: Callable[[], T]) -> T:
        """Return what some work gives, tried anew where it may pass; raises UserError when no attempt is left."""
        reason = ""
        for attempt in range(self._patience.attempts):
            try:
                return work()
            except TryAgain as trouble:
                reason = trouble.reason
                self._wait(trouble, attempt)
        whose = "; is the set of sources another user's?" if reason == "HTTP 500" else ""
        raise UserError(f"{self.url}: {reason}, {self._patience.attempts} times{whose}")

    def _wait(self, trouble: TryAgain, attempt: int) -> None:
        """Wait min(longest, first 2^attempt) seconds, at least what the site asks for; not after the last attempt."""
        patience, asked = self._patience, trouble.wait or 0.0
        if asked > patience.longest_wait_s:
            raise UserError(f"{self.url}: {trouble.reason}, asks to wait {asked:.0f} s")
        if attempt + 1 < patience.attempts:
            wait = max(asked, min(patience.longest_wait_s, patience.first_wait_s * 2**attempt))
            self._note(f"{self.url}: {trouble.reason}; trying again in {wait:.3g} s")
            time.sleep(wait)

    def _ask(self, method: str, path: str, body: Json | None = None) -> Any:
        """Return the JSON of one answer, None for a GET of what is not there; raises TryAgain or UserError."""
        headers = {"x-api-key": self._key, "accept": "application/json"}
        content = None
        if body is not None:
            headers["content-type"] = "application/json"
            content = json.dumps(body, allow_nan=False).encode()
        data, end = bytearray(), time.monotonic() + self._patience.timeout_s
        try:
            with self._http.stream(
                method, f"{self.url}/api/{path}", headers=headers, content=content
            ) as response:
                for part in response.iter_bytes():
                    data += part
                    if time.monotonic() > end:
                        raise TryAgain("time-out")
                    if len(data) > MAX_REPLY_BYTES:
                        raise TryAgain("a reply without end")
        except httpx.TransportError as error:
            raise TryAgain.after(error) from None
        except httpx.DecodingError:
            raise TryAgain("a reply that cannot be unpacked") from None
        text = data.decode("utf-8", "replace").replace(self._key, "***")
        return self._understood(response, text, method == "GET")

    def _understood(self, response: httpx.Response, text: str, reading: bool) -> Any:
        status = response.status_code
        if status == 404 and reading:
            return None
        try:
            body = json.loads(text)
        except (ValueError, RecursionError):
            body = ...
        if status == 200 and body is not ...:
            return body
        if passing(status) or status == 200:
            reason = "an answer that is no JSON" if status == 200 else f"HTTP {status}"
            raise TryAgain(reason, retry_after(response.headers))
        if status in (401, 403):
            raise UserError(f"{self.url}: HTTP {status}: the key in {KEY} is not accepted")
        if 300 <= status < 400:
            to = one_line(response.headers.get("location", "elsewhere"), 160)
            raise UserError(f"{self.url}: HTTP {status}: moved to {to}; give that address as --url")
        said = error_text(body)
        hint = "; give its name there with --model-id" if "model not found" in said.lower() else ""
        raise UserError(f"{self.url}: HTTP {status}{': ' + said if said else ''}{hint}")


def _objects(found: Json, key: str) -> list[Json]:
    """Return the objects in a list of an answer; none where it is no list."""
    listed = found.get(key)
    return (
        [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    )

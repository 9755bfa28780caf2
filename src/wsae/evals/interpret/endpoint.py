"""An OpenAI-compatible chat endpoint: concurrency, retries with back-off, and what an HTTP response means.

Nothing the server says is trusted: texts are cut to one line, control characters go, and the key is blotted out.
"""

import asyncio
import concurrent.futures
import datetime
import email.utils
import json
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx

from wsae.core.errors import UserError
from wsae.core.hub import key_from
from wsae.core.seeds import seed_for
from wsae.evals.config import LlmConfig
from wsae.evals.interpret.asking import (
    TOP_LOGPROBS,
    Answer,
    AnswerToken,
    Json,
    Llm,
    Request,
    one_line,
)

MAX_REPLY_BYTES = 1 << 24
"""A longer reply is cut off: no answer of ours needs a thousandth of it."""
_SECRET = 16
"""Characters of the shortest key that is kept out of answers."""
_SHOWN = 160
"""Characters of a server's message that are repeated."""


class TryAgain(Exception):
    """A passing trouble; `wait` is what the server asks for, if it does."""

    def __init__(self, reason: str, wait: float | None = None, may_cost: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.wait = reason, wait
        self.may_cost = may_cost
        """Whether the prompt may have been paid for: it counts as spent then."""

    @classmethod
    def after(cls, error: TimeoutError | httpx.TransportError) -> "TryAgain":
        """Return what a request that got no answer says."""
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return cls("cannot connect")
        if isinstance(error, TimeoutError | httpx.TimeoutException):
            return cls("time-out", may_cost=True)
        return cls(f"broken connection ({type(error).__name__})", may_cost=True)


def passing(status: int) -> bool:
    """Return whether a later request may fare better than one that was answered with this HTTP status."""
    return status in (408, 409, 425, 429) or status >= 500


class Endpoint(Llm):
    """A model behind an OpenAI-compatible `/chat/completions`."""

    def __init__(self, cfg: LlmConfig) -> None:
        super().__init__(cfg, cfg.model)
        self._key = key_from(cfg.key_env)
        self._resume_at = 0.0
        self._reached = False
        self._settled = asyncio.Event()

    def question(self, request: Request) -> Json:
        """Return host, model, messages and parameters."""
        return {"host": urlsplit(self.cfg.url).netloc, **self._body(request)}

    def answer_new(
        self, requests: Mapping[str, Request], done: Callable[[str, Answer], None]
    ) -> None:
        """Ask, `concurrency` requests at a time; in another thread where this one has a loop already (notebooks)."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            asyncio.run(self._answer_new(requests, done))
            return
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, self._answer_new(requests, done)).result()

    async def _answer_new(
        self, requests: Mapping[str, Request], done: Callable[[str, Answer], None]
    ) -> None:
        queue = iter(requests.items())
        self._settled = asyncio.Event()
        limits = httpx.Limits(max_connections=self.cfg.concurrency)
        secure = self.cfg.url.startswith("https")  # certificates take time to load
        async with httpx.AsyncClient(
            limits=limits, timeout=self.cfg.timeout_s, verify=secure
        ) as http:

            async def work() -> None:
                for key, request in queue:
                    done(key, await self._answer(http, key, request))

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self.cfg.concurrency, len(requests))):
                        group.create_task(work())
            except ExceptionGroup as errors:  # one is enough: they are mostly the same
                error: BaseException = errors
                while isinstance(error, BaseExceptionGroup):
                    error = error.exceptions[0]
                raise error from None

    async def _answer(self, http: httpx.AsyncClient, key: str, request: Request) -> Answer:
        """Try until there is an answer, a lasting failure, or no attempt left."""
        reason = ""
        estimate = request.estimated_tokens
        reserved = estimate + self._cap(request)
        for attempt in range(self.cfg.retries + 1):
            while not self.budget.take(reserved):
                if self.budget.closed:
                    state = "failed" if attempt else "not asked"
                    return Answer(state, reason=f"{reason}, then budget" if attempt else "budget")
                self._settled.clear()
                await self._settled.wait()
            spent = 0
            try:
                await asyncio.sleep(max(0.0, self._resume_at - time.monotonic()))
                answer = await self._exchange(http, request)
                if answer.state == "answered":
                    written = len(answer.tokens) or -(-len(answer.text.encode()) // 3)
                    answer = replace(  # what the endpoint did not count
                        answer,
                        prompt_tokens=answer.prompt_tokens or estimate,
                        completion_tokens=answer.completion_tokens or written,
                    )
                spent = answer.prompt_tokens + answer.completion_tokens
                if answer.prompt_tokens:  # paid for, empty or not
                    self.cache.save(key, self.question(request), answer)
                return answer
            except TryAgain as trouble:
                reason, spent = trouble.reason, estimate if trouble.may_cost else 0
                wait = self._wait(trouble, key, attempt)
            finally:
                self.budget.settle(reserved, spent)
                self._settled.set()
            if wait is None:
                return Answer("failed", reason=f"{reason}: asks for a longer wait than max_wait_s")
            if attempt < self.cfg.retries:
                await asyncio.sleep(wait)
        if not self._reached:
            raise UserError(
                f"{self.cfg.url}: {reason}, {self.cfg.retries + 1} times; is it running?"
            )
        return Answer("failed", reason=reason)

    def _wait(self, trouble: TryAgain, key: str, attempt: int) -> float | None:
        """Return seconds until the next attempt; None when the server asks for more than is allowed.

        w = min(max_wait, base 2^attempt) u, u uniform in [0.5, 1.5) and seeded; at least what the server asks for, and
        then all requests wait, for it is the account that is limited.
        """
        asked = trouble.wait or 0.0
        if asked > self.cfg.max_wait_s:
            return None
        self._resume_at = max(self._resume_at, time.monotonic() + asked)
        jitter = random.Random(seed_for(self.cfg.seed, "backoff", key, attempt)).uniform(0.5, 1.5)
        return max(asked, min(self.cfg.max_wait_s, self.cfg.backoff_s * 2**attempt) * jitter)

    async def _exchange(self, http: httpx.AsyncClient, request: Request) -> Answer:
        """Send a request once; raises TryAgain, or UserError when no request can succeed."""
        headers = {"content-type": "application/json", "accept": "application/json"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        content = json.dumps(self._body(request)).encode()
        data = bytearray()
        try:
            async with (
                asyncio.timeout(self.cfg.timeout_s),
                http.stream("POST", self.cfg.url, content=content, headers=headers) as response,
            ):
                async for part in response.aiter_bytes():
                    data += part
                    if len(data) > MAX_REPLY_BYTES:
                        break
        except (TimeoutError, httpx.TransportError) as error:
            raise TryAgain.after(error) from None
        except (httpx.InvalidURL, httpx.DecodingError) as error:
            raise UserError(f"{self.cfg.url}: {type(error).__name__}") from None
        self._reached = True
        text = data[:MAX_REPLY_BYTES].decode("utf-8", errors="replace").lstrip()
        # what servers without keys are given ("none", "x") is no secret, and a word of many answers
        text = text.replace(self._key, "***") if len(self._key) >= _SECRET else text
        return self._understood(response, text, request.logprobs)

    def _understood(self, response: httpx.Response, text: str, logprobs: bool) -> Answer:
        """Return the answer in a response, or a failure; raises TryAgain, or UserError."""
        done = response.status_code == 200
        if done and ("text/html" in response.headers.get("content-type", "") or text[:1] == "<"):
            raise UserError(
                f"{self.cfg.url}: answers with a web page, not as a chat endpoint; base URLs mostly end in /v1"
            )
        try:
            body = json.loads(text)
        except (ValueError, RecursionError):
            if done:
                raise TryAgain("not JSON", may_cost=True) from None
            body = None
        if not done:
            return self._refused(response, text, error_text(body))
        return self._read(body, logprobs)

    def _refused(self, response: httpx.Response, text: str, message: str) -> Answer:
        """Return a failure, whose repetition could not help; raises TryAgain, or UserError for what ends the run."""
        status, var = response.status_code, self.cfg.key_env
        where = f"{self.cfg.url}: HTTP {status}"
        if status in (401, 403):
            key = f"the key in {var} is not accepted" if self._key else f"no key in {var}"
            raise UserError(f"{where}: {key}; set that variable (or --key-variable)")
        if status == 404 and message:
            raise UserError(
                f"{where}: model {self.cfg.model!r} not found there, or a wrong address ({message})"
            )
        if status == 404:
            raise UserError(f"{where}: no such address; base URLs mostly end in /v1")
        if status == 402 or (status == 429 and "insufficient_quota" in text):
            raise UserError(f"{where}: nothing left on the account ({message})")
        if 300 <= status < 400:
            to = one_line(response.headers.get("location", "elsewhere"), _SHOWN)
            raise UserError(f"{where}: moved to {to}; give that address")
        if passing(status):
            raise TryAgain(f"HTTP {status}", retry_after(response.headers))
        return Answer("failed", reason=f"HTTP {status}: {message}" if message else f"HTTP {status}")

    def _read(self, body: object, logprobs: bool) -> Answer:
        """Return the answer in a reply; one that says what it cost was paid for, empty or not."""
        if not isinstance(body, dict):
            return Answer("failed", reason="an answer that is no JSON object")
        choice = _at(body, "choices", 0)
        content, tokens = _at(choice, "message", "content"), _tokens(choice)
        if not isinstance(choice, dict):
            said = error_text(body)
            answer = Answer("failed", reason=f"no choices: {said}" if said else "no choices")
        elif not isinstance(content, str) or not content.strip():
            answer = Answer("failed", reason="empty content")
        elif logprobs and not tokens:
            raise UserError(
                f"{self.cfg.url}: model {self.cfg.model!r} returns no log-probabilities; use --simulator json"
                " and no --probabilities"
            )
        else:
            finish = str(choice.get("finish_reason") or "")
            answer = Answer("answered", content, finish, tokens=tokens)
        counts = [_at(body, "usage", f"{kind}_tokens") for kind in ("prompt", "completion")]
        prompt, completion = (n if type(n) is int and n > 0 else 0 for n in counts)
        return replace(answer, prompt_tokens=prompt, completion_tokens=completion)

    def _cap(self, request: Request) -> int:
        return request.max_tokens + self.cfg.thinking_tokens

    def _body(self, request: Request) -> Json:
        messages = [message._asdict() for message in request.messages]
        out: Json = {"model": self.cfg.model, "messages": messages}
        out[self.cfg.cap_field] = self._cap(request)
        if self.cfg.temperature is not None:
            out["temperature"] = self.cfg.temperature
        if self.cfg.send_seed:
            out["seed"] = self.cfg.seed
        if request.logprobs:
            out |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        return out


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of a Retry-After header (a number or an HTTP date); None without a usable one."""
    text = headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            when = email.utils.parsedate_to_datetime(text)
        except ValueError:
            return None
        when = when if when.tzinfo else when.replace(tzinfo=datetime.UTC)
        seconds = (when - datetime.datetime.now(datetime.UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _at(value: Any, *path: str | int) -> Any:
    """Return what lies at a place of a JSON value; None where there is no such place."""
    for step in path:
        try:
            value = value[step]
        except (LookupError, TypeError):
            return None
    return value


def _tokens(choice: object) -> tuple[AnswerToken, ...]:
    """Return the answer's tokens; () unless every one has its text and finite-or-minus-infinite log-probabilities."""
    content, out = _at(choice, "logprobs", "content"), []
    for entry in content if isinstance(content, list) else []:
        others = _at(entry, "top_logprobs")
        top: dict[str, float] = {}
        for item in [*(others if isinstance(others, list) else []), entry]:
            text, value = _at(item, "token"), _at(item, "logprob")
            if not isinstance(text, str) or type(value) not in (int, float) or not value <= 1e-3:
                return ()
            top[text] = float(value)
        text, raw = entry["token"], _at(entry, "bytes")
        size = len(raw) if isinstance(raw, list) else len(text.encode(errors="replace"))
        out.append(AnswerToken(text, top, size))
    return tuple(out)


def error_text(body: object) -> str:
    """Return what a JSON error says, in one short line; "" for anything else (a page, say)."""
    found = body if isinstance(body, dict) else {}
    error = found.get("error", found.get("detail", found.get("message")))
    error = error.get("message", "") if isinstance(error, dict) else error
    return one_line(error, _SHOWN) if isinstance(error, str) else ""

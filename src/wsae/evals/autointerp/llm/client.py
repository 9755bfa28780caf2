"""An OpenAI-compatible chat endpoint: concurrency, retries with back-off, budgets, and answers kept on disk."""

import asyncio
import concurrent.futures
import json
import os
import random
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from wsae.core.errors import UserError
from wsae.core.files import digest
from wsae.core.progress import Progress, Tick, quiet
from wsae.core.seeds import seed_for
from wsae.evals.autointerp.llm.budget import Budget, estimated_tokens
from wsae.evals.autointerp.llm.cache import Cache
from wsae.evals.autointerp.llm.config import LlmConfig
from wsae.evals.autointerp.llm.reply import Response, TryAgain, read
from wsae.evals.autointerp.llm.types import Answer, Request

TOP_LOGPROBS = 20
"""Alternatives asked for at each token: the most that services give, and eleven numbers must be among them."""
MAX_REPLY_BYTES = 1 << 24
"""A longer reply is cut off: no answer of ours needs a thousandth of it."""
T = TypeVar("T")


class Endpoint:
    """A model behind an OpenAI-compatible `/chat/completions`."""

    def __init__(self, cfg: LlmConfig) -> None:
        self.cfg = cfg
        self.budget = Budget(cfg.max_requests, cfg.max_tokens)
        self._cache = Cache(Path(cfg.cache))
        self._key = _key(cfg.key_env)
        self._resume_at = 0.0
        self._reached = False

    @property
    def name(self) -> str:
        """The model's name at the endpoint."""
        return self.cfg.model

    def key(self, request: Request) -> str:
        """Return the content hash of a request: host, model, messages and parameters."""
        return digest(self._asked(request))

    def peek(self, request: Request) -> Answer | None:
        """Return the answer on disk, if there is one; asks nothing."""
        return self._cache.load(self.key(request))[0]

    def ask(
        self, requests: Sequence[Request], task: str = "ask", progress: Progress = quiet
    ) -> list[Answer]:
        """Return one answer per request, in order; equal requests are asked once.

        Raises UserError when none can succeed: wrong key, no such model, an address that is no chat endpoint.
        """
        keys = [self.key(request) for request in requests]
        unique = dict(zip(keys, requests, strict=True))
        with progress(task, len(unique), "requests") as tick:
            answers: dict[str, Answer] = {}
            damaged: dict[str, str] = {}
            for key in unique:
                found, damaged[key] = self._cache.load(key)
                if found:
                    answers[key] = found
                    tick(1)
            todo = [
                (key, request, damaged[key])
                for key, request in unique.items()
                if key not in answers
            ]
            if todo:
                _run(self._ask(todo, answers, tick))
        return shared(keys, answers)

    async def _ask(
        self, todo: list[tuple[str, Request, str]], answers: dict[str, Answer], tick: Tick
    ) -> None:
        queue = iter(todo)
        self.budget.begin()
        options = {
            "limits": httpx.Limits(max_connections=self.cfg.concurrency),
            "timeout": self.cfg.timeout_s,
            "verify": self.cfg.url.startswith("https"),  # certificates take time to load
        }
        async with httpx.AsyncClient(**options) as http:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self.cfg.concurrency, len(todo))):
                        group.create_task(self._work(http, queue, answers, tick))
            except ExceptionGroup as errors:  # one is enough: they are mostly the same
                raise _leaf(errors) from None

    async def _work(
        self,
        http: httpx.AsyncClient,
        queue: Iterator[tuple[str, Request, str]],
        answers: dict[str, Answer],
        tick: Tick,
    ) -> None:
        for key, request, damaged in queue:
            answer = await self._answer(http, key, request)
            answers[key] = replace(answer, damaged=damaged)
            tick(1)

    async def _answer(self, http: httpx.AsyncClient, key: str, request: Request) -> Answer:
        """Try until there is an answer, a lasting failure, or no attempt left."""
        reason = ""
        for attempt in range(self.cfg.retries + 1):
            estimate = estimated_tokens(request)
            reserved = estimate + self._cap(request)
            if not await self.budget.reserve(reserved):
                state = "failed" if attempt else "not asked"
                return Answer(state, reason=f"{reason}, then budget" if attempt else "budget")
            spent = 0
            try:
                await asyncio.sleep(max(0.0, self._resume_at - time.monotonic()))
                answer = await self._exchange(http, request)
                answer, spent = _counted(answer, estimate)
                if answer.state == "answered" or answer.prompt_tokens:
                    self._cache.save(key, self._asked(request), answer)
                return answer
            except TryAgain as trouble:
                reason, spent = trouble.reason, estimate if trouble.may_cost else 0
                wait = self._wait(trouble, key, attempt)
            finally:
                await self.budget.release(reserved, spent)
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
        try:
            async with asyncio.timeout(self.cfg.timeout_s):
                response = await self._post(http, request)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise TryAgain("cannot connect") from None
        except (TimeoutError, httpx.TimeoutException):
            raise TryAgain("time-out", may_cost=True) from None
        except httpx.TransportError as error:
            raise TryAgain(f"broken connection ({type(error).__name__})", may_cost=True) from None
        except (httpx.InvalidURL, httpx.DecodingError) as error:
            raise UserError(f"{self.cfg.url}: {type(error).__name__}") from None
        self._reached = True
        return read(response, self.cfg, bool(self._key), request.logprobs)

    async def _post(self, http: httpx.AsyncClient, request: Request) -> Response:
        headers = {"content-type": "application/json", "accept": "application/json"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        content = json.dumps(self._body(request)).encode()
        async with http.stream("POST", self.cfg.url, content=content, headers=headers) as response:
            data = bytearray()
            async for part in response.aiter_bytes():
                data += part
                if len(data) > MAX_REPLY_BYTES:
                    break
            text = data[:MAX_REPLY_BYTES].decode("utf-8", errors="replace")
            known = {name.lower(): value for name, value in response.headers.items()}
            return Response(response.status_code, known, self._blotted(text))

    def _blotted(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _cap(self, request: Request) -> int:
        return request.max_tokens + self.cfg.thinking_tokens

    def _parameters(self, request: Request) -> dict[str, Any]:
        out: dict[str, Any] = {self.cfg.cap_field: self._cap(request)}
        if self.cfg.temperature is not None:
            out["temperature"] = self.cfg.temperature
        if self.cfg.send_seed:
            out["seed"] = self.cfg.seed
        if request.logprobs:
            out |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        return out

    def _body(self, request: Request) -> dict[str, Any]:
        messages = [message._asdict() for message in request.messages]
        return {"model": self.cfg.model, "messages": messages, **self._parameters(request)}

    def _asked(self, request: Request) -> dict[str, Any]:
        return {"host": urlsplit(self.cfg.url).netloc, **self._body(request)}


def shared(keys: Sequence[str], answers: dict[str, Answer]) -> list[Answer]:
    """Return the answers in the order of the keys; from the second use on they cost nothing."""
    out, seen = [], set()
    for key in keys:
        answer = answers[key]
        if key in seen and answer.state == "answered":
            answer = replace(answer, cached=True)
        out.append(answer)
        seen.add(key)
    return out


def _key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable():
        raise UserError(f"{variable}: holds characters that no key has; set it again")
    return key


def _counted(answer: Answer, estimate: int) -> tuple[Answer, int]:
    """Fill in what the endpoint did not count; return the answer and its tokens."""
    if answer.state == "answered":
        written = len(answer.tokens) or -(-len(answer.text.encode()) // 3)
        answer = answer.counted(
            answer.prompt_tokens or estimate, answer.completion_tokens or written
        )
    return answer, answer.prompt_tokens + answer.completion_tokens


def _leaf(error: BaseException) -> BaseException:
    return _leaf(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end, in another thread where this one has a loop already (notebooks)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()

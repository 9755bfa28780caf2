"""An OpenAI-compatible chat endpoint: concurrency, retries with back-off, budgets, and answers kept on disk."""

import asyncio
import concurrent.futures
import datetime
import email.utils
import json
import math
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import httpx

from wsae.core.errors import UserError
from wsae.core.files import LINE_BYTES, Json, as_user_error, digest, opened, parse_json, write_json
from wsae.core.progress import Progress, Tick, quiet
from wsae.core.seeds import seed_for
from wsae.evals.autointerp.llm.config import LlmConfig
from wsae.evals.autointerp.llm.types import Answer, AnswerTally, AnswerToken, Llm, Request, one_line

# Requests asked, answers parsed strictly, every outcome counted.

NO_EXPLANATION = "no explanation"
_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
T = TypeVar("T")


class Unparsed(Exception):
    """An answer that is not of the form asked for; the message says how."""


def ask_all(
    llm: Llm,
    requests: Sequence[Request | None],
    parse: Callable[[int, Answer], T],
    task: str,
    progress: Progress = quiet,
) -> tuple[list[T | None], AnswerTally]:
    """Return what `parse` makes of each answer (None where there is none) and the outcomes, counted.

    A request that is None is not asked (there was no explanation). `parse` gets the request's number and raises
    Unparsed.
    """
    asked = [request for request in requests if request is not None]
    answers = iter(llm.ask(asked, task, progress))
    results: list[T | None] = []
    reasons: Counter[str] = Counter()
    given: list[Answer] = []
    not_asked = 0
    for number, request in enumerate(requests):
        answer = Answer("not asked", reason=NO_EXPLANATION) if request is None else next(answers)
        given.append(answer)
        result, reason = _parsed(answer, number, parse)
        results.append(result)
        not_asked += answer.state == "not asked"
        if reason is not None:
            reasons[reason] += 1
    return results, _tally(given, not_asked, reasons)


def _parsed(
    answer: Answer, number: int, parse: Callable[[int, Answer], T]
) -> tuple[T | None, str | None]:
    """Return the result and no reason, or no result and why."""
    if answer.state != "answered":
        return None, answer.reason
    try:
        return parse(number, answer), None
    except Unparsed as error:
        return None, f"unparsed: {error}"


def _tally(answers: list[Answer], not_asked: int, reasons: Counter[str]) -> AnswerTally:
    lost = sum(reasons.values())
    paid = [answer for answer in answers if not answer.cached]
    return AnswerTally(
        requested=len(answers),
        parsed=len(answers) - lost,
        failed=lost - not_asked,
        not_asked=not_asked,
        cached=len(answers) - len(paid),
        prompt_tokens=sum(answer.prompt_tokens for answer in paid),
        completion_tokens=sum(answer.completion_tokens for answer in paid),
        damaged=tuple(sorted({answer.damaged for answer in answers if answer.damaged})),
        reasons=dict(reasons),
    )


def said(answer: Answer) -> str:
    """Return an answer's text without the thoughts that some models put before it."""
    return _THOUGHTS.sub("", answer.text).strip()


# A hard stop on requests and tokens: what could exceed it is not sent.

TOKENS_PER_BYTE = 1 / 3
"""Prompt tokens per byte of UTF-8 where nobody counted: English has 1/4, Chinese 1/3, so this errs to the safe side."""
TOKENS_PER_MESSAGE = 8
"""What chat templates add around a turn."""


def estimated_tokens(request: Request) -> int:
    """Return about how many tokens a prompt has: a third of its bytes and 8 per turn."""
    size = sum(len(message.content.encode()) for message in request.messages)
    return round(size * TOKENS_PER_BYTE) + TOKENS_PER_MESSAGE * len(request.messages)


class Budget:
    """What a run has spent. A request is sent only if all that is spent and under way still fits with it.

    While requests are under way their estimates are held back; a request that does not fit waits for them to settle
    (real answers are shorter than their limits). If it still does not fit, the budget closes for good: which requests
    were left out does not depend on their size.
    """

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self.requests = self.tokens = 0
        self.closed = False
        self._held = self._under_way = 0
        self._settled: asyncio.Condition | None = None

    def begin(self) -> None:
        """Start counting in a new event loop; nothing is under way."""
        self._held = self._under_way = 0
        self._settled = asyncio.Condition()

    def take(self, tokens: int) -> bool:
        """Reserve a request of so many tokens if it fits; `settle` must follow."""
        if self.closed or not self._fits(tokens):
            return False
        self.requests += 1
        self._under_way += 1
        self._held += tokens
        return True

    def settle(self, reserved: int, spent: int) -> None:
        """Replace a reservation by what was spent."""
        self._under_way -= 1
        self._held -= reserved
        self.tokens += spent

    async def reserve(self, tokens: int) -> bool:
        """Wait until a request fits or cannot fit any more; return whether it was reserved."""
        assert self._settled is not None, "begin() comes first"
        async with self._settled:
            while not self.take(tokens):
                if self.closed or not self._under_way or self.requests >= self.max_requests:
                    self.closed = True
                    return False
                await self._settled.wait()
            return True

    async def release(self, reserved: int, spent: int) -> None:
        """Settle, and wake those who wait."""
        assert self._settled is not None, "begin() comes first"
        async with self._settled:
            self.settle(reserved, spent)
            self._settled.notify_all()

    def _fits(self, tokens: int) -> bool:
        room = self.max_tokens - self.tokens - self._held
        return self.requests < self.max_requests and tokens <= room


# Answers on disk under the content hash of what was asked; no key, no header, no address beyond the
# host.
#
# One file per answer, written atomically as soon as the answer is there, so that a killed run
# repeats no paid call.


class Cache:
    """A directory of answers; safe to share between processes."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, key: str) -> Path:
        """Return where the answer to a request lies."""
        return self.root / key[:2] / f"{key}.json"

    def load(self, key: str) -> tuple[Answer | None, str]:
        """Return the answer, or None and the name of the file if it is damaged ("" if there is none)."""
        path = self.path(key)
        try:
            with opened(path) as file:
                data = parse_json(file.read(LINE_BYTES))
        except FileNotFoundError:
            return None, ""
        except (ValueError, RecursionError):
            return None, str(path)
        except OSError as error:
            raise as_user_error(error, path) from error
        answer = _checked(data, key)
        return answer, "" if answer else str(path)

    def save(self, key: str, asked: Json, answer: Answer) -> None:
        """Write an answer beside what was asked, flushed to disk."""
        reply = _stored(answer)
        sealed = {"key": key, "asked": asked, "reply": reply, "sha256": digest([asked, reply])}
        write_json(self.path(key), sealed)


def _stored(answer: Answer) -> Json:
    fields = asdict(answer)
    kept = ("state", "text", "finish", "reason", "prompt_tokens", "completion_tokens")
    tokens = [[*token] for token in answer.tokens]
    return {**{name: fields[name] for name in kept}, "tokens": tokens, "values": [*answer.values]}


def _checked(data: object, key: str) -> Answer | None:
    """Return the answer of a file's content; None unless hashes and shape are what `save` wrote."""
    if not isinstance(data, dict) or data.get("key") != key or digest(data.get("asked")) != key:
        return None
    reply = data.get("reply")
    if not isinstance(reply, dict) or digest([data["asked"], reply]) != data.get("sha256"):
        return None
    try:
        tokens = tuple(AnswerToken(*token) for token in reply["tokens"])
        rest = {name: value for name, value in reply.items() if name not in ("tokens", "values")}
        return Answer(**rest, tokens=tokens, values=tuple(reply["values"]), cached=True)
    except (KeyError, TypeError):  # whole, but of another form: it is named, and asked again
        return None


# What an HTTP response means: an answer, a reason to try again, a failed request, or the end of the
# run.
#
# Nothing the server says is trusted: texts are cut to one line, control characters go, and the key
# is blotted out.

_SHOWN = 160
"""Characters of a server's message that are repeated."""


class Response(NamedTuple):
    """Status, headers (lower-case names) and text, with the key blotted out."""

    status: int
    headers: Mapping[str, str]
    text: str


class TryAgain(Exception):
    """A passing trouble; `wait` is what the server asks for, if it does."""

    def __init__(self, reason: str, wait: float | None = None, may_cost: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.wait = reason, wait
        self.may_cost = may_cost
        """Whether the prompt may have been paid for: it counts as spent then."""


def read(response: Response, cfg: LlmConfig, has_key: bool, logprobs: bool) -> Answer:
    """Return the answer in a response; raises TryAgain, or UserError when no request can succeed.

    An answer that says what it cost is one that was paid for, empty or not.
    """
    status = response.status
    if status == 200:
        return _answer(response, cfg, logprobs)
    message = _message(response)
    _refuse(response, cfg, has_key, message)
    if status in (408, 409, 425, 429) or status >= 500:
        raise TryAgain(f"HTTP {status}", retry_after(response.headers))
    return Answer("failed", reason=f"HTTP {status}: {message}" if message else f"HTTP {status}")


def _refuse(response: Response, cfg: LlmConfig, has_key: bool, message: str) -> None:
    """Raise UserError for what no repetition fixes."""
    status = response.status
    if status in (401, 403):
        key = f"the key in {cfg.key_env} is not accepted" if has_key else f"no key in {cfg.key_env}"
        raise UserError(f"{cfg.url}: HTTP {status}: {key}; set that variable (or --key-variable)")
    if status == 404:
        if message:
            raise UserError(
                f"{cfg.url}: HTTP 404: model {cfg.model!r} not found there, or a wrong address ({message})"
            )
        raise UserError(f"{cfg.url}: HTTP 404: no such address; base URLs mostly end in /v1")
    if status == 402 or (status == 429 and "insufficient_quota" in response.text):
        raise UserError(f"{cfg.url}: HTTP {status}: nothing left on the account ({message})")
    if 300 <= status < 400:
        to = one_line(response.headers.get("location", "elsewhere"), _SHOWN)
        raise UserError(f"{cfg.url}: HTTP {status}: moved to {to}; give that address")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of a Retry-After header (a number or an HTTP date); None without a usable one."""
    text = headers.get("retry-after", "").strip()
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        return _until(text)
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _until(date: str) -> float | None:
    try:
        when = email.utils.parsedate_to_datetime(date)
    except ValueError:
        return None
    when = when if when.tzinfo else when.replace(tzinfo=datetime.UTC)
    return max(0.0, (when - datetime.datetime.now(datetime.UTC)).total_seconds())


def _answer(response: Response, cfg: LlmConfig, logprobs: bool) -> Answer:
    text = response.text.lstrip()
    if "text/html" in response.headers.get("content-type", "") or text[:1] == "<":
        raise UserError(
            f"{cfg.url}: answers with a web page, not as a chat endpoint; base URLs mostly end in /v1"
        )
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        raise TryAgain("not JSON", may_cost=True) from None
    if not isinstance(body, dict):
        return Answer("failed", reason="an answer that is no JSON object")
    return _chosen(body, cfg, logprobs).counted(_count(body, "prompt"), _count(body, "completion"))


def _chosen(body: dict[str, Any], cfg: LlmConfig, logprobs: bool) -> Answer:
    choice = _first(body.get("choices"))
    if choice is None:
        said = _error_text(body)
        return Answer("failed", reason=f"no choices: {said}" if said else "no choices")
    message = choice.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, str) or not content.strip():
        return Answer("failed", reason="empty content")
    tokens = _tokens(choice.get("logprobs"))
    if logprobs and not tokens:
        raise UserError(
            f"{cfg.url}: model {cfg.model!r} returns no log-probabilities; use --simulator json"
            " and no --probabilities"
        )
    return Answer("answered", content, str(choice.get("finish_reason") or ""), tokens=tokens)


def _first(choices: object) -> dict[str, Any] | None:
    found = choices[0] if isinstance(choices, list) and choices else None
    return found if isinstance(found, dict) else None


def _count(body: dict[str, Any], kind: str) -> int:
    usage = body.get("usage")
    n = usage.get(f"{kind}_tokens") if isinstance(usage, dict) else None
    return n if isinstance(n, int) and not isinstance(n, bool) and n > 0 else 0


def _tokens(logprobs: object) -> tuple[AnswerToken, ...]:
    """Return the answer's tokens; () unless every one has its text and finite-or-minus-infinite log-probabilities."""
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    out = []
    for entry in content if isinstance(content, list) else []:
        if not isinstance(entry, dict):
            return ()
        alternatives = entry.get("top_logprobs")
        listed = [*(alternatives if isinstance(alternatives, list) else []), entry]
        if not all(_is_logprob(item) for item in listed):
            return ()
        top = {item["token"]: float(item["logprob"]) for item in listed}
        text, raw = entry["token"], entry.get("bytes")
        size = len(raw) if isinstance(raw, list) else len(text.encode(errors="replace"))
        out.append(AnswerToken(text, top, size))
    return tuple(out)


def _is_logprob(item: object) -> bool:
    if not isinstance(item, dict) or not isinstance(item.get("token"), str):
        return False
    value = item.get("logprob")
    return isinstance(value, int | float) and not isinstance(value, bool) and value <= 1e-3


def _message(response: Response) -> str:
    """Return what a JSON error says, in one short line; "" for anything else (a page, say)."""
    try:
        body = json.loads(response.text)
    except (ValueError, RecursionError):
        return ""
    return _error_text(body) if isinstance(body, dict) else ""


def _error_text(body: dict[str, Any]) -> str:
    error = body.get("error", body.get("detail", body.get("message")))
    if isinstance(error, dict):
        error = error.get("message", "")
    return one_line(error, _SHOWN) if isinstance(error, str) else ""


TOP_LOGPROBS = 20
"""Alternatives asked for at each token: the most that services give, and eleven numbers must be among them."""
MAX_REPLY_BYTES = 1 << 24
"""A longer reply is cut off: no answer of ours needs a thousandth of it."""


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

"""What an HTTP response means: an answer, a reason to try again, a failed request, or the end of the run.

Nothing the server says is trusted: texts are cut to one line, control characters go, and the key is blotted out.
"""

import datetime
import email.utils
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from wsae.core.errors import UserError
from wsae.evals.autointerp.llm.config import LlmConfig
from wsae.evals.autointerp.llm.texts import one_line
from wsae.evals.autointerp.llm.types import Answer, Token

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
    """Raise UserError for what no repetition mends."""
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


def _tokens(logprobs: object) -> tuple[Token, ...]:
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
        out.append(Token(text, top, size))
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

"""What is asked of a language model and what comes back: prompts, budget, answers kept on disk, outcomes counted."""

import functools
import math
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from wsae.core.files import LINE_BYTES, Json, as_user_error, digest, opened, parse_json, write_json
from wsae.core.progress import Progress, quiet
from wsae.evals.config import LlmConfig

NO_EXPLANATION = "no explanation"
TOKENS_PER_BYTE = 1 / 3
"""Prompt tokens per byte of UTF-8 where nobody counted: English has 1/4, Chinese 1/3, so this errs to the safe side."""
TOKENS_PER_MESSAGE = 8
"""What chat templates add around a turn."""
TOP_LOGPROBS = 20
"""Alternatives asked for at each token: the most that services give, and eleven numbers must be among them."""
_THOUGHTS = re.compile(r"\A(?:.*?</think>|\s*<think>.*)", re.DOTALL)
"""Some chat templates open thoughts in the prompt, and some thoughts are cut off before they end."""
T = TypeVar("T")


_GONE = "\u2426"
_SIGNS = {
    "<": "\u2039",
    ">": "\u203a",
    "\n": "\u23ce",
    "\t": "\u21e5",
    "\u200c": "\u200c",
    "\u200d": "\u200d",
}
_MARKER = re.compile(r"\[(?=\W*(?:EXPLANATION|INST|/INST|SYS|RESPONSE)\b)", re.IGNORECASE)
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def harmless(text: str) -> str:
    """Return a text of the same length that imitates no marker and hides nothing.

    `<` and `>` become U+2039 and U+203A, since `<<` and `>>` mark tokens and chat templates write their own markers
    between angle brackets; the bracket that opens `[EXPLANATION]`, `[INST]` and the like, also across tokens, U+27E6;
    newline, tab and other control characters visible signs, so that a text cannot begin a line of the prompt; direction
    marks, invisible, tag, private and unassigned characters U+2426. The joiners U+200C and U+200D stay: scripts and
    emoji need them. A text that gives orders stays readable as such; the prompts say that texts are data.
    """
    return _MARKER.sub("\u27e6", text.translate(_SIGN_OF))


class _SignOf(dict[int, str]):
    """What stands in a character's place, by code point; each is looked up once."""

    def __missing__(self, code: int) -> str:
        hidden = unicodedata.category(chr(code)) in _HIDDEN
        self[code] = chr(0x2400 + code) if code < 32 else _GONE if hidden else chr(code)
        return self[code]


_SIGN_OF = _SignOf({ord(char): sign for char, sign in _SIGNS.items()})


def harmless_tokens(tokens: Sequence[str]) -> list[str]:
    """Return tokens made harmless together: markers that span tokens are found too."""
    whole, out, start = harmless("".join(tokens)), [], 0
    for token in tokens:
        out.append(whole[start : start + len(token)])
        start += len(token)
    return out


def one_line(text: str, limit: int) -> str:
    """Return a text without control characters or line breaks, at most `limit` characters."""
    line = harmless(" ".join(text.split()))
    return line if len(line) <= limit else line[: limit - 3] + "..."


def marked(tokens: Sequence[str], marks: Sequence[bool]) -> str:
    """Join harmless tokens, each run of marked ones between << and >>."""
    out, inside = [], False
    for token, mark in zip(tokens, marks, strict=True):
        if mark != inside:
            out.append("<<" if mark else ">>")
            inside = mark
        out.append(token)
    return "".join(out) + (">>" if inside else "")


class ChatMessage(NamedTuple):
    """One turn of a conversation."""

    role: str
    """"system", "user" or "assistant"."""
    content: str


Prompt = Literal["explain", "detection", "fuzzing", "simulation", "simulation_json"]
_TURN = re.compile(r"^@(system|user|assistant)\n", re.MULTILINE)
_NAME = re.compile(r"\{\{(\w+)\}\}")


@functools.cache
def turns(prompt: Prompt) -> tuple[ChatMessage, ...]:
    """Return a prompt's turns, unfilled."""
    file = resources.files("wsae.evals.interpret") / "prompts" / f"{prompt}.txt"
    parts = _TURN.split(file.read_text(encoding="utf-8"))[1:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return tuple(ChatMessage(role, text.rstrip("\n")) for role, text in pairs)


def filled(prompt: Prompt, **texts: str) -> tuple[ChatMessage, ...]:
    """Return a prompt with every {{name}} replaced at once: braces inside the texts are left alone."""
    return tuple(
        ChatMessage(turn.role, _NAME.sub(lambda name: texts[name[1]], turn.content))
        for turn in turns(prompt)
    )


@dataclass(frozen=True)
class Request:
    """A conversation that the model continues."""

    messages: tuple[ChatMessage, ...]
    max_tokens: int
    """Limit of the answer."""
    expected_tokens: int
    """How long a good answer is, for estimates."""
    logprobs: bool = False
    """Whether the alternatives at each token of the answer are wanted."""
    slots: tuple[str, ...] = ()
    """What an answer with a number 0-10 after each of these pieces would hold: a local model reads the expected numbers
    from it in one pass instead of writing (endpoints cannot, and write)."""

    @property
    def estimated_tokens(self) -> int:
        """About how many tokens the prompt has: a third of its bytes and 8 per turn."""
        size = sum(len(message.content.encode()) for message in self.messages)
        return round(size * TOKENS_PER_BYTE) + TOKENS_PER_MESSAGE * len(self.messages)


class AnswerToken(NamedTuple):
    """A token of an answer and the log-probabilities of the likeliest at its place, itself included."""

    text: str
    top: dict[str, float]
    size: int
    """Bytes of the answer's UTF-8: a token may be part of a character, which its text cannot say."""

    def mass(self, symbols: Sequence[str]) -> dict[str, float]:
        """Return the probability of each symbol, whatever spaces are around it."""
        out = dict.fromkeys(symbols, 0.0)
        for text, logprob in self.top.items():
            if text.strip() in out:
                out[text.strip()] += math.exp(logprob)
        return out


@dataclass(frozen=True)
class Answer:
    """What became of one request."""

    state: Literal["answered", "failed", "not asked"]
    text: str = ""
    finish: str = ""
    """Why it ended ("stop", "length", ...), as far as the endpoint says."""
    reason: str = ""
    """Why there is none."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tokens: tuple[AnswerToken, ...] = ()
    values: tuple[float, ...] = ()
    """Expected numbers at the request's slots (local models)."""
    cached: bool = False
    damaged: str = ""
    """Name of the damaged cache file that made asking again necessary."""

    @property
    def said(self) -> str:
        """The text without the thoughts that some models put before it."""
        return _THOUGHTS.sub("", self.text).strip()


class Budget:
    """A hard stop on what a run spends: a request is sent only if all that is spent and under way still fits with it.

    While requests are under way their estimates are held back, since real answers are shorter than their limits. Once
    closed nothing is sent any more: which requests were left out does not depend on their size.
    """

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self.requests = self.tokens = self.under_way = 0
        self.closed = False
        self._held = 0

    def take(self, tokens: int) -> bool:
        """Reserve a request of so many tokens if it fits; `settle` must follow. Closes where none will ever fit."""
        room = self.max_tokens - self.tokens - self._held
        fits = self.requests < self.max_requests and tokens <= room
        if self.closed or not fits:
            self.closed |= not self.under_way or self.requests >= self.max_requests
            return False
        self.requests += 1
        self.under_way += 1
        self._held += tokens
        return True

    def settle(self, reserved: int, spent: int) -> None:
        """Replace a reservation by what was spent."""
        self.under_way -= 1
        self._held -= reserved
        self.tokens += spent


class Cache:
    """Answers on disk under the content hash of what was asked; safe to share between processes.

    One file per answer, written atomically as soon as it is there: a killed run repeats no paid call. No key, no header
    and no address beyond the host is written.
    """

    _kept = ("state", "text", "finish", "reason", "prompt_tokens", "completion_tokens")

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
            asked, reply = data["asked"], data["reply"]
            whole = data["key"] == key == digest(asked)
            if not whole or data["sha256"] != digest([asked, reply]):
                return None, str(path)
            tokens = tuple(AnswerToken(*token) for token in reply.pop("tokens"))
            values = tuple(reply.pop("values"))
            return Answer(**reply, tokens=tokens, values=values, cached=True), ""
        except FileNotFoundError:
            return None, ""
        except OSError as error:
            raise as_user_error(error, path) from error
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            return None, str(path)  # damaged, or whole but of another form: named, and asked again

    def save(self, key: str, asked: Json, answer: Answer) -> None:
        """Write an answer beside what was asked, flushed to disk."""
        reply = {name: getattr(answer, name) for name in self._kept}
        reply |= {"tokens": [[*token] for token in answer.tokens], "values": [*answer.values]}
        sealed = {"key": key, "asked": asked, "reply": reply, "sha256": digest([asked, reply])}
        write_json(self.path(key), sealed)


class Llm(ABC):
    """A language model that answers requests; a killed run's answers are found again on disk."""

    def __init__(self, cfg: LlmConfig, name: str) -> None:
        self.cfg = cfg
        self.name = name
        """Which model: belongs beside every score."""
        self.budget = Budget(cfg.max_requests, cfg.max_tokens)
        self.cache = Cache(Path(cfg.cache))

    @abstractmethod
    def question(self, request: Request) -> Json:
        """Return all that the answer to a request depends on."""

    @abstractmethod
    def answer_new(
        self, requests: Mapping[str, Request], done: Callable[[str, Answer], None]
    ) -> None:
        """Answer requests (by key) that are not on disk, saving what was paid for; call `done` with each answer."""

    def key(self, request: Request) -> str:
        """Return the content hash of a request."""
        return digest(self.question(request))

    def peek(self, request: Request) -> Answer | None:
        """Return the answer on disk, if there is one; asks nothing."""
        return self.cache.load(self.key(request))[0]

    def ask(
        self, requests: Sequence[Request], task: str = "ask", progress: Progress = quiet
    ) -> list[Answer]:
        """Return one answer per request, in order; equal requests are asked once, and then cost nothing.

        Raises UserError when none can come: wrong key, no such model, an address that is no chat endpoint.
        """
        keys = [self.key(request) for request in requests]
        unique = dict(zip(keys, requests, strict=True))
        answers: dict[str, Answer] = {}
        damaged: dict[str, str] = {}
        with progress(task, len(unique), "requests") as tick:

            def done(key: str, answer: Answer) -> None:
                answers[key] = replace(answer, damaged=damaged.get(key, ""))
                tick(1)

            for key in unique:
                found, where = self.cache.load(key)
                if found is None:
                    damaged[key] = where
                else:
                    done(key, found)
            if damaged:
                self.answer_new({key: unique[key] for key in damaged}, done)
        out = []
        for key in keys:
            out.append(answers[key])
            if out[-1].state == "answered":
                answers[key] = replace(out[-1], cached=True)
        return out


@dataclass(frozen=True)
class AnswerTally:
    """Outcomes of some requests; requested = parsed + failed + not_asked, always."""

    requested: int = 0
    parsed: int = 0
    """Answers of the form that was asked for."""
    failed: int = 0
    """Asked, but no answer came or it could not be parsed."""
    not_asked: int = 0
    """Left out for the budget or for want of an explanation."""
    cached: int = 0
    """Requests answered from disk, parsed or not."""
    prompt_tokens: int = 0
    """Paid in this run: answers from disk cost nothing."""
    completion_tokens: int = 0
    damaged: list[str] = field(default_factory=list)
    """Cache files that were damaged and asked again."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Why requests failed or were not asked -> how many."""

    def __post_init__(self) -> None:
        assert self.requested == self.parsed + self.failed + self.not_asked, self
        assert sum(self.reasons.values()) == self.failed + self.not_asked, self


class Unparsed(Exception):
    """An answer that is not of the form asked for; the message says how."""


def requests_about(
    items: Sequence[Any], explanations: Mapping[int, str], build: Callable[[Any, str], Request]
) -> list[Request | None]:
    """Return the request about each item with a `latent`; None where that latent has no explanation."""
    return [
        build(item, explanations[item.latent]) if item.latent in explanations else None
        for item in items
    ]


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
    came = iter(llm.ask([request for request in requests if request is not None], task, progress))
    lacking = Answer("not asked", reason=NO_EXPLANATION)
    answers = [lacking if request is None else next(came) for request in requests]
    results: list[T | None] = []
    reasons: list[str] = []
    for number, answer in enumerate(answers):
        result = None
        if answer.state != "answered":
            reasons.append(answer.reason)
        else:
            try:
                result = parse(number, answer)
            except Unparsed as error:
                reasons.append(f"unparsed: {error}")
        results.append(result)
    not_asked = sum(answer.state == "not asked" for answer in answers)
    paid = [answer for answer in answers if not answer.cached]
    return results, AnswerTally(
        requested=len(answers),
        parsed=len(answers) - len(reasons),
        failed=len(reasons) - not_asked,
        not_asked=not_asked,
        cached=len(answers) - len(paid),
        prompt_tokens=sum(answer.prompt_tokens for answer in paid),
        completion_tokens=sum(answer.completion_tokens for answer in paid),
        damaged=sorted({answer.damaged for answer in answers if answer.damaged}),
        reasons=dict(Counter(reasons)),
    )

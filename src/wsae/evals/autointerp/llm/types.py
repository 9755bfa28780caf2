"""What is asked of a language model, what comes back, and how the outcomes are counted."""

import functools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from wsae.core.progress import Progress, quiet
from wsae.evals.autointerp.llm.config import LlmConfig

# Texts of corpora and models made harmless inside prompts: one character for one, so token
# boundaries survive.
#
# What is replaced (the prompts say so): `<` and `>` by U+2039 and U+203A, since `<<` and `>>` mark
# tokens and chat templates write their own markers between angle brackets; the bracket that opens
# `[EXPLANATION]`, `[INST]` and the like, also across tokens, by U+27E6; newline, tab and other
# control characters by visible signs, so that a text cannot begin a line of the prompt; direction
# marks, invisible, tag, private and unassigned characters by U+2426. The joiners U+200C and U+200D
# stay: scripts and emoji need them. A text that gives orders stays readable as such; the prompts
# say that texts are data.

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


def _sign(char: str) -> str:
    if char in _SIGNS:
        return _SIGNS[char]
    if char < " ":
        return chr(0x2400 + ord(char))
    return _GONE if unicodedata.category(char) in _HIDDEN else char


def harmless(text: str) -> str:
    """Return a text of the same length that imitates no marker and hides nothing."""
    return _MARKER.sub("\u27e6", "".join(map(_sign, text)))


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


Role = Literal["system", "user", "assistant"]


class ChatMessage(NamedTuple):
    """One turn of a conversation."""

    role: Role
    content: str


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


class AnswerToken(NamedTuple):
    """A token of an answer and the log-probabilities of the likeliest at its place, itself included."""

    text: str
    top: dict[str, float]
    size: int
    """Bytes of the answer's UTF-8: a token may be part of a character, which its text cannot say."""


@dataclass(frozen=True)
class Answer:
    """What became of one request."""

    state: Literal["answered", "failed", "not asked"]
    text: str = ""
    finish: str = ""
    """Why it ended ("stop", "length", ...), as far as the endpoint says."""
    reason: str = ""
    """Why there is none."""
    tokens: tuple[AnswerToken, ...] = ()
    values: tuple[float, ...] = ()
    """Expected numbers at the request's slots (local models)."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: bool = False
    damaged: str = ""
    """Name of the damaged cache file that made asking again necessary."""

    def counted(self, prompt_tokens: int, completion_tokens: int) -> "Answer":
        """Return it with what it cost."""
        return replace(self, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)


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
    damaged: tuple[str, ...] = ()
    """Cache files that were damaged and asked again."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Why requests failed or were not asked -> how many."""

    def __post_init__(self) -> None:
        assert self.requested == self.parsed + self.failed + self.not_asked, self
        assert sum(self.reasons.values()) == self.failed + self.not_asked, self

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens paid in this run."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: "AnswerTally") -> "AnswerTally":
        reasons = dict(self.reasons)
        for reason, n in other.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + n
        return AnswerTally(
            self.requested + other.requested,
            self.parsed + other.parsed,
            self.failed + other.failed,
            self.not_asked + other.not_asked,
            self.cached + other.cached,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.damaged + other.damaged,
            reasons,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return {**vars(self), "damaged": list(self.damaged), "reasons": dict(self.reasons)}


@runtime_checkable
class Llm(Protocol):
    """A language model that answers requests; a killed run's answers are found again on disk."""

    cfg: LlmConfig

    @property
    def name(self) -> str:
        """Which model: belongs beside every score."""
        ...

    def peek(self, request: Request) -> Answer | None:
        """Return the answer on disk, if there is one; asks nothing."""
        ...

    def key(self, request: Request) -> str:
        """Return the content hash of a request."""
        ...

    def ask(
        self, requests: Sequence[Request], task: str = "ask", progress: Progress = quiet
    ) -> list[Answer]:
        """Return one answer per request, in order; raises UserError when none can come (wrong key, no such model)."""
        ...


# Prompts from their data files: turns after a line `@system`, `@user` or `@assistant`, with
# {{names}} to fill.

Prompt = Literal["explain", "detection", "fuzzing", "simulation", "simulation_json"]
_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
_TURN = re.compile(r"^@(system|user|assistant)\n", re.MULTILINE)
_NAME = re.compile(r"\{\{(\w+)\}\}")


@functools.cache
def turns(prompt: Prompt) -> tuple[ChatMessage, ...]:
    """Return a prompt's turns, unfilled."""
    file = resources.files("wsae.evals.autointerp.llm") / "prompts" / f"{prompt}.txt"
    parts = _TURN.split(file.read_text(encoding="utf-8"))[1:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return tuple(ChatMessage(_ROLES[role], text.rstrip("\n")) for role, text in pairs)


def filled(prompt: Prompt, **texts: str) -> tuple[ChatMessage, ...]:
    """Return a prompt with every {{name}} replaced at once: braces inside the texts are left alone."""
    return tuple(
        ChatMessage(turn.role, _NAME.sub(lambda name: texts[name[1]], turn.content))
        for turn in turns(prompt)
    )

"""What is asked of a language model, what comes back, and how the outcomes are counted."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from wsae.core.progress import Progress, quiet
from wsae.evals.autointerp.llm.config import LlmConfig

Role = Literal["system", "user", "assistant"]


class Message(NamedTuple):
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Request:
    """A conversation that the model continues."""

    messages: tuple[Message, ...]
    max_tokens: int
    """Limit of the answer."""
    expected_tokens: int
    """How long a good answer is, for estimates."""
    logprobs: bool = False
    """Whether the alternatives at each token of the answer are wanted."""
    slots: tuple[str, ...] = ()
    """What an answer with a number 0-10 after each of these pieces would hold: a local model reads the expected numbers
    from it in one pass instead of writing (endpoints cannot, and write)."""


class Token(NamedTuple):
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
    tokens: tuple[Token, ...] = ()
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
class Tally:
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

    def __add__(self, other: "Tally") -> "Tally":
        reasons = dict(self.reasons)
        for reason, n in other.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + n
        return Tally(
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

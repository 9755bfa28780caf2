"""Which language model explains and judges, what it may cost, and how its answers are kept (torch-free)."""

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from wsae.core.config import Config
from wsae.evals.config import Count, Size

LOCAL = "local:"
"""Prefix of an endpoint that is a Hugging Face model on this machine."""
Seconds = Annotated[float, Field(gt=0.0)]


class LlmConfig(Config):
    """A model that follows instructions; its key stays in the environment and is written nowhere."""

    endpoint: str = ""
    """Base URL of any OpenAI-compatible service ("https://api.openai.com/v1", "http://localhost:8000/v1"), or
    "local:MODEL" with a hub id, directory, .gguf file or "builtin"."""
    model: str = ""
    """The model's name at the endpoint; not used with "local:"."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; none set sends no key, as local servers want it."""
    concurrency: Count = 8
    """Requests under way at a time."""
    timeout_s: Seconds = 120.0
    """Seconds after which one attempt is given up, however slowly bytes still arrive."""
    retries: Size = 5
    """Further attempts after 429, 5xx, a time-out or a broken connection."""
    backoff_s: Seconds = 1.0
    """Wait before the first of them; doubles each time, with jitter from half to one and a half."""
    max_wait_s: Seconds = 120.0
    """Longest wait between attempts; a server that asks for more (Retry-After) fails the request."""
    max_requests: Size = 10_000
    """HTTP requests per run, retries included: a hard stop."""
    max_tokens: Size = 5_000_000
    """Prompt and completion tokens per run: a request that could exceed them is not sent."""
    temperature: float | None = Field(default=0.0, ge=0)
    """Sampling temperature; none leaves it out, for models that refuse it."""
    send_seed: bool = True
    """Send the seed along; false for endpoints that refuse it."""
    cap_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls the limit of an answer's length."""
    thinking_tokens: Size = 0
    """Added to every answer's limit, for models that think aloud first."""
    probabilities: bool = False
    """Judge contexts by P(1) / (P(0) + P(1)) from the log-probabilities, not by the answer alone."""
    hard: bool = False
    """Also judge the windows in which a neighbouring latent is active (half as many requests again)."""
    per_prompt: Count = 5
    """Contexts judged in one request."""
    simulator: Literal["logprobs", "json"] = "logprobs"
    """Expected value over the log-probabilities of 0-10 (the paper's), or the numbers themselves, asked outright."""
    cache: str = ".wsae-cache/llm"
    """Directory of answers; deleting it asks everything again."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of a local model."""
    device: str = "cpu"
    """Where a local model runs."""
    seed: int = 0
    """Root of shuffles, marks and jitter."""

    @property
    def local(self) -> str | None:
        """The local model, if it is one."""
        return self.endpoint.removeprefix(LOCAL) if self.endpoint.startswith(LOCAL) else None

    @property
    def url(self) -> str:
        """Where requests go."""
        base = self.endpoint.rstrip("/")
        return base if base.endswith("/chat/completions") else f"{base}/chat/completions"

    @model_validator(mode="after")
    def _well_formed(self) -> "LlmConfig":
        """Refuse what cannot work; no message repeats the endpoint, since a key may stand in it."""
        if not self.endpoint or self.local is not None:
            return self
        try:
            parts = urlsplit(self.endpoint)
            bad = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
        except ValueError:  # a port that is no number, an unclosed bracket
            bad, parts = True, urlsplit("")
        if bad:
            raise ValueError("endpoint: not a URL; give http(s)://HOST/v1 or local:MODEL")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(
                f"endpoint: a user, password, query or fragment in the URL; put the key into {self.key_env}"
            )
        if not self.model:
            raise ValueError("model: empty; give the model's name at the endpoint")
        return self

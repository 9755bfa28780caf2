"""Settings of every evaluation (torch-free): scores, recovery, class labels, probes, auto-interpretability."""

from typing import Annotated, Literal, get_args
from urllib.parse import urlsplit

from pydantic import Field, PositiveInt, model_validator

from wsae.core.config import Config

Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=0)]
AtLeastZero = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


CONTROL = "control-random"
"""Name of the untrained member in results."""


class EvalConfig(Config):
    """How held-out data are measured, and how sure the numbers are."""

    batch_size: Count = 2048
    """Held-out rows encoded at once."""
    rows: Count | None = None
    """Held-out rows measured at most, the first ones; default: all. Fewer need splice-tokens 0."""
    draws: Count = 2000
    """Bootstrap resamples behind each interval."""
    confidence: Fraction = 0.95
    """Coverage of the intervals."""
    dense_threshold: Fraction = 0.1
    """A latent that fires on more than this share of tokens is dense."""
    assignment_max: Size = 8192
    """Latents up to which members are matched one-to-one optimally; beyond, by mutual nearest."""
    random_control: bool = True
    """Add an untrained SAE with random directions and the same L0, the floor of fvu."""
    n_latents: Size = 200
    """Latents per member whose contexts are collected, spread over the densities; 0 skips contexts."""
    n_contexts: Count = 8
    """Contexts per latent, each from another sequence."""
    window_tokens: Count = 24
    """Tokens shown per context, about two thirds of them before the strongest one."""
    splice_tokens: Size = 8192
    """Held-out tokens run through the model with reconstructions in place; 0 skips it."""
    splice_logits: Count = 1 << 27
    """Logits held at once while splicing; bounds memory (4 bytes each)."""
    replay_bytes: Size = 1 << 29
    """Held-out activations and codes kept in memory between the two passes; more are read or computed again."""
    seed: int = 0
    """Root of the bootstrap, the sampling of latents and the random control."""

    @model_validator(mode="after")
    def _splicing_needs_all_rows(self) -> "EvalConfig":
        if self.rows is not None and self.splice_tokens:
            raise ValueError(f"rows {self.rows}: splicing needs all rows; set splice_tokens to 0")
        return self


class RecoveryConfig(Config):
    """Where the recovery scores draw their lines; the paper states none of these values."""

    threshold: AtLeastZero = 1.0
    """A feature activates a latent when the sum M_j^i over samples exceeds this (Appendix B.3). In units of one
    sample at full strength, so what it means depends on the number of rows and on how often a feature is active."""
    mean_threshold: AtLeastZero = 0.05
    """The same for the mean response over the samples in which the feature is active."""
    relative_threshold: Fraction = 0.1
    """The same as a share of the latent's strongest mean response."""
    found_correlation: Fraction = 0.5
    """A feature with no latent correlated above this is missing."""
    seed: int = 0
    """Seed of the random directions behind mcc_direction_chance."""


# Scores against class labels

ClassControl = Literal["dimensions", "pca", "random_sae", "shuffled"]
CONTROLS: tuple[ClassControl, ...] = ("dimensions", "pca", "random_sae", "shuffled")
"""dimensions: those of the activations, as they are. pca: principal directions, Top-k with the plain member's k.
random_sae: untrained directions, as sparse. shuffled: the plain member with the images' classes permuted."""


class ClassesConfig(Config):
    """Scores of latents against class labels on held-out images."""

    batch_size: PositiveInt = 2048
    """Held-out rows encoded at once."""
    n_top: PositiveInt = 20
    """Strongest samples per latent whose classes are compared; a latent with fewer is not scored on them."""
    min_support: PositiveInt = 20
    """Samples a latent must be active on for the chance-corrected scores."""
    groups: int = Field(default=20, ge=0)
    """Groups of images left out one by one for the intervals over images (memory: groups x latents x classes x 4
    bytes); 0 leaves these intervals away."""
    permutations: PositiveInt = 1000
    """Random orders of the labels behind the chance levels."""
    minibatch: int = Field(default=256, ge=0)
    """Rows of the one mini-batch on which NCL's training log measures; 0 leaves that value away."""
    controls: tuple[ClassControl, ...] = CONTROLS
    assignment_max: PositiveInt = 2048
    """Live latents up to which members are matched one-to-one optimally; beyond, by mutual nearest."""
    draws: PositiveInt = 1000
    """Bootstrap resamples behind each interval over latents."""
    confidence: Fraction = 0.95
    """Coverage of the intervals."""
    seed: int = 0

    def bootstrap(self) -> EvalConfig:
        """Return the settings of the intervals over latents."""
        return EvalConfig(draws=self.draws, confidence=self.confidence, seed=self.seed)


# Labelled evaluations


class ProbeConfig(Config):
    """How classes of tokens or documents are told apart by a few latents."""

    k: tuple[Count, ...] = Field(default=(1, 2, 5, 16), min_length=1)
    """Latents that a probe sees; all of them are tried beside it."""
    tokens: Count = 100_000
    """Held-out tokens read at most, the first ones; half of their sequences train the probes, half test them."""
    examples: Count = 1000
    """Tokens of a class used at most on either side; as many others stand against them."""
    documents: Count = 300
    """Documents of a class used at most; a third of them test the probes."""
    least: Count = 40
    """Tokens or documents of a class that train, and that test, at least; one with fewer is left out and named."""
    ablated: tuple[Count, ...] = (2, 5, 10, 20, 50)
    """Latents set to zero to remove a class (targeted perturbation, spurious correlation)."""
    context: Annotated[int, Field(ge=2)] = 128
    """Tokens of a document that the model reads, the first ones; longer documents are counted."""
    batch_size: Count = 2048
    """Rows encoded at once."""
    draws: Count = 2000
    """Bootstrap resamples behind each interval."""
    confidence: Fraction = 0.95
    """Coverage of the intervals."""
    seed: int = 0
    """Root of the draws of tokens and documents, the random control and the bootstrap."""

    def bootstrap(self) -> EvalConfig:
        """Return the settings of the intervals."""
        return EvalConfig(draws=self.draws, confidence=self.confidence, seed=self.seed)


# Auto-interpretability

Free = Literal["embedding", "surprisal"]
"""Scores that need no language model that follows instructions."""
Asked = Literal["detection", "fuzzing", "simulation"]
"""Scores that ask one."""
Score = Free | Asked
FREE: tuple[Score, ...] = get_args(Free)
Control = Literal["random_sae", "random_model", "neurons", "pca", "shuffled"]


class ContextConfig(Config):
    """Which contexts stand for a latent."""

    width: Count = 32
    """Tokens per window; windows tile a sequence and never straddle two documents."""
    n_latents: Count = 200
    """Latents per member, one drawn from each of as many equal-count strata of density."""
    min_windows: Count = 20
    """A latent with fewer activating windows on either side is skipped, and counted."""
    n_top: Size = 5
    """Explaining windows of largest activation."""
    n_quantile: Size = 10
    """Explaining windows spread over the quantiles of activation."""
    n_score: Count = 20
    """Activating windows to score on, spread over the quantiles; as many random ones in which the latent is silent."""
    n_hard: Size = 20
    """Silent windows in which a neighbouring latent (decoder cosine) is active."""
    reservoir: Count = 100
    """Random activating windows kept per latent and side, from which quantiles are taken."""
    pool: Count = 2048
    """Random windows kept per side, the same for all latents."""
    seed: int = 0

    @model_validator(mode="after")
    def _explained(self) -> "ContextConfig":
        if not self.n_top + self.n_quantile:
            raise ValueError(
                "n_top and n_quantile: both are 0; a latent needs windows to explain it"
            )
        return self


class FragmentConfig(Config):
    """What simulation is scored on."""

    width: Count = 64
    """Tokens of a fragment."""
    limit: Count = 50_000
    """Fragments looked at, one per document."""
    batch_size: Count = 2048
    """Rows read at once."""
    seed: int = 0


class InterpretConfig(Config):
    """What is scored, and how sure the numbers are."""

    contexts: ContextConfig = ContextConfig()
    scores: tuple[Score, ...] = ("embedding", "surprisal")
    """What is measured; detection, fuzzing and simulation ask a language model."""
    controls: tuple[Control, ...] = ()
    """What the scores are compared with."""
    hooks: tuple[str, ...] = ()
    """Hooks of the run; default: all."""
    members: tuple[str, ...] = ()
    """Members of the run; default: all. A weighted member brings its plain twin."""
    surprisal_latents: Count = 50
    """Latents per member scored by surprisal, which costs a model pass per window (the first of a seeded order)."""
    fragment_tokens: Count = 64
    """Tokens of the fragments that simulation is scored on."""
    keep_store: bool = False
    """Keep the activations that the control random_model harvests."""
    draws: Count = 2000
    """Bootstrap resamples of latents behind each interval."""
    confidence: Fraction = 0.95
    """Coverage of the intervals."""
    batch_size: Count = 2048
    """Rows encoded at once."""
    seed: int = 0


# The language model that explains and judges

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

"""Detection and fuzzing: which held-out windows hold the explained pattern, judged a few at a time (Paulo et al. 2024).

Detection: activating windows against random ones in which the latent is silent, unmarked. Fuzzing: marked windows; in
the positive ones the latent's own tokens are marked, in the negative ones as many as the positives' mean, at random
(`silent`), or wrong tokens of activating windows (`active`: half of the positives, disjoint from the other half). As
many positives as negatives per latent, shuffled together. Hard negatives are judged in prompts of their own, so that
asking for them changes no other answer.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from wsae.core.progress import Progress, quiet
from wsae.core.seeds import seed_for
from wsae.evals.autointerp.llm.client import Unparsed, ask_all, said
from wsae.evals.autointerp.llm.config import LlmConfig
from wsae.evals.autointerp.llm.types import (
    Answer,
    AnswerTally,
    Llm,
    Request,
    filled,
    harmless,
    harmless_tokens,
    marked,
)
from wsae.evals.autointerp.summary import LatentScore, Verdicts, judge
from wsae.evals.autointerp.windows import Collected, LatentContexts, Shown, Windows

# Explanations from activating windows: tokens marked, activations as integers 0-10 (Paulo et al.
# 2024, Section 3.1).
#
# A token is marked when its activation exceeds 0.3 of the largest one in its window, so that weak
# windows too show where they fire; the integers are in tenths of the largest activation in all
# windows shown, ceil(10 a / max).

MARK_SHARE = 0.3
"""Share of a window's largest activation from which tokens are marked (Delphi's)."""
LEVELS = 10
MARKER = "[EXPLANATION]:"
LONGEST = 1000
"""Characters of an explanation: a longer one is no sentence."""
_LIMIT, _EXPECTED = 300, 40
Rounding = Callable[[np.ndarray], np.ndarray]


class Explanation(NamedTuple):
    """What a model says makes a latent fire; untrusted text in one line."""

    latent: int
    text: str


class Explained(NamedTuple):
    """Explanations by latent, of those that could be had, and the outcomes of asking."""

    explanations: dict[int, Explanation]
    tally: AnswerTally
    model: str


class Tokens(NamedTuple):
    """A window's harmless tokens and the latent's activation on each."""

    texts: list[str]
    acts: Float[np.ndarray, " tokens"]


def window_tokens(windows: Windows, shown: Shown) -> list[Tokens]:
    """Return the windows shown, without padding.

    The tokens that continue a split character count as one with that which shows it, whose activation is their largest.
    """
    out = []
    for window, acts in zip(shown.window.tolist(), shown.acts, strict=True):
        texts, values = windows.tokens(window), acts[windows.ids[window] >= 0].astype(np.float64)
        heads = [i for i, text in enumerate(texts) if text or i == 0]
        if len(heads) < len(texts):
            texts, values = [texts[i] for i in heads], np.maximum.reduceat(values, heads)
        out.append(Tokens(harmless_tokens(texts), values))
    return out


def marks(acts: Float[np.ndarray, " tokens"]) -> list[bool]:
    """Return which tokens are marked: a > 0.3 max(a) of the window."""
    return (acts > MARK_SHARE * max(float(acts.max(initial=0.0)), 0.0)).tolist()


def levels(
    acts: Float[np.ndarray, " tokens"], peak: float, rounded: Rounding = np.ceil
) -> list[int]:
    """Return ceil(10 a / peak) (or another rounding), within 0-10."""
    if peak <= 0:
        return [0] * len(acts)
    return rounded(LEVELS * np.clip(acts / peak, 0.0, 1.0)).astype(int).tolist()


def explanation_request(examples: Sequence[Tokens], rounded: Rounding = np.ceil) -> Request:
    """Return the request to explain a latent from windows in which it fires."""
    peak = max((float(tokens.acts.max(initial=0.0)) for tokens in examples), default=0.0)
    shown = [
        _example(number, tokens, levels(tokens.acts, peak, rounded))
        for number, tokens in enumerate(examples, start=1)
    ]
    return Request(filled("explain", examples="\n".join(shown)), _LIMIT, _EXPECTED)


def _example(number: int, tokens: Tokens, strengths: list[int]) -> str:
    listed = [
        f"({json.dumps(text, ensure_ascii=False)}, {level})"
        for text, level in zip(tokens.texts, strengths, strict=True)
        if level
    ]
    line = marked(tokens.texts, marks(tokens.acts))
    return f"Example {number}: {line}\nActive: {', '.join(listed)}"


def explanation_requests(collected: Collected) -> dict[int, Request]:
    """Return the request of every latent."""
    return {
        contexts.latent: explanation_request(window_tokens(collected.windows, contexts.explain))
        for contexts in collected.latents
    }


def parse_explanation(answer: Answer) -> str:
    """Return what follows the one `[EXPLANATION]:`, in one harmless line; raises Unparsed."""
    _, marker, text = said(answer).partition(MARKER)
    text = " ".join(text.split())
    if not marker:
        raise Unparsed(f"no {MARKER}")
    if MARKER in text:
        raise Unparsed(f"{MARKER} more than once")
    if answer.finish == "length":
        raise Unparsed("explanation cut off")
    if not text:
        raise Unparsed("empty explanation")
    if len(text) > LONGEST:
        raise Unparsed(f"explanation of more than {LONGEST} characters")
    return harmless(text)


def explain_latents(
    collected: Collected, llm: Llm, progress: Progress = quiet, task: str = "explain"
) -> Explained:
    """Ask for an explanation of every latent from its explaining windows; those without one are counted."""
    return ask_explanations(explanation_requests(collected), llm, progress, task)


def ask_explanations(
    requests: dict[int, Request], llm: Llm, progress: Progress, task: str
) -> Explained:
    """Ask the requests of latents and keep what could be parsed."""
    texts, tally = ask_all(
        llm, [*requests.values()], lambda _, answer: parse_explanation(answer), task, progress
    )
    found = {
        latent: Explanation(latent, text)
        for latent, text in zip(requests, texts, strict=True)
        if text is not None
    }
    return Explained(found, tally, llm.name)


Kind = Literal["detection", "fuzzing"]
Variant = Literal["silent", "active"]
POSITIVE, NEGATIVE, HARD = 0, 1, 2
_LIST = re.compile(r"\[[^\[\]]*\]")


class JudgedWindow(NamedTuple):
    """A window to judge: its role (0 positive, 1 negative, 2 hard) and its text, marked for fuzzing."""

    role: int
    text: str


class JudgingBatch(NamedTuple):
    """The windows of one prompt."""

    latent: int
    items: tuple[JudgedWindow, ...]


class Judged(NamedTuple):
    """A score per latent and the outcomes of asking."""

    scores: list[LatentScore]
    tally: AnswerTally
    model: str


def batches(
    kind: Kind, collected: Collected, cfg: LlmConfig, variant: Variant = "silent"
) -> list[JudgingBatch]:
    """Return the prompts' windows, latent by latent; the same seed gives the same."""
    out = []
    for contexts in collected.latents:
        rng = np.random.default_rng(seed_for(cfg.seed, kind, variant, contexts.latent))
        positive, negative = _sides(kind, variant, collected, contexts, rng)
        n = min(len(positive), len(negative))
        asked = [JudgedWindow(POSITIVE, text) for text in _some(positive, n, rng)]
        asked += [JudgedWindow(NEGATIVE, text) for text in _some(negative, n, rng)]
        out += _cut(
            contexts.latent, [asked[i] for i in rng.permutation(len(asked))], cfg.per_prompt
        )
        if cfg.hard and kind == "detection":
            hard = _plain(window_tokens(collected.windows, contexts.hard))
            out += _cut(
                contexts.latent, [JudgedWindow(HARD, text) for text in hard], cfg.per_prompt
            )
    return out


def _cut(latent: int, items: Sequence[JudgedWindow], size: int) -> list[JudgingBatch]:
    return [JudgingBatch(latent, tuple(items[i : i + size])) for i in range(0, len(items), size)]


def _some(texts: list[str], n: int, rng: np.random.Generator) -> list[str]:
    return texts if len(texts) == n else [texts[i] for i in rng.permutation(len(texts))[:n]]


def _sides(
    kind: Kind,
    variant: Variant,
    collected: Collected,
    contexts: LatentContexts,
    rng: np.random.Generator,
) -> tuple[list[str], list[str]]:
    positive = window_tokens(collected.windows, contexts.positive)
    negative = window_tokens(collected.windows, contexts.negative)
    if kind == "detection":
        return _plain(positive), _plain(negative)
    if variant == "active":
        right, wrong = positive[::2], positive[1::2]
        return [_own(tokens) for tokens in right], [
            _wrong(tokens, rng) for tokens in wrong if not all(marks(tokens.acts))
        ]
    counts = [sum(marks(tokens.acts)) for tokens in positive]
    n = math.ceil(float(np.mean(counts))) if counts else 0
    silent = [_random(tokens, range(len(tokens.texts)), n, rng) for tokens in negative]
    return [_own(tokens) for tokens in positive], silent


def _plain(windows: list[Tokens]) -> list[str]:
    return ["".join(tokens.texts) for tokens in windows]


def _own(tokens: Tokens) -> str:
    return marked(tokens.texts, marks(tokens.acts))


def _wrong(tokens: Tokens, rng: np.random.Generator) -> str:
    """Mark as many tokens as are the latent's own, none of them its own (fewer where fewer are left)."""
    own = marks(tokens.acts)
    return _random(tokens, [i for i, mark in enumerate(own) if not mark], sum(own), rng)


def _random(tokens: Tokens, among: Sequence[int], n: int, rng: np.random.Generator) -> str:
    chosen = {among[i] for i in rng.permutation(len(among))[:n]}
    return marked(tokens.texts, [i in chosen for i in range(len(tokens.texts))])


def judging_request(kind: Kind, batch: JudgingBatch, explanation: str, cfg: LlmConfig) -> Request:
    """Return the request to judge a batch."""
    texts = [f"Text {i}: {item.text}" for i, item in enumerate(batch.items, start=1)]
    n = len(texts)
    messages = filled(kind, explanation=explanation, texts="\n".join(texts), n=str(n))
    return Request(messages, 16 + 8 * n, 1 + 3 * n, logprobs=cfg.probabilities)


def parse_verdicts(answer: Answer, n: int, probabilities: bool = False) -> list[float]:
    """Return n verdicts from an answer with exactly one list, of n symbols 0 or 1; raises Unparsed.

    With probabilities: P(1) / (P(0) + P(1)) at each symbol.
    """
    text = said(answer)
    found = _LIST.findall(text)
    if len(found) != 1:
        raise Unparsed(f"{len(found)} lists" if found else "no list")
    symbols = [part.strip() for part in found[0][1:-1].split(",")]
    if not set(symbols) <= {"0", "1"}:
        raise Unparsed("a list of other things than 0 and 1")
    if len(symbols) != n:
        raise Unparsed("a list of another length")
    if not probabilities:
        return [float(symbol) for symbol in symbols]
    return _probabilities(answer, symbols)


def _probabilities(answer: Answer, symbols: list[str]) -> list[float]:
    """Return P(1) / (P(0) + P(1)) at the answer's last n tokens that are 0 or 1, which must spell the list."""
    spoken = [token for token in answer.tokens if token.text.strip() in ("0", "1")][-len(symbols) :]
    if [token.text.strip() for token in spoken] != symbols:
        raise Unparsed("0 and 1 are not tokens of their own, so they have no probabilities")
    out = []
    for token in spoken:
        mass = {"0": 0.0, "1": 0.0}
        for text, logprob in token.top.items():
            if text.strip() in mass:
                mass[text.strip()] += math.exp(logprob)
        total = mass["0"] + mass["1"]
        if total <= 0:
            raise Unparsed("0 and 1 have no probability")
        out.append(mass["1"] / total)
    return out


def detection_scores(
    collected: Collected,
    explanations: dict[int, Explanation],
    llm: Llm,
    progress: Progress = quiet,
    task: str = "detection",
) -> Judged:
    """Judge whether held-out windows hold each explained pattern; a latent without explanation is not asked about."""
    asked = batches("detection", collected, llm.cfg)
    return _judged("detection", collected, asked, explanations, llm, progress, task)


def fuzzing_scores(
    collected: Collected,
    explanations: dict[int, Explanation],
    llm: Llm,
    variant: Variant = "silent",
    progress: Progress = quiet,
    task: str = "fuzzing",
) -> Judged:
    """Judge whether the marked tokens are the explained ones."""
    asked = batches("fuzzing", collected, llm.cfg, variant)
    return _judged("fuzzing", collected, asked, explanations, llm, progress, task)


def _judged(
    kind: Kind,
    collected: Collected,
    asked: list[JudgingBatch],
    explanations: dict[int, Explanation],
    llm: Llm,
    progress: Progress,
    task: str,
) -> Judged:
    requests = [
        judging_request(kind, batch, explanations[batch.latent].text, llm.cfg)
        if batch.latent in explanations
        else None
        for batch in asked
    ]
    verdicts, tally = ask_all(
        llm,
        requests,
        lambda i, answer: parse_verdicts(answer, len(asked[i].items), llm.cfg.probabilities),
        task,
        progress,
    )
    sides: dict[int, tuple[list[float], ...]] = {c.latent: ([], [], []) for c in collected.latents}
    for batch, given in zip(asked, verdicts, strict=True):
        for item, verdict in zip(batch.items, given or [math.nan] * len(batch.items), strict=True):
            sides[batch.latent][item.role].append(verdict)
    scores = []
    for contexts in collected.latents:
        columns = [np.array(side, dtype=np.float64) for side in sides[contexts.latent]]
        scores.append(judge(contexts.latent, contexts.density, Verdicts(*columns)))
    return Judged(scores, tally, llm.name)

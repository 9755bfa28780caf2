"""Detection and fuzzing: which held-out windows hold the explained pattern, judged a few at a time (Paulo et al. 2024).

Detection: activating windows against random ones in which the latent is silent, unmarked. Fuzzing: marked windows; in
the positive ones the latent's own tokens are marked, in the negative ones as many as the positives' mean, at random. As
many positives as negatives per latent, shuffled together. Hard negatives are judged in prompts of their own, so that
asking for them changes no other answer.

Explanations come from activating windows (Section 3.1): a token is marked when its activation exceeds 0.3 of the
largest one in its window, so that weak windows too show where they fire; activations are shown as integers 0-10, tenths
of the largest activation in all windows shown, ceil(10 a / max).
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from wsae.core.progress import Progress, quiet
from wsae.core.seeds import seed_for
from wsae.evals.autointerp.llm.asking import (
    Answer,
    AnswerTally,
    Llm,
    Request,
    Unparsed,
    ask_all,
    requests_about,
)
from wsae.evals.autointerp.llm.config import LlmConfig
from wsae.evals.autointerp.llm.texts import filled, harmless, harmless_tokens, marked
from wsae.evals.autointerp.summary import LatentScore, Verdicts, judge
from wsae.evals.autointerp.windows import Collected, Fragments, LatentContexts, Shown, Windows

MARK_SHARE = 0.3
"""Share of a window's largest activation from which tokens are marked (Delphi's)."""
LEVELS = 10
MARKER = "[EXPLANATION]:"
LONGEST = 1000
"""Characters of an explanation: a longer one is no sentence."""
_LIMIT, _EXPECTED = 300, 40
Rounding = Callable[[np.ndarray], np.ndarray]


class Explained(NamedTuple):
    """Explanations by latent (untrusted text, in one line), of those that could be had, and the outcomes of asking."""

    explanations: dict[int, str]
    tally: AnswerTally


class Tokens(NamedTuple):
    """A window's harmless tokens and the latent's activation on each."""

    texts: list[str]
    acts: Float[np.ndarray, " tokens"]

    def plain(self) -> str:
        """Return the text."""
        return "".join(self.texts)

    def own(self) -> str:
        """Return the text with the latent's own tokens marked."""
        return marked(self.texts, marks(self.acts))


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
    lines = []
    for number, tokens in enumerate(examples, start=1):
        strengths = zip(tokens.texts, levels(tokens.acts, peak, rounded), strict=True)
        listed = [f"({json.dumps(text, ensure_ascii=False)}, {n})" for text, n in strengths if n]
        lines += [f"Example {number}: {tokens.own()}", f"Active: {', '.join(listed)}"]
    return Request(filled("explain", examples="\n".join(lines)), _LIMIT, _EXPECTED)


def explanation_requests(found: Collected | Fragments) -> dict[int, Request]:
    """Return the request of every latent from its explaining windows, or fragments, where activations are floored."""
    rounded = np.floor if isinstance(found, Fragments) else np.ceil
    return {
        one.latent: explanation_request(window_tokens(found.windows, one.explain), rounded)
        for one in found.latents
    }


def parse_explanation(answer: Answer) -> str:
    """Return what follows the one `[EXPLANATION]:`, in one harmless line; raises Unparsed."""
    _, marker, text = answer.said.partition(MARKER)
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
    found: Collected | Fragments, llm: Llm, progress: Progress = quiet, task: str = "explain"
) -> Explained:
    """Ask for an explanation of every latent and keep what could be parsed; the others are counted."""
    requests = explanation_requests(found)
    texts, tally = ask_all(
        llm, [*requests.values()], lambda _, answer: parse_explanation(answer), task, progress
    )
    pairs = zip(requests, texts, strict=True)
    return Explained({latent: text for latent, text in pairs if text is not None}, tally)


Kind = Literal["detection", "fuzzing"]
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


def batches(kind: Kind, collected: Collected, cfg: LlmConfig) -> list[JudgingBatch]:
    """Return the prompts' windows, latent by latent; the same seed gives the same."""
    out = []
    for contexts in collected.latents:
        rng = np.random.default_rng(seed_for(cfg.seed, kind, "silent", contexts.latent))
        texts = _texts(kind, collected.windows, contexts, rng)
        n = min(map(len, texts))
        asked = []
        for role, side in zip((POSITIVE, NEGATIVE), texts, strict=True):
            some = range(n) if len(side) == n else rng.permutation(len(side))[:n]
            asked += [JudgedWindow(role, side[i]) for i in some]
        groups = [[asked[i] for i in rng.permutation(len(asked))]]
        if cfg.hard and kind == "detection":
            hard = window_tokens(collected.windows, contexts.hard)
            groups.append([JudgedWindow(HARD, tokens.plain()) for tokens in hard])
        size = cfg.per_prompt
        parts = (group[i : i + size] for group in groups for i in range(0, len(group), size))
        out += [JudgingBatch(contexts.latent, tuple(part)) for part in parts]
    return out


def _texts(
    kind: Kind, windows: Windows, contexts: LatentContexts, rng: np.random.Generator
) -> tuple[list[str], list[str]]:
    """Return the texts of the positive and of the negative windows."""
    positive, negative = (
        window_tokens(windows, shown) for shown in (contexts.positive, contexts.negative)
    )
    if kind == "detection":
        return [tokens.plain() for tokens in positive], [tokens.plain() for tokens in negative]
    counts = [sum(marks(tokens.acts)) for tokens in positive]
    n = math.ceil(float(np.mean(counts))) if counts else 0
    fuzzed = []
    for tokens in negative:
        chosen = set(rng.permutation(len(tokens.texts))[:n].tolist())
        fuzzed.append(marked(tokens.texts, [i in chosen for i in range(len(tokens.texts))]))
    return [tokens.own() for tokens in positive], fuzzed


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
    text = answer.said
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
    spoken = [token for token in answer.tokens if token.text.strip() in ("0", "1")][-n:]
    if [token.text.strip() for token in spoken] != symbols:  # they must spell the list
        raise Unparsed("0 and 1 are not tokens of their own, so they have no probabilities")
    masses = [token.mass(("0", "1")) for token in spoken]
    if any(mass["0"] + mass["1"] <= 0 for mass in masses):
        raise Unparsed("0 and 1 have no probability")
    return [mass["1"] / (mass["0"] + mass["1"]) for mass in masses]


def judged(
    kind: Kind,
    collected: Collected,
    explanations: dict[int, str],
    llm: Llm,
    progress: Progress = quiet,
    task: str = "",
) -> Judged:
    """Judge held-out windows by each latent's explanation; a latent without one is not asked about."""
    asked = batches(kind, collected, llm.cfg)
    verdicts, tally = ask_all(
        llm,
        requests_about(asked, explanations, partial(judging_request, kind, cfg=llm.cfg)),
        lambda i, answer: parse_verdicts(answer, len(asked[i].items), llm.cfg.probabilities),
        task or kind,
        progress,
    )
    by_role: dict[int, tuple[list[float], ...]] = {
        contexts.latent: ([], [], []) for contexts in collected.latents
    }
    for batch, given in zip(asked, verdicts, strict=True):
        for item, verdict in zip(batch.items, given or [math.nan] * len(batch.items), strict=True):
            by_role[batch.latent][item.role].append(verdict)
    scores = []
    for contexts in collected.latents:
        columns = [np.array(role, dtype=np.float64) for role in by_role[contexts.latent]]
        scores.append(judge(contexts.latent, contexts.density, Verdicts(*columns)))
    return Judged(scores, tally)


detection_scores = partial(judged, "detection")
"""Judge whether held-out windows hold each explained pattern."""
fuzzing_scores = partial(judged, "fuzzing")
"""Judge whether the marked tokens are the explained ones."""

"""Explanations from activating windows: tokens marked, activations as integers 0-10 (Paulo et al. 2024, Section 3.1).

A token is marked when its activation exceeds 0.3 of the largest one in its window, so that weak windows too show where
they fire; the integers are in tenths of the largest activation in all windows shown, ceil(10 a / max).
"""

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from wsae.core.progress import Progress, quiet
from wsae.evals.autointerp.llm.asking import Unparsed, ask_all, said
from wsae.evals.autointerp.llm.prompts import filled
from wsae.evals.autointerp.llm.texts import harmless, harmless_tokens, marked
from wsae.evals.autointerp.llm.types import Answer, Llm, Request, Tally
from wsae.evals.autointerp.windows import Collected, Shown, Windows

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
    tally: Tally
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

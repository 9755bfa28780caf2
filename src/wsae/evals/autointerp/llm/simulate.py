"""Simulation: activations predicted from an explanation, correlated with the real ones (the paper's Appendix B.4).

From the 20 fragments of largest activation, five explain the latent (their activations as integers floor(10 a / max))
and five others are simulated, with five random fragments in which its activation varies. The score is Pearson's
correlation of simulated and real activations over all tokens of the scored fragments: `top`, `random`, and `mixed` over
both ("top-random", the paper's). A simulation without variance predicts nothing and scores 0. A fragment whose
simulation failed enters no score; `mixed` needs at least one fragment of either kind.

The simulator's numbers are expected values over the probabilities of 0-10 ("logprobs"), or asked outright ("json").
Bills et al. (2023) read all probabilities at once behind the word `unknown`; a local model does so here, an endpoint
writes the numbers one by one, each seeing those before it, because chat endpoints return probabilities of what they
write only.
"""

import json
import math
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from wsae.core.progress import Progress, quiet
from wsae.evals.autointerp.llm.asking import (
    Answer,
    AnswerTally,
    AnswerToken,
    Llm,
    Request,
    Unparsed,
    ask_all,
    requests_about,
)
from wsae.evals.autointerp.llm.config import LlmConfig
from wsae.evals.autointerp.llm.detect import (
    LEVELS,
    Explained,
    Tokens,
    explain_latents,
    window_tokens,
)
from wsae.evals.autointerp.llm.texts import filled
from wsae.evals.autointerp.windows import Fragments, LatentFragments

_NUMBERS = {str(v): v for v in range(11)}


class WrittenActivation(NamedTuple):
    """A written activation, and where it begins in the answer's UTF-8."""

    value: int
    place: int


def rows_of(answer: Answer, n: int) -> list[WrittenActivation]:
    """Return the activations of n lines `number, tab, token, tab, activation`, in order; raises Unparsed."""
    text = answer.said
    place = len(answer.text[: answer.text.index(text)].encode())
    out = []
    for line in text.split("\n"):
        parts = line.split("\t")
        if len(parts) != 3 or parts[0] != str(len(out) + 1):
            raise Unparsed("lines that are not number, token, activation in order")
        digits = parts[2].strip()
        if digits not in _NUMBERS:
            raise Unparsed("an activation that is no whole number from 0 to 10")
        before = line[: len(line) - len(parts[2].lstrip())]
        out.append(WrittenActivation(_NUMBERS[digits], place + len(before.encode())))
        place += len(line.encode()) + 1
    if len(out) != n:
        raise Unparsed("not one line per token")
    return out


def expected_rows(answer: Answer, rows: list[WrittenActivation]) -> list[float]:
    """Return E = sum_v v P(v) / sum_v P(v), v = 0 ... 10, at each row; raises Unparsed.

    Where 10 is written as the tokens `1` and `0`, a `1` counts as 1 + 9 P(0 | 1), known when it was written.
    """
    starts, place = [], 0
    for token in answer.tokens:
        starts.append(place)
        place += token.size
    out, i = [], 0
    for row in rows:
        while i < len(starts) and starts[i] + answer.tokens[i].size <= row.place:
            i += 1
        text = answer.tokens[i].text.strip() if i < len(starts) else ""
        if text != str(row.value) and (text != "1" or row.value != 10):
            raise Unparsed("numbers are not tokens of their own, so they have no probabilities")
        following = answer.tokens[i + 1] if i + 1 < len(starts) else None
        out.append(_expected(answer.tokens[i], following))
    return out


def _expected(token: AnswerToken, following: AnswerToken | None) -> float:
    mass = token.mass([*_NUMBERS])
    total = sum(mass.values())
    if total <= 0:
        raise Unparsed("0-10 have no probability")
    value = sum(_NUMBERS[text] * share for text, share in mass.items())
    if token.text.strip() == "1" and following is not None and token.text == token.text.rstrip():
        zero = sum(math.exp(p) for text, p in following.top.items() if text.rstrip() == "0")
        value += 9 * mass["1"] * min(1.0, zero)
    return value / total


class SimulationScore(NamedTuple):
    """One latent's correlations; None where no fragment of the kind was simulated."""

    latent: int
    density: float
    top: float | None
    random: float | None
    mixed: float | None
    n_top: int
    """Top fragments simulated, of 5."""
    n_random: int
    failed: int
    """Fragments without a simulation."""


class Simulated(NamedTuple):
    """Scores, the explanations behind them, and the outcomes of asking (explanations have their own tally)."""

    scores: list[SimulationScore]
    explained: Explained
    tally: AnswerTally


class Case(NamedTuple):
    """A fragment to simulate."""

    latent: int
    is_top: bool
    tokens: Tokens


def cases(found: Fragments) -> list[Case]:
    """Return the fragments to simulate, latent by latent."""
    return [
        Case(latent.latent, is_top, tokens)
        for latent in found.latents
        for is_top, shown in ((True, latent.top), (False, latent.random))
        for tokens in window_tokens(found.windows, shown)
    ]


def simulation_request(case: Case, explanation: str, cfg: LlmConfig) -> Request:
    """Return the request to simulate a fragment."""
    texts = case.tokens.texts
    listed = [f"{i}\t{text}" for i, text in enumerate(texts, start=1)]
    written = {"explanation": explanation, "tokens": "\n".join(listed)}
    if cfg.simulator == "json":
        n = 8 * len(texts)
        return Request(filled("simulation_json", **written), 32 + 2 * n, n)
    size = sum(len(line.encode()) // 3 + 5 for line in listed)
    slots = tuple(f"{line}\t" for line in listed)
    return Request(filled("simulation", **written), 32 + 2 * size, size, True, slots)


def parse_simulation(answer: Answer, n: int, cfg: LlmConfig) -> Float64[np.ndarray, " tokens"]:
    """Return n simulated activations from 0 to 10; raises Unparsed."""
    if answer.values:
        assert len(answer.values) == n
        return np.array(answer.values, dtype=np.float64)
    if cfg.simulator == "json":
        return np.array(_pairs(answer.said, n), dtype=np.float64)
    rows = rows_of(answer, n)
    return np.array(expected_rows(answer, rows), dtype=np.float64)


def _pairs(text: str, n: int) -> list[float]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise Unparsed("not JSON") from None
    if not isinstance(value, list) or len(value) != n:
        raise Unparsed("not a list of one pair per token")
    out = []
    for i, pair in enumerate(value, start=1):
        if not isinstance(pair, list) or len(pair) != 2 or pair[0] != i or pair[0] is True:
            raise Unparsed("not a list of pairs in order")
        number = pair[1]
        if type(number) not in (int, float) or not 0 <= number <= LEVELS:
            raise Unparsed("an activation that is no number from 0 to 10")
        out.append(float(number))
    return out


def correlation(
    simulated: list[Float64[np.ndarray, " _"]], real: list[Float64[np.ndarray, " _"]]
) -> float | None:
    """Return Pearson's r over all tokens, r = sum (s - s0)(a - a0) / sqrt(sum (s - s0)^2 sum (a - a0)^2).

    0 when the simulation is constant; None without fragments, or when the real activations are constant.
    """
    if not simulated:
        return None
    s, a = np.concatenate(simulated), np.concatenate(real)
    s, a = s - s.mean(), a - a.mean()
    if not a.any():
        return None
    scale = math.sqrt(float(s @ s) * float(a @ a))
    return float(np.clip(float(s @ a) / scale, -1.0, 1.0)) if scale > 0 else 0.0


def simulation_scores(
    found: Fragments,
    llm: Llm,
    explanations: dict[int, str] | None = None,
    progress: Progress = quiet,
    task: str = "simulation",
) -> Simulated:
    """Explain each latent from its explaining fragments (unless explanations are given) and simulate the others."""
    explained = (
        explain_latents(found, llm, progress, f"{task}: explain")
        if explanations is None
        else Explained(explanations, AnswerTally())
    )
    asked = cases(found)
    build = partial(simulation_request, cfg=llm.cfg)
    results, tally = ask_all(
        llm,
        requests_about(asked, explained.explanations, build),
        lambda i, answer: parse_simulation(answer, len(asked[i].tokens.texts), llm.cfg),
        task,
        progress,
    )
    pairs = list(zip(asked, results, strict=True))
    scores = [_score(one, [p for p in pairs if p[0].latent == one.latent]) for one in found.latents]
    return Simulated(scores, explained, tally)


def _score(
    latent: LatentFragments, results: list[tuple[Case, Float64[np.ndarray, " tokens"] | None]]
) -> SimulationScore:
    done = [(case, result) for case, result in results if result is not None]
    top = [(case, result) for case, result in done if case.is_top]
    random = [(case, result) for case, result in done if not case.is_top]

    def correlated(some: list[tuple[Case, Float64[np.ndarray, " tokens"]]]) -> float | None:
        return correlation([result for _, result in some], [case.tokens.acts for case, _ in some])

    return SimulationScore(
        latent=latent.latent,
        density=latent.density,
        top=correlated(top),
        random=correlated(random),
        mixed=correlated(done) if top and random else None,
        n_top=len(top),
        n_random=len(random),
        failed=len(results) - len(done),
    )

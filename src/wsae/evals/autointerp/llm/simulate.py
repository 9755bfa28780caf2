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
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from wsae.core.progress import Progress, quiet
from wsae.evals.autointerp.llm.asking import Unparsed, ask_all, said
from wsae.evals.autointerp.llm.config import LlmConfig
from wsae.evals.autointerp.llm.explain import (
    LEVELS,
    Explained,
    Explanation,
    Tokens,
    ask_explanations,
    explanation_request,
    window_tokens,
)
from wsae.evals.autointerp.llm.fragments import Fragments, LatentFragments
from wsae.evals.autointerp.llm.prompts import filled
from wsae.evals.autointerp.llm.rows import expected_rows, rows_of
from wsae.evals.autointerp.llm.types import Answer, Llm, Request, Tally


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
    tally: Tally
    skipped: dict[str, int]
    model: str


class Case(NamedTuple):
    """A fragment to simulate."""

    latent: int
    is_top: bool
    tokens: Tokens


def simulation_explanations(found: Fragments) -> dict[int, Request]:
    """Return the requests to explain each latent from its five explaining fragments."""
    return {
        latent.latent: explanation_request(window_tokens(found.windows, latent.explain), np.floor)
        for latent in found.latents
    }


def cases(found: Fragments) -> list[Case]:
    """Return the fragments to simulate, latent by latent."""
    return [case for latent in found.latents for case in _cases(found, latent)]


def _cases(found: Fragments, latent: LatentFragments) -> list[Case]:
    roles = ((True, latent.top), (False, latent.random))
    return [
        Case(latent.latent, is_top, tokens)
        for is_top, shown in roles
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
        return np.array(_pairs(said(answer), n), dtype=np.float64)
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
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or pair[0] != i
            or isinstance(pair[0], bool)
        ):
            raise Unparsed("not a list of pairs in order")
        number = pair[1]
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not 0 <= number <= LEVELS:
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
    explanations: dict[int, Explanation] | None = None,
    progress: Progress = quiet,
    task: str = "simulation",
) -> Simulated:
    """Explain each latent from its explaining fragments (unless explanations are given) and simulate the others."""
    explained = (
        ask_explanations(simulation_explanations(found), llm, progress, f"{task}: explain")
        if explanations is None
        else Explained(explanations, Tally(), llm.name)
    )
    asked = cases(found)
    requests = [
        simulation_request(case, explained.explanations[case.latent].text, llm.cfg)
        if case.latent in explained.explanations
        else None
        for case in asked
    ]
    results, tally = ask_all(
        llm,
        requests,
        lambda i, answer: parse_simulation(answer, len(asked[i].tokens.texts), llm.cfg),
        task,
        progress,
    )
    by_latent: dict[int, list[tuple[Case, Float64[np.ndarray, " tokens"] | None]]] = {}
    for case, result in zip(asked, results, strict=True):
        by_latent.setdefault(case.latent, []).append((case, result))
    scores = [_score(latent, by_latent[latent.latent]) for latent in found.latents]
    return Simulated(scores, explained, tally, dict(found.skipped), llm.name)


def _score(
    latent: LatentFragments, results: list[tuple[Case, Float64[np.ndarray, " tokens"] | None]]
) -> SimulationScore:
    done = [(case, result) for case, result in results if result is not None]
    top = [(case, result) for case, result in done if case.is_top]
    random = [(case, result) for case, result in done if not case.is_top]
    return SimulationScore(
        latent.latent,
        latent.density,
        _correlated(top),
        _correlated(random),
        _correlated(done) if top and random else None,
        len(top),
        len(random),
        len(results) - len(done),
    )


def _correlated(done: list[tuple[Case, Float64[np.ndarray, " tokens"]]]) -> float | None:
    return correlation([result for _, result in done], [case.tokens.acts for case, _ in done])

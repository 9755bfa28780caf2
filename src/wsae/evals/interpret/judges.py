"""Latents explained and judged by a language model, and what asking would cost.

Detection and fuzzing: which held-out windows hold the explained pattern, judged a few at a time (Paulo et al. 2024).

Detection: activating windows against random ones in which the latent is silent, unmarked. Fuzzing: marked windows; in
the positive ones the latent's own tokens are marked, in the negative ones as many as the positives' mean, at random. As
many positives as negatives per latent, shuffled together. Hard negatives are judged in prompts of their own, so that
asking for them changes no other answer.

Explanations come from activating windows (Section 3.1): a token is marked when its activation exceeds 0.3 of the
largest one in its window, so that weak windows too show where they fire; activations are shown as integers 0-10, tenths
of the largest activation in all windows shown, ceil(10 a / max).

Simulation: activations predicted from an explanation, correlated with the real ones (the paper's Appendix B.4).

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
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float64

from wsae.core.progress import Progress, quiet
from wsae.core.seeds import seed_for
from wsae.evals.config import Asked, LlmConfig
from wsae.evals.interpret.asking import (
    Answer,
    AnswerTally,
    AnswerToken,
    Llm,
    Request,
    Unparsed,
    ask_all,
    filled,
    harmless,
    harmless_tokens,
    marked,
    requests_about,
)
from wsae.evals.interpret.summary import LatentScore, Verdicts, judge
from wsae.evals.interpret.windows import (
    Collected,
    Fragments,
    LatentContexts,
    LatentFragments,
    Shown,
    Windows,
)

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

    scores: Sequence["LatentScore | SimulationScore"]
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


_NUMBERS = {str(v): v for v in range(11)}


class WrittenActivation(NamedTuple):
    """A written activation, and where it begins in the answer's UTF-8."""

    value: int
    place: int


def rows_of(answer: Answer, n: int) -> list[WrittenActivation]:
    """Return the activations of n lines `number, tab, token, tab, activation`, in order; raises Unparsed."""
    text = answer.said
    place = len(answer.text[: answer.text.rindex(text)].encode())
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
    ends, out = np.cumsum([token.size for token in answer.tokens]), []
    for row in rows:
        i = int(np.searchsorted(ends, row.place, side="right"))
        text = answer.tokens[i].text.strip() if i < len(ends) else ""
        if text != str(row.value) and (text != "1" or row.value != 10):
            raise Unparsed("numbers are not tokens of their own, so they have no probabilities")
        following = answer.tokens[i + 1] if i + 1 < len(ends) else None
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
    explanations: dict[int, str],
    llm: Llm,
    progress: Progress = quiet,
    task: str = "simulation",
) -> Judged:
    """Simulate each explained latent on its top and random fragments."""
    asked = cases(found)
    results, tally = ask_all(
        llm,
        requests_about(asked, explanations, partial(simulation_request, cfg=llm.cfg)),
        lambda i, answer: parse_simulation(answer, len(asked[i].tokens.texts), llm.cfg),
        task,
        progress,
    )
    pairs = list(zip(asked, results, strict=True))
    scores = [_score(one, [p for p in pairs if p[0].latent == one.latent]) for one in found.latents]
    return Judged(scores, tally)


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


PLACEHOLDER = (
    "Words of the kind that an explanation may name, in a sentence of about the usual length."
)
"""Stands for an explanation still to come where its cost is planned."""


@dataclass(frozen=True)
class Planned:
    """Requests of one score; token numbers are estimates, and those on disk cost none."""

    requests: int = 0
    """To be sent, if every explanation still to come can be parsed and nothing is tried twice."""
    cached: int = 0
    """Answered on disk already."""
    not_asked: int = 0
    """For want of an explanation, which failed before."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """As long as good answers are."""
    limit_tokens: int = 0
    """As long as answers may be: what budgets hold back."""

    def __add__(self, other: "Planned") -> "Planned":
        mine, theirs = vars(self), vars(other)
        return Planned(**{name: mine[name] + theirs[name] for name in mine})


def dry_run(
    llm: Llm,
    scores: Iterable[Asked],
    collected: Collected | None = None,
    found: Fragments | None = None,
) -> dict[str, Planned]:
    """Return what each score of one member would cost, by name; nothing is sent.

    Detection and fuzzing (of `collected`) share their explanations, "explanation"; simulation (of `found`) has its own.
    """
    out: dict[str, Planned] = {}
    wanted = set(scores)
    if collected is not None and wanted & {"detection", "fuzzing"}:
        requests = explanation_requests(collected)
        out["explanation"] = _planned(llm, [*requests.values()])
        texts = _planned_texts(llm, requests)
        for kind in ("detection", "fuzzing"):
            if kind in wanted:
                build = partial(judging_request, kind, cfg=llm.cfg)
                asked = requests_about(batches(kind, collected, llm.cfg), texts, build)
                out[kind] = _planned(llm, asked)
    if found is not None and "simulation" in wanted:
        requests = explanation_requests(found)
        texts = _planned_texts(llm, requests)
        out["simulation explanation"] = _planned(llm, [*requests.values()])
        build = partial(simulation_request, cfg=llm.cfg)
        out["simulation"] = _planned(llm, requests_about(cases(found), texts, build))
    return out


def _planned_texts(llm: Llm, requests: dict[int, Request]) -> dict[int, str]:
    """Return each latent's explanation: on disk, or a placeholder; none where it failed before."""
    out: dict[int, str] = {}
    for latent, request in requests.items():
        answer = llm.peek(request)
        if answer is None:
            out[latent] = f"{PLACEHOLDER} {latent}"
        elif answer.state == "answered":
            with suppress(Unparsed):
                out[latent] = parse_explanation(answer)
    return out


def _planned(llm: Llm, requests: Sequence[Request | None]) -> Planned:
    unique = {llm.key(request): request for request in requests if request is not None}
    new = [request for request in unique.values() if llm.peek(request) is None]
    return Planned(
        requests=len(new),
        cached=len(unique) - len(new),
        not_asked=sum(request is None for request in requests),
        prompt_tokens=sum(request.estimated_tokens for request in new),
        completion_tokens=sum(request.expected_tokens for request in new),
        limit_tokens=sum(request.max_tokens + llm.cfg.thinking_tokens for request in new),
    )

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

import heapq
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from wsae.acts.tokens import TokenTable
from wsae.core.errors import UserError
from wsae.core.progress import Progress, quiet
from wsae.core.seeds import mix64, seed_for
from wsae.evals.autointerp.documents import Documents, documents_of
from wsae.evals.autointerp.llm.client import Unparsed, ask_all, said
from wsae.evals.autointerp.llm.config import FragmentConfig, LlmConfig
from wsae.evals.autointerp.llm.detect import (
    LEVELS,
    Explained,
    Explanation,
    Tokens,
    ask_explanations,
    explanation_request,
    window_tokens,
)
from wsae.evals.autointerp.llm.types import Answer, AnswerTally, AnswerToken, Llm, Request, filled
from wsae.evals.autointerp.reservoirs import priority
from wsae.evals.autointerp.windows import Shown, Windows, cut_windows
from wsae.evals.data import HeldOut
from wsae.evals.latents import Entries
from wsae.sae import SparseAutoencoder

# Where each document's fragment lies, found as the rows go by.


class Placed(NamedTuple):
    """The rows of a chunk that lie in fragments, and the fragments that get no more rows."""

    rows: Int64[np.ndarray, " rows"]
    fragment: Int64[np.ndarray, " rows"]
    offset: Int64[np.ndarray, " rows"]
    closed: Int64[np.ndarray, " closed"]


class _Fragment(NamedTuple):
    seq: int
    start: int
    document: int


class Placer:
    """One fragment per document, in its first part of a sequence that is long enough.

    Uniform over the starts there, by a hash of the document, so that it does not depend on how the rows are split.
    """

    def __init__(self, documents: Documents, cfg: FragmentConfig) -> None:
        self.width, self._limit = cfg.width, cfg.limit
        self._documents = documents
        self._key = seed_for(cfg.seed, "fragments")
        self._all: list[_Fragment] = []
        self._settled = -1
        self._seq, self._pos = -1, -1
        self._map = np.zeros(0, dtype=np.int64)
        self._n_closed = 0

    @property
    def n(self) -> int:
        """Complete fragments so far."""
        return self._n_closed

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self._n_closed >= self._limit

    def document(self, fragment: int) -> int:
        """Return the document of a fragment."""
        return self._all[fragment].document

    def place(self, seq: Int64[np.ndarray, " rows"], pos: Int64[np.ndarray, " rows"]) -> Placed:
        """Place the next rows."""
        fragment = np.full(len(seq), -1)
        cuts = np.flatnonzero(np.diff(seq)) + 1
        for rows in np.split(np.arange(len(seq)), cuts) if len(seq) else ():
            self._enter(int(seq[rows[0]]))
            fragment[rows] = self._map[pos[rows]]
            self._pos = int(pos[rows[-1]])
        inside = np.flatnonzero(fragment >= 0)
        starts = np.array([self._all[f].start for f in fragment[inside].tolist()], dtype=np.int64)
        closed = np.arange(self._n_closed, self._before(self._seq))
        self._n_closed += len(closed)
        return Placed(inside, fragment[inside], pos[inside] - starts, closed)

    def last(self) -> Int64[np.ndarray, " closed"]:
        """Return the fragments still open after the last row, without one that may be incomplete."""
        whole = [f for f in self._all[self._n_closed :] if f.start + self.width <= self._pos + 1]
        closed = np.arange(self._n_closed, self._n_closed + len(whole))
        self._n_closed += len(closed)
        return closed

    def windows(self, number: Int64[np.ndarray, " n"], table: TokenTable) -> Windows:
        """Return fragments as windows."""
        chosen = [self._all[i] for i in number.tolist()]
        seq, start, document = np.array(chosen, dtype=np.int64).reshape(len(chosen), 3).T
        return cut_windows(table, seq, start, document, self.width)

    def _before(self, seq: int) -> int:
        """Return how many fragments lie in sequences before this one, at most the limit."""
        n = len(self._all)
        while n and self._all[n - 1].seq >= seq:
            n -= 1
        return max(n, self._n_closed)

    def _enter(self, seq: int) -> None:
        """Choose the fragments of a sequence when its first row comes."""
        if seq == self._seq:
            return
        if seq < self._seq:
            raise UserError("the held-out rows are not in the text's order; harvest the data again")
        self._seq = seq
        length = self._documents.seq_len
        place = np.arange(length)
        spans = self._documents.of(np.full(length, seq), place, 1)
        numbers = spans.first[: int(spans.length[0])]
        self._map = np.full(length, -1)
        for document in np.unique(numbers[numbers > self._settled]).tolist():
            first, last = np.flatnonzero(numbers == document)[[0, -1]].tolist()
            room = last + 1 - first - self.width
            if room < 0 or len(self._all) >= self._limit:
                continue
            hashed = mix64(np.array([document], dtype=np.uint64), self._key)
            start = first + int(hashed[0]) % (room + 1)
            self._map[start : start + self.width] = len(self._all)
            self._all.append(_Fragment(seq, start, document))
            self._settled = document


# Fragments for simulation, as in the paper's Appendix B.4: one random stretch of 64 tokens from
# each document.
#
# A document's fragment lies in its first part of a sequence that is long enough; shorter documents
# have none. Tokens whose rows were left out of the data (attention sinks, special tokens) count as
# silent. Memory: per member latents x (20 + 15) x width activations, and those of the fragments in
# one batch, whatever the number of tokens.

N_TOP = 20
"""Fragments of largest activation, from which explaining and top scoring ones are dealt; fewer varying: skipped."""
EXPLAIN, TOP = slice(0, N_TOP, 4), slice(2, N_TOP, 4)
"""Their ranks: 0, 4, 8, 12, 16 explain, 2, 6, 10, 14, 18 are scored (Cunningham et al.'s code)."""
N_RANDOM = 5
"""Random varying fragments scored, none of the ten above."""
_RESERVOIR = N_RANDOM + 2 * N_RANDOM
FEW = "fewer than 20 varying fragments"


@dataclass(frozen=True)
class LatentFragments:
    """One latent's fragments by role, all from different documents."""

    latent: int
    density: float
    """Share of the fragments' tokens on which it fires."""
    explain: Shown
    top: Shown
    random: Shown


@dataclass(frozen=True)
class Fragments:
    """One member's latents with their fragments, and those skipped."""

    windows: Windows
    latents: list[LatentFragments]
    skipped: dict[str, int] = field(default_factory=dict)
    """Reason -> latents skipped for it."""
    n_fragments: int = 0


def fragments(
    source: HeldOut,
    members: dict[str, dict[str, SparseAutoencoder]],
    latents: dict[str, dict[str, Int64[Tensor, " latents"]]],
    cfg: FragmentConfig,
    progress: Progress = quiet,
) -> dict[str, dict[str, Fragments]]:
    """Return the fragments of some latents of every member, from one pass: hook -> member -> fragments.

    Raises UserError when the data have no text, no such hook, or no document of `width` tokens.
    """
    for hook in members:
        if hook not in source.hooks:
            raise UserError(f"the data have no hook {hook!r}; they have {', '.join(source.hooks)}")
    placer = Placer(documents_of(source), cfg)
    keepers = {
        (hook, name): _Keeper(sae, latents[hook][name], cfg)
        for hook, saes in members.items()
        for name, sae in saes.items()
    }
    with torch.inference_mode(), progress("fragments", None, "rows") as tick:
        for chunk in source.heldout(cfg.batch_size):
            seq, pos = chunk.seq.numpy().astype(np.int64), chunk.pos.numpy().astype(np.int64)
            placed = placer.place(seq, pos)
            rows = torch.from_numpy(placed.rows)
            for (hook, _), keeper in keepers.items():
                keeper.update(chunk.x[hook][rows], placed.fragment, placed.offset)
            _close(keepers, placer, placed.closed)
            tick(len(seq))
            if placer.full:
                break
    _close(keepers, placer, placer.last())
    if not placer.n:
        raise UserError(
            f"no held-out document has {cfg.width} tokens in one sequence; lower the fragments' width"
        )
    table = source.tokens()
    assert table is not None
    return _results(members, keepers, placer, table)


def _close(
    keepers: dict[tuple[str, str], "_Keeper"], placer: Placer, closed: Int64[np.ndarray, " n"]
) -> None:
    for keeper in keepers.values():
        keeper.close(closed, placer.document)


class _KeptFragment(NamedTuple):
    """A fragment's rank (larger is better), number, and activations; compared by rank and number only."""

    rank: tuple[float | int, int]
    fragment: int
    acts: Float32[np.ndarray, " width"]


class _Keeper:
    """The strongest and some random varying fragments of each of a member's latents."""

    def __init__(
        self, sae: SparseAutoencoder, latents: Int64[Tensor, " latents"], cfg: FragmentConfig
    ) -> None:
        self._sae, self._cfg = sae, cfg
        self.latents = latents.tolist()
        self._slot = np.full(sae.cfg.d_sae, -1)
        self._slot[latents.numpy()] = np.arange(len(latents))
        self._open: dict[int, Float32[np.ndarray, "width latents"]] = {}
        self.top: list[list[_KeptFragment]] = [[] for _ in self.latents]
        self.random: list[list[_KeptFragment]] = [[] for _ in self.latents]
        self.varying = np.zeros(len(latents), dtype=np.int64)
        self.active = np.zeros(len(latents), dtype=np.int64)

    def update(
        self,
        x: Tensor,
        fragment: Int64[np.ndarray, " rows"],
        offset: Int64[np.ndarray, " rows"],
    ) -> None:
        """Add rows that lie in fragments."""
        if not len(fragment):
            return
        entries = Entries(self._sae.encode_code(x.to(self._sae.W_dec.device)))
        slot = self._slot[entries.indices.numpy()]
        known = slot >= 0
        row, slot = entries.rows.numpy()[known], slot[known]
        value = entries.values.numpy()[known].astype(np.float32)
        shape = (self._cfg.width, len(self.latents))
        for number in np.unique(fragment).tolist():
            acts = self._open.setdefault(number, np.zeros(shape, dtype=np.float32))
            here = fragment[row] == number
            acts[offset[row[here]], slot[here]] = value[here]

    def close(self, closed: Int64[np.ndarray, " n"], document: Callable[[int], int]) -> None:
        """Offer complete fragments to every latent."""
        for number in closed.tolist():
            acts = self._open.pop(number, None)
            if acts is None:
                continue  # every row of it was left out of the data
            peak = acts.max(0)
            self.active += (acts > 0).sum(0)
            slots = (peak != acts.min(0)).nonzero()[0]
            self.varying[slots] += 1
            hashes = priority(
                self._cfg.seed,
                np.full(len(slots), document(number), dtype=np.int64),
                np.array(self.latents, dtype=np.int64)[slots],
            )
            for slot, rank in zip(slots.tolist(), hashes.tolist(), strict=True):
                column = acts[:, slot]
                _offer(self.top[slot], float(peak[slot]), number, column, N_TOP)
                _offer(self.random[slot], -rank, number, column, _RESERVOIR)


def _offer(
    heap: list[_KeptFragment], strength: float | int, number: int, acts: np.ndarray, size: int
) -> None:
    """Keep a fragment if it is among the `size` best so far; of equal ones the earlier."""
    rank = (strength, -number)
    if len(heap) < size:
        heapq.heappush(heap, _KeptFragment(rank, number, acts.copy()))
    elif rank > heap[0].rank:
        heapq.heapreplace(heap, _KeptFragment(rank, number, acts.copy()))


def _dealt(keeper: _Keeper, slot: int) -> tuple[list[_KeptFragment], ...]:
    """Return a latent's explaining, top and random fragments."""
    top = sorted(keeper.top[slot], key=lambda kept: kept.rank, reverse=True)
    explain, scored = top[EXPLAIN], top[TOP]
    used = {kept.fragment for kept in (*explain, *scored)}
    ranked = sorted(keeper.random[slot], key=lambda kept: kept.rank, reverse=True)
    random = [kept for kept in ranked if kept.fragment not in used]
    return explain, scored, random[:N_RANDOM]


def _results(
    members: dict[str, dict[str, SparseAutoencoder]],
    keepers: dict[tuple[str, str], _Keeper],
    placer: Placer,
    table: TokenTable,
) -> dict[str, dict[str, Fragments]]:
    dealt = {
        key: {j: _dealt(k, i) for i, j in enumerate(k.latents) if k.varying[i] >= N_TOP}
        for key, k in keepers.items()
    }
    parts = [p for roles in dealt.values() for role in roles.values() for p in role]
    number = np.unique(np.array([k.fragment for part in parts for k in part], dtype=np.int64))
    windows = placer.windows(number, table)
    out: dict[str, dict[str, Fragments]] = {hook: {} for hook in members}
    for (hook, name), keeper in keepers.items():
        tokens = placer.n * placer.width
        found = [
            LatentFragments(
                j,
                float(keeper.active[keeper.latents.index(j)]) / tokens,
                *(_shown(part, number, placer.width) for part in roles),
            )
            for j, roles in dealt[hook, name].items()
        ]
        few = len(keeper.latents) - len(found)
        out[hook][name] = Fragments(windows, found, {FEW: few} if few else {}, placer.n)
    return out


def _shown(kept: list[_KeptFragment], number: Int64[np.ndarray, " n"], width: int) -> Shown:
    window = np.searchsorted(number, np.array([k.fragment for k in kept], dtype=np.int64))
    acts = np.array([k.acts for k in kept], dtype=np.float32).reshape(len(kept), width)
    return Shown(window, acts)


# A simulator's written reply: one line per token, and the expected value of each number from the
# log-probabilities.

_NUMBERS = {str(v): v for v in range(11)}


class WrittenActivation(NamedTuple):
    """A written activation, and where it begins in the answer's UTF-8."""

    value: int
    place: int


def rows_of(answer: Answer, n: int) -> list[WrittenActivation]:
    """Return the activations of n lines `number, tab, token, tab, activation`, in order; raises Unparsed."""
    text = said(answer)
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
        if i == len(starts) or not _begins(answer.tokens[i], row.value):
            raise Unparsed("numbers are not tokens of their own, so they have no probabilities")
        following = answer.tokens[i + 1] if i + 1 < len(starts) else None
        out.append(_expected(answer.tokens[i], following))
    return out


def _begins(token: AnswerToken, value: int) -> bool:
    text = token.text.strip()
    return text == str(value) or (text == "1" and value == 10)


def _expected(token: AnswerToken, following: AnswerToken | None) -> float:
    mass = dict.fromkeys(_NUMBERS, 0.0)
    for text, logprob in token.top.items():
        if text.strip() in mass:
            mass[text.strip()] += math.exp(logprob)
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
        else Explained(explanations, AnswerTally(), llm.name)
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

"""Surprisal detection: an explanation that fits a context makes its text more likely to a language model.

s(c) = [log P(c | explanation) - log P(c | nothing said)] / n_tokens(c), nats per token. The explanation is a latent's
label in words, or where there is none some of its explaining windows, put into a template (`surprisal.json`). "Nothing
said" is the same template with an empty word, or with windows of many other latents: a prompt of the same form, so that
the difference is due to what is said. Against a bare text instead, the mean AUC on hand-made features is lower
(docs/benchmarks.md).
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from jaxtyping import Int64

from wsae.core.progress import Progress, quiet
from wsae.core.seeds import seed_for
from wsae.evals.autointerp.metrics import LatentScore, Verdicts, judge
from wsae.evals.autointerp.reader import Reader
from wsae.evals.autointerp.windows import Collected, LatentContexts
from wsae.evals.data import Language

TEMPLATES: dict[str, str] = json.loads(
    files("wsae.evals.autointerp").joinpath("surprisal.json").read_text(encoding="utf-8")
)
N_SHOWN = 8
"""Explaining windows that the model reads, at most: every other one, the strongest first."""
N_NOTHING = 2
"""Prompts of other latents' windows whose log-probabilities are averaged: each alone favours what it is about."""
N_REFERENCE = 20
"""Explaining windows of other latents that help to set a threshold."""
MAX_WORDS = 1000
"""Characters of a label that are read; an explanation is a sentence or two."""


def surprisal_scores(
    collected: Collected,
    language: Language | Reader,
    explanations: Mapping[int, str] | None = None,
    latents: Collection[int] | None = None,
    seed: int = 0,
    progress: Progress = quiet,
) -> list[LatentScore]:
    """Return the scores of `latents` (none: all), explained by `explanations` (latent -> words) where there are any.

    A context counts as active above a threshold that no scored context sets: half-way between the mean score of the
    explaining windows that the model did not read and the median one of 20 explaining windows of other latents. One
    `Reader` for several members reads each window after "nothing said" once.
    """
    reader = language if isinstance(language, Reader) else Reader(language)
    asked = _Asked(reader, collected, seed)
    chosen = [one for one in collected.latents if latents is None or one.latent in latents]
    out = []
    with progress("surprisal", len(chosen), "latents") as tick:
        for one in chosen:
            out.append(asked.score(one, (explanations or {}).get(one.latent)))
            tick(1)
    return out


@dataclass(frozen=True)
class _Asked:
    """What scoring a latent needs beside its contexts."""

    reader: Reader
    collected: Collected
    seed: int

    def score(self, one: LatentContexts, words: str | None) -> LatentScore:
        """Return one latent's score."""
        explain = one.explain.window
        shown, rest = (explain[:0], explain) if words is not None else split_shown(explain)
        reference = self._drawn(self._without(one), N_REFERENCE, "reference", one.latent)
        groups = (rest, reference, one.positive.window, one.negative.window, one.hard.window)
        texts = self._texts(np.concatenate(groups))
        if words is not None:
            said, nothing = words_prefix(words), [words_prefix(TEMPLATES["nothing"])]
        else:
            said, nothing = windows_prefix(self._texts(shown)), self._nothing(one, len(shown))
        before = np.mean([self.reader.remembered(prefix, texts) for prefix in nothing], axis=0)
        gains = self.reader.read(said, texts) - before
        ends = np.cumsum([len(group) for group in groups])[:-1]
        mine, foreign, *verdicts = np.split(gains, ends)
        mine, foreign = mine[~np.isnan(mine)], foreign[~np.isnan(foreign)]
        threshold = (mine.mean() + np.median(foreign)) / 2 if len(mine) and len(foreign) else np.nan
        return judge(one.latent, one.density, Verdicts(*verdicts), float(threshold))

    def _nothing(self, one: LatentContexts, n: int) -> list[str]:
        """Return prompts of windows of the half of the latents that `one` is not in, so that none is its own."""
        order = {other.latent: place for place, other in enumerate(self.collected.latents)}
        half = 1 - order[one.latent] % 2
        others = [other for other in self.collected.latents if order[other.latent] % 2 == half]
        drawn = (self._drawn(others, n, "nothing", half, k) for k in range(N_NOTHING))
        return [windows_prefix(self._texts(windows)) for windows in drawn]

    def _without(self, one: LatentContexts) -> list[LatentContexts]:
        return [other for other in self.collected.latents if other is not one]

    def _drawn(
        self, latents: list[LatentContexts], n: int, *names: str | int
    ) -> Int64[np.ndarray, " n"]:
        """Return explaining windows of n latents, one of each (more where there are fewer latents)."""
        rng = np.random.default_rng(seed_for(self.seed, "surprisal", *names))
        shuffled = [
            rng.permutation(latents[i].explain.window) for i in rng.permutation(len(latents))
        ]
        rounds = [one[k] for k in range(n) for one in shuffled if k < len(one)]
        return np.array(list(dict.fromkeys(rounds))[:n], dtype=np.int64)

    def _texts(self, windows: Int64[np.ndarray, " n"]) -> list[str]:
        return [self.collected.windows.text(int(window)) for window in windows]


def split_shown(
    explain: Int64[np.ndarray, " n"],
) -> tuple[Int64[np.ndarray, " shown"], Int64[np.ndarray, " rest"]]:
    """Return the explaining windows that the model reads and those that it does not."""
    shown = explain[::2][:N_SHOWN]
    return shown, np.setdiff1d(explain, shown)


def words_prefix(words: str) -> str:
    """Return what precedes a context explained in words."""
    return _filled("words", "{explanation}", words.strip().rstrip(".")[:MAX_WORDS])


def windows_prefix(windows: Sequence[str]) -> str:
    """Return what precedes a context explained by other windows."""
    return "".join(_filled("window", "{window}", one) for one in windows) + TEMPLATES["last"]


def _filled(name: str, gap: str, text: str) -> str:
    """Put text into a template; the text is data, so braces in it mean nothing."""
    before, _, after = TEMPLATES[name].partition(gap)
    return before + text + after

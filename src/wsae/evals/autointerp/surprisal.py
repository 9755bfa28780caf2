"""Surprisal detection: an explanation that fits a context makes its text more likely to a language model.

s(c) = [log P(c | explanation) - log P(c | baseline)] / n_tokens(c), nats per token, where the explanation is a latent's
label in words, or where there is none some of its explaining windows, put into a template (`surprisal.json`).
"""

import json
from collections.abc import Collection, Mapping, Sequence
from importlib.resources import files

import numpy as np
from jaxtyping import Float64

from wsae.core.progress import Progress, quiet
from wsae.core.seeds import seed_for
from wsae.evals.autointerp.metrics import LatentScore, Verdicts, judge
from wsae.evals.autointerp.reader import Causal, Reader
from wsae.evals.autointerp.windows import Collected, LatentContexts

N_REFERENCE = 20
"""Explaining windows of other latents that help to set a threshold."""
MAX_WORDS = 1000
"""Characters of a label that are read; an explanation is a sentence or two."""


def surprisal_scores(
    collected: Collected,
    language: Causal | Reader,
    explanations: Mapping[int, str] | None = None,
    latents: Collection[int] | None = None,
    seed: int = 0,
    progress: Progress = quiet,
) -> list[LatentScore]:
    """Return the scores of `latents` (none: all), explained by `explanations` (latent -> words) where there are any.

    Without words every other explaining window is shown to the model. A context counts as active above a threshold
    that no scored context sets: half-way between the mean score of the explaining windows that were not shown (with
    words: all of them) and the median one of 20 explaining windows of other latents.
    """
    reader = language if isinstance(language, Reader) else Reader(language)
    chosen = [one for one in collected.latents if latents is None or one.latent in latents]
    out = []
    with progress("surprisal", len(chosen), "latents") as tick:
        for one in chosen:
            words = (explanations or {}).get(one.latent)
            out.append(_score(reader, collected, one, words, seed))
            tick(1)
    return out


def _score(
    reader: Reader, collected: Collected, one: LatentContexts, words: str | None, seed: int
) -> LatentScore:
    text = collected.windows.text
    shown, rest = (
        split_shown(one.explain.window) if words is None else ([], one.explain.window.tolist())
    )
    prefix = windows_prefix([text(w) for w in shown]) if words is None else words_prefix(words)
    groups = [
        rest,
        _reference(collected, one, seed),
        *(role.window.tolist() for role in (one.positive, one.negative, one.hard)),
    ]
    gains = _gains(reader, prefix, [[text(w) for w in group] for group in groups])
    mine, foreign = (values[~np.isnan(values)] for values in gains[:2])
    threshold = (mine.mean() + np.median(foreign)) / 2 if len(mine) and len(foreign) else np.nan
    return judge(one.latent, one.density, Verdicts(*gains[2:]), float(threshold))


def _gains(
    reader: Reader, prefix: str, groups: Sequence[Sequence[str]]
) -> list[Float64[np.ndarray, " _"]]:
    """Return s(c) of every text, group by group; one pass of the prefix for all."""
    texts = [text for group in groups for text in group]
    gains = reader.read(prefix, texts) - reader.remembered(TEMPLATES["baseline"], texts)
    return np.split(gains, np.cumsum([len(group) for group in groups])[:-1])


def _reference(collected: Collected, one: LatentContexts, seed: int) -> list[int]:
    """Return explaining windows of other latents, drawn at random."""
    others = [other.explain.window for other in collected.latents if other is not one]
    pool = np.setdiff1d(np.concatenate(others), one.explain.window) if others else np.zeros(0, int)
    rng = np.random.default_rng(seed_for(seed, "surprisal", "reference", one.latent))
    return rng.permutation(pool)[:N_REFERENCE].tolist()


def split_shown(windows: np.ndarray) -> tuple[list[int], list[int]]:
    """Return the explaining windows that the model reads (every other one, the strongest first) and the rest."""
    return windows[::2].tolist(), windows[1::2].tolist()


def words_prefix(words: str) -> str:
    """Return what precedes a context explained in words."""
    return _filled("label", "{explanation}", words.strip()[:MAX_WORDS])


def windows_prefix(windows: Sequence[str]) -> str:
    """Return what precedes a context explained by other windows."""
    return "".join(_filled("window", "{window}", one) for one in windows) + TEMPLATES["last"]


def _filled(name: str, gap: str, text: str) -> str:
    """Put text into a template; the text is data, so braces in it mean nothing."""
    before, _, after = TEMPLATES[name].partition(gap)
    return before + text + after


TEMPLATES: dict[str, str] = json.loads(
    files("wsae.evals.autointerp").joinpath("surprisal.json").read_text(encoding="utf-8")
)

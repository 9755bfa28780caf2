"""Collected contexts made by hand: sentences of known features, without a model or an SAE."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from wsae.evals.interpret.windows import Collected, LatentContexts, Shown, Windows

FEATURES = Path(__file__).with_name("interpret_features.json")


def sentences() -> tuple[dict[str, list[str]], list[str]]:
    """Return the hand-made features with their sentences, and sentences that belong to none."""
    data = json.loads(FEATURES.read_text())
    return data["features"], data["distractors"]


def windows(texts: Sequence[str]) -> Windows:
    """Return one window per text, its tokens the words with their spaces."""
    split = [[(" " if i else "") + word for i, word in enumerate(t.split(" "))] for t in texts]
    names = {
        word: place for place, word in enumerate(sorted({w for words in split for w in words}))
    }
    ids = np.full((len(texts), max(map(len, split))), -1, dtype=np.int32)
    for row, words in enumerate(split):
        ids[row, : len(words)] = [names[word] for word in words]
    place, strings = np.arange(len(texts)), list(names)
    zeros = np.zeros_like(place)
    return Windows(ids, place, zeros, place, lambda tokens: [strings[int(i)] for i in tokens])


def shown(rows: Sequence[int], width: int, value: float = 0.0) -> Shown:
    """Return windows on whose every token the latent has one activation."""
    acts = np.full((len(rows), width), value, dtype=np.float32)
    return Shown(np.asarray(rows, dtype=np.int64), acts)


def features(n_explain: int = 6, turn: bool = False) -> tuple[Collected, dict[int, str]]:
    """Return the hand-made features as latents, and what they are called.

    Each is explained by its first `n_explain` sentences (the last ones if `turn`) and scored on the others; negatives
    are the sentences of no feature, hard negatives the scoring sentences of the other features.
    """
    named, distractors = sentences()
    texts = [text for group in named.values() for text in group] + distractors
    made = windows(texts)
    starts = np.cumsum([0, *map(len, named.values())])
    groups = [
        np.arange(a, b)[:: -1 if turn else 1] for a, b in zip(starts, starts[1:], strict=False)
    ]
    width, rest = made.ids.shape[1], np.arange(starts[-1], len(texts))
    latents = []
    for latent, group in enumerate(groups):
        others = np.concatenate([g[n_explain:] for k, g in enumerate(groups) if k != latent])
        roles = (group[:n_explain], group[n_explain:], rest, others)
        explain, positive, negative, hard = (
            shown(rows, width, value)
            for rows, value in zip(roles, (1.0, 1.0, 0.0, 0.0), strict=True)
        )
        latents.append(LatentContexts(latent, 0.01, 1.0, explain, positive, negative, hard))
    return Collected(made, latents, {}), dict(enumerate(named))

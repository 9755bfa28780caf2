"""Surprisal detection: an explanation that fits a context makes its text more likely to a language model.

s(c) = [log P(c | explanation) - log P(c | nothing said)] / n_tokens(c), nats per token. The explanation is a latent's
label in words, or where there is none some of its explaining windows, put into a template (`surprisal.json`). "Nothing
said" is the same template with an empty word, or with windows of many other latents: a prompt of the same form, so that
the difference is due to what is said. Against a bare text instead, the mean AUC on hand-made features is lower
(docs/benchmarks.md).

The model reads many texts after one prefix: the prefix goes through it once, and its keys and values are repeated for a
batch of texts. Logits over the vocabulary exist for one batch only and are reduced to the log-probability of the token
that follows.
"""

import copy
import json
from collections.abc import Collection, Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from wsae.acts.loading import input_device, refuse_unable_to_continue
from wsae.acts.stream import Language
from wsae.core.progress import Progress, quiet
from wsae.core.seeds import seed_for
from wsae.evals.interpret.summary import LatentScore, Verdicts, half_way, judge
from wsae.evals.interpret.windows import Collected, LatentContexts

LOGITS = 1 << 25
"""Logits held at once (4 bytes each, twice: 268 MB)."""
KEYS = 1 << 13
"""Tokens whose keys and values are held at once, prefixes included: 377 MB for SmolLM2-135M in fp32."""


class PrefixReader:
    """Reads texts after prefixes, and remembers what each distinct text costs after a fixed one."""

    def __init__(self, language: Language) -> None:
        self._model: Any = language.model
        self._tokenizer: Any = language.tokenizer
        self._device = input_device(self._model)
        refuse_unable_to_continue(self._model)
        self._remembered: dict[tuple[str, str], float] = {}
        limit = getattr(self._model.config, "max_position_embeddings", None)
        self._limit = limit if isinstance(limit, int) else 1 << 30
        empty = self._tokenizer([""], add_special_tokens=True)["input_ids"][0]
        bos = self._tokenizer.bos_token_id
        self._lead = [bos] if bos is not None and bos in empty else []

    def remembered(self, prefix: str, texts: Sequence[str]) -> Float64[np.ndarray, " texts"]:
        """Return `read`, each distinct text read once in the reader's life; for prefixes that come back."""
        new = [text for text in dict.fromkeys(texts) if (prefix, text) not in self._remembered]
        for text, value in zip(new, self.read(prefix, new), strict=True):
            self._remembered[prefix, text] = float(value)
        return np.array([self._remembered[prefix, text] for text in texts], dtype=np.float64)

    @torch.inference_mode()
    def read(self, prefix: str, texts: Sequence[str]) -> Float64[np.ndarray, " texts"]:
        """Return (1 / n) sum_{t = 1..n} log P(x_t | prefix, x_<t) of each text, nats per token; NaN without tokens.

        Text and prefix are cut into tokens separately. A prefix too long for the model loses its beginning.
        """
        out = np.full(len(texts), np.nan)
        if not texts:
            return out
        ids = self._ids(texts)
        order = sorted((i for i, one in enumerate(ids) if one), key=lambda i: -len(ids[i]))
        if not order:
            return out
        head = self._lead + self._ids([prefix])[0]
        head = head[-max(1, self._limit - len(ids[order[0]])) :]
        first = self._model(torch.tensor([head], device=self._device), use_cache=True)
        start = 0
        while start < len(order):
            width = len(ids[order[start]])
            size = min(LOGITS // (width * first.logits.shape[-1]), KEYS // (len(head) + width))
            batch = order[start : start + max(1, size)]
            out[batch] = self._read_batch(first, [ids[i] for i in batch])
            start += len(batch)
        return out

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    def _read_batch(self, first: Any, ids: list[list[int]]) -> Float64[np.ndarray, " batch"]:
        """Return the means over each row's tokens; rows are padded on the right, where causal models do not look."""
        width = len(ids[0])
        tokens = torch.tensor([one + [0] * (width - len(one)) for one in ids], device=self._device)
        lengths = torch.tensor([len(one) for one in ids], device=self._device)
        total = _log_probability(first.logits[:, -1:].expand(len(ids), 1, -1), tokens[:, :1])
        if width > 1:
            cache = copy.deepcopy(first.past_key_values)
            cache.batch_repeat_interleave(len(ids))
            logits = self._model(tokens[:, :-1], past_key_values=cache, use_cache=True).logits
            total = torch.cat([total, _log_probability(logits, tokens[:, 1:])], dim=1)
        real = torch.arange(width, device=self._device) < lengths[:, None]
        return ((total.double() * real).sum(1) / lengths).cpu().numpy()


def _log_probability(logits: Tensor, targets: Tensor) -> Tensor:
    """Return log softmax(logits)[target] = logit - log sum exp, row by row so that no second copy is held."""
    rows = []
    for row, target in zip(logits, targets, strict=True):
        row = row.float()
        rows.append(row.gather(1, target[:, None])[:, 0] - row.logsumexp(1))
    return torch.stack(rows)


TEMPLATES: dict[str, str] = json.loads(
    files("wsae.evals.interpret").joinpath("surprisal.json").read_text(encoding="utf-8")
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
    language: Language | PrefixReader,
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
    reader = language if isinstance(language, PrefixReader) else PrefixReader(language)
    chosen = [one for one in collected.latents if latents is None or one.latent in latents]
    out = []
    with progress("surprisal", len(chosen), "latents") as tick:
        for one in chosen:
            out.append(_scored(reader, collected, one, (explanations or {}).get(one.latent), seed))
            tick(1)
    return out


def _scored(
    reader: PrefixReader, collected: Collected, one: LatentContexts, words: str | None, seed: int
) -> LatentScore:
    def texts(windows: Int64[np.ndarray, " n"]) -> list[str]:
        return [collected.windows.text(window) for window in windows.tolist()]

    explain = one.explain.window
    shown, rest = (explain[:0], explain) if words is not None else split_shown(explain)
    others = [other for other in collected.latents if other is not one]
    reference = _drawn(others, N_REFERENCE, seed, "reference", one.latent)
    groups = [rest, reference, *(role.window for role in one.scored())]
    if words is not None:
        said, nothing = words_prefix(words), [words_prefix(TEMPLATES["nothing"])]
    else:  # windows of the half of the latents that this one is not in, so that none is its own
        half = 1 - [other is one for other in collected.latents].index(True) % 2
        others = collected.latents[half::2]
        drawn = (_drawn(others, len(shown), seed, "nothing", half, k) for k in range(N_NOTHING))
        said, nothing = windows_prefix(texts(shown)), [windows_prefix(texts(one)) for one in drawn]
    read = texts(np.concatenate(groups))
    before = np.mean([reader.remembered(prefix, read) for prefix in nothing], axis=0)
    ends = np.cumsum([len(group) for group in groups])[:-1]
    mine, foreign, *verdicts = np.split(reader.read(said, read) - before, ends)
    return judge(one.latent, one.density, Verdicts(*verdicts), half_way(mine, foreign))


def _drawn(
    latents: list[LatentContexts], n: int, seed: int, *names: str | int
) -> Int64[np.ndarray, " n"]:
    """Return explaining windows of n latents, one of each (more where there are fewer latents)."""
    rng = np.random.default_rng(seed_for(seed, "surprisal", *names))
    shuffled = [rng.permutation(latents[i].explain.window) for i in rng.permutation(len(latents))]
    rounds = [one[k] for k in range(n) for one in shuffled if k < len(one)]
    return np.array(list(dict.fromkeys(rounds))[:n], dtype=np.int64)


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

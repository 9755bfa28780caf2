"""A causal language model as a reader: log P(text | prefix) of many texts after one prefix.

The prefix goes through the model once; its keys and values are repeated for a batch of texts. Logits over the
vocabulary exist for one batch only and are reduced to the log-probability of the token that follows.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from wsae.acts.loading import refuse_unable_to_continue
from wsae.evals.data import Language

LOGITS = 1 << 25
"""Logits held at once (4 bytes each, twice: 268 MB)."""
KEYS = 1 << 13
"""Tokens whose keys and values are held at once, prefixes included: 377 MB for SmolLM2-135M in fp32."""


class Reader:
    """Reads texts after prefixes, and remembers what each distinct text costs after a fixed one."""

    def __init__(self, language: Language) -> None:
        self._model: Any = language.model
        self._tokenizer: Any = language.tokenizer
        self._device = next(self._model.parameters()).device
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
            size = self._size(len(head), len(ids[order[start]]), first.logits.shape[-1])
            batch = order[start : start + size]
            out[batch] = self._read_batch(first, [ids[i] for i in batch])
            start += size
        return out

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    @staticmethod
    def _size(head: int, width: int, vocabulary: int) -> int:
        return max(1, min(LOGITS // (width * vocabulary), KEYS // (head + width)))

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

"""Token ids of sequences and what they read, without model or tokenizer."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int
from torch import Tensor

_MARKERS = frozenset(
    {
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|end|>",
        "<end_of_turn>",
        "</s>",
        "<eos>",
    }
)
"""How end-of-text tokens read, for stores that did not note their ids."""


class TokenTable:
    """Sequences of token ids [n_seq, seq_len] with their lengths (the rest is padding), and what the ids read.

    `ends` are the ids that end a document; a document may run on over sequences. Empty: every sequence is one document.
    None: nothing says where documents end.
    """

    def __init__(
        self,
        ids: Int[Tensor, "n_seq seq_len"],
        lengths: Int[Tensor, " n_seq"],
        strings: Mapping[int, str],
        ends: tuple[int, ...] | None = None,
    ) -> None:
        self.ids, self.lengths, self.ends = ids, lengths, ends
        self._strings = strings

    def decode(self, ids: Sequence[int] | np.ndarray | Tensor) -> list[str]:
        """Return each id's text, leading space included."""
        return [self._strings.get(int(i), f"<{int(i)}>") for i in ids]


def likely_ends(strings: Mapping[int, str]) -> tuple[int, ...] | None:
    """Return the ids that read like an end-of-text token, or None when none does."""
    return tuple(sorted(i for i, text in strings.items() if text.strip() in _MARKERS)) or None

"""Token ids of sequences and what they read, without model or tokenizer."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int
from torch import Tensor


class TokenTable:
    """Sequences of token ids [n_seq, seq_len] with their lengths (the rest is padding), and what the ids read."""

    def __init__(
        self,
        ids: Int[Tensor, "n_seq seq_len"],
        lengths: Int[Tensor, " n_seq"],
        strings: Mapping[int, str],
    ) -> None:
        self.ids, self.lengths = ids, lengths
        self._strings = strings

    def decode(self, ids: Sequence[int] | np.ndarray | Tensor) -> list[str]:
        """Return each id's text, leading space included."""
        return [self._strings.get(int(i), f"<{int(i)}>") for i in ids]

"""What an evaluation needs of its data: held-out rows in a fixed order, and their tokens where there are any."""

from collections.abc import Iterator
from itertools import zip_longest
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from wsae.acts.source import HeldoutRows, as_path, open_matrix
from wsae.acts.tokens import TokenTable
from wsae.core.errors import UserError


@runtime_checkable
class HeldOut(Protocol):
    """The part of an activation source that evaluation uses."""

    hooks: dict[str, int]

    def heldout(self, batch_size: int) -> Iterator[HeldoutRows]:
        """Yield every held-out row once, sequence by sequence."""
        ...

    def tokens(self) -> TokenTable | None:
        """Return the held-out sequences' tokens; None for arrays."""
        ...


@runtime_checkable
class Tokenizer(Protocol):
    """What splicing needs of a tokenizer."""

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the tokens that are not text."""
        ...


@runtime_checkable
class Language(Protocol):
    """The model behind the activations (`wsae.acts.language.LanguageModel`; not imported: it needs transformers)."""

    @property
    def model(self) -> nn.Module:
        """A causal language model."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer."""
        ...


@runtime_checkable
class Pictures(Protocol):
    """The images behind the activations (`wsae.acts.images.harvest.Gallery`; not imported: it needs Pillow)."""

    def label(self, image: int) -> str:
        """Return the name of an image's class."""
        ...

    def thumbnail(self, image: int) -> str:
        """Return a small PNG in base64; raises UserError where the image cannot be read."""
        ...


class BothSides:
    """Two sources of the same rows as one with the hooks of both: what a transcoder reads, and what it is to give."""

    def __init__(self, read: HeldOut, given: HeldOut) -> None:
        self._parts = (read, given)
        self.hooks = {**read.hooks, **given.hooks}

    def heldout(self, batch_size: int) -> Iterator[HeldoutRows]:
        """Yield the rows in order; raises UserError where one side has more of them."""
        for a, b in zip_longest(*(part.heldout(batch_size) for part in self._parts)):
            if a is None or b is None or len(a.seq) != len(b.seq):
                raise UserError(
                    f"{' and '.join(self.hooks)} have different numbers of rows; they must be of the same tokens"
                )
            yield HeldoutRows({**a.x, **b.x}, a.seq, a.pos)

    def tokens(self) -> TokenTable | None:
        """Return the tokens of what is read."""
        return self._parts[0].tokens()


class MatrixRows:
    """Activations in memory, in a file or a folder of files (`open_matrix`), all evaluated, each row by itself."""

    def __init__(self, x: object, name: str = "acts") -> None:
        self._x = open_matrix(x, str(as_path(x) or name))
        self._name = name
        self.hooks = {name: self._x.shape[1]}

    def heldout(self, batch_size: int) -> Iterator[HeldoutRows]:
        """Yield the rows in order, as fp32."""
        for start in range(0, self._x.shape[0], batch_size):
            index = np.arange(start, min(start + batch_size, self._x.shape[0]))
            seq = torch.from_numpy(index)
            yield HeldoutRows({self._name: self._x.take(index)}, seq, torch.zeros_like(seq))

    def tokens(self) -> TokenTable | None:
        """Arrays have no tokens."""
        return None

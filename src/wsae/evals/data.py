"""What an evaluation needs of its data: held-out rows in a fixed order, and their tokens where there are any."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from wsae.acts.source import Chunk
from wsae.acts.tokens import TokenTable
from wsae.core.errors import UserError


@runtime_checkable
class HeldOut(Protocol):
    """The part of an activation source that evaluation uses."""

    hooks: dict[str, int]

    def heldout(self, batch_size: int) -> Iterator[Chunk]:
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
    """The images behind the activations (`wsae.acts.images.gallery.Gallery`; not imported: it needs Pillow)."""

    def label(self, image: int) -> str:
        """Return the name of an image's class."""
        ...

    def thumbnail(self, image: int) -> str:
        """Return a small PNG in base64; raises UserError where the image cannot be read."""
        ...


class Rows:
    """An array of activations [rows, d_in], all of it evaluated; each row is a sequence of its own."""

    def __init__(
        self, x: Shaped[np.ndarray, "..."] | Float[Tensor, "..."], name: str = "acts"
    ) -> None:
        if x.ndim != 2:
            raise UserError(f"activations of shape {tuple(x.shape)}; give [rows, d_in]")
        self._x = x
        self._name = name
        self.hooks = {name: int(x.shape[1])}

    def heldout(self, batch_size: int) -> Iterator[Chunk]:
        """Yield the rows in order, as fp32."""
        for start in range(0, len(self._x), batch_size):
            part = self._x[start : start + batch_size]
            x = part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))
            seq = torch.arange(start, start + len(x))
            yield Chunk({self._name: x.detach().float().cpu()}, seq, torch.zeros_like(seq))

    def tokens(self) -> TokenTable | None:
        """Arrays have no tokens."""
        return None

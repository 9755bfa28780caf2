"""InfoNCE over two views of every image, as solo-learn and NCL have it."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


def info_nce(
    z: Float[Tensor, "rows out"],
    everyone: Float[Tensor, "all out"],
    first: int,
    temperature: float,
) -> Float[Tensor, ""]:
    """Return the mean over the rows of -log(pos / (pos + neg)), with pos and neg sums of exp(cosine / temperature).

    `z` holds this process's first views, then its second views; `everyone` is all processes' `z` one after another,
    and `z` begins at its row `first`. A row's positive is the other view of its image, its negatives all views of the
    others; the row itself counts as neither. Float32 at least, under autocast too. Raises ValueError when `z` is not
    two views.
    """
    rows = len(z)
    if rows % 2:
        raise ValueError(f"{rows} projections are not two views of the same images")
    with torch.autocast(z.device.type, enabled=False):
        own = _unit(z)
        logits = own @ (own if everyone is z else _unit(everyone)).T / temperature
    row = torch.arange(rows, device=z.device)
    itself = torch.zeros_like(logits, dtype=torch.bool)
    itself[row, first + row] = True
    partner = first + (row + rows // 2) % rows
    return nn.functional.cross_entropy(logits.masked_fill(itself, -torch.inf), partner)


def _unit(z: Float[Tensor, "rows out"]) -> Float[Tensor, "rows out"]:
    """Return rows of length 1, in float32 at least."""
    return nn.functional.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)

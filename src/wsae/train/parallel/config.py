"""How a run is laid out over processes, as values. No torch here."""

import os

from pydantic import PositiveInt

from wsae.core.config import Config
from wsae.core.errors import UserError, nearest

AXES = ("layers", "data", "latents")
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Layout(Config):
    """How many ranks share each kind of work; their product is the number of processes."""

    layers: PositiveInt = 1
    """Parts into which hooks and members are divided."""
    data: PositiveInt = 1
    """Parts into which every batch is divided."""
    latents: PositiveInt = 1
    """Parts into which each SAE's latents are divided."""

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return self.layers * self.data * self.latents


def launched() -> bool:
    """Return whether torchrun (or anything that speaks its environment) started this process."""
    return all(name in os.environ for name in _TORCHRUN)


def parse_layout(text: str | None, ranks: int) -> Layout:
    """Return the layout that `--mesh TEXT` means for so many ranks; all of them share the data where it is None.

    "data=2,latents=4" gives sizes; one axis may come without: it takes the ranks that are left. Raises UserError for
    another axis, size or product.
    """
    if text is None:
        return Layout(data=ranks)
    sizes: dict[str, int] = {}
    rest: str | None = None
    for word in text.split(","):
        name, equals, size = (part.strip() for part in word.partition("="))
        if name not in AXES:
            raise UserError(
                f"--mesh {text}: no axis '{name}'{nearest(name, AXES)}; use {', '.join(AXES)}"
            )
        if name in {*sizes, rest}:
            raise UserError(f"--mesh {text}: {name} is given twice")
        if not equals:
            if rest is not None:
                raise UserError(f"--mesh {text}: only one axis may come without a size")
            rest = name
        elif size.isdecimal() and int(size) > 0:
            sizes[name] = int(size)
        else:
            raise UserError(f"--mesh {text}: {name}={size} is no number of ranks")
    given = Layout.parse(sizes).ranks
    if rest is not None and ranks % given == 0:
        sizes[rest] = ranks // given
    layout = Layout.parse(sizes)
    if layout.ranks != ranks:
        raise UserError(
            f"--mesh {text}: asks for {layout.ranks} processes, {ranks} were started; "
            "change the sizes or torchrun's --nproc-per-node"
        )
    return layout


def even_part(total: int, parts: int, index: int) -> slice:
    """Return the index-th of `parts` contiguous parts of range(total); the first total % parts are one longer."""
    base, extra = divmod(total, parts)
    first = index * base + min(index, extra)
    return slice(first, first + base + (index < extra))


def chunk_part(total: int, parts: int, index: int) -> slice:
    """Return the index-th part of range(total) by the rule of torch.chunk, which DTensor's Shard follows."""
    size = -(-total // parts)
    return slice(min(total, index * size), min(total, (index + 1) * size))

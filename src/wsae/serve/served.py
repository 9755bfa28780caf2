"""A run that is served."""

from dataclasses import dataclass
from pathlib import Path

from wsae.serve.index import Index


@dataclass(frozen=True)
class Served:
    """One run: its name in addresses, its directory, its index."""

    slug: str
    path: Path
    index: Index

"""A run that is served: each request sees one index of it, whatever becomes of the files meanwhile."""

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from wsae.core.artifact import MANIFEST
from wsae.core.errors import UserError
from wsae.serve.build import PARTS, run_digest
from wsae.serve.index import REMAKE, DamagedIndexError, Index
from wsae.serve.open import seal_of, sealed_identity

PATIENCE_S, PAUSE_S = 2.0, 0.02
"""How long a request waits for an index that is just being put in place, and how often it looks."""
CHANGED = "the run has changed since its index was made; restart wsae serve to see it as it is now"
Stamp = tuple[tuple[int, int, int, int] | None, ...]


@dataclass(frozen=True)
class Served:
    """One run as one request sees it: its name in addresses, its directory, its index."""

    slug: str
    path: Path
    index: Index
    root: str = "/"
    """What leads to the start from where the visitor is."""
    notice: str = ""
    """What the visitor should know of the numbers."""

    @property
    def base(self) -> str:
        """The address of the run."""
        return f"{self.root}r/{quote(self.slug)}"


class Shelf:
    """A run's place among those that are served: hands out the index of the moment, read anew when it is replaced.

    An index keeps its connections to the file that it was read from, so one that is replaced stays whole for the
    requests that hold it.
    """

    def __init__(self, slug: str, path: Path, place: Path) -> None:
        self.slug, self.path, self.place = slug, path, place
        self._lock = threading.Lock()
        self._index: Index | None = None
        self._seen: Stamp = ()
        self._problem = ""
        self._run: Stamp = ()
        self._notice = ""

    def now(self, root: str = "/") -> Served:
        """Return the run as it is now; raises DamagedIndexError when its index is gone or damaged."""
        with self._lock:
            if self._seen != self._stamp():
                self._read()
            if self._index is None:
                raise DamagedIndexError(self._problem)
            state = stamps(*(self.path / part / MANIFEST for part in ("", *PARTS)))
            if state != self._run:
                self._run, self._notice = state, self._compared(self._index)
            return Served(self.slug, self.path, self._index, root, self._notice)

    def has(self, index: Index) -> bool:
        """Whether an index is still the one in its place."""
        return index is self._index and self._seen == self._stamp()

    def _stamp(self) -> Stamp:
        return stamps(self.place, seal_of(self.place))

    def _read(self) -> None:
        """Read the index, waiting while its file and its seal do not fit: they are put in place one after the other."""
        end = time.monotonic() + PATIENCE_S
        self._index, self._run = None, ()
        while True:
            seen = self._stamp()
            try:
                identity = sealed_identity(self.place)
                index = Index(self.place)
            except (UserError, OSError) as error:
                if time.monotonic() > end:
                    self._seen, self._problem = seen, f"{error}; {REMAKE}"
                    return
            else:
                if index.identity == identity and self._stamp() == seen:
                    self._index, self._seen = index, seen
                    return
            time.sleep(PAUSE_S)

    def _compared(self, index: Index) -> str:
        try:
            return "" if run_digest(self.path) == index.run else CHANGED
        except UserError:  # trained or evaluated at this moment
            return CHANGED


def stamps(*paths: Path) -> Stamp:
    """Return what changes when a file is replaced or written to; nothing where there is none."""
    out: list[tuple[int, int, int, int] | None] = []
    for path in paths:
        try:
            found = path.stat()
        except OSError:
            out.append(None)
        else:
            out.append((found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size))
    return tuple(out)

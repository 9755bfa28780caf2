"""Reading an index: one connection per thread, a few rows at a time, nothing kept that grows with the latents."""

import base64
import json
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wsae.report.rundata import Json
from wsae.serve import schema
from wsae.serve.measures import Measure

Pairs = list[tuple[int, float]]
"""(latent or token, value), in the order to be shown."""


@dataclass(frozen=True)
class Member:
    """A member of the run as the index knows it."""

    id: int
    slug: str
    hook: str
    name: str
    kind: str
    plain: bool
    twin: int | None
    size: int
    alive: int
    shown: int
    weights: bool
    density: Json

    @property
    def keys(self) -> tuple[int, int]:
        """First and last key of its latents."""
        return schema.key_of(self.id, 0), schema.key_of(self.id, self.size - 1)


class Index:
    """One run's index, open for reading."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._local = threading.local()
        meta = {key: json.loads(value) for key, value in self.rows("SELECT key, value FROM meta")}
        self.name: str = meta["name"]
        self.unit: str = meta["unit"]
        self.overview: Json = meta["overview"]
        self.model: Json = meta["model"]
        self.measures = [Measure(*entry) for entry in meta["measures"]]
        self.column = {measure.key: f"m{i}" for i, measure in enumerate(self.measures)}
        found = self.rows("SELECT id, slug, record FROM member ORDER BY id")
        self.members = [Member(id=i, slug=s, **json.loads(record)) for i, s, record in found]
        self.by_slug = {member.slug: member for member in self.members}

    def rows(self, sql: str, values: Sequence[object] = ()) -> list[tuple]:
        """Run one query with its values and return all its rows."""
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = schema.connect(self.path)
        return connection.execute(sql, values).fetchall()

    def numbers(self, key: int) -> dict[str, float | None]:
        """Return the measures of one latent by name."""
        columns = ", ".join(self.column.values())
        (values,) = self.rows(f"SELECT {columns} FROM latent WHERE key = ?", (key,))
        return dict(zip(self.column, values, strict=True))

    def state(self, key: int) -> tuple[bool, int | None]:
        """Return (whether it fired, key of its match in the twin)."""
        ((alive, twin),) = self.rows("SELECT alive, twin FROM latent WHERE key = ?", (key,))
        return bool(alive), twin

    def record(self, key: int) -> Json:
        """Return explanation, contexts, scores and typical tokens; empty where nothing is stored."""
        found = self.rows("SELECT record FROM shown WHERE key = ?", (key,))
        return json.loads(found[0][0]) if found else {}

    def labels(self, keys: Sequence[int]) -> dict[int, str]:
        """Return the one-line labels of some latents that have one."""
        marks = ",".join("?" * len(keys))
        return dict(self.rows(f"SELECT key, label FROM shown WHERE key IN ({marks})", keys))

    def alive(self, keys: Sequence[int]) -> dict[int, bool]:
        """Return which of some latents fired on held-out data."""
        marks = ",".join("?" * len(keys))
        found = self.rows(f"SELECT key, alive FROM latent WHERE key IN ({marks})", keys)
        return {key: bool(fired) for key, fired in found}

    def packed(self, key: int) -> tuple[Pairs, Pairs, list[int]]:
        """Return nearest latents, promoted then demoted tokens, and the counts of the histogram; empty if unknown."""
        found = self.rows("SELECT neighbours, logits, histogram FROM packed WHERE key = ?", (key,))
        near, logits, histogram = found[0] if found else (None, None, None)
        counts = [] if histogram is None else np.frombuffer(histogram, np.int32).tolist()
        return _pairs(near), _pairs(logits), counts

    def tokens(self, ids: Sequence[int]) -> dict[int, str]:
        """Return the text of some tokens."""
        marks = ",".join("?" * len(ids))
        return dict(self.rows(f"SELECT id, text FROM token WHERE id IN ({marks})", ids))

    def suitors(self, key: int, n: int) -> Pairs:
        """Return the latents of other members whose match is this one, most alike first: (key, cosine)."""
        column = self.column["match"]
        sql = f"SELECT key, {column} FROM latent WHERE twin = ? ORDER BY {column} DESC, key LIMIT ?"
        return self.rows(sql, (key, n))

    def image(self, number: int) -> str:
        """Return a thumbnail as a data address; empty if there is none."""
        found = self.rows("SELECT png FROM image WHERE number = ?", (number,))
        return f"data:image/png;base64,{base64.b64encode(found[0][0]).decode()}" if found else ""


def _pairs(blob: bytes | None) -> Pairs:
    """Undo the packing: float32 values, then as many int32 numbers."""
    if blob is None:
        return []
    half = len(blob) // 2
    values, numbers = np.frombuffer(blob[:half], np.float32), np.frombuffer(blob[half:], np.int32)
    return list(zip(numbers.tolist(), values.tolist(), strict=True))

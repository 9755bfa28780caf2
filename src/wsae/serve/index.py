"""Reading an index: a few rows at a time, nothing kept that grows with the latents.

An `Index` is one state of the file: its connections are opened together, and each must find the same identity. What
comes out of the file is of its form, or the index is damaged: whoever sends a run can compute its seal.
"""

import base64
import contextlib
import json
import queue
import sqlite3
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, field_validator, model_validator

from wsae.core.errors import UserError
from wsae.report.forms import Count, Form, Number, ShownForm, Text, formed
from wsae.report.rundata import Json
from wsae.serve import schema
from wsae.serve.histogram import BINS, DENSITY_EDGES
from wsae.serve.measures import BASIC, Measure

CONNECTIONS = 4
REMAKE = "restart wsae serve, which makes it again"
Pairs = list[tuple[int, float]]
"""(latent or token, value), in the order to be shown."""


class DamagedIndexError(UserError):
    """An index that is gone, or not of the form that this wsae writes."""


class DensityForm(Form):
    """A member's densities, counted."""

    edges: list[float]
    counts: list[Count] = Field(
        min_length=len(DENSITY_EDGES) - 1, max_length=len(DENSITY_EDGES) - 1
    )
    dead: Count

    @field_validator("edges")
    @classmethod
    def _ours(cls, edges: list[float]) -> list[float]:
        if edges != DENSITY_EDGES:
            raise ValueError("should be the edges of wsae's bins")
        return edges


class MemberForm(Form):
    """A member's record."""

    hook: Text
    name: Text
    kind: Text
    plain: bool
    twin: Count | None
    size: Count = Field(ge=1, lt=1 << 31)
    alive: Count
    shown: Count
    weights: str
    density: DensityForm


class JudgedForm(Form):
    """A comparison in words."""

    outcome: Text
    mark: Text
    text: Text
    how: Text


class CellForm(Form):
    """A value in words."""

    value: Text
    bounds: Text
    judged: JudgedForm | None


class RowForm(Form):
    """A line of a table."""

    name: Text
    tip: Text
    way: Text
    cells: list[CellForm]


class HeadForm(Form):
    """The head of a column."""

    name: Text
    kind: Text
    text: Text


GroupForm = Annotated[list[Any], Field(min_length=2, max_length=2)]
"""The name and the lines of a part of a table."""
_GROUP_ROWS = TypeAdapter(list[RowForm])


class ScoresForm(Form):
    """A table of scores."""

    columns: list[HeadForm]
    rows: list[RowForm]

    @model_validator(mode="after")
    def _square(self) -> "ScoresForm":
        if any(len(row.cells) != len(self.columns) for row in self.rows):
            raise ValueError("should have a cell for each column")
        return self


class OverviewHook(Form):
    """What is said of a hook."""

    name: Text
    verdict: Text
    method: Text
    members: list[HeadForm]
    groups: list[GroupForm]
    scores: ScoresForm | None
    classes: ScoresForm | None

    @model_validator(mode="after")
    def _square(self) -> "OverviewHook":
        rows = [row for _, rows in self.groups for row in _GROUP_ROWS.validate_python(rows)]
        if any(len(row.cells) != len(self.members) for row in rows):
            raise ValueError("should have a cell for each member")
        return self


class OverviewForm(Form):
    """The run as a whole."""

    hooks: list[OverviewHook]
    cards: list[Annotated[list[Text], Field(min_length=2, max_length=2)]]
    notes: list[Text]


class ModelForm(Form):
    """The model, or why there is none."""

    name: Text
    why_not: Text
    about: Text


class MetaForm(Form):
    """What holds for the whole index."""

    identity: str
    run: str
    name: Text
    unit: Text
    overview: OverviewForm
    model: ModelForm
    measures: list[Annotated[list[Text], Field(min_length=3, max_length=3)]]

    @field_validator("measures")
    @classmethod
    def _basic(cls, measures: list[list[str]]) -> list[list[str]]:
        if [key for key, *_ in measures[: len(BASIC)]] != [measure.key for measure in BASIC]:
            raise ValueError("should begin with the basic measures")
        return measures


_META, _MEMBER, _SHOWN = TypeAdapter(MetaForm), TypeAdapter(MemberForm), TypeAdapter(ShownForm)
_NUMBERS = TypeAdapter(list[Number])
_LABELS = TypeAdapter(dict[int, str])


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
    weights: str
    """The digest of its weights' manifest; empty where the run keeps none."""
    density: Json

    @property
    def keys(self) -> tuple[int, int]:
        """First and last key of its latents."""
        return schema.key_of(self.id, 0), schema.key_of(self.id, self.size - 1)


class Index:
    """One run's index, open for reading: one state of its file. Raises DamagedIndexError for one that is not ours."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._free: queue.LifoQueue[sqlite3.Connection] = queue.LifoQueue()
        kept: list[sqlite3.Connection] = []
        weakref.finalize(self, _close, kept)
        with self._readable():
            self._open(kept)
            meta: Json = formed(_META, self._meta(), path)
            if not schema.is_ours(kept[0], len(meta["measures"])):
                raise UserError(f"{path}: holds other tables than wsae makes")
            self.identity: str = meta["identity"]
            self.run: str = meta["run"]
            self.name: str = meta["name"]
            self.unit: str = meta["unit"]
            self.overview: Json = meta["overview"]
            self.model: Json = meta["model"]
            self.measures = [Measure(*entry) for entry in meta["measures"]]
            self.column = {measure.key: f"m{i}" for i, measure in enumerate(self.measures)}
            self.members = self._members()
            self.by_slug = {member.slug: member for member in self.members}

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except DamagedIndexError:
            raise
        except UserError as error:
            raise DamagedIndexError(str(error)) from error
        except (sqlite3.DatabaseError, ValueError, TypeError, KeyError) as error:
            why = " ".join(str(error).split())[:200]
            raise DamagedIndexError(f"{self.path}: damaged ({why})") from error

    def _open(self, kept: list[sqlite3.Connection]) -> None:
        """Open all connections; each must find the same identity, or the file was replaced in between."""
        found = set()
        for _ in range(CONNECTIONS):
            connection = schema.connect(self.path)
            kept.append(connection)
            self._free.put(connection)
            sql = "SELECT value FROM meta WHERE key = 'identity'"
            found.add(connection.execute(sql).fetchone())
        if len(found) != 1:
            raise ValueError("replaced while it was opened")

    def _meta(self) -> Json:
        return {key: json.loads(value) for key, value in self.rows("SELECT key, value FROM meta")}

    def _members(self) -> list[Member]:
        """Return the members, numbered from 0."""
        out: list[Member] = []
        for number, slug, record in self.rows("SELECT id, slug, record FROM member ORDER BY id"):
            found = formed(_MEMBER, json.loads(record), self.path)
            known = {name: found[name] for name in MemberForm.model_fields}
            out.append(Member(id=number, slug=slug, **known))
        twins = {member.twin for member in out} - {None}
        if [member.id for member in out] != [*range(len(out))] or not twins <= {*range(len(out))}:
            raise ValueError("its members are not numbered as wsae does")
        if not out or not all(isinstance(member.slug, str) for member in out):
            raise ValueError("it has no members")
        return out

    def rows(self, sql: str, values: Sequence[object] = ()) -> list[tuple]:
        """Run one query with its values and return all its rows."""
        connection = self._free.get()
        try:
            with self._readable():
                return connection.execute(sql, values).fetchall()
        finally:
            self._free.put(connection)

    def numbers(self, keys: Sequence[int]) -> dict[int, dict[str, float | None]]:
        """Return the measures of some latents by key, then name."""
        columns, marks = ", ".join(self.column.values()), ",".join("?" * len(keys))
        found = self.rows(f"SELECT key, {columns} FROM latent WHERE key IN ({marks})", keys)
        with self._readable():
            if {key for key, *_ in found} != {*keys}:
                raise ValueError("lacks a latent")
            formed(_NUMBERS, [value for _, *values in found for value in values], self.path)
            return {key: dict(zip(self.column, values, strict=True)) for key, *values in found}

    def keys(self, sql: str, values: Sequence[object]) -> list[int]:
        """Run a query for keys of latents and return them."""
        with self._readable():
            return [self._key(key) for (key,) in self.rows(sql, values)]

    def state(self, key: int) -> tuple[bool, int | None]:
        """Return (whether it fired, key of its match in the twin)."""
        with self._readable():
            ((alive, twin),) = self.rows("SELECT alive, twin FROM latent WHERE key = ?", (key,))
            return bool(alive), None if twin is None else self._key(twin)

    def _key(self, key: object) -> int:
        """Return a latent's key; raises ValueError when there is no such latent."""
        if not isinstance(key, int) or key < 0:
            raise ValueError("names no latent")
        member, latent = schema.place_of(key)
        if member >= len(self.members) or latent >= self.members[member].size:
            raise ValueError("names a latent that its member does not have")
        return key

    def record(self, key: int) -> Json:
        """Return explanation, contexts, scores and typical tokens; empty where nothing is stored."""
        with self._readable():
            found = self.rows("SELECT record FROM shown WHERE key = ?", (key,))
            return formed(_SHOWN, json.loads(found[0][0]), self.path) if found else {}

    def labels(self, keys: Sequence[int]) -> dict[int, str]:
        """Return the one-line labels of some latents that have one."""
        marks = ",".join("?" * len(keys))
        found = self.rows(f"SELECT key, label FROM shown WHERE key IN ({marks})", keys)
        with self._readable():
            return formed(_LABELS, dict(found), self.path)

    def alive(self, keys: Sequence[int]) -> dict[int, bool]:
        """Return which of some latents fired on held-out data."""
        marks = ",".join("?" * len(keys))
        found = self.rows(f"SELECT key, alive FROM latent WHERE key IN ({marks})", keys)
        with self._readable():
            if {key for key, _ in found} != {*keys}:
                raise ValueError("lacks a latent")
            return {key: bool(fired) for key, fired in found}

    def packed(self, key: int) -> tuple[Pairs, Pairs, list[int]]:
        """Return nearest latents, promoted then demoted tokens, and the counts of the histogram; empty if unknown."""
        sql = "SELECT neighbours, logits, histogram FROM packed WHERE key = ?"
        with self._readable():
            found = self.rows(sql, (key,))
            near, logits, histogram = found[0] if found else (None, None, None)
            counts = [] if histogram is None else np.frombuffer(histogram, np.int32).tolist()
            if len(counts) not in (0, BINS) or min(counts, default=0) < 0:
                raise ValueError("has a histogram of another size")
            latents = _pairs(near)
            for latent, _ in latents:
                self._key(schema.key_of(schema.place_of(key)[0], latent))
            return latents, _pairs(logits), counts

    def tokens(self, ids: Sequence[int]) -> dict[int, str]:
        """Return the text of some tokens."""
        marks = ",".join("?" * len(ids))
        found = self.rows(f"SELECT id, text FROM token WHERE id IN ({marks})", ids)
        with self._readable():
            return formed(_LABELS, dict(found), self.path)

    def suitors(self, key: int, n: int) -> Pairs:
        """Return the latents of other members whose match is this one, most alike first: (key, cosine)."""
        column = self.column["match"]
        sql = f"SELECT key, {column} FROM latent WHERE twin = ? ORDER BY {column} DESC, key LIMIT ?"
        with self._readable():
            found = [(self._key(other), cosine) for other, cosine in self.rows(sql, (key, n))]
            formed(_NUMBERS, [cosine for _, cosine in found], self.path)
            return found

    def image(self, number: int) -> str:
        """Return a thumbnail as a data address; empty if there is none."""
        found = self.rows("SELECT png FROM image WHERE number = ?", (number,))
        with self._readable():
            return (
                f"data:image/png;base64,{base64.b64encode(found[0][0]).decode()}" if found else ""
            )


def _close(connections: list[sqlite3.Connection]) -> None:
    for connection in connections:
        connection.close()


def _pairs(blob: bytes | None) -> Pairs:
    """Undo the packing: float32 values, then as many int32 numbers; raises ValueError for what is no such blob."""
    if blob is None:
        return []
    half = len(blob) // 2
    values, numbers = np.frombuffer(blob[:half], np.float32), np.frombuffer(blob[half:], np.int32)
    if not np.isfinite(values).all():
        raise ValueError("holds what is no number")
    return list(zip(numbers.tolist(), values.tolist(), strict=True))

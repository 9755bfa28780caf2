"""Reading an index: a few rows at a time, nothing kept that grows with the latents.

An `Index` is one state of the file: its connections are opened together, and each must find the same identity. What
comes out of the file is of its form, or the index is damaged: whoever sends a run can compute its seal.
"""

import base64
import contextlib
import json
import math
import queue
import re
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, NamedTuple
from urllib.parse import quote, urlencode

import numpy as np
import torch
from jaxtyping import Int64
from pydantic import Field, TypeAdapter, field_validator
from torch import Tensor

from wsae.acts.tokens import alone, joined
from wsae.core.artifact import MANIFEST, read_manifest
from wsae.core.errors import UserError, nearest
from wsae.evals.latents import Context
from wsae.report.charts import folded
from wsae.report.rundata import DensityForm
from wsae.report.view import OverviewForm
from wsae.run import (
    NAMES_FILE,
    PARTS,
    Count,
    Form,
    Json,
    NamedLatent,
    Number,
    Run,
    ShownForm,
    Text,
    formed,
)
from wsae.serve import schema
from wsae.serve.schema import (
    BASIC,
    BINS,
    Measure,
    key_of,
    place_of,
    seal_of,
    sealed_identity,
    spaced,
    unpacked,
)

CONNECTIONS = 4
REMAKE = "restart wsae serve, which makes it again"
Pairs = list[tuple[int, float]]
"""(latent or token, value), in the order to be shown."""


class DamagedIndexError(UserError):
    """An index that is gone, or not of the form that this wsae writes."""


class Member(Form):
    """A member of the run as the index knows it."""

    id: Count
    slug: Text
    hook: Text
    name: Text
    kind: Text
    plain: bool
    twin: Count | None
    size: Count = Field(ge=1, lt=1 << 31)
    alive: Count
    density: DensityForm
    shown: Count
    weights: str
    """The digest of its weights' manifest; empty where the run keeps none."""

    @property
    def keys(self) -> tuple[int, int]:
        """First and last key of its latents."""
        return self.key(0), self.key(self.size - 1)

    def key(self, latent: int) -> int:
        """Return the key of a latent."""
        return key_of(self.id, latent)


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
    window: int = Field(ge=4, le=256)
    no_contexts: Text
    """Why contexts were not collected for all; empty where they were."""
    measures: list[Annotated[list[Text], Field(min_length=3, max_length=3)]]

    @field_validator("measures")
    @classmethod
    def _basic(cls, measures: list[list[str]]) -> list[list[str]]:
        if [key for key, *_ in measures[: len(BASIC)]] != [measure.key for measure in BASIC]:
            raise ValueError("should begin with the basic measures")
        return measures


_META, _SHOWN = TypeAdapter(MetaForm), TypeAdapter(ShownForm)
_NUMBERS = TypeAdapter(list[Number])
_LABELS = TypeAdapter(dict[int, str])
_TOKENS = TypeAdapter(dict[int, str | bytes])


def run_digest(run: Path) -> str:
    """Return the digest of a run with its evaluation and scores; raises UserError for an unfinished one."""
    return Run(run).digest()


def weights_digest(place: Path) -> str:
    """Return the digest of the manifest of an SAE, which names its content; raises UserError when it has none."""
    return read_manifest(place, "sae", verify=False).digest()


class Index:
    """One run's index, open for reading: one state of its file. Raises DamagedIndexError for one that is not ours."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._free: queue.LifoQueue[sqlite3.Connection] = queue.LifoQueue()
        kept: list[sqlite3.Connection] = []
        weakref.finalize(self, lambda: [connection.close() for connection in kept])
        with self._readable():
            for _ in range(CONNECTIONS):
                kept.append(schema.connect(path))
                self._free.put(kept[-1])
            sql = "SELECT value FROM meta WHERE key = 'identity'"
            if len({connection.execute(sql).fetchone() for connection in kept}) != 1:
                raise ValueError("replaced while it was opened")
            found = self.rows("SELECT key, value FROM meta")
            meta: Json = formed(_META, {key: json.loads(value) for key, value in found}, path)
            if not schema.is_ours(kept[0], len(meta["measures"])):
                raise UserError(f"{path}: holds other tables than wsae makes")
            self.identity: str = meta["identity"]
            self.run: str = meta["run"]
            self.name: str = meta["name"]
            self.unit: str = meta["unit"]
            self.overview: Json = meta["overview"]
            self.model: Json = meta["model"]
            self.window: int = meta["window"]
            self.no_contexts: str = meta["no_contexts"]
            self.measures = [Measure(*entry) for entry in meta["measures"]]
            self.column = {measure.key: f"m{i}" for i, measure in enumerate(self.measures)}
            found = self.rows("SELECT id, slug, record FROM member ORDER BY id")
            self.members = [Member(id=i, slug=slug, **json.loads(told)) for i, slug, told in found]
            numbers = [*range(len(self.members))]
            twins = {member.twin for member in self.members} - {None}
            if not numbers or [m.id for m in self.members] != numbers or not twins <= {*numbers}:
                raise ValueError("its members are not numbered as wsae does")
            self.by_slug = {member.slug: member for member in self.members}
            self._means: dict[int, dict[str, float | None]] = {}
            self._firsts: dict[tuple[int, int], Found] = {}

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

    def checked(self, key: object) -> int:
        """Return a latent's key; raises DamagedIndexError when there is no such latent."""
        with self._readable():
            return self._key(key)

    def means(self, member: Member) -> dict[str, float | None]:
        """Return the mean of each measure over the live latents of a member that have it."""
        if member.id not in self._means:
            columns = ", ".join(f"avg({column})" for column in self.column.values())
            sql = f"SELECT {columns} FROM latent WHERE alive = 1 AND key BETWEEN ? AND ?"
            ((*values,),) = self.rows(sql, member.keys)
            with self._readable():
                self._means[member.id] = dict(
                    zip(self.column, formed(_NUMBERS, values, self.path), strict=True)
                )
        return self._means[member.id]

    def measured(self, member: Member) -> set[str]:
        """Return the measures that some live latent of a member has."""
        return {key for key, mean in self.means(member).items() if mean is not None}

    def resolution(self, member: Member) -> float:
        """Return the smallest density of a live latent: one firing, where one of them fires once."""
        column = self.column["density"]
        sql = f"SELECT min({column}) FROM latent WHERE alive = 1 AND key BETWEEN ? AND ?"
        ((least,),) = self.rows(sql, member.keys)
        return float(least or 1.0)

    def first(self, member: Member, name: int, ask: "Asked", n: int) -> "Found":
        """Return the first n latents of a list that the first page names, remembered under `name`."""
        if (member.id, name) not in self._firsts:
            found = find(self, member, ask)
            self._firsts[member.id, name] = Found(found.keys[:n], found.total)
        return self._firsts[member.id, name]

    def _key(self, key: object) -> int:
        """Return a latent's key; raises ValueError when there is no such latent."""
        if not isinstance(key, int) or key < 0:
            raise ValueError("names no latent")
        member, latent = place_of(key)
        if member >= len(self.members) or latent >= self.members[member].size:
            raise ValueError("names a latent that its member does not have")
        return key

    def owner(self, key: int) -> tuple[Member, int]:
        """Return the member and number of a latent."""
        member, latent = place_of(key)
        return self.members[member], latent

    def record(self, key: int) -> Json:
        """Return explanation, contexts, scores and typical tokens; empty where nothing is stored."""
        with self._readable():
            found = self.rows("SELECT record FROM shown WHERE key = ?", (key,))
            record = formed(_SHOWN, json.loads(found[0][0]), self.path) if found else {}
            collected = self.contexts(key)
            return record | {name: some for name, some in collected.items() if some}

    def lines(self, keys: Sequence[int]) -> dict[int, tuple[bool, str | None]]:
        """Return whether some latents fired on held-out data, and the lines that stand for those that have one."""
        marks = ",".join("?" * len(keys))
        sql = f"SELECT key, alive, label FROM latent LEFT JOIN shown USING(key) WHERE key IN ({marks})"
        found = self.rows(sql, keys)
        with self._readable():
            if {key for key, *_ in found} != {*keys}:
                raise ValueError("lacks a latent")
            formed(_LABELS, {key: label or "" for key, _, label in found}, self.path)
            return {key: (bool(alive), label) for key, alive, label in found}

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
                self._key(self.owner(key)[0].key(latent))
            return latents, _pairs(logits), counts

    def fires(self, key: int) -> Pairs:
        """Return the tokens on which a latent fires most, with their shares of its random firings; empty if unknown."""
        with self._readable():
            found = self.rows("SELECT fires FROM packed WHERE key = ?", (key,))
            return _pairs(found[0][0] if found else None)

    def contexts(self, key: int) -> dict[str, list[Json]]:
        """Return the collected contexts of a latent: the strongest, and samples over the quantiles."""
        with self._readable():
            found = self.rows("SELECT contexts FROM packed WHERE key = ?", (key,))
            strongest, samples = unpacked(found[0][0] if found else None)
            ids = self._sequences({context.seq for context in (*strongest, *samples)})
            if any(context.pos >= len(ids[context.seq]) for context in (*strongest, *samples)):
                raise ValueError("has a context beyond its sequence")
            near = [
                ids[c.seq][max(0, c.pos - 2 * self.window) : c.pos + 2 * self.window]
                for c in (*strongest, *samples)
            ]
            raw = self._raw({token for part in near for token in part.tolist()})

            def decode(tokens: list[int], part: slice) -> list[str]:
                return joined([raw[token] for token in tokens], part)

            def windows(contexts: list[Context]) -> list[Json]:
                return [c.window(ids[c.seq], decode, self.window) for c in contexts]

            return {"contexts": windows(strongest), "samples": windows(samples)}

    def _sequences(self, numbers: set[int]) -> dict[int, Int64[Tensor, " length"]]:
        """Return the token ids of some sequences; raises KeyError for one that is not there."""
        wanted = json.dumps(sorted(numbers))
        sql = "SELECT seq, ids FROM text WHERE seq IN (SELECT value FROM json_each(?))"
        found = dict(self.rows(sql, (wanted,)))
        arrays = {number: np.frombuffer(found[number], np.int32) for number in numbers}
        return {number: torch.from_numpy(ids.astype(np.int64)) for number, ids in arrays.items()}

    def _raw(self, ids: set[int]) -> dict[int, str | bytes]:
        """Return the texts of some tokens, or their bytes; raises KeyError for one that is not there."""
        wanted = json.dumps(sorted(ids))
        sql = "SELECT id, text FROM token WHERE id IN (SELECT value FROM json_each(?))"
        found = formed(_TOKENS, dict(self.rows(sql, (wanted,))), self.path)
        return {token: found[token] for token in ids}

    def tokens(self, ids: Sequence[int]) -> dict[int, str]:
        """Return the text of some tokens, as they read by themselves."""
        with self._readable():
            return {token: alone(text) for token, text in self._raw({*ids}).items()}

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


def _pairs(blob: bytes | None) -> Pairs:
    """Undo the packing: float32 values, then as many int32 numbers; raises ValueError for what is no such blob."""
    blob = blob or b""
    half = len(blob) // 2
    values, numbers = np.frombuffer(blob[:half], np.float32), np.frombuffer(blob[half:], np.int32)
    if not np.isfinite(values).all():
        raise ValueError("holds what is no number")
    return list(zip(numbers.tolist(), values.tolist(), strict=True))


# A list of latents: what an address may ask, checked, and the SQL it becomes.
#
# Only names of this index's measures reach the text of a statement, never what was typed; that is
# bound as values.

PER_PAGE = 50
ECHO = 40
"""Characters of a visitor's word that a message repeats."""
MAX_QUERY = 200
MAX_PAGE = 1_000_000
ALIVE = ("any", "yes", "no")
SHOWN = ("any", "contexts")
STAR = ("any", "yes")
LATENT = "latent"
"""The sort by number."""
_FAR = 1e308


@dataclass(frozen=True)
class Asked:
    """One list: the text looked for, the order, the filters, the page."""

    query: str = ""
    sort: str = LATENT
    down: bool = False
    alive: str = "any"
    shown: str = "any"
    low: dict[str, float] = field(default_factory=dict)
    high: dict[str, float] = field(default_factory=dict)
    page: int = 1
    star: str = "any"
    starred: tuple[int, ...] = ()
    """Keys of the latents that are starred, for a list of these."""
    called: tuple[int, ...] = ()
    """Keys of the latents whose name the text is found in."""

    def address(self, **changes: str | int) -> dict[str, str]:
        """Return the parameters of an address that asks this, those at their defaults left out."""
        values = {
            "q": self.query,
            "sort": ("-" if self.down else "") + self.sort,
            "alive": self.alive,
            "shown": self.shown,
            "star": self.star,
            **{f"min.{key}": repr(value).removesuffix(".0") for key, value in self.low.items()},
            **{f"max.{key}": repr(value).removesuffix(".0") for key, value in self.high.items()},
            "page": str(self.page),
        } | {key: str(value) for key, value in changes.items()}
        plain = {
            "q": "",
            "sort": LATENT,
            "alive": "any",
            "shown": "any",
            "star": "any",
            "page": "1",
        }
        return {key: value for key, value in values.items() if plain.get(key) != value}


class Found(NamedTuple):
    """One page of a list: keys in order, and how many there are on all pages."""

    keys: list[int]
    total: int


def asked(params: Mapping[str, str], index: Index) -> Asked:
    """Return what an address asks; raises UserError naming the parameter that is not valid."""
    sort = params.get("sort", LATENT)
    down, sort = sort.startswith("-"), sort.removeprefix("-")
    if sort not in (LATENT, *index.column):
        near = nearest(sort[:ECHO], [LATENT, *index.column])
        raise UserError(f"sort: no measure {sort[:ECHO]!r}{near}")
    query = params.get("q", "").strip()
    if len(query) > MAX_QUERY:
        raise UserError(f"q: longer than {MAX_QUERY} characters")
    return Asked(
        query=query,
        sort=sort,
        down=down,
        alive=_one_of(params, "alive", ALIVE),
        shown=_one_of(params, "shown", SHOWN),
        star=_one_of(params, "star", STAR),
        low=_bounds(params, "min.", index),
        high=_bounds(params, "max.", index),
        page=whole(params.get("page", "1"), "page", 1, MAX_PAGE),
    )


def whole(text: str, name: str, low: int, high: int) -> int:
    """Return a whole number within bounds; raises UserError."""
    if not re.fullmatch(r"[0-9]{1,10}", text) or not low <= int(text) <= high:
        raise UserError(f"{name}: {text[:ECHO]!r} is not a whole number from {low} to {high}")
    return int(text)


def _one_of(params: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    value = params.get(name) or choices[0]
    if value not in choices:
        raise UserError(f"{name}: {value[:ECHO]!r} is not one of {', '.join(choices)}")
    return value


def _bounds(params: Mapping[str, str], prefix: str, index: Index) -> dict[str, float]:
    out: dict[str, float] = {}
    for name, text in params.items():
        key = name.removeprefix(prefix)
        if not name.startswith(prefix) or not text.strip():
            continue
        if key not in index.column:
            raise UserError(
                f"{prefix}: no measure {key[:ECHO]!r}{nearest(key[:ECHO], index.column)}"
            )
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UserError(f"{name}: {text[:ECHO]!r} is not a number")
        out[key] = value
    return out


def words_of(query: str) -> list[str]:
    """Return the words and "quoted phrases" of a search text."""
    found = re.findall(r'"([^"]*)"|([^\s"]+)', query)
    return [phrase or word for phrase, word in found if phrase or word]


def match_of(query: str) -> str | None:
    """Return the search text in the language of FTS5: all words, each as a phrase of its own, the last a beginning.

    Nothing in it is an operator. None when it holds no letter or digit, so that there is nothing to look for.
    """
    words = [w for w in words_of(query) if any(char.isalnum() for char in w)]
    if not words:
        return None
    phrases = ['"' + spaced(word).replace('"', '""').replace("\0", " ") + '"' for word in words]
    open_end = "" if query.rstrip().endswith('"') else " *"
    return " AND ".join(phrases) + open_end


def _where(index: Index, member: Member | None, ask: Asked) -> tuple[str, str, list[object]]:
    """Return the FROM and WHERE of a list, and the values bound in them."""
    source, tests, values = "latent", [], []
    if ask.query and ask.called:
        tests.append(
            "latent.key IN (SELECT rowid FROM words WHERE words MATCH ? UNION SELECT value FROM json_each(?))"
        )
        values += [match_of(ask.query) or '""', json.dumps(ask.called)]
    elif ask.query:
        match = match_of(ask.query)
        source = "words CROSS JOIN latent ON latent.key = words.rowid"
        tests.append("words MATCH ?" if match else "0 = ?")
        values.append(match or 1)
    if ask.star == "yes":
        tests.append("latent.key IN (SELECT value FROM json_each(?))")
        values.append(json.dumps(ask.starred))
    if member is not None:
        tests.append("latent.key BETWEEN ? AND ?")
        values += member.keys
    if ask.alive != "any":
        tests.append("alive = ?")
        values.append(int(ask.alive == "yes"))
    if ask.shown != "any":
        tests.append("shown = 1")
    for sign, bounds in ((">=", ask.low), ("<=", ask.high)):
        for key, value in bounds.items():
            tests.append(f"{index.column[key]} {sign} ?")
            values.append(value)
    return source, " AND ".join(tests) or "1", values


def _order(index: Index, ask: Asked) -> str:
    """Return an expression that grows along the list; missing values come last either way."""
    if ask.sort == LATENT:
        return "-latent.key" if ask.down else "latent.key"
    column = index.column[ask.sort]
    return f"-ifnull({column}, -{_FAR})" if ask.down else f"ifnull({column}, {_FAR})"


def find(index: Index, member: Member | None, ask: Asked) -> Found:
    """Return one page of the latents of a member (None: of all members)."""
    source, where, values = _where(index, member, ask)
    ((total,),) = index.rows(f"SELECT count(*) FROM {source} WHERE {where}", values)
    skip = (ask.page - 1) * PER_PAGE
    sql = f"SELECT latent.key FROM {source} WHERE {where} ORDER BY {_order(index, ask)}, latent.key LIMIT ? OFFSET ?"
    return Found(index.keys(sql, [*values, PER_PAGE, skip]) if skip < total else [], total)


def beside(
    index: Index, member: Member | None, ask: Asked, key: int
) -> tuple[int | None, int | None]:
    """Return the keys before and after a latent in a list; it need not be in the list itself."""
    source, where, values = _where(index, member, ask)
    order = _order(index, ask)
    here = index.rows(f"SELECT {order} FROM latent WHERE latent.key = ?", (key,))
    out: list[int | None] = []
    for sign, way in (("<", "DESC"), (">", "ASC")):
        sql = (
            f"SELECT latent.key FROM {source} WHERE {where} AND ({order}, latent.key) {sign} (?, ?) "
            f"ORDER BY {order} {way}, latent.key {way} LIMIT 1"
        )
        out.append(next(iter(index.keys(sql, [*values, here[0][0], key])), None))
    return out[0], out[1]


# A run that is served: each request sees one index of it, whatever becomes of the files meanwhile.

PATIENCE_S, PAUSE_S = 2.0, 0.02
"""How long a request waits for an index that is just being put in place, and how often it looks."""
CHANGED = "the run has changed since its index was made; restart wsae serve to see it as it is now"
Stamp = tuple[tuple[int, int, int, int] | None, ...]


class Said(NamedTuple):
    """A line that stands for a latent in lists."""

    alive: bool
    label: str
    star: bool


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
    names: Mapping[int, NamedLatent] = field(default_factory=dict)
    """Key -> what users call a latent, and whether it is starred."""

    def said(self, keys: Sequence[int]) -> dict[int, "Said"]:
        """Return the lines that stand for some latents: the user's name, else what is known of it."""
        lines, none = self.index.lines(keys), NamedLatent()
        return {
            key: Said(alive, (named := self.names.get(key, none)).name or label or "", named.star)
            for key, (alive, label) in lines.items()
        }

    def asked(self, params: Mapping[str, str]) -> Asked:
        """Return what an address asks, with the users' names and stars; raises UserError as `asked` does."""
        ask = asked(params, self.index)
        words = [folded(word) for word in words_of(ask.query)]
        called = [
            key
            for key, named in self.names.items()
            if words and all(word in folded(named.name) for word in words)
        ]
        starred = [key for key, named in self.names.items() if named.star]
        return replace(ask, starred=tuple(sorted(starred)), called=tuple(sorted(called)))

    @property
    def base(self) -> str:
        """The address of the run."""
        return f"{self.root}r/{quote(self.slug)}"

    def list_link(self, slug: str, ask: Asked, **changes: str | int) -> str:
        """Return the address of a list."""
        return _address(f"{self.base}/{quote(slug)}", ask.address(**changes))

    def latent_link(
        self, member: Member, latent: int, ask: Asked | None = None, everywhere: bool = False
    ) -> str:
        """Return the address of a latent's page, with the list it was found in."""
        params = {} if ask is None else ask.address(page=1)
        params |= {"in": "all"} if everywhere else {}
        return _address(f"{self.base}/{quote(member.slug)}/{latent}", params)


def _address(path: str, params: dict[str, str]) -> str:
    return f"{path}?{urlencode(params)}" if params else path


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
        self._named: Stamp = ()
        self._names: dict[int, NamedLatent] = {}
        self._unnamed = ""

    def now(self, root: str = "/") -> Served:
        """Return the run as it is now; raises DamagedIndexError when its index is gone or damaged."""
        with self._lock:
            if self._seen != self._stamp():
                self._read()
            if self._index is None:
                raise DamagedIndexError(self._problem)
            state = stamps(*(self.path / part / MANIFEST for part in ("", *PARTS)))
            if state != self._run:
                self._run, self._notice = state, CHANGED
                with contextlib.suppress(UserError):  # trained or evaluated at this moment
                    self._notice = "" if run_digest(self.path) == self._index.run else CHANGED
            self._read_names(self._index)
            notice = " ".join(filter(None, (self._notice, self._unnamed)))
            return Served(self.slug, self.path, self._index, root, notice, self._names)

    def _read_names(self, index: Index) -> None:
        """Read the users' names anew when their file has changed; the notice says where that is not possible."""
        seen = (*stamps(self.path / NAMES_FILE), *self._seen)
        if seen == self._named:
            return
        self._named, self._names, self._unnamed = seen, {}, ""
        try:
            found = Run(self.path).names
        except UserError as error:
            self._unnamed = str(error)
            return
        for member in index.members:
            for latent, named in found.get(member.hook, {}).get(member.name, {}).items():
                if int(latent) < member.size:
                    self._names[member.key(int(latent))] = NamedLatent.model_validate(named)

    def has(self, index: Index) -> bool:
        """Return whether an index is still the one in its place."""
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

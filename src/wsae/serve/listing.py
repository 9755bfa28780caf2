"""A list of latents: what an address may ask, checked, and the SQL it becomes.

Only names of this index's measures reach the text of a statement, never what was typed; that is bound as values.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from wsae.core.errors import UserError, nearest
from wsae.serve.index import Index, Member
from wsae.serve.schema import place_of
from wsae.serve.text import spaced

PER_PAGE = 50
ECHO = 40
"""Characters of a visitor's word that a message repeats."""
MAX_QUERY = 200
MAX_PAGE = 1_000_000
ALIVE = ("any", "yes", "no")
SHOWN = ("any", "contexts")
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

    def address(self, **changes: str | int) -> dict[str, str]:
        """Return the parameters of an address that asks this, those at their defaults left out."""
        values = {
            "q": self.query,
            "sort": ("-" if self.down else "") + self.sort,
            "alive": self.alive,
            "shown": self.shown,
            **{f"min.{key}": f"{value:g}" for key, value in self.low.items()},
            **{f"max.{key}": f"{value:g}" for key, value in self.high.items()},
            "page": str(self.page),
        } | {key: str(value) for key, value in changes.items()}
        plain = {"q": "", "sort": LATENT, "alive": "any", "shown": "any", "page": "1"}
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
    if ask.query:
        match = match_of(ask.query)
        source = "words CROSS JOIN latent ON latent.key = words.rowid"
        tests.append("words MATCH ?" if match else "0 = ?")
        values.append(match or 1)
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
    sql = (
        f"SELECT latent.key FROM {source} WHERE {where} "
        f"ORDER BY {_order(index, ask)}, latent.key LIMIT ? OFFSET ?"
    )
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


def member_of(index: Index, key: int) -> tuple[Member, int]:
    """Return the member and number of a latent."""
    member, latent = place_of(key)
    return index.members[member], latent

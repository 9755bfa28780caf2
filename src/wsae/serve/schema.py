"""The tables of `browser.sqlite`, and connections that can only read or only build.

A latent's key is `member << 32 | latent`. Everything a list sorts or filters by is a column of the narrow table
`latent`; what one latent's page shows lies in other tables under the same key.
"""

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

SCHEMA = 5
"""Raise it whenever a table, or the meaning of a value in one, changes."""
NAME = "browser.sqlite"
_SHIFT = 32
_CACHE_KIB = 4096

_TABLES = {
    "meta": "CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "member": "CREATE TABLE member(id INTEGER PRIMARY KEY, slug TEXT UNIQUE NOT NULL, record TEXT NOT NULL)",
    "shown": "CREATE TABLE shown(key INTEGER PRIMARY KEY, label TEXT NOT NULL, record TEXT NOT NULL)",
    "packed": "CREATE TABLE packed(key INTEGER PRIMARY KEY, neighbours BLOB, logits BLOB, histogram BLOB)",
    "token": "CREATE TABLE token(id INTEGER PRIMARY KEY, text TEXT NOT NULL)",
    "image": "CREATE TABLE image(number INTEGER PRIMARY KEY, png BLOB NOT NULL)",
    "words": "CREATE VIRTUAL TABLE words USING fts5(explanation, contexts, tokens, content='', "
    'tokenize="unicode61 remove_diacritics 2")',
    "by_twin": "CREATE INDEX by_twin ON latent(twin)",
}


def statements(measures: int) -> dict[str, str]:
    """Return name -> statement of an index with so many measures."""
    columns = "".join(f", m{i} REAL" for i in range(measures))
    latent = (
        "CREATE TABLE latent(key INTEGER PRIMARY KEY, alive INTEGER NOT NULL, shown INTEGER NOT NULL, "
        f"twin INTEGER{columns})"
    )
    return {"latent": latent, **_TABLES}


def key_of(member: int, latent: int) -> int:
    """Return the key of a latent."""
    return member << _SHIFT | latent


def place_of(key: int) -> tuple[int, int]:
    """Return (member, latent) of a key."""
    return key >> _SHIFT, key & ((1 << _SHIFT) - 1)


def create(path: Path, measures: int) -> sqlite3.Connection:
    """Create the tables in a new file and return a connection for filling it.

    Without a journal: the file has a temporary name until it is whole.
    """
    path.unlink(missing_ok=True)
    connection = sqlite3.connect(path, isolation_level=None)
    for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-65536"):
        connection.execute(f"PRAGMA {pragma}")
    for name, statement in statements(measures).items():
        if name != "by_twin":  # made last, at once
            connection.execute(statement)
    connection.execute("BEGIN")
    return connection


def finish(connection: sqlite3.Connection) -> None:
    """Make the index of partners, pack the words, write everything."""
    connection.execute(_TABLES["by_twin"])
    connection.execute("INSERT INTO words(words) VALUES('optimize')")
    connection.execute("COMMIT")
    connection.execute("ANALYZE")
    connection.close()


def connect(path: Path) -> sqlite3.Connection:
    """Open an index for reading; nothing that its file says about its own schema is run."""
    connection = sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro", uri=True)
    for pragma in ("query_only=ON", "trusted_schema=OFF", "cell_size_check=ON"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
    return connection


def is_ours(connection: sqlite3.Connection, measures: int) -> bool:
    """Whether a file holds exactly these tables (no trigger, no view), none of them damaged."""
    rows: Sequence[tuple[str, str, str]] = connection.execute(
        "SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL"
    ).fetchall()
    made = {name: sql for kind, name, sql in rows if kind in ("table", "index")}
    known = statements(measures)
    own = all(made.get(name) == sql for name, sql in known.items())
    extra = [
        name
        for name in made
        if name not in known and not name.startswith(("words_", "sqlite_stat"))
    ]
    if not own or extra or any(kind not in ("table", "index") for kind, *_ in rows):
        return False
    return connection.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok"

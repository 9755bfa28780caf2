"""The tables of `browser.sqlite`, and connections that can only read or only build.

A latent's key is `member << 32 | latent`. Everything a list sorts or filters by is a column of the narrow table
`latent`; what one latent's page shows lies in other tables under the same key.
"""

import os
import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from wsae.core.artifact import record
from wsae.core.errors import UserError
from wsae.core.files import read_sealed, seal, write_json
from wsae.evals.latents import Context, Kept

# The bins in which activations are counted: eight per decade, the same for every latent.

PER_DECADE, LOWEST, BINS = 8, -4, 72
"""Eight bins per decade from 1e-4 to 1e5; what lies outside is counted in the last bin of its side."""


def bin_of(values: Float64[Tensor, " nnz"]) -> Int64[Tensor, " nnz"]:
    """Return the bin of some activations above 0."""
    bins = values.log10().sub_(LOWEST).mul_(PER_DECADE)
    return bins.long().clamp_(0, BINS - 1)  # cut off, not rounded down: what is under 0 becomes 0


def occupied(counts: list[int]) -> tuple[list[float], list[int]]:
    """Return (edges as powers of ten, counts) of the bins from the first to the last that holds something."""
    used = [i for i, count in enumerate(counts) if count]
    if not used:
        return [], []
    bins = range(used[0], used[-1] + 1)
    edges = [LOWEST + i / PER_DECADE for i in (*bins, bins.stop)]
    return edges, counts[bins.start : bins.stop]


_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3021-\u312f\u3131-\u318e\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff])"
)
"""Scripts that are written without spaces between words (Thai to Khmer, Chinese, Japanese), and Korean."""


def spaced(text: str) -> str:
    """Return text in which each character of a script without spaces is a word of its own, for the search.

    A search for some of them is one for that phrase, so it finds them in the midst of a sentence.
    """
    return text if text.isascii() else _UNSPACED.sub(r" \1 ", text)


# The numbers known of every latent of a member: what the evaluation and the scores say, and what
# the decoder says.


class Measure(NamedTuple):
    """One number per latent: its key in addresses, its name for readers, what it means."""

    key: str
    name: str
    about: str


BASIC = (
    Measure("density", "density", "share of held-out rows on which the latent fires"),
    Measure("variance", "variance", "variance of the activation over all held-out rows"),
    Measure("max", "strongest", "strongest activation on held-out rows"),
    Measure(
        "gamma",
        "γ influence",
        "‖Γd‖² / ‖d‖² of the decoder row d: what an error along it counts in the weighted loss; 1 without weights",
    ),
    Measure("match", "match", "decoder cosine with the most similar live latent of the plain twin"),
    Measure(
        "kept",
        "kept",
        "for a latent of the plain twin: the largest match of another member's latent that it is the match of; 0: none",
    ),
    Measure(
        "nearest", "nearest cosine", "largest |cosine| with another decoder row of the same SAE"
    ),
    Measure("sequences", "sequences", "held-out sequences in which it fires"),
)

SCHEMA = 6
"""Raise it whenever a table, or the meaning of a value in one, changes."""
NAME = "browser.sqlite"
_SHIFT = 32
_CACHE_KIB = 4096

_TABLES = {
    "meta": "CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "member": "CREATE TABLE member(id INTEGER PRIMARY KEY, slug TEXT UNIQUE NOT NULL, record TEXT NOT NULL)",
    "shown": "CREATE TABLE shown(key INTEGER PRIMARY KEY, label TEXT NOT NULL, record TEXT NOT NULL)",
    "packed": "CREATE TABLE packed(key INTEGER PRIMARY KEY, neighbours BLOB, logits BLOB, histogram BLOB, "
    "fires BLOB, contexts BLOB)",
    "text": "CREATE TABLE text(seq INTEGER PRIMARY KEY, ids BLOB NOT NULL)",
    "token": "CREATE TABLE token(id INTEGER PRIMARY KEY, text NOT NULL)",
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

    Without a journal or locks: the file has a temporary name of its own until it is whole.
    """
    address = f"file:{quote(os.fsencode(path.absolute()))}?nolock=1"
    connection = sqlite3.connect(address, uri=True, isolation_level=None)
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
    """Open an index for reading, from any thread; nothing that its file says about its own schema is run.

    `immutable`: a journal or log that lies beside the file, which no checksum covers, is left alone, and no lock taken.
    """
    address = f"file:{quote(os.fsencode(path.resolve()))}?mode=ro&immutable=1"
    connection = sqlite3.connect(address, uri=True, check_same_thread=False)
    for pragma in ("query_only=ON", "trusted_schema=OFF", "cell_size_check=ON"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
    return connection


def is_ours(connection: sqlite3.Connection, measures: int) -> bool:
    """Return whether a file holds exactly these tables (no trigger, no view), none of them damaged."""
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


# The seal of an index: what it must be to be opened.


def seal_of(path: Path) -> Path:
    """Return where the checksum of an index is kept: beside it, written after it."""
    return path.with_name(f"{path.name}.json")


def write_seal(path: Path, identity: str) -> None:
    """Write the seal of an index, which tells what it was made from."""
    write_json(seal_of(path), seal({"identity": identity, "file": record(path).to_dict()}))


def sealed_identity(path: Path) -> str:
    """Return the identity of an index that its seal tells; raises UserError when it is not the file that was sealed."""
    if not path.is_file() or not seal_of(path).is_file():
        raise UserError(f"{path}: no index with its seal")
    told = read_sealed(seal_of(path))
    if told.get("file") != record(path).to_dict() or not isinstance(told.get("identity"), str):
        raise UserError(f"{path}: altered, its checksum differs")
    return told["identity"]


class Unpacked(NamedTuple):
    """A latent's contexts: the strongest, and samples over the quantiles, strongest first."""

    strongest: list[Context]
    samples: list[Context]


def unpacked(blob: bytes | None) -> Unpacked:
    """Return the contexts that an index keeps of a latent; raises ValueError for what is no such blob."""
    if not blob:
        return Unpacked([], [])
    top, samples = np.frombuffer(blob[:8], np.int32).tolist()
    n = top + samples
    if min(top, samples) < 0 or len(blob) < 8 + 12 * n:
        raise ValueError("has contexts of another form")
    seq, pos, count = np.frombuffer(blob[8 : 8 + 12 * n], np.int32).reshape(3, n).astype(np.int64)
    rest = blob[8 + 12 * n :]
    entries = len(rest) // 6
    if min(seq.min(), pos.min(), count.min()) < 0 or len(rest) != 6 * count.sum():
        raise ValueError("has contexts of another form")
    act: Float32[np.ndarray, " entries"] = np.frombuffer(rest[: 4 * entries], np.float32)
    if not np.isfinite(act).all():
        raise ValueError("holds what is no number")
    offset = np.frombuffer(rest[4 * entries :], np.int16)
    unused = np.zeros(n, dtype=np.int64)
    flags = unused.astype(bool)
    value = unused.astype(np.float32)
    kept = Kept(unused, seq, pos, value, unused, flags, flags, flags, count, offset, act)
    found = [
        context._replace(value=context.acts.get(context.pos, 0.0)) for context in kept.contexts()
    ]
    return Unpacked(found[:top], found[top:])

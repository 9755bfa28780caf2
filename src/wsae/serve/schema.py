"""The tables of `browser.sqlite`, and connections that can only read or only build.

A latent's key is `member << 32 | latent`. Everything a list sorts or filters by is a column of the narrow table
`latent`; what one latent's page shows lies in other tables under the same key.
"""

import os
import re
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from wsae.acts.tokens import owner_of
from wsae.core.artifact import record
from wsae.core.errors import UserError
from wsae.core.files import read_sealed
from wsae.evals.latents import unit_rows
from wsae.report.rundata import RunData, finite
from wsae.report.view import score_name
from wsae.report.words import number
from wsae.run import Json
from wsae.sae import SparseAutoencoder

# What is computed from decoder rows alone, in blocks: nearest latents, and what a latent's
# direction weighs.

BLOCK = 1 << 24
"""Numbers of a product held at once (64 MB in fp32)."""


def neighbours(
    W_dec: Float[Tensor, "d_sae d_in"], n: int
) -> Iterator[tuple[Float[Tensor, "block n"], Int64[Tensor, "block n"]]]:
    """Yield, block by block, the n other latents of largest signed decoder cosine: (cosines, latents), best first.

    A latent whose row is zero has cosine 0 with every other.
    """
    units = unit_rows(W_dec)
    d_sae = len(units)
    n = min(n, d_sae - 1)
    size = max(1, BLOCK // d_sae)
    for start in range(0, d_sae, size):
        cosine = units[start : start + size] @ units.T
        cosine.diagonal(start).fill_(-torch.inf)
        best = cosine.topk(n, dim=1)
        yield best.values.clamp(-1.0, 1.0).cpu(), best.indices.cpu()


def influence(
    W_dec: Float[Tensor, "d_sae d_in"], gamma: Float[Tensor, "..."]
) -> Float64[Tensor, " d_sae"]:
    """Return ||Gamma d||^2 / ||d||^2 for every decoder row d: what an error along it counts in the weighted loss.

    1 without weights. `gamma` is the diagonal [d_in] or the matrix [d_in, d_in]. A row of zeros gives NaN.
    """
    weights = gamma.detach().double()
    out = []
    for rows in W_dec.split(max(1, BLOCK // W_dec.shape[1])):
        units = unit_rows(rows).double()
        weighed = units * weights if weights.ndim == 1 else units @ weights.T
        length = units.square().sum(1)
        out.append(torch.where(length > 0, weighed.square().sum(1) / length, torch.nan).cpu())
    return torch.cat(out)


# The bins in which activations are counted: eight per decade, the same for every latent.

PER_DECADE, LOWEST, BINS = 8, -4, 72
"""Eight bins per decade from 1e-4 to 1e5; what lies outside is counted in the last bin of its side."""
DENSITY_EDGES = [-7.0 + 0.25 * i for i in range(29)]
"""The bins in which a member's densities are counted, as powers of ten."""


def bin_of(values: Float64[Tensor, " nnz"]) -> Int64[Tensor, " nnz"]:
    """Return the bin of some activations above 0."""
    return ((values.log10() - LOWEST) * PER_DECADE).floor().long().clamp(0, BINS - 1)


def edge(number: int) -> float:
    """Return the lower edge of a bin, as a power of ten."""
    return LOWEST + number / PER_DECADE


def occupied(counts: list[int]) -> tuple[list[float], list[int]]:
    """Return (edges as powers of ten, counts) of the bins from the first to the last that holds something."""
    used = torch.tensor(counts).nonzero()[:, 0].tolist()
    if not used:
        return [], []
    first, last = used[0], used[-1]
    return [edge(i) for i in range(first, last + 2)], counts[first : last + 1]


# Contexts as pieces to be shown: visible characters, shading by activation, marks where the search
# text stands.

LEVELS = 6
CONTINUED = "⋯"
"""Stands for a token that continues the character before it."""
_HIDDEN = re.compile(
    "[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3021-\u312f\u3131-\u318e\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff])"
)
"""Scripts that are written without spaces between words (Thai to Khmer, Chinese, Japanese), and Korean."""
_NAMED = {"\n": "↵", "\t": "⇥"}


class Piece(NamedTuple):
    """Some text of a context: its shade (0: silent), whether it is the peak or matches the search, its activation."""

    text: str
    level: int = 0
    peak: bool = False
    hit: bool = False
    tip: str = ""

    @property
    def kind(self) -> str:
        """Its classes."""
        names = [f"a{self.level}"] if self.level else []
        return " ".join(
            ["tok", *names, *(["peak"] if self.peak else []), *(["hit"] if self.hit else [])]
        )

    @property
    def plain(self) -> bool:
        """Whether it needs no element of its own."""
        return not (self.level or self.hit or self.peak)


def visible(text: str) -> str:
    """Return text in which characters that are invisible, or would reorder the line, stand by name."""
    return _HIDDEN.sub(lambda m: _NAMED.get(m[0]) or f"⟨{ord(m[0]):04X}⟩", text)


def spaced(text: str) -> str:
    """Return text in which each character of a script without spaces is a word of its own, for the search.

    A search for some of them is one for that phrase, so it finds them in the midst of a sentence.
    """
    return text if text.isascii() else _UNSPACED.sub(r" \1 ", text)


def shown_token(text: str) -> str:
    """Return a token that stands alone: visible, and not empty."""
    return visible(text).strip() or ("␣" if text else CONTINUED)


def level_of(act: float, most: float | None) -> int:
    """Return the shade of an activation: 0 none, 1 to 6 by its share of the strongest."""
    if act <= 0:
        return 0
    share = act / most if most and most > 0 else 1.0
    return max(1, min(LEVELS, -int(-LEVELS * share // 1)))


def pieces(context: dict[str, Any], most: float | None, words: list[str]) -> list[Piece]:
    """Return a context's tokens as pieces, neighbours without a mark joined; `most` is the latent's strongest."""
    tokens = [str(token) for token in context["tokens"]]
    hits = matched(tokens, words)
    out: list[Piece] = []
    for i, (token, act) in enumerate(zip(tokens, context["acts"], strict=True)):
        tip = f"activation {number(float(act))}" if act > 0 else ""
        piece = Piece(
            visible(token) or (CONTINUED if act > 0 else ""),
            level_of(act, most),
            i == context.get("peak") and act > 0,
            i in hits,
            tip,
        )
        if piece.plain and out and out[-1].plain:
            out[-1] = Piece(out[-1].text + piece.text)
        else:
            out += _spaced(piece)
    if out and out[0].plain:
        out[0] = Piece(out[0].text.lstrip(" "))
    return out


def _spaced(piece: Piece) -> list[Piece]:
    """Keep leading spaces outside the shading, so that lines break cleanly."""
    body = piece.text.lstrip(" ")
    if piece.plain or not body or body == piece.text:
        return [piece]
    return [Piece(piece.text[: len(piece.text) - len(body)]), piece._replace(text=body)]


def matched(tokens: list[str], words: list[str]) -> set[int]:
    """Return the positions of tokens that some word of the search covers, in any case."""
    hits: set[int] = set()
    starts, text = [], ""
    for token in tokens:
        starts.append(len(text))
        text += token.lower()
    ends = [*starts[1:], len(text)]
    for word in (word.lower() for word in words if word):
        at = text.find(word)
        while at >= 0:
            for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
                if start < at + len(word) and end > at:
                    hits.add(i)
            at = text.find(word, at + len(word))
    return hits


# What a run already says of single latents: contexts, explanation, scores, typical tokens, ready
# for the index.

Texts = tuple[str, str, str]
"""Explanation, contexts and typical tokens, as they are searched."""
_KEPT = ("explanation", "tokens", "contexts", "scores", "match")
_LABEL = 160


def entries(run: RunData, who: tuple[str, str], size: int) -> dict[int, Json]:
    """Return latent -> what evaluation and interpretation say of it, for a member of `size` latents.

    Raises UserError when they name a latent that the member does not have, or a context is not one.
    """
    hook, member = who
    out: dict[int, Json] = {}
    for entry in run.contexts.get(hook, {}).get(member, []):
        latent = entry.get("latent")
        if not isinstance(latent, int) or not 0 <= latent < size:
            raise UserError(
                f"{run.path}: its contexts name latent {latent!r} of {member}, which has {size}; "
                "evaluate and interpret it again"
            )
        if not all(_is_context(context) for context in entry.get("contexts", [])):
            raise UserError(
                f"{run.path}: a context of {member}'s latent {latent} is damaged; evaluate it again"
            )
        out[latent] = entry
    return out


def _is_context(context: object) -> bool:
    if not isinstance(context, dict):
        return False
    tokens, acts = context.get("tokens"), context.get("acts")
    whole = isinstance(tokens, list) and isinstance(acts, list) and len(tokens) == len(acts)
    peak, seq = context.get("peak"), context.get("seq")
    placed = peak is None or (isinstance(peak, int) and whole and 0 <= peak < len(tokens or []))
    return (
        whole
        and placed
        and (seq is None or isinstance(seq, int))
        and all(isinstance(token, str) for token in tokens or [])
        and all(finite(act) is not None for act in acts or [])
    )


def stored_rows(
    run: RunData, who: tuple[str, str], size: int, fresh: dict[int, list[Json]] | None = None
) -> Iterator[tuple[int, str, Texts, Json]]:
    """Yield (latent, label, texts, record) of each latent that has contexts, scores or an explanation.

    `fresh`: contexts collected now, for latents that have none stored.
    """
    hook, member = who
    details = _details(run, hook, member)
    found = entries(run, who, size)
    for latent, contexts in (fresh or {}).items():
        entry = found.get(latent, {"latent": latent})
        found[latent] = entry if entry.get("contexts") else {**entry, "contexts": contexts}
    for latent, entry in sorted(found.items()):
        kept = {name: entry[name] for name in _KEPT if entry.get(name)}
        if latent in details:
            kept["details"] = details[latent]
        yield latent, label(entry), texts(entry), kept


def label(entry: Json) -> str:
    """Return one line that stands for a latent in lists: its explanation, else what it fires on."""
    said = entry.get("explanation")
    if said:
        return clean(str(said))[:_LABEL]
    tokens = [str(token) for token in entry.get("tokens", [])] or _peaks(entry)
    shown = dict.fromkeys(shown_token(clean(token)) for token in tokens)
    return "fires on " + ", ".join(f"“{token}”" for token in [*shown][:5]) if shown else ""


def _peaks(entry: Json) -> list[str]:
    contexts = [c for c in entry.get("contexts", []) if isinstance(c.get("peak"), int)]
    return list(dict.fromkeys(owner_of(c["tokens"], c["peak"]) for c in contexts))


def texts(entry: Json) -> Texts:
    """Return what a search looks through (`spaced`)."""
    contexts = "\n".join("".join(map(str, c["tokens"])) for c in entry.get("contexts", []))
    typical = " ".join(str(token) for token in entry.get("tokens", []))
    said = str(entry.get("explanation") or "")
    return spaced(clean(said)), spaced(clean(contexts)), spaced(clean(typical))


def clean(text: str) -> str:
    """Return text that UTF-8 can carry (half a surrogate pair becomes a question mark)."""
    return text.encode("utf-8", "replace").decode()


def _details(run: RunData, hook: str, member: str) -> dict[int, Json]:
    """Return latent -> how each score came about, from the interpretation."""
    found = run.interpretation.get("hooks", {}).get(hook, {}).get("members", {}).get(member, {})
    rows = found.get("latents", [])
    return {int(row["latent"]): row["details"] for row in rows if row.get("details")}


# The numbers known of every latent of a member: what the evaluation and the scores say, and what
# the decoder says.


class Measure(NamedTuple):
    """One number per latent: its key in addresses, its name for readers, what it means."""

    key: str
    name: str
    about: str


DENSITY = Measure("density", "density", "share of held-out rows on which the latent fires")
MATCH = Measure(
    "match", "match", "decoder cosine with the most similar live latent of the plain twin"
)
BASIC = (
    DENSITY,
    Measure("variance", "variance", "variance of the activation over all held-out rows"),
    Measure("max", "strongest", "strongest activation among the held-out rows that were kept"),
    Measure(
        "gamma",
        "γ influence",
        "‖Γd‖² / ‖d‖² of the decoder row d: what an error along it counts in the weighted loss; 1 without weights",
    ),
    MATCH,
    Measure(
        "nearest", "nearest cosine", "largest |cosine| with another decoder row of the same SAE"
    ),
)
CLASSES = ("consistency_top", "consistency_corrected", "selectivity", "information")
_ARRAYS = {
    "density": "density",
    "variance": "variance",
    "match": "match_cosine",
    "nearest": "decoder_max_cosine",
}
"""Measure -> array of the evaluation."""


@dataclass(frozen=True)
class Classes:
    """Scores against class labels by "hook|member|name", and what they mean."""

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    glossary: Json = field(default_factory=dict)


def measures(run: RunData, classes: Classes) -> list[Measure]:
    """Return the measures this run has, basic ones first."""
    told = {**run.interpretation.get("glossary", {}), **classes.glossary}
    entries = (e for named in run.contexts.values() for latents in named.values() for e in latents)
    scores = dict.fromkeys(score for entry in entries for score in entry.get("scores", {}))
    by_class = (key for key in CLASSES if any(n.endswith(f"|{key}") for n in classes.arrays))
    names = [key for key in dict.fromkeys([*scores, *by_class]) if key not in _basic_keys()]
    return [*BASIC, *(Measure(key, score_name(key), _about(told.get(key))) for key in names)]


def _basic_keys() -> set[str]:
    return {measure.key for measure in BASIC}


def _about(entry: object) -> str:
    told = entry if isinstance(entry, dict) else {}
    return "; ".join(str(told[part]) for part in ("formula", "direction") if told.get(part))


def columns(
    run: RunData, classes: Classes, who: tuple[str, str], sae: SparseAutoencoder | None
) -> dict[str, np.ndarray]:
    """Return key -> values [d_sae] of one (hook, member); NaN where a latent was not measured."""
    hook, member = who
    density = run.array(hook, member, "density")
    assert density is not None, "only members with a density are indexed"
    size = len(density)
    out = {
        key: found
        for key, name in _ARRAYS.items()
        if (found := run.array(hook, member, name)) is not None
    }
    if sae is not None:
        out["gamma"] = influence(sae.W_dec, sae.gamma).numpy()
    for key in CLASSES:
        found = classes.arrays.get(f"{hook}|{member}|{key}")
        if found is not None:
            out[key] = found
    for latent, entry in entries(run, who, size).items():
        values = {"max": entry.get("max"), **entry.get("scores", {})}
        for key, value in values.items():
            if value is not None and key not in CLASSES and key not in _ARRAYS:
                out.setdefault(key, np.full(size, np.nan))[latent] = value
    return {key: values for key, values in out.items() if len(values) == size}


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


# The seal of an index: what it must be to be opened.


def seal_of(path: Path) -> Path:
    """Return where the checksum of an index is kept: beside it, written after it."""
    return path.with_name(f"{path.name}.json")


def sealed_identity(path: Path) -> str:
    """Return the identity of an index that its seal tells; raises UserError when it is not the file that was sealed."""
    if not path.is_file() or not seal_of(path).is_file():
        raise UserError(f"{path}: no index with its seal")
    told = read_sealed(seal_of(path))
    if told.get("file") != record(path).to_dict() or not isinstance(told.get("identity"), str):
        raise UserError(f"{path}: altered, its checksum differs")
    return told["identity"]

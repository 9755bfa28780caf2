"""Make a run's index: every latent of every member, from what evaluation, scores and decoders say.

It is made once, under a lock, and again when the run or its scores have changed. One member's weights are in memory at
a time. The file appears under its name when it is whole.
"""

import contextlib
import errno
import json
import os
import re
import sqlite3
import tempfile
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from wsae.acts.stream import HeldOut
from wsae.acts.tokens import TokenTable, decode_table, owner_of
from wsae.core.errors import UserError
from wsae.core.files import as_user_error, digest, locked_file, writing
from wsae.core.progress import Progress, quiet
from wsae.evals.latents import RELATIVE_NORM, sample_latents
from wsae.report.charts import shown_token
from wsae.report.rundata import RunData, counted, is_control, read_run
from wsae.report.view import glossary, meaning, overview, score_name
from wsae.run import Json, Run
from wsae.sae import SAE
from wsae.serve import schema
from wsae.serve.collect import Gathered, MemberContexts, Say, Seen, Watched, collect
from wsae.serve.config import IndexConfig
from wsae.serve.index import Index, Member, run_digest, weights_digest
from wsae.serve.model import (
    ModelName,
    Unembedding,
    fingerprint_of,
    influence,
    load,
    model_of,
    neighbours,
    promoted,
    unembedding,
)
from wsae.serve.schema import BASIC, Measure, key_of

Reopen = Callable[[Path], HeldOut]
"""Run -> the data it was trained on."""


def ensure_index(
    run: Path,
    place: Path | None,
    cfg: IndexConfig,
    reopen: Reopen | None = None,
    progress: Progress = quiet,
    say: Say = str,
) -> tuple[Path, bool]:
    """Return the path of a run's current index, and whether it was made just now.

    `place`: the file, instead of RUN/browser.sqlite; `reopen`: see `build`. Raises UserError when the run is not
    whole or evaluated, or nothing can be written there. A second process waits for the first one's index.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such run directory; give the --out of a `wsae train`")
    path = place or run / schema.NAME
    key = identity(run, cfg)
    if is_current(path, key):
        return path, False
    try:
        with alone(path):
            if is_current(path, key):  # made by another process in the meantime
                return path, False
            build(run, path, cfg, reopen, progress, say)
            schema.write_seal(path, key)
    except UserError as error:
        if "cannot write here" in str(error) and place is None:
            raise UserError(
                f"{run}: cannot write its index here; give a directory with --out"
            ) from error
        raise
    return path, True


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process makes this index; raises UserError where its place cannot be written or is full."""
    lock = path.with_name(f".{path.name}.lock")
    try:
        with locked_file(lock, wait=True):
            yield
    except OSError as error:
        raise as_user_error(error, path) from error
    except sqlite3.OperationalError as error:
        number = _REFUSALS.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
        if number is None:
            raise
        refusal = OSError(number, str(error))
        try:  # SQLite keeps its reasons to itself: what does the system say to a small write?
            with tempfile.TemporaryFile(dir=path.parent) as file:
                file.write(b"x")
                file.flush()
                os.fsync(file.fileno())
        except OSError as told:
            refusal = told
        raise as_user_error(refusal, path) from error


_REFUSALS = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR: errno.ENOSPC,  # what a write past the disk's or the user's limit becomes
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
}
"""SQLite's result code without the details -> errno, for where a second, small write is not refused."""


def is_current(path: Path, key: str) -> bool:
    """Return whether a file is a whole index of this identity, unaltered since it was made."""
    try:
        return schema.sealed_identity(path) == key == Index(path).identity
    except UserError:  # damaged: made again
        return False


NO_LOGITS = ModelName("", "left out with --logits 0")


def identity(run: Path, cfg: IndexConfig) -> str:
    """Return the digest of everything an index is made from: another digest means another index.

    Raises UserError when `run` is no finished run or has not been evaluated.
    """
    found, model = run_digest(run), _model(run, cfg)
    told = fingerprint_of(model.name) if model.name else model.why_not
    there = Path(str(Run(run).source.get("path"))).exists()  # the data that contexts are of
    return digest([schema.SCHEMA, cfg.to_dict(), found, told, there])


def _model(run: Path, cfg: IndexConfig) -> ModelName:
    return NO_LOGITS if cfg.logits == 0 else model_of(run)


def build(
    run: Path,
    out: Path,
    cfg: IndexConfig,
    reopen: Reopen | None = None,
    progress: Progress = quiet,
    say: Say = str,
) -> None:
    """Write the index of a run to `out`, atomically.

    `reopen` gives the data that contexts are collected from; `say` is told beforehand what it takes. Raises UserError
    when the run is not whole or not evaluated, changes meanwhile, or what was asked for cannot be had.
    """
    key, of_run = identity(run, cfg), run_digest(run)
    data = read_run(run)
    source = Indexing(data, cfg, _model(run, cfg), measures(data), members(data))
    if not source.members:
        raise UserError(f"{run}: its evaluation knows no latents; run: wsae evaluate {run}")
    gathered, why_not = gather(source, reopen, progress, say)
    source = replace(source, gathered=gathered)
    with writing(out) as temporary:
        connection = schema.create(temporary, len(source.measures))
        try:
            about = _fill(connection, source, progress)
            told = [
                (key, name, str(entry.get("formula", ""))) for key, name, entry in glossary(data)
            ]
            meta = {
                "identity": key,
                "run": of_run,
                "measures": source.measures,
                "overview": {**overview(data).model_dump(), "glossary": told},
                "model": {**source.model._asdict(), "about": about},
                "unit": data.unit,
                "name": run.resolve().name,
                "config": cfg.to_dict(),
                "window": cfg.window,
                "no_contexts": why_not,
            }
            rows = [(name, json.dumps(value)) for name, value in meta.items()]
            connection.executemany("INSERT INTO meta VALUES(?, ?)", rows)
            schema.finish(connection)
        finally:
            connection.close()
        if identity(run, cfg) != key:
            raise UserError(f"{run}: changed while its index was made; run the same command again")


# What an index is made from: the members and the measures of their latents.


@dataclass(frozen=True)
class Indexing:
    """A run as it is indexed: what was read of it, and what is asked for."""

    run: RunData
    cfg: IndexConfig
    model: ModelName
    measures: list[Measure]
    members: list[Member]
    gathered: Gathered | None = None

    def seen(self, member: Member) -> Seen | None:
        """Return what a member's latents do on all held-out rows, where that was looked at."""
        return None if self.gathered is None else self.gathered.seen.get(member.id)

    def density(self, member: Member) -> Float[np.ndarray, " d_sae"]:
        """Return how often each latent of a member fires."""
        seen = self.seen(member)
        return (
            seen.density
            if seen is not None
            else self.run.arrays[f"{member.hook}|{member.name}|density"]
        )

    def contexts(self, member: Member) -> MemberContexts | None:
        """Return a member's contexts, where they were collected."""
        gathered = self.gathered
        return None if self.seen(member) is None or not gathered else gathered.contexts(member.id)

    def load(self, member: Member) -> SAE | None:
        """Return a member's SAE, none where the run keeps no weights of it; raises UserError for a damaged one."""
        place = self.run.weights(member.hook, member.name)
        return None if place is None else SAE.load(place)


RESERVED = ("all", "live", "compare", "steer", "attribute")
"""Words that mean something else where a member's name stands in an address."""


def slugs(names: Iterable[str]) -> list[str]:
    """Return one name per name, in order: safe characters only, none twice, none reserved."""
    out: list[str] = []
    for name in names:
        base = re.sub(r"[^A-Za-z0-9._~-]+", "-", name).strip("-.") or "x"
        slug, number = base, 1
        while slug in out or slug in RESERVED:
            number += 1
            slug = f"{base}-{number}"
        out.append(slug)
    return out


def members(run: RunData) -> list[Member]:
    """Return the trained members whose densities were measured."""
    pairs = [
        (hook, name)
        for hook in run.hooks
        for name in run.members(hook)
        if not is_control(name) and run.array(hook, name, "density") is not None
    ]
    several = len({hook for hook, _ in pairs}) > 1
    names = slugs([f"{hook}~{name}" if several else name for hook, name in pairs])
    out = []
    for number, ((hook, name), slug) in enumerate(zip(pairs, names, strict=True)):
        density, twin = run.arrays[f"{hook}|{name}|density"], (hook, run.twin_of(hook, name))
        place = run.weights(hook, name)
        out.append(
            Member(
                id=number,
                slug=slug,
                hook=hook,
                name=name,
                kind=run.kind(hook, name),
                plain=run.is_plain(hook, name),
                twin=next((i for i, pair in enumerate(pairs) if pair == twin), None),
                size=len(density),
                alive=int((density > 0).sum()),
                density=counted(density),
                shown=0,
                weights="" if place is None else weights_digest(place),
            )
        )
    return out


CLASSES = ("consistency_top", "consistency_corrected", "selectivity", "information")
_ARRAYS = {
    "density": "density",
    "variance": "variance",
    "match": "match_cosine",
    "nearest": "decoder_max_cosine",
}
"""Measure -> array of the evaluation."""


def measures(run: RunData) -> list[Measure]:
    """Return the measures this run has, basic ones first."""
    told = {
        key: entry
        for part in (run.interpretation, run.classes)
        for key, entry in part.get("glossary", {}).items()
    }
    stored = (e for named in run.contexts.values() for latents in named.values() for e in latents)
    scores = dict.fromkeys(score for entry in stored for score in entry.get("scores", {}))
    by_class = (key for key in CLASSES if any(n.endswith(f"|{key}") for n in run.by_class))
    basic = {measure.key for measure in BASIC}
    names = [key for key in dict.fromkeys([*scores, *by_class]) if key not in basic]
    evaluated = (m for hook in run.hooks for m in run.evaluated(hook).get("members", {}).values())
    sources = dict.fromkeys(s for m in evaluated for s in (m.get("sources") or {}).get("alone", ()))
    return [
        *BASIC,
        *(Measure(key, score_name(key), meaning(told.get(key, {}))) for key in names),
        *(Measure(f"{RELATIVE_NORM}[{name}]", f"in {name}", _SHARE) for name in sources),
    ]


_SHARE = "the source's share of the decoder row: its norm there over the sum of all; sources at the same scale"


def entries(run: RunData, member: Member) -> dict[int, Json]:
    """Return latent -> what evaluation and interpretation say of it; raises UserError for one that is not there."""
    out: dict[int, Json] = {}
    for entry in run.contexts.get(member.hook, {}).get(member.name, []):
        latent = entry["latent"]
        if latent >= member.size:
            raise UserError(
                f"{run.path}: its contexts name latent {latent!r} of {member.name}, which has "
                f"{member.size}; evaluate and interpret it again"
            )
        out[latent] = entry
    return out


def columns(
    run: RunData, member: Member, sae: SAE | None, stored: dict[int, Json]
) -> dict[str, np.ndarray]:
    """Return measure -> values [d_sae] of a member; NaN where a latent was not measured."""
    found = {key: run.array(member.hook, member.name, name) for key, name in _ARRAYS.items()}
    found["gamma"] = None if sae is None else influence(sae.W_dec, sae.gamma).numpy()
    place = f"{member.hook}|{member.name}|"
    found |= {key: run.by_class.get(place + key) for key in CLASSES}
    own = (
        key.removeprefix(place) for key in run.arrays if key.startswith(f"{place}{RELATIVE_NORM}")
    )
    found |= {key: run.arrays[place + key] for key in own}
    out = {key: values for key, values in found.items() if values is not None}
    for latent, entry in stored.items():
        values = {"max": entry.get("max"), **entry.get("scores", {})}
        for key, value in values.items():
            if value is not None and key not in CLASSES and key not in _ARRAYS:
                out.setdefault(key, np.full(member.size, np.nan))[latent] = value
    return {key: values for key, values in out.items() if len(values) == member.size}


def kept_by_others(source: Indexing, member: Member) -> Float[np.ndarray, " d_sae"] | None:
    """Return for each latent of a twin the largest match cosine of those that it is the match of, 0 for none's."""
    out = np.zeros(member.size)
    others = [other for other in source.members if other.twin == member.id]
    for other in others:
        names = (
            source.run.array(other.hook, other.name, f"match_{k}") for k in ("index", "cosine")
        )
        match, cosine = names
        if match is None or cosine is None:
            continue
        matched = (match >= 0) & (match < member.size) & np.isfinite(cosine)
        np.maximum.at(out, match[matched].astype(int), cosine[matched])
    return out if others else None


def labels(run: RunData, member: Member) -> dict[int, list[Json]]:
    """Return latent -> the classes that probes tell by it, where it is among a class's few chosen latents."""
    out: dict[int, list[Json]] = {}
    for kind, record in run.probing.items():
        found = record.get("hooks", {}).get(member.hook, {})
        chosen = found.get("members", {}).get(member.name, {}).get("chosen", [])
        for task, latents in zip(found.get("tasks", []), chosen, strict=False):
            for rank, latent in enumerate(latents):
                out.setdefault(latent, []).append({"kind": kind, "task": task, "rank": rank})
    return {k: sorted(v, key=lambda one: one["rank"]) for k, v in out.items() if k < member.size}


# What the latents do on the run's held-out data.


def gather(
    source: Indexing, reopen: Reopen | None, progress: Progress, say: Say
) -> tuple[Gathered | None, str]:
    """Return what the latents do on the run's held-out data, or why that is not known.

    Raises UserError for data that cannot be had where contexts were asked for by number.
    """
    cfg = source.cfg
    if cfg.contexts == 0:
        return None, "left out with --contexts 0"
    try:
        data, table = _reopened(source, reopen)
    except UserError as error:
        if cfg.contexts is not None:
            raise UserError(f"--contexts: {error}") from error
        say(f"contexts of the evaluated sample only: {error}")
        return None, str(error)
    watched = []
    for member in source.members:
        sae = source.load(member)
        if sae is None:
            continue
        chosen = torch.arange(member.size)
        if cfg.contexts is not None:
            density = torch.from_numpy(source.density(member))
            chosen = sample_latents(density, cfg.contexts, cfg.seed, member.hook, member.name)
        watched.append(Watched(member.id, member.hook, sae, chosen))
    return collect(watched, data, table, cfg, progress, say), ""


def _reopened(source: Indexing, reopen: Reopen | None) -> tuple[HeldOut, TokenTable]:
    """Return the run's data and their text; raises UserError where they cannot be had."""
    if reopen is None:
        raise UserError("the run's data were not given")
    run, behind = source.run.path, model_of(source.run.path)
    if Run(run).source.get("kind") == "live" and behind.why_not:
        raise UserError(behind.why_not)
    data = reopen(run)
    table = data.tokens()
    if table is None:
        raise UserError("the run's data have no text to collect contexts from")
    missing = next((m.hook for m in source.members if m.hook not in data.hooks), None)
    if missing is not None:
        raise UserError(f"the data have no hook {missing!r}")
    return data, table


# The rows of an index, a member at a time.

_PNG = b"\x89PNG\r\n\x1a\n"


def _fill(
    connection: sqlite3.Connection,
    source: Indexing,
    progress: Progress,
) -> str:
    """Write everything about latents; return what the unembedding stands for, in words."""
    language = load(source.model.name, "cpu") if source.model.name else None
    out = None if language is None else unembedding(language.model)
    used: set[int] = set()
    shown: set[int] = set()
    with progress("index", sum(member.size for member in source.members), "latents") as tick:
        for member in source.members:
            sae, contexts = source.load(member), source.contexts(member)
            write_member(connection, source, member, sae, contexts)
            if sae is None:
                tick(member.size)
                continue
            shown |= set() if contexts is None else contexts.sequences
            fits = out is not None and sae.cfg.width_out == out.rows.shape[1]
            tokens = _logit_blobs(sae, out if fits else None, source.cfg.logits, used)
            near = _near_blobs(sae, source.cfg.neighbours)
            seen = _seen_blobs(member.size, source.seen(member), contexts)
            for latent, row in enumerate(zip(near, tokens, seen, strict=True)):
                write_packed(connection, key_of(member.id, latent), *row)
                tick(1)
    texts = {} if language is None else decode_table(language.tokenizer, sorted(used))
    if source.gathered is not None:
        texts |= _write_text(connection, source.gathered, sorted(shown))
    rows = ((t, clean(text) if isinstance(text, str) else text) for t, text in texts.items())
    connection.executemany("INSERT INTO token VALUES(?, ?)", rows)
    for number, data in source.run.thumbnails.items():
        png = b64decode(data)
        if not png.startswith(_PNG):
            raise UserError(
                f"{source.run.path}: image {number} is not a PNG; evaluate the run again"
            )
        connection.execute("INSERT INTO image VALUES(?, ?)", (int(number), png))
    return "" if out is None else out.about


def write_member(
    connection: sqlite3.Connection,
    source: Indexing,
    member: Member,
    sae: SAE | None,
    contexts: MemberContexts | None,
) -> None:
    """Write a member, the numbers of all its latents, and what is known of some: contexts, explanations, scores."""
    run, stored, seen = source.run, entries(source.run, member), source.seen(member)
    found = columns(run, member, sae, stored)
    if (kept := kept_by_others(source, member)) is not None:
        found["kept"] = kept
    if seen is not None:
        found["max"] = np.where(seen.peak.numpy() > 0, seen.peak.numpy(), np.nan)
        found["density"] = seen.density
        found["sequences"] = np.where(seen.chosen, seen.top.sequences, np.nan)
        member.density, member.alive = counted(seen.density), int((seen.density > 0).sum())
    scored = run.interpretation.get("hooks", {}).get(member.hook, {}).get("members", {})
    rows = scored.get(member.name, {}).get("latents", [])
    details = {int(row["latent"]): row["details"] for row in rows if row.get("details")}
    told_by = labels(run, member)
    known = set(stored) | set(told_by) | set(() if contexts is None else contexts.latents)
    for latent in sorted(known):
        entry = stored.get(latent, {})
        kept = {name: entry[name] for name in KEPT if entry.get(name)}
        found_texts = [] if contexts is None else contexts.texts(latent)
        if contexts is not None and found_texts:
            typical = [*contexts.peaks(latent), *contexts.fires(latent)]
            entry = {"tokens": [*dict.fromkeys(typical)]} | entry
            kept.pop("contexts", None)
        else:
            found_texts = ["".join(c["tokens"]) for c in entry.get("contexts", [])]
        if latent in told_by:
            kept["labels"] = told_by[latent]
        if latent in details:
            kept["details"] = details[latent]
        at = key_of(member.id, latent)
        shown = (at, label(entry), json.dumps(kept))
        connection.execute("INSERT INTO shown VALUES(?, ?, ?)", shown)
        connection.execute(
            "INSERT INTO words(rowid, explanation, contexts, tokens) VALUES(?, ?, ?, ?)",
            (at, *texts(entry, found_texts)),
        )
    member.shown = len(known)
    told = json.dumps(member.model_dump(exclude={"id", "slug"}))
    connection.execute("INSERT INTO member VALUES(?, ?, ?)", (member.id, member.slug, told))
    marks = ",".join("?" * (4 + len(source.measures)))
    connection.executemany(
        f"INSERT INTO latent VALUES({marks})", _numbers(source, member, found, known)
    )


def _numbers(
    source: Indexing, member: Member, found: dict[str, np.ndarray], known: set[int]
) -> Iterator[tuple[object, ...]]:
    """Yield the rows of the table `latent`."""
    missing = np.full(member.size, np.nan)
    table = np.stack([found.get(m.key, missing) for m in source.measures], axis=1).astype(float)
    partner = None if member.twin is None else source.members[member.twin]
    match = source.run.array(member.hook, member.name, "match_index")
    if match is None or partner is None:
        match, partner = np.full(member.size, -1.0), member
    elif match.max() >= partner.size:
        raise UserError(
            f"{source.run.path}: {member.name} is matched beyond {partner.name}; evaluate it again"
        )
    density = source.density(member)
    rows = zip(table.tolist(), np.isfinite(table).tolist(), match.tolist(), strict=True)
    for latent, (values, measured, other) in enumerate(rows):
        twin = key_of(partner.id, int(other)) if other >= 0 else None
        kept = (value if there else None for value, there in zip(values, measured, strict=True))
        alive, shown = int(density[latent] > 0), int(latent in known)
        yield key_of(member.id, latent), alive, shown, twin, *kept


class SeenBlobs(NamedTuple):
    """What a latent does, packed: counts (int32); shares (float32), then tokens (int32); contexts (`unpacked`)."""

    counts: bytes | None = None
    fires: bytes | None = None
    contexts: bytes | None = None


def write_packed(
    connection: sqlite3.Connection,
    key: int,
    near: bytes | None,
    tokens: bytes | None,
    seen: SeenBlobs,
) -> None:
    """Write a latent's nearest latents, promoted tokens, counts of activations, typical tokens and contexts."""
    row = (key, near, tokens, *seen)
    connection.execute("INSERT INTO packed VALUES(?, ?, ?, ?, ?, ?)", row)


def _seen_blobs(
    size: int, seen: Seen | None, contexts: MemberContexts | None
) -> Iterator[SeenBlobs]:
    """Yield what each latent does; nothing of any where that was not looked at."""
    if seen is None or contexts is None:
        yield from [SeenBlobs()] * size
        return
    counts = seen.histogram.numpy()
    for latent in range(size):
        blobs = contexts.shares(latent), contexts.packed(latent)
        yield SeenBlobs(counts[latent].tobytes(), *blobs)


def _write_text(
    connection: sqlite3.Connection, gathered: Gathered, sequences: list[int]
) -> dict[int, str | bytes]:
    """Write the token ids of some sequences; return what these read."""
    used: set[int] = set()
    for seq in sequences:
        ids = gathered.ids(seq).numpy().astype(np.int32)
        used.update(np.unique(ids).tolist())
        connection.execute("INSERT INTO text VALUES(?, ?)", (seq, ids.tobytes()))
    return gathered.table.texts(sorted(used))


def _near_blobs(sae: SAE, n: int) -> Iterator[bytes | None]:
    """Yield cosines (float32), then latents (int32)."""
    if n == 0 or sae.cfg.d_sae < 2:
        yield from [None] * sae.cfg.d_sae
        return
    for cosine, where in neighbours(sae.directions, n):
        values, places = cosine.numpy(), where.numpy().astype(np.int32)
        yield from (v.tobytes() + i.tobytes() for v, i in zip(values, places, strict=True))


def _logit_blobs(
    sae: SAE, out: Unembedding | None, n: int, used: set[int]
) -> Iterator[bytes | None]:
    """Yield logits (float32), then tokens (int32): the promoted ones first."""
    if out is None:
        yield from [None] * sae.cfg.d_sae
        return
    for block in promoted(sae.W_dec, out, n):
        values = np.concatenate([part[0].numpy() for part in block], axis=1)
        tokens = np.concatenate([part[1].numpy() for part in block], axis=1).astype(np.int32)
        used.update(np.unique(tokens).tolist())
        yield from (v.tobytes() + t.tobytes() for v, t in zip(values, tokens, strict=True))


KEPT = ("explanation", "tokens", "contexts", "scores", "match")
_LABEL = 160


def label(entry: Json) -> str:
    """Return one line that stands for a latent in lists: its explanation, else what it fires on."""
    said = entry.get("explanation")
    if said:
        return clean(said)[:_LABEL]
    contexts = [c for c in entry.get("contexts", []) if c.get("peak") is not None]
    tokens = entry.get("tokens") or [owner_of(c["tokens"], c["peak"]) for c in contexts]
    shown = dict.fromkeys(shown_token(clean(token)) for token in tokens)
    return "fires on " + ", ".join(f"“{token}”" for token in [*shown][:5]) if shown else ""


def texts(entry: Json, contexts: list[str]) -> tuple[str, str, str]:
    """Return explanation, contexts and typical tokens as they are searched."""
    said, typical = entry.get("explanation") or "", " ".join(entry.get("tokens", []))
    found = (said, "\n".join(contexts), typical)
    said, shown, typical = (schema.spaced(clean(text)) for text in found)
    return said, shown, typical


def clean(text: str) -> str:
    """Return text that UTF-8 can carry (half a surrogate pair becomes a question mark)."""
    return text.encode("utf-8", "replace").decode()

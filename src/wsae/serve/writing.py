"""The rows of an index, a member at a time."""

import json
import sqlite3
from collections.abc import Iterator

import numpy as np

from wsae.core.errors import UserError
from wsae.core.progress import Tick
from wsae.report.charts import kind_of
from wsae.report.rundata import Json
from wsae.sae import SparseAutoencoder
from wsae.serve import schema
from wsae.serve.collect import Seen
from wsae.serve.config import IndexConfig
from wsae.serve.geometry import neighbours
from wsae.serve.histogram import DENSITY_EDGES
from wsae.serve.job import Job, Member
from wsae.serve.measures import columns
from wsae.serve.stored import stored_rows
from wsae.serve.unembed import Unembedding, promoted

EDGES = np.array(DENSITY_EDGES)
Watched = tuple[Member, Seen | None]


def write_member(
    connection: sqlite3.Connection, job: Job, what: Watched, sae: SparseAutoencoder | None
) -> None:
    """Write a member, the numbers of all its latents, and what is known of some: contexts, explanations, scores."""
    member, seen = what
    found = columns(job.run, job.classes, (member.hook, member.name), sae)
    if seen is not None:
        found["max"] = np.where(seen.peak.numpy() > 0, seen.peak.numpy(), np.nan)
    shown: set[int] = set()
    fresh = None if seen is None else seen.contexts
    size = len(job.density(member))
    who = (member.hook, member.name)
    for latent, label, texts, kept in stored_rows(job.run, who, size, fresh):
        shown.add(latent)
        at = schema.key_of(member.id, latent)
        row = (at, label, json.dumps(kept))
        connection.execute("INSERT INTO shown VALUES(?, ?, ?)", row)
        connection.execute(
            "INSERT INTO words(rowid, explanation, contexts, tokens) VALUES(?, ?, ?, ?)",
            (at, *texts),
        )
    partner = _twin(job, member)
    record = _record(
        job, (member, partner), (len(shown), "" if sae is None else job.weights(member))
    )
    values = (member.id, member.slug, json.dumps(record))
    connection.execute("INSERT INTO member VALUES(?, ?, ?)", values)
    marks = ",".join("?" * (4 + len(job.measures)))
    rows = _latent_rows(job, (member, partner), found, shown)
    connection.executemany(f"INSERT INTO latent VALUES({marks})", rows)


def _twin(job: Job, member: Member) -> Member | None:
    twin = job.run.twin_of(member.hook, member.name)
    return next((m for m in job.members if (m.hook, m.name) == (member.hook, twin)), None)


def _record(job: Job, pair: tuple[Member, Member | None], known: tuple[int, str]) -> Json:
    member, partner = pair
    density = job.density(member)
    return {
        "hook": member.hook,
        "name": member.name,
        "kind": kind_of(job.run, member.hook, member.name),
        "plain": job.run.is_plain(member.hook, member.name),
        "twin": None if partner is None else partner.id,
        "size": len(density),
        "alive": int((density > 0).sum()),
        "density": _histogram(density),
        "shown": known[0],
        "weights": known[1],
    }


def _latent_rows(
    job: Job,
    pair: tuple[Member, Member | None],
    found: dict[str, np.ndarray],
    shown: set[int],
) -> Iterator[tuple[object, ...]]:
    member, partner = pair
    density = job.density(member)
    missing = np.full(len(density), np.nan)
    table = np.stack([found.get(m.key, missing) for m in job.measures], axis=1).astype(float)
    known = np.isfinite(table)
    match = job.run.array(member.hook, member.name, "match_index")
    if match is not None and partner is not None and match.max() >= len(job.density(partner)):
        raise UserError(
            f"{job.run.path}: {member.name} is matched beyond {partner.name}; evaluate it again"
        )
    for latent, (values, has) in enumerate(zip(table.tolist(), known.tolist(), strict=True)):
        twin = None
        if match is not None and partner is not None and match[latent] >= 0:
            twin = schema.key_of(partner.id, int(match[latent]))
        at = schema.key_of(member.id, latent)
        kept = (value if there else None for value, there in zip(values, has, strict=True))
        yield (at, int(density[latent] > 0), int(latent in shown), twin, *kept)


def _histogram(density: np.ndarray) -> Json:
    alive = np.clip(np.log10(density[density > 0]), EDGES[0], EDGES[-1] - 1e-9)
    counts = np.histogram(alive, EDGES)[0]
    return {"edges": DENSITY_EDGES, "counts": counts.tolist(), "dead": int((density <= 0).sum())}


def write_packed(
    connection: sqlite3.Connection,
    cfg: IndexConfig,
    what: Watched,
    found: tuple[SparseAutoencoder, Unembedding | None, set[int]],
    tick: Tick,
) -> None:
    """Write nearest latents, promoted tokens and counts of activations of every latent; note the tokens used."""
    (member, seen), (sae, out, used) = what, found
    near = _near_blobs(sae, cfg.neighbours)
    logits = _logit_blobs(sae, out, cfg.logits, used)
    for latent, (a, b) in enumerate(zip(near, logits, strict=True)):
        counts = None if seen is None else seen.histogram[latent].numpy().tobytes()
        at = schema.key_of(member.id, latent)
        connection.execute("INSERT INTO packed VALUES(?, ?, ?, ?)", (at, a, b, counts))
        tick(1)


def _near_blobs(sae: SparseAutoencoder, n: int) -> Iterator[bytes | None]:
    """Yield cosines (float32), then latents (int32)."""
    if n == 0 or sae.cfg.d_sae < 2:
        yield from [None] * sae.cfg.d_sae
        return
    for cosine, where in neighbours(sae.W_dec, n):
        values, places = cosine.numpy(), where.numpy().astype(np.int32)
        yield from (v.tobytes() + i.tobytes() for v, i in zip(values, places, strict=True))


def _logit_blobs(
    sae: SparseAutoencoder, out: Unembedding | None, n: int, used: set[int]
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

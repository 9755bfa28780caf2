"""Make a run's index: every latent of every member, from what evaluation, scores and decoders say.

One member's weights are in memory at a time. The file appears under its name when it is whole.
"""

import json
import re
import sqlite3
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float64, Int32, Int64
from torch import Tensor, nn

from wsae.core.artifact import read_manifest
from wsae.core.errors import UserError
from wsae.core.files import digest, writing
from wsae.core.progress import Progress, Tick, quiet
from wsae.evals.contexts import TopContexts, sample_latents
from wsae.evals.data import HeldOut
from wsae.evals.latents import Entries
from wsae.report import view
from wsae.report import view as interpretation
from wsae.report.charts import kind_of
from wsae.report.rundata import RunData, is_control, read_classes, read_run
from wsae.report.words import Judgement
from wsae.run import Json, Run, check_no_sae
from wsae.sae import SparseAutoencoder
from wsae.sae.encoding import Encoder
from wsae.serve import schema
from wsae.serve.config import IndexConfig
from wsae.serve.model import ModelName, fingerprint_of, load, model_of
from wsae.serve.schema import (
    BINS,
    BLOCK,
    DENSITY_EDGES,
    Classes,
    Measure,
    bin_of,
    columns,
    measures,
    neighbours,
    stored_rows,
)

if TYPE_CHECKING:
    from wsae.acts.language import LanguageModel

# One pass over a run's held-out data: how strongly every latent fires, and where some of them fire
# most.


@runtime_checkable
class Watched(Protocol):
    """A member to be watched."""

    @property
    def hook(self) -> str:
        """Where its activations come from."""
        ...

    @property
    def name(self) -> str:
        """What it is called."""
        ...


@dataclass(frozen=True)
class Seen:
    """What one member's latents did on the held-out rows."""

    peak: Float64[Tensor, " d_sae"]
    histogram: Int32[Tensor, "d_sae bins"]
    contexts: dict[int, list[Json]]
    """Contexts of the chosen latents, strongest first."""


class _Watch:
    """One member while the rows go by."""

    def __init__(self, sae: SparseAutoencoder, chosen: Int64[Tensor, " latents"], n: int) -> None:
        d_sae = sae.cfg.d_sae
        self.encode = Encoder(sae)
        self.top = TopContexts(chosen, d_sae, n)
        self.peak = torch.zeros(d_sae, dtype=torch.float64)
        self.histogram = torch.zeros(d_sae, BINS, dtype=torch.int32)

    def update(self, x: Tensor, seq: Tensor, pos: Tensor) -> None:
        """Add some rows."""
        entries = Entries(self.encode(x))
        self.top.update(entries, seq.long(), pos.long())
        self.peak.scatter_reduce_(0, entries.indices, entries.values, "amax")
        flat = entries.indices * BINS + bin_of(entries.values)
        ones = torch.ones_like(flat, dtype=torch.int32)
        self.histogram.view(-1).scatter_add_(0, flat, ones)


Wanted = dict[Watched, tuple[SparseAutoencoder, Float64[Tensor, " d_sae"]]]
"""Member -> (its SAE, the densities of its latents)."""


def collect(
    source: HeldOut, members: Wanted, cfg: IndexConfig, progress: Progress
) -> dict[Watched, Seen]:
    """Return what every member's latents do, with contexts of `cfg.contexts` live ones each, spread over density.

    Raises UserError when the data have no text or lack a hook of the run.
    """
    if source.tokens() is None:
        raise UserError("--contexts: the run's data have no text to collect contexts from")
    missing = next((m.hook for m in members if m.hook not in source.hooks), None)
    if missing is not None:
        raise UserError(f"--contexts: the data have no hook {missing!r}")
    watched = {
        m: _Watch(
            sae, sample_latents(density, cfg.contexts, cfg.seed, m.hook, m.name), cfg.per_latent
        )
        for m, (sae, density) in members.items()
    }
    with torch.inference_mode(), progress("contexts", None, "rows") as tick:
        for chunk in source.heldout(cfg.batch_size):
            for member, watch in watched.items():
                watch.update(chunk.x[member.hook], chunk.seq, chunk.pos)
            tick(len(chunk.seq))
    return {member: _seen(source, watch, cfg) for member, watch in watched.items()}


def _seen(source: HeldOut, watch: _Watch, cfg: IndexConfig) -> Seen:
    table = source.tokens()
    assert table is not None
    contexts = {
        latent: [
            c.window(table.ids[c.seq, : int(table.lengths[c.seq])].long(), table.decode, cfg.window)
            for c in found
        ]
        for latent, found in watch.top.result().items()
    }
    return Seen(watch.peak, watch.histogram, contexts)


# A run that is being indexed.


@dataclass(frozen=True)
class Member:
    """A member to be indexed."""

    id: int
    hook: str
    name: str
    slug: str


@dataclass(frozen=True)
class Job:
    """A run being indexed: what was read of it, and what is asked for."""

    run: RunData
    classes: Classes
    measures: list[Measure]
    members: list[Member]
    cfg: IndexConfig
    model: ModelName

    def density(self, member: Member) -> Float[np.ndarray, " d_sae"]:
        """Return how often each latent of a member fires."""
        found = self.run.array(member.hook, member.name, "density")
        assert found is not None, "only members with densities are indexed"
        return found

    def load(self, member: Member) -> SparseAutoencoder | None:
        """Return a member's SAE, none where the run keeps no weights of it; raises UserError for a damaged one."""
        listed = self.run.manifest.get("info", {}).get("members", {}).get(member.hook, [])
        place = Run(self.run.path).place(member.hook, member.name)
        return SparseAutoencoder.load(place) if member.name in listed else None

    def weights(self, member: Member) -> str:
        """Return the digest of the manifest of a member's weights."""
        return weights_digest(Run(self.run.path).place(member.hook, member.name))


def weights_digest(place: Path) -> str:
    """Return the digest of the manifest of an SAE, which names its content; raises UserError when it has none."""
    return read_manifest(place, "sae", verify=False).digest()


# The run as a whole, as the report words it, in JSON: the overview page is drawn from this without
# the run.


def overview(run: RunData) -> Json:
    """Return verdicts, the members' metrics side by side, the scores, the setup and the glossary."""
    views = [view.hook_view(run, hook, index) for index, hook in enumerate(run.hooks)]
    hooks = [
        {
            "name": found.name,
            "verdict": found.verdict,
            "method": found.method,
            "members": [
                {"name": m.name, "kind": m.kind, "text": m.text, "control": m.is_control}
                for m in found.members
            ],
            "groups": [[name, [_row(row) for row in rows]] for name, rows in found.groups],
            "scores": _scores(found.interpretation),
            "classes": _scores(found.classes),
        }
        for found in views
    ]
    told = [[key, name, str(entry.get("formula", ""))] for key, name, entry in view.glossary(run)]
    return {"hooks": hooks, "cards": view.cards(run), "notes": run.notes, "glossary": told}


def _row(row: view.Row | interpretation.ScoreRow) -> Json:
    cells = [{"value": c.value, "bounds": c.bounds, "judged": _judged(c.judged)} for c in row.cells]
    return {"name": row.name, "tip": row.tip, "way": row.way, "cells": cells}


def _judged(judged: Judgement | None) -> Json | None:
    if judged is None:
        return None
    return {"outcome": judged.outcome, "mark": judged.mark, "text": judged.text, "how": judged.how}


def _scores(found: interpretation.ScoresView | None) -> Json | None:
    if found is None:
        return None
    columns = [{"name": c.name, "kind": c.kind, "text": c.text} for c in found.columns]
    return {"columns": columns, "rows": [_row(row) for row in found.rows], "judges": found.judges}


# Short names that stand in addresses.

RESERVED = ("all", "live")
"""Words that mean something else where a member's name stands."""


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


# The tokens a latent promotes: its decoder row through the model's final norm and unembedding.
#
# The norm's gain is folded in (and, for LayerNorm, its centring); its division by the length of the
# residual stream is left out, which is the same for all tokens: the order of tokens is exact for a
# residual that lies along the row, the scale is not in nats.


class Unembedding(NamedTuple):
    """Rows of the unembedding with the final norm's gain folded in, and what was folded, in words."""

    rows: Float[Tensor, "vocabulary d_model"]
    about: str


class Promoted(NamedTuple):
    """The most promoted and the most demoted tokens of some latents, strongest first."""

    up: tuple[Float[Tensor, "block n"], Int64[Tensor, "block n"]]
    down: tuple[Float[Tensor, "block n"], Int64[Tensor, "block n"]]


def unembedding(model: nn.Module) -> Unembedding | None:
    """Return a causal language model's unembedding; None when it has none that is a plain matrix.

    None too where the model's files lack its weights or the final norm's: they are NaN.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    rows = weight.detach().float()
    norm = final_norm(model, rows.shape[1])
    if any(bool(x.isnan().any()) for x in (rows, *(norm.parameters() if norm else ()))):
        return None
    if norm is None:
        return Unembedding(rows, "without a final norm, none was found")
    gain, centred = _gain(norm, rows.shape[1])
    rows = rows * gain.to(rows.device)
    kind = type(norm).__name__
    if not centred:
        return Unembedding(rows, f"gain of the final {kind} folded in")
    return Unembedding(
        rows - rows.mean(1, keepdim=True), f"gain and centring of the final {kind} folded in"
    )


def final_norm(model: nn.Module, d_model: int) -> nn.Module | None:
    """Return the norm before the unembedding: the last one of this width outside the blocks."""
    found = [
        module
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and not any(part.isdigit() for part in name.split("."))
        and getattr(getattr(module, "weight", None), "shape", None) == (d_model,)
    ]
    return found[-1] if found else None


@torch.no_grad()
def _gain(norm: nn.Module, d_model: int) -> tuple[Float[Tensor, " d_model"], bool]:
    """Read a norm's gain off two probes, whatever its kind, and whether it takes the mean away.

    The odd part of norm(x) at x = +-1 in turn is gain * x: both have mean 0 (even widths) and mean square 1.
    """
    parameter = next(norm.parameters())
    signs = torch.ones(d_model, device=parameter.device, dtype=parameter.dtype)
    flat = signs.clone()
    signs[1::2] = -1

    def odd(x: Tensor) -> Tensor:
        return ((norm(x[None]) - norm(-x[None])) / 2)[0].float()

    gain = odd(signs) * signs.float()
    centred = float(odd(flat).abs().max()) < 1e-3 * float(gain.abs().max())
    return gain, centred


def promoted(W_dec: Float[Tensor, "d_sae d_model"], out: Unembedding, n: int) -> Iterator[Promoted]:
    """Yield, block by block, the n tokens each decoder row raises most and lowers most."""
    rows = out.rows
    n = min(n, len(rows))
    size = max(1, BLOCK // len(rows))
    W_dec = W_dec.detach().float().to(rows.device)
    for start in range(0, len(W_dec), size):
        logits = W_dec[start : start + size] @ rows.T
        up, down = logits.topk(n, dim=1), logits.topk(n, dim=1, largest=False)
        yield Promoted((up.values.cpu(), up.indices.cpu()), (down.values.cpu(), down.indices.cpu()))


# The rows of an index, a member at a time.

EDGES = np.array(DENSITY_EDGES)
WatchedMember = tuple[Member, Seen | None]


def write_member(
    connection: sqlite3.Connection, job: Job, what: WatchedMember, sae: SparseAutoencoder | None
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
    what: WatchedMember,
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


_PNG = b"\x89PNG\r\n\x1a\n"
NO_LOGITS = ModelName("", "left out with --logits 0")
Reopen = Callable[[Path], HeldOut]
"""Run -> the data it was trained on."""


def identity(run: Path, cfg: IndexConfig) -> str:
    """Return the digest of everything an index is made from: another digest means another index.

    Raises UserError when `run` is no finished run or has not been evaluated.
    """
    found = run_digest(run)
    model = _model(run, cfg)
    told = fingerprint_of(model.name) if model.name else model.why_not
    return digest([schema.SCHEMA, cfg.to_dict(), found, told])


def run_digest(run: Path) -> str:
    """Return the digest of a run with its evaluation and scores; raises UserError as `identity`."""
    check_no_sae(run)
    read_manifest(run, "run", verify=False)  # an unfinished run is refused as such
    return Run(run).digest()


def build(
    run: Path,
    out: Path,
    cfg: IndexConfig,
    reopen: Reopen | None = None,
    progress: Progress = quiet,
) -> None:
    """Write the index of a run to `out`, atomically.

    `reopen` gives the data, needed for `cfg.contexts` alone. Raises UserError when the run is not whole or not
    evaluated, changes meanwhile, or what was asked for cannot be had.
    """
    key, of_run = identity(run, cfg), run_digest(run)
    opened = Run(run)
    data = read_run(opened)
    classes = Classes(read_classes(opened)[1], data.classes.get("glossary", {}))
    job = Job(data, classes, measures(data, classes), _members(data), cfg, _model(run, cfg))
    if not job.members:
        raise UserError(f"{run}: its evaluation knows no latents; run: wsae evaluate {run}")
    seen = _collected(job, reopen, progress) if cfg.contexts and reopen is not None else {}
    language = load(job.model.name, "cpu") if job.model.name else None
    with writing(out) as temporary:
        connection = schema.create(temporary, len(job.measures))
        try:
            about = _fill(connection, (job, seen), language, progress)
            _meta(connection, job, {"identity": key, "run": of_run, "about": about})
            schema.finish(connection)
        finally:
            connection.close()
        if identity(run, cfg) != key:
            raise UserError(f"{run}: changed while its index was made; run the same command again")


def _model(run: Path, cfg: IndexConfig) -> ModelName:
    return NO_LOGITS if cfg.logits == 0 else model_of(run)


def _members(run: RunData) -> list[Member]:
    pairs = [
        (hook, name)
        for hook in run.hooks
        for name in run.members(hook)
        if not is_control(name) and run.array(hook, name, "density") is not None
    ]
    several = len({hook for hook, _ in pairs}) > 1
    names = slugs([f"{hook}~{name}" if several else name for hook, name in pairs])
    return [Member(i, *pair, slug) for i, (pair, slug) in enumerate(zip(pairs, names, strict=True))]


def _collected(job: Job, reopen: Reopen, progress: Progress) -> dict[Member, Seen]:
    """Watch every member whose weights the run keeps, all in one pass."""
    wanted = {
        member: (sae, torch.from_numpy(job.density(member)))
        for member in job.members
        if (sae := job.load(member)) is not None
    }
    found = collect(reopen(job.run.path), {m: v for m, v in wanted.items()}, job.cfg, progress)
    return {member: found[member] for member in wanted}


def _fill(
    connection: sqlite3.Connection,
    what: tuple[Job, dict[Member, Seen]],
    language: "LanguageModel | None",
    progress: Progress,
) -> str:
    """Write everything about latents; return what the unembedding stands for, in words."""
    job, seen = what
    out = None if language is None else unembedding(language.model)
    used: set[int] = set()
    with progress("index", sum(len(job.density(m)) for m in job.members), "latents") as tick:
        for member in job.members:
            sae = job.load(member)
            write_member(connection, job, (member, seen.get(member)), sae)
            if sae is None:
                tick(len(job.density(member)))
                continue
            fits = out is not None and sae.cfg.d_in == out.rows.shape[1]
            packed = (sae, out if fits else None, used)
            write_packed(connection, job.cfg, (member, seen.get(member)), packed, tick)
    if language is not None:
        from wsae.acts.tokens import alone, decode_table

        texts = decode_table(language.tokenizer, sorted(used))
        rows = ((t, alone(text).encode("utf-8", "replace").decode()) for t, text in texts.items())
        connection.executemany("INSERT INTO token VALUES(?, ?)", rows)
    _images(connection, job.run)
    return "" if out is None else out.about


def _images(connection: sqlite3.Connection, run: RunData) -> None:
    for number, data in run.thumbnails.items():
        png = b64decode(data)
        if not png.startswith(_PNG):
            raise UserError(f"{run.path}: image {number} is not a PNG; evaluate the run again")
        connection.execute("INSERT INTO image VALUES(?, ?)", (int(number), png))


def _meta(connection: sqlite3.Connection, job: Job, told: dict[str, str]) -> None:
    """Write what holds for the whole index; `identity` and `run` are digests of what it was made from."""
    values = {
        "identity": told["identity"],
        "run": told["run"],
        "measures": [tuple(measure) for measure in job.measures],
        "overview": overview(job.run),
        "model": {**job.model._asdict(), "about": told["about"]},
        "unit": job.run.unit,
        "name": job.run.path.resolve().name,
        "config": job.cfg.to_dict(),
    }
    rows = [(name, json.dumps(value)) for name, value in values.items()]
    connection.executemany("INSERT INTO meta VALUES(?, ?)", rows)

"""Make a run's index: every latent of every member, from what evaluation, scores and decoders say.

One member's weights are in memory at a time. The file appears under its name when it is whole.
"""

import json
import sqlite3
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from wsae.core.artifact import MANIFEST, read_manifest
from wsae.core.errors import UserError
from wsae.core.files import digest, writing
from wsae.core.progress import Progress, quiet
from wsae.evals.data import HeldOut
from wsae.report.rundata import RunData, check_no_sae, is_control, read_classes, read_run
from wsae.serve import schema
from wsae.serve.collect import Seen, collect
from wsae.serve.config import IndexConfig
from wsae.serve.job import Job, Member
from wsae.serve.measures import Classes, measures
from wsae.serve.model import ModelName, fingerprint_of, load, model_of
from wsae.serve.overview import overview
from wsae.serve.slugs import slugs
from wsae.serve.unembed import unembedding
from wsae.serve.writing import write_member, write_packed

if TYPE_CHECKING:
    from wsae.acts.language import LanguageModel

PARTS = ("evaluation", "interpretation", "classes")
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
    found = {"run": read_manifest(run, "run", verify=False).digest()}
    if not (run / "evaluation" / MANIFEST).is_file():
        raise UserError(f"{run}: has not been evaluated; run: wsae evaluate {run}")
    for part in PARTS:
        if (run / part / MANIFEST).is_file():
            found[part] = read_manifest(run / part, part, verify=False).digest()
    return digest(found)


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
    data = read_run(run)
    classes = Classes(read_classes(run / "classes")[1], data.classes.get("glossary", {}))
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
        from wsae.acts.decoding import decode_table
        from wsae.acts.tokens import alone

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

"""Interpret a training run on held-out text: RUN/interpretation, whole or without a manifest.

Contexts are collected anew in one pass; scores that need no endpoint are kept part by part (`parts`), an endpoint's
answers one by one (`llm.cache`), so a killed run scores nothing twice and ends with the same bytes.
"""

import hashlib
from pathlib import Path
from typing import Any, Unpack

from wsae.core.artifact import MANIFEST, read_manifest, write_manifest
from wsae.core.files import digest, locked, read_json
from wsae.core.progress import Progress, quiet
from wsae.evals.autointerp.config import Asked, InterpretConfig
from wsae.evals.autointerp.llm.plan import Planned, dry_run
from wsae.evals.autointerp.pairs import look, selected
from wsae.evals.autointerp.panel import Judges, again, panel
from wsae.evals.autointerp.parts import Parts, write_ascii
from wsae.evals.autointerp.record import contexts_json, record_json
from wsae.evals.autointerp.scoring import all_fragments, score_all
from wsae.evals.autointerp.subjects import Job, subjects
from wsae.evals.data import HeldOut
from wsae.evals.run import run_subject

Json = dict[str, Any]
PLACE, RECORD, CONTEXTS = "interpretation", "interpretation.json", "contexts.json"


def interpret_run(
    run: Path,
    source: HeldOut,
    cfg: InterpretConfig = InterpretConfig(),  # noqa: B008  (frozen)
    progress: Progress = quiet,
    force: bool = False,
    **judges: Unpack[Judges],
) -> Json:
    """Score the latents of a finished run, write RUN/interpretation and return the content of interpretation.json.

    Judges are `encoder` (none: the builtin one), `language` (the model behind the data) and `llm`; each is needed by
    its scores only. What was made from the same run, data, settings and judges is returned as it is unless `force`.
    Raises UserError when `run` is not a finished run, the data have no text, or a score lacks its judge.
    """
    families = selected(run_subject(run).families, cfg)
    job = Job(run, source, families, panel(cfg, judges, progress), data_digest(source))
    place = run / PLACE
    with locked(place, top=run):
        if force:
            Parts(place / "parts").clear()
        elif (done := _current(job, place)) is not None:
            return done
        return _interpret(job, place)


def data_digest(source: HeldOut) -> str:
    """Return a source's own digest, or a hash of its held-out rows where it has none."""
    own = getattr(source, "digest", None)
    if own is not None:
        return own()
    sha = hashlib.sha256()
    for chunk in source.heldout(2048):
        for tensor in (*chunk.x.values(), chunk.seq, chunk.pos):
            sha.update(tensor.contiguous().cpu().numpy().tobytes())
    return sha.hexdigest()


def _inputs(job: Job) -> dict[str, str]:
    """Return the digests of everything the result depends on beside the settings."""
    judges = {f"judge/{score}": digest(job.panel.identity(score)) for score in job.cfg.scores}
    run = read_manifest(job.run, "run", verify=False).digest()
    return {"run": run, "data": job.data, **judges}


def _current(job: Job, place: Path) -> Json | None:
    """Return what is there, if it is whole, finished, and of these inputs and settings."""
    if not (place / MANIFEST).exists():
        return None
    there = read_manifest(place, PLACE)
    same = there.config == job.cfg.to_dict() and there.inputs == _inputs(job)
    return read_json(place / RECORD) if same and not there.info.get("unfinished") else None


def _interpret(job: Job, place: Path) -> Json:
    sides = look(job.source, job.families, job.cfg, job.progress)
    found = subjects(job, place, sides)
    score_all(job, Parts(place / "parts"), sides, found)
    (place / MANIFEST).unlink(missing_ok=True)
    write_ascii(place / RECORD, record_json(job.panel, sides, found))
    write_ascii(place / CONTEXTS, contexts_json(sides, found))
    parts = (subject.parts for named in found.values() for subject in named.values())
    info = {"unfinished": any(map(again, parts))}
    files = [RECORD, CONTEXTS]
    write_manifest(place, PLACE, job.cfg.to_dict(), files, inputs=_inputs(job), info=info)
    return read_json(place / RECORD)


def plan_run(
    run: Path,
    source: HeldOut,
    cfg: InterpretConfig,
    progress: Progress = quiet,
    **judges: Unpack[Judges],
) -> dict[str, Planned]:
    """Return what the language model would be asked, by score, summed over hooks, members and controls; asks nothing.

    The control random_model is left out: its latents are known only after it was trained.
    """
    asked: list[Asked] = [s for s in cfg.scores if s != "embedding" and s != "surprisal"]
    known = tuple(control for control in cfg.controls if control != "random_model")
    cfg = cfg.model_copy(update={"scores": tuple(asked), "controls": known})
    families = selected(run_subject(run).families, cfg)
    job = Job(run, source, families, panel(cfg, judges, progress), "")
    sides = look(source, families, cfg, progress)
    found = subjects(job, run / PLACE, sides)
    simulated = all_fragments(job, sides, found) if "simulation" in asked else {}
    total: dict[str, Planned] = {}
    for hook, named in found.items():
        for name, subject in named.items():
            assert job.panel.llm is not None
            fragments_of = simulated.get((hook, name))
            for score, part in dry_run(
                job.panel.llm, asked, subject.collected, fragments_of
            ).items():
                total[score] = total.get(score, Planned()) + part
    return total

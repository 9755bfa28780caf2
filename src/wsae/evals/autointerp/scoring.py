"""Every scorer over every member and control, each answer as a part in plain JSON, by latent.

What needs no endpoint is kept part by part, in files named by the hash of what they were made from: a killed run finds
its parts again; another score or control makes only its own.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wsae.core.errors import UserError
from wsae.core.files import Json, digest, finite, read_sealed, seal, write_text
from wsae.core.seeds import seed_for
from wsae.evals.autointerp.collect import Latents, Members, fragments
from wsae.evals.autointerp.config import FREE, FragmentConfig, Score
from wsae.evals.autointerp.controls import shuffled, subset
from wsae.evals.autointerp.embedding import embedding_scores
from wsae.evals.autointerp.llm.asking import NO_EXPLANATION, AnswerTally
from wsae.evals.autointerp.llm.detect import Kind, explain_latents, judged
from wsae.evals.autointerp.llm.simulate import simulation_scores
from wsae.evals.autointerp.members import (
    Interpreted,
    InterpretedMember,
    InterpretJob,
    SurveyedHook,
)
from wsae.evals.autointerp.summary import METRIC
from wsae.evals.autointerp.surprisal import TEMPLATES, surprisal_scores
from wsae.evals.autointerp.windows import Fragments
from wsae.sae import SparseAutoencoder

SCHEMA = 2
"""Of a part: another way of scoring is another number."""
_FINAL = (NO_EXPLANATION, "unparsed")
"""Beginnings of the reasons that asking again would not fix: the answer on disk is what it is."""


class Parts:
    """A directory of parts."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def get(self, key: Json, make: Callable[[], Json]) -> Json:
        """Return the part made from `key`, from disk or made now; what was made now is read back the same way."""
        path = self.place / f"{digest(key)}.json"
        if not path.is_file():
            write_ascii(path, seal(finite({"key": key, "part": make()})))
        found = read_sealed(path)
        if found.keys() != {"key", "part"} or digest(found["key"]) != path.stem:
            raise UserError(f"{path}: altered, not the part it is named after; remove it")
        return found["part"]

    def clear(self) -> None:
        """Forget all of them."""
        shutil.rmtree(self.place, ignore_errors=True)


def write_ascii(path: Path, value: object) -> None:
    """Write a JSON file atomically: NaN as null, and every text in ASCII, since a model's may not be valid UTF-8."""
    write_text(path, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


def part_of(
    job: InterpretJob, score: Score, scores: list[Any], tally: AnswerTally | None = None
) -> Json:
    """Return the answer of a scorer for one member."""
    details = {str(row.latent): row._asdict() for row in scores}
    density = {latent: row.pop("density") for latent, row in details.items()}
    for row in details.values():
        del row["latent"]
    return {
        "judge": job.judge_name(score),
        "metric": METRIC[score],
        "density": density,
        "details": details,
        "tally": None if tally is None else asdict(tally),
    }


def scorer_identity(job: InterpretJob, score: Score) -> Json:
    """Return what a score depends on beside the contexts: who judges, and how."""
    own = getattr(job.judge(score), "digest", "")
    found: Json = {"score": score, "judge": job.judge_name(score), "digest": own}
    if score == "surprisal":
        found["prompts"] = digest(TEMPLATES)
    if score not in FREE:
        assert job.llm is not None
        names = ("probabilities", "hard", "per_prompt", "simulator", "temperature", "seed")
        found |= {name: getattr(job.llm.cfg, name) for name in names}
    return found


def score_all(
    job: InterpretJob, parts: Parts, surveyed: dict[str, SurveyedHook], found: Interpreted
) -> None:
    """Fill in every member's parts and explanations."""
    for hook, named in found.items():
        sample, partners = costly_latents(job, surveyed[hook], named)
        for name, member in named.items():
            for score in job.cfg.scores:
                if score == "embedding":
                    member.parts[score] = _free(job, parts, hook, name, member, None)
                elif score == "surprisal":
                    chosen = sorted({*sample[name], *partners[name]})
                    part = _free(job, parts, hook, name, member, chosen)
                    member.parts[score] = part | {"sample": sample[name]}
            _ask(job, member, f"{hook}/{name}")
    if "simulation" not in job.cfg.scores:
        return
    for (hook, name), shown in all_fragments(job, surveyed, found).items():
        member = found[hook][name]
        assert job.llm is not None
        result = simulation_scores(shown, job.llm, None, job.progress, f"{hook}/{name}")
        part = part_of(job, "simulation", result.scores, result.tally)
        part |= {"explaining": asdict(result.explained.tally), "skipped": dict(shown.skipped)}
        member.parts["simulation"] = part
        told = {str(j): text for j, text in result.explained.explanations.items()}
        member.explanations = told | member.explanations


def _ask(job: InterpretJob, member: InterpretedMember, task: str) -> None:
    """Explain a member's latents once and judge them by detection and fuzzing."""
    wanted: list[Kind] = [s for s in job.cfg.scores if s == "detection" or s == "fuzzing"]
    if not wanted:
        return
    assert job.llm is not None
    collected = member.collected
    explained = explain_latents(collected, job.llm, job.progress, f"{task}: explain")
    for score in wanted:
        names = (job.progress, f"{task}: {score}")
        result = judged(score, collected, explained.explanations, job.llm, *names)
        part = part_of(job, score, result.scores, result.tally)
        member.parts[score] = part | {"explaining": asdict(explained.tally)}
    member.explanations |= {str(j): text for j, text in explained.explanations.items()}


def costly_latents(
    job: InterpretJob, surveyed: SurveyedHook, named: dict[str, InterpretedMember]
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Return by name the latents that surprisal is made for: a part of the sample, and partners of other members'.

    The part is the first n of a seeded order of those with contexts. The shuffled control is made for the reference's.
    """
    sample: dict[str, list[int]] = {}
    for name, member in named.items():
        there = {contexts.latent for contexts in member.collected.latents}
        own = [latent for latent in member.sample if latent in there]
        rng = np.random.default_rng(seed_for(job.cfg.seed, "few", surveyed.survey.hook, name))
        sample[name] = [own[i] for i in rng.permutation(len(own))[: job.cfg.surprisal_latents]]
        if member.control == "shuffled":
            sample[name] = sample[surveyed.reference]
    partners: dict[str, list[int]] = {name: [] for name in named}
    for member, twin in surveyed.family.twins.items():
        paired = surveyed.partners(member)
        partners[twin] += [paired[j] for j in sample[member] if j in paired]
    return sample, partners


def _free(
    job: InterpretJob,
    parts: Parts,
    hook: str,
    name: str,
    member: InterpretedMember,
    chosen: list[int] | None,
) -> Json:
    """Return the part of embedding, or of surprisal for the chosen latents, from disk or made now."""
    score: Score = "embedding" if chosen is None else "surprisal"
    collected, cfg = member.collected, job.cfg

    def made() -> Json:
        if chosen is None:
            assert job.encoder is not None
            found = embedding_scores(collected, job.encoder, progress=job.progress)
        else:
            assert job.reader is not None
            found = surprisal_scores(
                collected, job.reader, None, set(chosen), cfg.seed, job.progress
            )
        return part_of(job, score, found)

    return parts.get(
        {
            "schema": SCHEMA,
            "scorer": scorer_identity(job, score),
            "place": [hook, name],
            "data": job.data,
            "sae": sae_digest(member.sae),
            "contexts": cfg.contexts.to_dict(),
            "shuffled": cfg.seed if member.control == "shuffled" else None,
            "latents": [contexts.latent for contexts in collected.latents],
            "chosen": chosen,
        },
        made,
    )


def asks_again(parts: Mapping[str, Json]) -> bool:
    """Return whether some request had no answer that another attempt, or a larger budget, could bring."""
    tallies = (part.get(kind) for part in parts.values() for kind in ("tally", "explaining"))
    reasons = (reason for tally in tallies if tally for reason in tally["reasons"])
    return any(not reason.startswith(_FINAL) for reason in reasons)


def sae_digest(sae: SparseAutoencoder) -> str:
    """Return a hash of an SAE's settings and tensors."""
    sha = hashlib.sha256(repr(sae.cfg.to_dict()).encode())
    for name, tensor in sorted(sae.tensors().items()):
        sha.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def all_fragments(
    job: InterpretJob, surveyed: dict[str, SurveyedHook], found: Interpreted
) -> dict[tuple[str, str], Fragments]:
    """Return the fragments that simulation needs, by hook and name: one pass over each source.

    Latents without contexts have some too: fragments have their own rule for skipping.
    """
    out: dict[tuple[str, str], Fragments] = {}
    cfg = FragmentConfig(
        width=job.cfg.fragment_tokens, batch_size=job.cfg.batch_size, seed=job.cfg.seed
    )
    every = [(hook, name, one) for hook, named in found.items() for name, one in named.items()]
    for source in {id(one.source): one.source for _, _, one in every}.values():
        saes: Members = {}
        latents: Latents = {}
        for hook, name, one in every:
            if one.source is source and one.control != "shuffled":
                shown = [contexts.latent for contexts in one.collected.latents]
                wanted = list(dict.fromkeys([*one.sample, *shown]))
                saes.setdefault(hook, {})[name] = one.sae
                latents.setdefault(hook, {})[name] = torch.tensor(wanted, dtype=torch.int64)
        made = fragments(source, saes, latents, cfg, job.progress)
        out |= {(hook, name): one for hook, named in made.items() for name, one in named.items()}
    for hook, name, one in every:
        if one.control == "shuffled":
            reference = out[hook, surveyed[hook].reference]
            out[hook, name] = shuffled(subset(reference, one.sample), job.cfg.seed, hook)
    return out

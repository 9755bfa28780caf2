"""Every scorer over every member and control; what needs no endpoint is kept part by part."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from wsae.core.errors import UserError
from wsae.core.files import Json, digest, finite, read_sealed, seal, write_text
from wsae.core.seeds import seed_for
from wsae.evals.autointerp.config import FREE, Score
from wsae.evals.autointerp.controls import derangement
from wsae.evals.autointerp.llm.config import FragmentConfig
from wsae.evals.autointerp.llm.simulate import Fragments, fragments
from wsae.evals.autointerp.subjects import InterpretJob, Named, Subject, Subjects, SurveyedHook
from wsae.sae import SparseAutoencoder

# Finished parts of an interpretation, in files named by the hash of what they were made from.
#
# A killed run finds its parts again; another score or control makes only its own.


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


SCHEMA = 2
"""Of a part: another way of scoring is another number."""


def score_all(
    job: InterpretJob, parts: Parts, sides: dict[str, SurveyedHook], found: Subjects
) -> None:
    """Fill in every subject's parts and explanations."""
    for hook, named in found.items():
        few = few_latents(job.cfg.surprisal_latents, job.cfg.seed, sides[hook], named)
        for name, subject in named.items():
            for score in job.cfg.scores:
                if score in FREE:
                    chosen = few[name] if score == "surprisal" else None
                    subject.parts[score] = _free(job, parts, hook, name, subject, score, chosen)
            if {"detection", "fuzzing"} & set(job.cfg.scores):  # they share their explanations
                asked, explanations = job.scorers.asked(subject.collected, f"{hook}/{name}")
                subject.parts |= asked
                subject.explanations |= explanations
    if "simulation" in job.cfg.scores:
        for (hook, name), shown in all_fragments(job, sides, found).items():
            subject = found[hook][name]
            part, explanations = job.scorers.simulated(shown, f"{hook}/{name}")
            subject.parts["simulation"] = part
            subject.explanations = explanations | subject.explanations


class Few(NamedTuple):
    """The latents of one subject that a costly score is made for."""

    sample: list[int]
    """A part of the subject's sample: its mean is over these."""
    partners: list[int]
    """Of the latents of other members."""


def few_latents(n: int, seed: int, sides: SurveyedHook, named: Named) -> dict[str, Few]:
    """Return the first n latents of a seeded order of each sample that have contexts, and their partners.

    The shuffled control is made for the reference's.
    """
    out = {}
    for name, subject in named.items():
        there = {contexts.latent for contexts in subject.collected.latents}
        own = [latent for latent in subject.sample if latent in there]
        rng = np.random.default_rng(seed_for(seed, "few", sides.survey.hook, name))
        out[name] = Few([own[i] for i in rng.permutation(len(own))[:n]], [])
        if subject.control == "shuffled":
            out[name] = Few(out[sides.reference].sample, [])
    for member, twin in sides.family.twins.items():
        partners = sides.partners(member)
        out[twin].partners.extend(partners[j] for j in out[member].sample if j in partners)
    return out


def _free(
    job: InterpretJob,
    parts: Parts,
    hook: str,
    name: str,
    subject: Subject,
    score: Score,
    few: Few | None,
) -> Json:
    """Return a part from disk or made now; of a few latents it says which are the sample."""
    chosen = None if few is None else sorted({*few.sample, *few.partners})
    made_from = {
        "schema": SCHEMA,
        "scorer": job.scorers.identity(score),
        "place": [hook, name],
        "data": job.data,
        "sae": sae_digest(subject.sae),
        "contexts": job.cfg.contexts.to_dict(),
        "shuffled": job.cfg.seed if subject.control == "shuffled" else None,
        "latents": [contexts.latent for contexts in subject.collected.latents],
        "chosen": chosen,
    }
    wanted = None if chosen is None else set(chosen)
    part = parts.get(made_from, lambda: job.scorers.free(score, subject.collected, wanted))
    return part if few is None else {**part, "sample": few.sample}


def sae_digest(sae: SparseAutoencoder) -> str:
    """Return a hash of an SAE's settings and tensors."""
    sha = hashlib.sha256(repr(sae.cfg.to_dict()).encode())
    for name, tensor in sorted(sae.tensors().items()):
        sha.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def all_fragments(
    job: InterpretJob, sides: dict[str, SurveyedHook], found: Subjects
) -> dict[tuple[str, str], Fragments]:
    """Return the fragments that simulation needs, by hook and name: one pass over each source."""
    out: dict[tuple[str, str], Fragments] = {}
    every = [(h, n, s) for h, named in found.items() for n, s in named.items()]
    real = [(h, n, s) for h, n, s in every if s.control != "shuffled"]
    for source in {id(s.source): s.source for _, _, s in real}.values():
        mine = [(h, n, s) for h, n, s in real if s.source is source]
        saes: dict[str, dict[str, SparseAutoencoder]] = {h: {} for h, _, _ in mine}
        latents: dict[str, dict[str, torch.Tensor]] = {h: {} for h, _, _ in mine}
        for hook, name, subject in mine:
            saes[hook][name] = subject.sae
            latents[hook][name] = torch.tensor(_simulable(subject), dtype=torch.int64)
        cfg = FragmentConfig(
            width=job.cfg.fragment_tokens, batch_size=job.cfg.batch_size, seed=job.cfg.seed
        )
        made = fragments(source, saes, latents, cfg, job.progress)
        out |= {(hook, name): made[hook][name] for hook, name, _ in mine}
    for hook, name, subject in every:
        if subject.control == "shuffled":
            reference = out[hook, sides[hook].reference]
            out[hook, name] = _shuffled(reference, set(subject.sample), job.cfg.seed, hook)
    return out


def _simulable(subject: Subject) -> list[int]:
    """Return a subject's latents, those without contexts too: fragments have their own rule for skipping."""
    shown = [contexts.latent for contexts in subject.collected.latents]
    return list(dict.fromkeys([*subject.sample, *shown]))


def _shuffled(found: Fragments, sample: set[int], seed: int, hook: str) -> Fragments:
    """Return the fragments of a sample, each latent with another one's explaining ones."""
    latents = [latent for latent in found.latents if latent.latent in sample]
    if len(latents) < 2:
        return replace(found, latents=[], skipped={"alone": len(latents)})
    giver = derangement(len(latents), seed_for(seed, "shuffled", hook))
    swapped = [
        replace(one, explain=latents[int(giver[i])].explain) for i, one in enumerate(latents)
    ]
    return replace(found, latents=swapped, skipped={})

"""An interpretation: the run's members and their controls, each with its contexts, and every scorer over all of them.

One pass over the held-out rows gives densities, live latents and the statistics behind the controls. A member's sample
is one live latent from each of n equal-count strata of density; its twin shows the partners of these beside a sample of
its own, so that a comparison over matched latents has both sides.

Each scorer's answer is a part in plain JSON, by latent. What needs no endpoint is kept part by part, in files named by
the hash of what they were made from: a killed run finds its parts again; another score or control makes only its own.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from wsae.acts.hooknames import among
from wsae.acts.stream import HeldOut, Language
from wsae.core.errors import UserError
from wsae.core.files import Json, digest, finite, read_sealed, seal, write_text
from wsae.core.progress import Progress, quiet
from wsae.core.seeds import seed_for
from wsae.evals.config import FREE, Control, FragmentConfig, InterpretConfig, Score
from wsae.evals.control import NAMES, neurons, pca, random_control, random_model, shuffled, subset
from wsae.evals.interpret.asking import NO_EXPLANATION, AnswerTally, Llm, Request
from wsae.evals.interpret.collect import Latents, Members, collect, fragments
from wsae.evals.interpret.detection import (
    TEMPLATES,
    Memo,
    PrefixReader,
    TextEncoder,
    embedding_scores,
    load_encoder,
    surprisal_scores,
)
from wsae.evals.interpret.judges import explain_latents, judged, simulation_scores
from wsae.evals.interpret.summary import METRIC
from wsae.evals.interpret.windows import Collected, Fragments
from wsae.evals.latents import LiveDecoder, Matching, match, sample_latents
from wsae.evals.measure import EvaluatedSaes, Survey
from wsae.run import Run
from wsae.sae import SAE
from wsae.stats.moments import Covariance
from wsae.train.config import TrainConfig

ASSIGNMENT_MAX = 8192
"""Live latents up to which members are matched one-to-one optimally, as in `wsae evaluate`."""


class ScorerModels(TypedDict, total=False):
    """The models that may be asked; what is left out is not there."""

    llm: Llm | None
    """A language model that follows instructions, for detection, fuzzing and simulation."""
    language: Language | None
    """The model behind the activations, for surprisal and the control random_model."""
    encoder: TextEncoder | None
    """A sentence encoder, for embedding; none loads the builtin one."""


@dataclass(frozen=True)
class InterpretJob:
    """One interpretation: the run's families on some data, and the models that the scores need, all there."""

    run: Path
    source: HeldOut
    families: dict[str, EvaluatedSaes]
    cfg: InterpretConfig
    data: str
    """Digest of the data."""
    progress: Progress = quiet
    encoder: TextEncoder | None = None
    language: Language | None = None
    reader: PrefixReader | None = None
    """The language model as a reader, which remembers what it has read."""
    llm: Llm | None = None

    def judge(self, score: Score) -> Any:
        """Return the model behind a score."""
        return {"embedding": self.encoder, "surprisal": self.language}.get(score, self.llm)

    def judge_name(self, score: Score) -> str:
        """Return what results call the model behind a score."""
        return name_of(self.judge(score))


def name_of(judge: Any) -> str:
    """Return what results call a model."""
    return str(getattr(judge, "name", type(judge).__name__))


def needed_models(cfg: InterpretConfig, given: ScorerModels) -> dict[str, Any]:
    """Return the fields of `InterpretJob` for its models; raises UserError naming the score that lacks one."""
    out: dict[str, Any] = {name: given.get(name) for name in ("encoder", "language", "llm")}
    if "embedding" in cfg.scores:
        out["encoder"] = Memo(out["encoder"] or load_encoder())
    if "surprisal" in cfg.scores:
        if out["language"] is None:
            raise UserError(
                "score surprisal: needs the one model behind the data, and there are two or it was not given; leave it "
                "out (--score embedding)"
            )
        out["reader"] = PrefixReader(out["language"])
    asked = [score for score in cfg.scores if score not in FREE]
    if asked and out["llm"] is None:
        raise UserError(
            f"score {asked[0]}: asks a language model that follows instructions; give one, or leave it out"
        )
    return out


@dataclass(frozen=True)
class SurveyedHook:
    """One hook's members before collection."""

    family: EvaluatedSaes
    survey: Survey
    covariance: Covariance | None
    reference: str
    """The member that the controls are made like: the plain twin, or the first member where none is plain."""
    sample: dict[str, list[int]] = field(default_factory=dict)
    """Each member's own latents: its means are over these."""
    matching: dict[str, Matching] = field(default_factory=dict)

    def pairs(self, member: str) -> dict[int, tuple[int, float]]:
        """Return latent -> its partner in the twin and their cosine, for the member's latents that have one."""
        found = self.matching[member]
        columns = (found.pair_a.tolist(), found.pair_b.tolist(), found.pair_cosine.tolist())
        return {latent: (other, cosine) for latent, other, cosine in zip(*columns, strict=True)}

    def partners(self, member: str) -> dict[int, int]:
        """Return latent -> its partner, for the member's sampled latents."""
        pairs = self.pairs(member)
        return {latent: pairs[latent][0] for latent in self.sample[member] if latent in pairs}

    def latents(self) -> dict[str, Int64[Tensor, " latents"]]:
        """Return what to collect of each member: its sample, then partners of other members' samples."""
        wanted = {name: list(sample) for name, sample in self.sample.items()}
        for member, twin in self.family.twins.items():
            wanted[twin] += self.partners(member).values()
        return {
            name: torch.tensor(list(dict.fromkeys(latents)), dtype=torch.int64)
            for name, latents in wanted.items()
        }

    def controls(self, cfg: InterpretConfig) -> dict[str, SAE]:
        """Return the controls that are SAEs of the same rows, by name."""
        mean, l0 = self.survey.moments.mean, self.survey.activity[self.reference].l0
        like = self.family.saes[self.reference]
        made: dict[Control, SAE] = {}
        if "random_sae" in cfg.controls:
            made["random_sae"] = random_control(like, mean, l0, cfg.seed)
        if "neurons" in cfg.controls:
            made["neurons"] = neurons(mean, self.survey.moments.variance, l0)
        if "pca" in cfg.controls:
            assert self.covariance is not None
            made["pca"] = pca(mean, self.covariance.covariance, l0)
        device = like.W_dec.device
        return {NAMES[control]: sae.to(device) for control, sae in made.items()}


@torch.inference_mode()
def survey_hooks(
    source: HeldOut,
    families: dict[str, EvaluatedSaes],
    cfg: InterpretConfig,
    progress: Progress = quiet,
) -> dict[str, SurveyedHook]:
    """Survey the held-out rows once and choose each member's latents, hook by hook.

    Raises UserError when there are no rows, a width differs, or the data hold NaN.
    """
    surveys = {hook: Survey(hook, family.saes, source.hooks) for hook, family in families.items()}
    covariances = {h: Covariance(source.hooks[h]) for h in families if "pca" in cfg.controls}
    n_rows = 0
    with progress("survey", None, "rows") as tick:
        for chunk in source.heldout(cfg.batch_size):
            for hook, survey in surveys.items():
                survey.update(chunk.x)
                if hook in covariances:
                    covariances[hook].update(chunk.x[hook])
            n_rows += len(chunk.seq)
            tick(len(chunk.seq))
    if not n_rows:
        raise UserError("there are no held-out rows to interpret on; hold out more data")
    out = {}
    for hook, family in families.items():
        activity, matching, sample = surveys[hook].activity, {}, {}
        for name, live in activity.items():
            n, names = cfg.contexts.n_latents, ("interpret", hook, name)
            sample[name] = sample_latents(live.density, n, cfg.seed, *names).tolist()
        for member, twin in family.twins.items():
            a, b = (
                LiveDecoder(family.saes[n].directions, activity[n].alive) for n in (member, twin)
            )
            matching[member] = match(a, b, ASSIGNMENT_MAX, cfg.seed)
        reference = next(iter(family.twins.values()), next(iter(family.saes)))
        covariance = covariances.get(hook)
        out[hook] = SurveyedHook(family, surveys[hook], covariance, reference, sample, matching)
    return out


def selected(families: dict[str, EvaluatedSaes], cfg: InterpretConfig) -> dict[str, EvaluatedSaes]:
    """Return the hooks and members asked for, each weighted member with its twin; raises UserError for others."""
    hooks = [among(hook, families) for hook in cfg.hooks]
    if None in hooks:
        wrong = cfg.hooks[hooks.index(None)]
        raise UserError(f"hook {wrong!r}: the run has {', '.join(families)}")
    out = {}
    for hook, family in families.items():
        if hooks and hook not in hooks:
            continue
        for name in cfg.members:
            if name not in family.saes:
                raise UserError(f"member {name!r}: the run has {', '.join(family.saes)}")
        chosen = set(cfg.members or family.saes)
        chosen |= {twin for name, twin in family.twins.items() if name in chosen}
        out[hook] = EvaluatedSaes(
            {name: sae for name, sae in family.saes.items() if name in chosen},
            {name: twin for name, twin in family.twins.items() if name in chosen},
        )
    return out


@dataclass
class InterpretedMember:
    """One member or control, its contexts, and what the scorers make of them."""

    sae: SAE
    source: HeldOut
    collected: Collected
    sample: list[int]
    """Latents its means are over; the others are partners of another member's."""
    control: Control | None = None
    alive: int | None = None
    """Latents that fire on the held-out rows; None where nobody counted."""
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Score -> {"judge", "metric", "density": {latent: ...}, "details": {latent: {...}}, "tally" or None}."""
    explanations: dict[str, str] = field(default_factory=dict)

    def sampled(self, score: str) -> list[int]:
        """Return the latents that a score's mean is over: the sample, or the part of it that was scored."""
        return self.parts[score].get("sample", self.sample)

    def values(self, score: str) -> dict[int, float]:
        """Return the score of every latent that has one."""
        part = self.parts[score]
        found = {int(j): row.get(part["metric"]) for j, row in part["details"].items()}
        return {latent: value for latent, value in found.items() if value is not None}

    def own(self, score: str) -> dict[int, float]:
        """Return the same for the sample alone."""
        values = self.values(score)
        return {latent: values[latent] for latent in self.sampled(score) if latent in values}


Interpreted = dict[str, dict[str, InterpretedMember]]
"""Hook -> the name of the member or control -> it."""


def collect_members(
    job: InterpretJob, place: Path, surveyed: dict[str, SurveyedHook]
) -> Interpreted:
    """Collect the contexts of all members and controls: one pass, and one of the model with random weights."""
    cfg = job.cfg
    saes: Members = {h: {**one.family.saes, **one.controls(cfg)} for h, one in surveyed.items()}
    wanted = {hook: one.latents() for hook, one in surveyed.items()}
    control_of: dict[str, Control] = {name: control for control, name in NAMES.items()}

    def collected(source: HeldOut, saes: Members, wanted: Latents | None) -> Interpreted:
        found = collect(source, saes, cfg.contexts, cfg.batch_size, wanted, job.progress)
        out: Interpreted = {}
        for hook, named in found.items():
            out[hook] = {}
            for name, one in named.items():  # the sample of a control: all latents drawn
                sample = [*(contexts.latent for contexts in one.latents), *one.left_out]
                control = control_of.get(name)
                out[hook][name] = InterpretedMember(saes[hook][name], source, one, sample, control)
        return out

    out = collected(job.source, saes, wanted)
    for hook, one in surveyed.items():
        for name, sample in one.sample.items():
            out[hook][name].sample = sample
            out[hook][name].alive = len(one.survey.activity[name].alive)
        if "shuffled" in cfg.controls:
            like = out[hook][one.reference]
            own = subset(like.collected, set(like.sample))
            out[hook][NAMES["shuffled"]] = InterpretedMember(
                like.sae,
                like.source,
                shuffled(own, cfg.seed, hook),
                [contexts.latent for contexts in own.latents],
                "shuffled",
            )
    if "random_model" in cfg.controls:
        train = Run(job.run).config
        if not isinstance(train, TrainConfig):
            raise UserError(
                f"{job.run}: too little is known of how this SAE was trained for the control random_model; leave it out"
            )
        member = next(iter(surveyed.values())).reference
        made, live = random_model(
            job.source,
            job.language,
            train,
            member,
            place / "random-model",
            cfg.seed,
            cfg.keep_store,
            job.progress,
        )
        alone = {hook: {NAMES["random_model"]: made[hook]} for hook in surveyed}
        for hook, named in collected(live, alone, None).items():
            out[hook] |= named
    return out


SCHEMA = 2
"""Of a part: another way of scoring is another number."""
_FINAL = (NO_EXPLANATION, "unparsed", "empty content", "longer than the model's")
"""Beginnings of the reasons that asking again would not fix: the answer on disk, or the model, is what it is."""


def kept_part(place: Path, key: Json, make: Callable[[], Json]) -> Json:
    """Return the part made from `key`, from disk or made now; what was made now is read back the same way."""
    path = place / f"{digest(key)}.json"
    if not path.is_file():
        write_ascii(path, seal(finite({"key": key, "part": make()})))
    found = read_sealed(path)
    if found.keys() != {"key", "part"} or digest(found["key"]) != path.stem:
        raise UserError(f"{path}: altered, not the part it is named after; remove it")
    return found["part"]


def write_ascii(path: Path, value: object) -> None:
    """Write a JSON file atomically: NaN as null, and every text in ASCII, since a model's may not be valid UTF-8."""
    write_text(path, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


def part_of(
    job: InterpretJob, score: Score, scores: Sequence[Any], tally: AnswerTally | None = None
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


def scorer_identity(score: Score, judge: Any) -> Json:
    """Return what a score depends on beside the contexts: who judges, and how."""
    found: Json = {"score": score, "judge": name_of(judge), "digest": getattr(judge, "digest", "")}
    if score == "surprisal":
        found["prompts"] = digest(TEMPLATES)
    if score not in FREE:
        names = ("probabilities", "hard", "per_prompt", "simulator", "seed")
        found |= {name: getattr(judge.cfg, name) for name in names}
        found["asked"] = digest(judge.question(Request((), 0, 0)))  # where, and how long it thinks
    return found


def score_all(
    job: InterpretJob, parts: Path, surveyed: dict[str, SurveyedHook], found: Interpreted
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
            asked: list[Score] = [s for s in job.cfg.scores if s == "detection" or s == "fuzzing"]
            _ask(job, asked, member, member.collected, f"{hook}/{name}")
    if "simulation" in job.cfg.scores:
        for (hook, name), shown in all_fragments(job, surveyed, found).items():
            member = found[hook][name]
            _ask(job, ["simulation"], member, shown, f"{hook}/{name}")
            member.parts["simulation"]["skipped"] = dict(shown.skipped)


def _ask(
    job: InterpretJob,
    scores: list[Score],
    member: InterpretedMember,
    found: Collected | Fragments,
    task: str,
) -> None:
    """Explain a member's latents once and judge the explanations in several ways."""
    if not scores:
        return
    assert job.llm is not None
    explained = explain_latents(found, job.llm, job.progress, f"{task}: explain")
    for score in scores:
        given = (explained.explanations, job.llm, job.progress, f"{task}: {score}")
        if isinstance(found, Fragments):
            result = simulation_scores(found, *given)
        else:
            result = judged("detection" if score == "detection" else "fuzzing", found, *given)
        part = part_of(job, score, result.scores, result.tally)
        member.parts[score] = part | {"explaining": asdict(explained.tally)}
    told = {str(latent): text for latent, text in explained.explanations.items()}
    member.explanations = told | member.explanations


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
    parts: Path,
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

    return kept_part(
        parts,
        {
            "schema": SCHEMA,
            "scorer": scorer_identity(score, job.judge(score)),
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


def sae_digest(sae: SAE) -> str:
    """Return a hash of an SAE's tensors and settings, but for those left at None: a new one leaves old hashes alone."""
    made = {name: value for name, value in sae.cfg.to_dict().items() if value is not None}
    sha = hashlib.sha256(repr(made).encode())
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

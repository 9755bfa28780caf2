"""Who judges, and each scorer's answer for one member as a part that can be kept: plain JSON, by latent."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypedDict

from wsae.core.errors import UserError
from wsae.core.files import digest
from wsae.core.progress import Progress, quiet
from wsae.evals.autointerp.config import FREE, InterpretConfig, Score
from wsae.evals.autointerp.embedding import embedding_scores
from wsae.evals.autointerp.encoder import Encoder, Memo, load_encoder
from wsae.evals.autointerp.llm.asking import NO_EXPLANATION
from wsae.evals.autointerp.llm.detect import Judged, detection_scores, fuzzing_scores
from wsae.evals.autointerp.llm.explain import Explained, Explanation, explain_latents
from wsae.evals.autointerp.llm.fragments import Fragments
from wsae.evals.autointerp.llm.simulate import simulation_scores
from wsae.evals.autointerp.llm.types import Llm, Tally
from wsae.evals.autointerp.reader import Reader
from wsae.evals.autointerp.surprisal import TEMPLATES, surprisal_scores
from wsae.evals.autointerp.windows import Collected
from wsae.evals.data import Language

Json = dict[str, Any]
METRIC: dict[Score, str] = {
    "embedding": "auc",
    "surprisal": "auc",
    "detection": "balanced_accuracy",
    "fuzzing": "balanced_accuracy",
    "simulation": "mixed",
}
"""The number that stands for a score; what else is known of a latent is beside it."""
_FINAL = (NO_EXPLANATION, "unparsed")
"""Beginnings of the reasons that asking again would not mend: the answer on disk is what it is."""


class Judges(TypedDict, total=False):
    """Who may be asked; what is left out is not there."""

    llm: Llm | None
    """A language model that follows instructions, for detection, fuzzing and simulation."""
    language: Language | None
    """The model behind the activations, for surprisal and the control random_model."""
    encoder: Encoder | None
    """A sentence encoder, for embedding; none loads the builtin one."""


@dataclass(frozen=True)
class Panel:
    """The judges that the scores need, all there."""

    cfg: InterpretConfig
    encoder: Encoder | None
    language: Language | None
    llm: Llm | None
    reader: Reader | None = None
    """The language model as a reader, which remembers what it has read."""
    progress: Progress = quiet

    def names(self) -> dict[str, str]:
        """Return score -> who judges it."""
        return {score: _name(self._judge(score)) for score in self.cfg.scores}

    def identity(self, score: Score) -> Json:
        """Return what a score depends on beside the contexts: who judges, and how."""
        judge = self._judge(score)
        found: Json = {
            "score": score,
            "judge": _name(judge),
            "digest": getattr(judge, "digest", ""),
        }
        if score == "surprisal":
            found["prompts"] = digest(TEMPLATES)
        if score not in FREE:
            assert self.llm is not None
            cfg = self.llm.cfg
            own = ("probabilities", "hard", "per_prompt", "simulator", "temperature", "seed")
            found |= {name: getattr(cfg, name) for name in own}
        return found

    def free(self, score: Score, collected: Collected, latents: set[int] | None) -> Json:
        """Score some of a member's latents (none: all) without an LLM."""
        if score == "embedding":
            assert self.encoder is not None
            scores = embedding_scores(collected, self.encoder, progress=self.progress)
        else:
            assert self.reader is not None
            scores = surprisal_scores(
                collected, self.reader, None, latents, self.cfg.seed, self.progress
            )
        return _part(score, _name(self._judge(score)), scores, None)

    def asked(self, collected: Collected, task: str) -> tuple[dict[str, Json], dict[str, str]]:
        """Explain a member's latents and judge them by detection and fuzzing; return parts and explanations."""
        assert self.llm is not None
        wanted: list[Score] = [s for s in self.cfg.scores if s in ("detection", "fuzzing")]
        explained = explain_latents(collected, self.llm, self.progress, f"{task}: explain")
        parts = {}
        for score in wanted:
            found = self._judged(score, collected, explained, f"{task}: {score}")
            parts[score] = _part(score, found.model, found.scores, found.tally)
            parts[score]["explaining"] = explained.tally.to_dict()
        return parts, _texts(explained.explanations)

    def simulated(self, found: Fragments, task: str) -> tuple[Json, dict[str, str]]:
        """Explain a member's latents from fragments and simulate others; return the part and explanations."""
        assert self.llm is not None
        result = simulation_scores(found, self.llm, None, self.progress, task)
        part = _part("simulation", result.model, result.scores, result.tally)
        part |= {"explaining": result.explained.tally.to_dict(), "skipped": result.skipped}
        return part, _texts(result.explained.explanations)

    def _judged(self, score: str, collected: Collected, explained: Explained, task: str) -> Judged:
        assert self.llm is not None
        if score == "detection":
            return detection_scores(
                collected, explained.explanations, self.llm, self.progress, task
            )
        return fuzzing_scores(
            collected, explained.explanations, self.llm, "silent", self.progress, task
        )

    def _judge(self, score: str) -> object:
        named = {"embedding": self.encoder, "surprisal": self.language}
        return named.get(score, self.llm)


def panel(cfg: InterpretConfig, judges: Judges, progress: Progress) -> Panel:
    """Return the judges; raises UserError naming the score that lacks one."""
    encoder, language, llm = judges.get("encoder"), judges.get("language"), judges.get("llm")
    if "embedding" in cfg.scores:
        encoder = Memo(load_encoder() if encoder is None else encoder)
    if "surprisal" in cfg.scores and language is None:
        raise UserError(
            "score surprisal: needs the model behind the data, and these have none; leave it out"
        )
    asked = [score for score in cfg.scores if score not in FREE]
    if asked and llm is None:
        raise UserError(
            f"score {asked[0]}: asks a language model that follows instructions; give one, or leave it out"
        )
    reader = Reader(language) if "surprisal" in cfg.scores and language is not None else None
    return Panel(cfg, encoder, language, llm, reader, progress)


def subset(collected: Collected, latents: set[int]) -> Collected:
    """Return the contexts of some latents."""
    return replace(collected, latents=[c for c in collected.latents if c.latent in latents])


def again(parts: Mapping[str, Json]) -> bool:
    """Say whether some request had no answer that another attempt, or a larger budget, could bring."""
    tallies = (part.get(kind) for part in parts.values() for kind in ("tally", "explaining"))
    reasons = (reason for tally in tallies if tally for reason in tally["reasons"])
    return any(not reason.startswith(_FINAL) for reason in reasons)


def _part(score: Score, judge: str, scores: list[Any], tally: Tally | None) -> Json:
    return {
        "judge": judge,
        "metric": METRIC[score],
        "density": {str(row.latent): row.density for row in scores},
        "details": {str(row.latent): _row(row) for row in scores},
        "tally": None if tally is None else tally.to_dict(),
    }


def _row(row: Any) -> Json:
    return {key: value for key, value in row._asdict().items() if key not in ("latent", "density")}


def _texts(explanations: dict[int, Explanation]) -> dict[str, str]:
    return {str(latent): found.text for latent, found in explanations.items()}


def _name(judge: object) -> str:
    return str(getattr(judge, "name", type(judge).__name__))

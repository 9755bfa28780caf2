"""What asking would cost, before anything is sent: the very requests that would be, without those answered on disk."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from wsae.evals.autointerp.config import Asked
from wsae.evals.autointerp.llm.client import Unparsed, estimated_tokens
from wsae.evals.autointerp.llm.detect import (
    batches,
    explanation_requests,
    judging_request,
    parse_explanation,
)
from wsae.evals.autointerp.llm.simulate import (
    Fragments,
    cases,
    simulation_explanations,
    simulation_request,
)
from wsae.evals.autointerp.llm.types import Llm, Request
from wsae.evals.autointerp.windows import Collected

PLACEHOLDER = (
    "Words of the kind that an explanation may name, in a sentence of about the usual length."
)


@dataclass(frozen=True)
class Planned:
    """Requests of one score; token numbers are estimates, and those on disk cost none."""

    requests: int = 0
    """To be sent, if every explanation still to come can be parsed and nothing is tried twice."""
    cached: int = 0
    """Answered on disk already."""
    not_asked: int = 0
    """For want of an explanation, which failed before."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """As long as good answers are."""
    limit_tokens: int = 0
    """As long as answers may be: what budgets hold back."""

    def __add__(self, other: "Planned") -> "Planned":
        mine, theirs = vars(self), vars(other)
        return Planned(**{name: mine[name] + theirs[name] for name in mine})


def dry_run(
    llm: Llm,
    scores: Iterable[Asked],
    collected: Collected | None = None,
    found: Fragments | None = None,
) -> dict[str, Planned]:
    """Return what each score of one member would cost, by name; nothing is sent.

    Detection and fuzzing (of `collected`) share their explanations, "explanation"; simulation (of `found`) has its own.
    """
    out: dict[str, Planned] = {}
    wanted = set(scores)
    if collected is not None and wanted & {"detection", "fuzzing"}:
        texts = _explanations(out, "explanation", llm, explanation_requests(collected))
        for kind in ("detection", "fuzzing"):
            if kind in wanted:
                asked = [
                    judging_request(kind, batch, text, llm.cfg) if text is not None else None
                    for batch in batches(kind, collected, llm.cfg)
                    for text in [texts[batch.latent]]
                ]
                out[kind] = _planned(llm, asked)
    if found is not None and "simulation" in wanted:
        texts = _explanations(out, "simulation explanation", llm, simulation_explanations(found))
        asked = [
            simulation_request(case, text, llm.cfg) if text is not None else None
            for case in cases(found)
            for text in [texts[case.latent]]
        ]
        out["simulation"] = _planned(llm, asked)
    return out


def _explanations(
    out: dict[str, Planned], name: str, llm: Llm, requests: dict[int, Request]
) -> dict[int, str | None]:
    """Plan explanations; return each one's text: on disk, a placeholder, or None where it failed before."""
    out[name] = _planned(llm, [*requests.values()])
    return {latent: _text(llm, latent, request) for latent, request in requests.items()}


def _text(llm: Llm, latent: int, request: Request) -> str | None:
    answer = llm.peek(request)
    if answer is None:
        return f"{PLACEHOLDER} {latent}"
    if answer.state != "answered":
        return None
    try:
        return parse_explanation(answer)
    except Unparsed:
        return None


def _planned(llm: Llm, requests: Sequence[Request | None]) -> Planned:
    unique = {llm.key(request): request for request in requests if request is not None}
    new = [request for request in unique.values() if llm.peek(request) is None]
    return Planned(
        requests=len(new),
        cached=len(unique) - len(new),
        not_asked=sum(request is None for request in requests),
        prompt_tokens=sum(map(estimated_tokens, new)),
        completion_tokens=sum(request.expected_tokens for request in new),
        limit_tokens=sum(request.max_tokens + llm.cfg.thinking_tokens for request in new),
    )

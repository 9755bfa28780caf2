"""What asking would cost, before anything is sent: the very requests that would be, without those answered on disk."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from wsae.evals.autointerp.config import Asked
from wsae.evals.autointerp.llm.asking import Llm, Request, Unparsed, requests_about
from wsae.evals.autointerp.llm.detect import (
    batches,
    explanation_requests,
    judging_request,
    parse_explanation,
)
from wsae.evals.autointerp.llm.simulate import cases, simulation_request
from wsae.evals.autointerp.windows import Collected, Fragments

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
        requests = explanation_requests(collected)
        out["explanation"], texts = _planned(llm, [*requests.values()]), _texts(llm, requests)
        for kind in ("detection", "fuzzing"):
            if kind in wanted:
                build = partial(judging_request, kind, cfg=llm.cfg)
                asked = requests_about(batches(kind, collected, llm.cfg), texts, build)
                out[kind] = _planned(llm, asked)
    if found is not None and "simulation" in wanted:
        requests = explanation_requests(found)
        texts = _texts(llm, requests)
        out["simulation explanation"] = _planned(llm, [*requests.values()])
        build = partial(simulation_request, cfg=llm.cfg)
        out["simulation"] = _planned(llm, requests_about(cases(found), texts, build))
    return out


def _texts(llm: Llm, requests: dict[int, Request]) -> dict[int, str]:
    """Return each latent's explanation: on disk, or a placeholder; none where it failed before."""
    out: dict[int, str] = {}
    for latent, request in requests.items():
        answer = llm.peek(request)
        if answer is None:
            out[latent] = f"{PLACEHOLDER} {latent}"
        elif answer.state == "answered":
            with suppress(Unparsed):
                out[latent] = parse_explanation(answer)
    return out


def _planned(llm: Llm, requests: Sequence[Request | None]) -> Planned:
    unique = {llm.key(request): request for request in requests if request is not None}
    new = [request for request in unique.values() if llm.peek(request) is None]
    return Planned(
        requests=len(new),
        cached=len(unique) - len(new),
        not_asked=sum(request is None for request in requests),
        prompt_tokens=sum(request.estimated_tokens for request in new),
        completion_tokens=sum(request.expected_tokens for request in new),
        limit_tokens=sum(request.max_tokens + llm.cfg.thinking_tokens for request in new),
    )

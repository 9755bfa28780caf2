"""Requests asked, answers parsed strictly, every outcome counted."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from wsae.core.progress import Progress, quiet
from wsae.evals.autointerp.llm.types import Answer, Llm, Request, Tally

NO_EXPLANATION = "no explanation"
_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
T = TypeVar("T")


class Unparsed(Exception):
    """An answer that is not of the form asked for; the message says how."""


def ask_all(
    llm: Llm,
    requests: Sequence[Request | None],
    parse: Callable[[int, Answer], T],
    task: str,
    progress: Progress = quiet,
) -> tuple[list[T | None], Tally]:
    """Return what `parse` makes of each answer (None where there is none) and the outcomes, counted.

    A request that is None is not asked (there was no explanation). `parse` gets the request's number and raises
    Unparsed.
    """
    asked = [request for request in requests if request is not None]
    answers = iter(llm.ask(asked, task, progress))
    results: list[T | None] = []
    reasons: Counter[str] = Counter()
    given: list[Answer] = []
    not_asked = 0
    for number, request in enumerate(requests):
        answer = Answer("not asked", reason=NO_EXPLANATION) if request is None else next(answers)
        given.append(answer)
        result, reason = _parsed(answer, number, parse)
        results.append(result)
        not_asked += answer.state == "not asked"
        if reason is not None:
            reasons[reason] += 1
    return results, _tally(given, not_asked, reasons)


def _parsed(
    answer: Answer, number: int, parse: Callable[[int, Answer], T]
) -> tuple[T | None, str | None]:
    """Return the result and no reason, or no result and why."""
    if answer.state != "answered":
        return None, answer.reason
    try:
        return parse(number, answer), None
    except Unparsed as error:
        return None, f"unparsed: {error}"


def _tally(answers: list[Answer], not_asked: int, reasons: Counter[str]) -> Tally:
    lost = sum(reasons.values())
    paid = [answer for answer in answers if not answer.cached]
    return Tally(
        requested=len(answers),
        parsed=len(answers) - lost,
        failed=lost - not_asked,
        not_asked=not_asked,
        cached=len(answers) - len(paid),
        prompt_tokens=sum(answer.prompt_tokens for answer in paid),
        completion_tokens=sum(answer.completion_tokens for answer in paid),
        damaged=tuple(sorted({answer.damaged for answer in answers if answer.damaged})),
        reasons=dict(reasons),
    )


def said(answer: Answer) -> str:
    """Return an answer's text without the thoughts that some models put before it."""
    return _THOUGHTS.sub("", answer.text).strip()

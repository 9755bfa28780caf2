"""A simulator's written reply: one line per token, and the expected value of each number from the log-probabilities."""

import math
from typing import NamedTuple

from wsae.evals.autointerp.llm.asking import Unparsed, said
from wsae.evals.autointerp.llm.types import Answer, Token

_NUMBERS = {str(v): v for v in range(11)}


class Row(NamedTuple):
    """A written activation, and where it begins in the answer's UTF-8."""

    value: int
    place: int


def rows_of(answer: Answer, n: int) -> list[Row]:
    """Return the activations of n lines `number, tab, token, tab, activation`, in order; raises Unparsed."""
    text = said(answer)
    place = len(answer.text[: answer.text.index(text)].encode())
    out = []
    for line in text.split("\n"):
        parts = line.split("\t")
        if len(parts) != 3 or parts[0] != str(len(out) + 1):
            raise Unparsed("lines that are not number, token, activation in order")
        digits = parts[2].strip()
        if digits not in _NUMBERS:
            raise Unparsed("an activation that is no whole number from 0 to 10")
        before = line[: len(line) - len(parts[2].lstrip())]
        out.append(Row(_NUMBERS[digits], place + len(before.encode())))
        place += len(line.encode()) + 1
    if len(out) != n:
        raise Unparsed("not one line per token")
    return out


def expected_rows(answer: Answer, rows: list[Row]) -> list[float]:
    """Return E = sum_v v P(v) / sum_v P(v), v = 0 ... 10, at each row; raises Unparsed.

    Where 10 is written as the tokens `1` and `0`, a `1` counts as 1 + 9 P(0 | 1), known when it was written.
    """
    starts, place = [], 0
    for token in answer.tokens:
        starts.append(place)
        place += token.size
    out, i = [], 0
    for row in rows:
        while i < len(starts) and starts[i] + answer.tokens[i].size <= row.place:
            i += 1
        if i == len(starts) or not _begins(answer.tokens[i], row.value):
            raise Unparsed("numbers are not tokens of their own, so they have no probabilities")
        following = answer.tokens[i + 1] if i + 1 < len(starts) else None
        out.append(_expected(answer.tokens[i], following))
    return out


def _begins(token: Token, value: int) -> bool:
    text = token.text.strip()
    return text == str(value) or (text == "1" and value == 10)


def _expected(token: Token, following: Token | None) -> float:
    mass = dict.fromkeys(_NUMBERS, 0.0)
    for text, logprob in token.top.items():
        if text.strip() in mass:
            mass[text.strip()] += math.exp(logprob)
    total = sum(mass.values())
    if total <= 0:
        raise Unparsed("0-10 have no probability")
    value = sum(_NUMBERS[text] * share for text, share in mass.items())
    if token.text.strip() == "1" and following is not None and token.text == token.text.rstrip():
        zero = sum(math.exp(p) for text, p in following.top.items() if text.rstrip() == "0")
        value += 9 * mass["1"] * min(1.0, zero)
    return value / total

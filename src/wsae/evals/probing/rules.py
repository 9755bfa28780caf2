"""Token tasks whose labels are computed by rule: what a token is, told from its text and its neighbours' alone.

They need no data but text. Each rule says for every token of a sequence whether it is of the class; a task is the
rule's tokens against all others.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool

Rule = Callable[[Sequence[str], int], bool]
"""(texts of a sequence's tokens, leading spaces included, and a place in it) -> whether the token is of the class."""


def _matches(pattern: str) -> Rule:
    """Return the rule of tokens whose text, spaces stripped, matches the whole pattern."""
    whole = re.compile(pattern)
    return lambda texts, i: whole.fullmatch(texts[i].strip()) is not None


def _word(words: str) -> Rule:
    """Return the rule of whole words: a token that begins a word, is one of `words`, and ends there."""
    known = frozenset(words.split())
    return lambda texts, i: (
        texts[i].strip().lower() in known and _begins(texts, i) and _ends(texts, i)
    )


def _suffix(ending: str, but: str | None = None) -> Rule:
    """Return the rule of tokens that end a word of more letters than `ending`, and end with it and not with `but`."""

    def rule(texts: Sequence[str], i: int) -> bool:
        text = texts[i].strip().lower()
        if not text.endswith(ending) or (but and text.endswith(but)):
            return False
        if not text.isalpha() or not _ends(texts, i):
            return False
        return len(text) > len(ending) + 1 or not _begins(texts, i)

    return rule


def _begins(texts: Sequence[str], i: int) -> bool:
    """Return whether the token is the first of its word."""
    here = texts[i]
    return bool(here) and (not here[0].isalnum() or i == 0 or not texts[i - 1][-1:].isalnum())


def _ends(texts: Sequence[str], i: int) -> bool:
    """Return whether the token is the last of its word; at the end of a sequence it counts as the last."""
    return i + 1 == len(texts) or not texts[i + 1][:1].isalnum()


def _after(before: Rule) -> Rule:
    """Return the rule of tokens that follow one of another rule."""
    return lambda texts, i: i > 0 and before(texts, i - 1)


def _first_letter(letter: str) -> Rule:
    """Return the rule of tokens that begin a word with `letter`, whatever its case."""
    return lambda texts, i: texts[i].strip()[:1].lower() == letter and _begins(texts, i)


def _quoted(texts: Sequence[str], i: int) -> bool:
    """Return whether an odd number of double quotation marks stands before the token, within 60 tokens."""
    before = "".join(texts[max(0, i - 60) : i])
    opened, closed = before.count("\u201c"), before.count("\u201d")
    return '"' not in texts[i] and (before.count('"') % 2 == 1 or opened > closed)


def _in_brackets(texts: Sequence[str], i: int) -> bool:
    before = "".join(texts[max(0, i - 60) : i])
    return before.rfind("(") > before.rfind(")")


def _repeated(texts: Sequence[str], i: int) -> bool:
    """Return whether the same word of four letters or more stands among the 30 tokens before."""
    text = texts[i].strip().lower()
    return (
        len(text) >= 4
        and text.isalpha()
        and any(t.strip().lower() == text for t in texts[max(0, i - 30) : i])
    )


RULES: dict[str, Rule] = {
    "capitalised": lambda texts, i: (
        re.fullmatch(r"[A-Z][a-z]+", texts[i].strip()) is not None and _begins(texts, i)
    ),
    "all capitals": _matches(r"[A-Z]{2,}"),
    "digits": _matches(r"[0-9]+"),
    "comma": _matches(r","),
    "full stop": _matches(r"\."),
    "question or exclamation": _matches(r"[?!]+"),
    "colon or semicolon": _matches(r"[:;]"),
    "bracket": _matches(r"[()\[\]{}]+"),
    "quotation mark": _matches(r"[\"\u201c\u201d]+"),
    "hyphen or dash": _matches(r"[-\u2013\u2014]+"),
    "line break": lambda texts, i: "\n" in texts[i] and not texts[i].strip(),
    "inside a word": lambda texts, i: texts[i][:1].isalpha() and not _begins(texts, i),
    "begins with a vowel": lambda texts, i: (
        texts[i].strip()[:1].lower() in tuple("aeiou") and _begins(texts, i)
    ),
    "begins with s": _first_letter("s"),
    "begins with c": _first_letter("c"),
    "begins with p": _first_letter("p"),
    "begins with m": _first_letter("m"),
    "eight letters or more": lambda texts, i: (
        len(texts[i].strip()) >= 8 and texts[i].strip().isalpha()
    ),
    "ends in -ing": _suffix("ing"),
    "ends in -ed": _suffix("ed"),
    "ends in -ly": _suffix("ly"),
    "ends in -tion": _suffix("tion"),
    "ends in -er": _suffix("er"),
    "ends in -s": _suffix("s", but="ss"),
    "month": _matches(
        "January|February|March|April|May|June|July|August|September|October|November|December"
    ),
    "number word": _word(
        "one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty hundred thousand "
        "million first second third"
    ),
    "article": _word("a an the"),
    "preposition": _word(
        "of in to for with on at by from about into over after under between through against"
    ),
    "conjunction": _word("and or but nor yet because although while if unless"),
    "pronoun": _word("i you he she it we they me him her us them"),
    "possessive": _word("my your his its our their"),
    "form of be": _word("am is are was were be been being"),
    "modal verb": _word("can could may might must shall should will would"),
    "negation": _word("not no never none nothing neither nor cannot"),
    "question word": _word("who whom whose which what when where why how"),
    "demonstrative": _word("this that these those"),
    "after a comma": _after(_matches(r",")),
    "after a full stop": _after(_matches(r"\.")),
    "after an article": _after(_word("a an the")),
    "in quotation marks": _quoted,
    "in brackets": _in_brackets,
    "said before": _repeated,
}
"""Each task's name and its rule."""


def label(texts: Sequence[str]) -> Bool[np.ndarray, "tasks tokens"]:
    """Return, for every rule in order and every token of a sequence, whether the token is of the class."""
    found = [[rule(texts, i) for i in range(len(texts))] for rule in RULES.values()]
    return np.array(found, dtype=bool).reshape(len(RULES), len(texts))

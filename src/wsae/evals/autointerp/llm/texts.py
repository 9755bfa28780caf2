"""Texts of corpora and models made harmless inside prompts: one character for one, so token boundaries survive.

What is replaced (the prompts say so): `<` and `>` by U+2039 and U+203A, since `<<` and `>>` mark tokens and chat
templates write their own markers between angle brackets; the bracket that opens `[EXPLANATION]`, `[INST]` and the like,
also across tokens, by U+27E6; newline, tab and other control characters by visible signs, so that a text cannot begin a
line of the prompt; direction marks, invisible, tag, private and unassigned characters by U+2426. The joiners U+200C and
U+200D stay: scripts and emoji need them. A text that gives orders stays readable as such; the prompts say that texts
are data.
"""

import re
import unicodedata
from collections.abc import Sequence

_GONE = "\u2426"
_SIGNS = {
    "<": "\u2039",
    ">": "\u203a",
    "\n": "\u23ce",
    "\t": "\u21e5",
    "\u200c": "\u200c",
    "\u200d": "\u200d",
}
_MARKER = re.compile(r"\[(?=\W*(?:EXPLANATION|INST|/INST|SYS|RESPONSE)\b)", re.IGNORECASE)
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def _sign(char: str) -> str:
    if char in _SIGNS:
        return _SIGNS[char]
    if char < " ":
        return chr(0x2400 + ord(char))
    return _GONE if unicodedata.category(char) in _HIDDEN else char


def harmless(text: str) -> str:
    """Return a text of the same length that imitates no marker and hides nothing."""
    return _MARKER.sub("\u27e6", "".join(map(_sign, text)))


def harmless_tokens(tokens: Sequence[str]) -> list[str]:
    """Return tokens made harmless together: markers that span tokens are found too."""
    whole, out, start = harmless("".join(tokens)), [], 0
    for token in tokens:
        out.append(whole[start : start + len(token)])
        start += len(token)
    return out


def one_line(text: str, limit: int) -> str:
    """Return a text without control characters or line breaks, at most `limit` characters."""
    line = harmless(" ".join(text.split()))
    return line if len(line) <= limit else line[: limit - 3] + "..."


def marked(tokens: Sequence[str], marks: Sequence[bool]) -> str:
    """Join harmless tokens, each run of marked ones between << and >>."""
    out, inside = [], False
    for token, mark in zip(tokens, marks, strict=True):
        if mark != inside:
            out.append("<<" if mark else ">>")
            inside = mark
        out.append(token)
    return "".join(out) + (">>" if inside else "")

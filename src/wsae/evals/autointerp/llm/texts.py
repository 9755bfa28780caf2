"""Prompts from their data files, and texts of corpora and models made harmless inside them: one character for one.

What is replaced (the prompts say so): `<` and `>` by U+2039 and U+203A, since `<<` and `>>` mark tokens and chat
templates write their own markers between angle brackets; the bracket that opens `[EXPLANATION]`, `[INST]` and the like,
also across tokens, by U+27E6; newline, tab and other control characters by visible signs, so that a text cannot begin a
line of the prompt; direction marks, invisible, tag, private and unassigned characters by U+2426. The joiners U+200C and
U+200D stay: scripts and emoji need them. A text that gives orders stays readable as such; the prompts say that texts
are data.
"""

import functools
import re
import unicodedata
from collections.abc import Sequence
from importlib import resources
from typing import Literal, NamedTuple

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


def harmless(text: str) -> str:
    """Return a text of the same length that imitates no marker and hides nothing."""

    def sign(char: str) -> str:
        if char < " ":
            return _SIGNS.get(char, chr(0x2400 + ord(char)))
        return _SIGNS.get(char, _GONE if unicodedata.category(char) in _HIDDEN else char)

    return _MARKER.sub("\u27e6", "".join(map(sign, text)))


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


class ChatMessage(NamedTuple):
    """One turn of a conversation."""

    role: str
    """"system", "user" or "assistant"."""
    content: str


Prompt = Literal["explain", "detection", "fuzzing", "simulation", "simulation_json"]
_TURN = re.compile(r"^@(system|user|assistant)\n", re.MULTILINE)
_NAME = re.compile(r"\{\{(\w+)\}\}")


@functools.cache
def turns(prompt: Prompt) -> tuple[ChatMessage, ...]:
    """Return a prompt's turns, unfilled."""
    file = resources.files("wsae.evals.autointerp.llm") / "prompts" / f"{prompt}.txt"
    parts = _TURN.split(file.read_text(encoding="utf-8"))[1:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return tuple(ChatMessage(role, text.rstrip("\n")) for role, text in pairs)


def filled(prompt: Prompt, **texts: str) -> tuple[ChatMessage, ...]:
    """Return a prompt with every {{name}} replaced at once: braces inside the texts are left alone."""
    return tuple(
        ChatMessage(turn.role, _NAME.sub(lambda name: texts[name[1]], turn.content))
        for turn in turns(prompt)
    )

"""Contexts as pieces to be shown: visible characters, shading by activation, marks where the search text stands."""

import re
from typing import Any, NamedTuple

from wsae.report.words import number

LEVELS = 6
CONTINUED = "⋯"
"""Stands for a token that continues the character before it."""
_HIDDEN = re.compile(
    "[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3021-\u312f\u3131-\u318e\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff])"
)
"""Scripts that are written without spaces between words (Thai to Khmer, Chinese, Japanese), and Korean."""
_NAMED = {"\n": "↵", "\t": "⇥"}


class Piece(NamedTuple):
    """Some text of a context: its shade (0: silent), whether it is the peak or matches the search, its activation."""

    text: str
    level: int = 0
    peak: bool = False
    hit: bool = False
    tip: str = ""

    @property
    def kind(self) -> str:
        """Its classes."""
        names = [f"a{self.level}"] if self.level else []
        return " ".join(
            ["tok", *names, *(["peak"] if self.peak else []), *(["hit"] if self.hit else [])]
        )

    @property
    def plain(self) -> bool:
        """Whether it needs no element of its own."""
        return not (self.level or self.hit or self.peak)


def visible(text: str) -> str:
    """Return text in which characters that are invisible, or would reorder the line, stand by name."""
    return _HIDDEN.sub(lambda m: _NAMED.get(m[0]) or f"⟨{ord(m[0]):04X}⟩", text)


def spaced(text: str) -> str:
    """Return text in which each character of a script without spaces is a word of its own, for the search.

    A search for some of them is one for that phrase, so it finds them in the midst of a sentence.
    """
    return text if text.isascii() else _UNSPACED.sub(r" \1 ", text)


def shown_token(text: str) -> str:
    """Return a token that stands alone: visible, and not empty."""
    return visible(text).strip() or ("␣" if text else CONTINUED)


def level_of(act: float, most: float | None) -> int:
    """Return the shade of an activation: 0 none, 1 to 6 by its share of the strongest."""
    if act <= 0:
        return 0
    share = act / most if most and most > 0 else 1.0
    return max(1, min(LEVELS, -int(-LEVELS * share // 1)))


def pieces(context: dict[str, Any], most: float | None, words: list[str]) -> list[Piece]:
    """Return a context's tokens as pieces, neighbours without a mark joined; `most` is the latent's strongest."""
    tokens = [str(token) for token in context["tokens"]]
    hits = matched(tokens, words)
    out: list[Piece] = []
    for i, (token, act) in enumerate(zip(tokens, context["acts"], strict=True)):
        tip = f"activation {number(float(act))}" if act > 0 else ""
        piece = Piece(
            visible(token) or (CONTINUED if act > 0 else ""),
            level_of(act, most),
            i == context.get("peak") and act > 0,
            i in hits,
            tip,
        )
        if piece.plain and out and out[-1].plain:
            out[-1] = Piece(out[-1].text + piece.text)
        else:
            out += _spaced(piece)
    if out and out[0].plain:
        out[0] = Piece(out[0].text.lstrip(" "))
    return out


def _spaced(piece: Piece) -> list[Piece]:
    """Keep leading spaces outside the shading, so that lines break cleanly."""
    body = piece.text.lstrip(" ")
    if piece.plain or not body or body == piece.text:
        return [piece]
    return [Piece(piece.text[: len(piece.text) - len(body)]), piece._replace(text=body)]


def matched(tokens: list[str], words: list[str]) -> set[int]:
    """Return the positions of tokens that some word of the search covers, in any case."""
    hits: set[int] = set()
    starts, text = [], ""
    for token in tokens:
        starts.append(len(text))
        text += token.lower()
    ends = [*starts[1:], len(text)]
    for word in (word.lower() for word in words if word):
        at = text.find(word)
        while at >= 0:
            for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
                if start < at + len(word) and end > at:
                    hits.add(i)
            at = text.find(word, at + len(word))
    return hits

"""Contexts of latents: spans of text to be drawn, shaded by activation; and packed, for the report's script to draw.

What is invisible, or would reorder the line, is shown by name.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

from wsae.report.rundata import RunData
from wsae.report.view import number, score_name
from wsae.run import Json

LEVELS = 6
CONTINUED = "⋯"
"""Stands for a token that continues the character before it."""
_HIDDEN = re.compile(
    "[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
_NAMED = {"\n": "↵", "\t": "⇥"}


class Span(NamedTuple):
    """Some text of a context: its shade (0: silent), whether it is the peak or matches the search, its activation."""

    text: str
    level: int = 0
    peak: bool = False
    hit: bool = False
    tip: str = ""

    @property
    def kind(self) -> str:
        """Its classes; none where it needs no element of its own."""
        shade = [f"a{self.level}"] if self.level else []
        marks = [*shade, *["peak"] * self.peak, *["hit"] * self.hit]
        return " ".join(["tok", *marks]) if marks else ""


def visible(text: str) -> str:
    """Return text in which characters that are invisible, or would reorder the line, stand by name."""
    return _HIDDEN.sub(lambda m: _NAMED.get(m[0]) or f"⟨{ord(m[0]):04X}⟩", text)


def shown_token(text: str) -> str:
    """Return a token that stands alone: visible, and not empty."""
    return visible(text).strip() or ("␣" if text else CONTINUED)


def level_of(act: float, most: float | None) -> int:
    """Return the shade of an activation: 0 none, 1 to 6 by its share of the strongest."""
    if act <= 0:
        return 0
    share = act / most if most and most > 0 else 1.0
    return max(1, min(LEVELS, -int(-LEVELS * share // 1)))


def spans(context: Json, most: float | None, words: list[str]) -> list[Span]:
    """Return a context as spans, tokens without a mark joined; `most` is the latent's strongest activation.

    Leading spaces stay outside the shading, so that lines break cleanly.
    """
    tokens = [str(token) for token in context["tokens"]]
    hits = matched(tokens, words)
    out = [Span("")]
    for i, (token, act) in enumerate(zip(tokens, context["acts"], strict=True)):
        text = visible(token) or (CONTINUED if act > 0 else "")
        tip = f"activation {number(float(act))}" if act > 0 else ""
        at_peak = act > 0 and i == context.get("peak")
        span = Span(text.lstrip(" ") or text, level_of(act, most), at_peak, i in hits, tip)
        plain = text.removesuffix(span.text) if span.kind else text
        if out[-1].kind:
            out.append(Span(plain))
        else:
            out[-1] = Span(out[-1].text + plain)
        if span.kind:
            out.append(span)
    out[0] = Span(out[0].text.lstrip(" "))
    return [span for span in out if span.text]


def matched(tokens: list[str], words: list[str]) -> set[int]:
    """Return the positions of tokens that some word of the search covers, in any case."""
    hits: set[int] = set()
    if not words:
        return hits
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


def pack_contexts(run: RunData) -> Json:
    """Return the contexts in compact form: a token table, and per context token numbers and the activations above 0.

    A latent is [index, density, variance, max, match or null, contexts, scores, explanation or null, typical tokens], a
    match [member, latent, cosine], a context [token numbers, peak position, sequence, [position, activation, ...]];
    scores are [value or null, ...] in the order of `scores`. A context in an image has one token, its class, and the
    image's number as sequence; `images` holds the thumbnails.
    """
    entries = [e for named in run.contexts.values() for latents in named.values() for e in latents]
    counts = Counter(token for e in entries for c in e["contexts"] for token in c["tokens"])
    table = sorted(counts, key=lambda token: (-counts[token], token))
    number_of = {token: i for i, token in enumerate(table)}
    scores = [*dict.fromkeys(score for entry in entries for score in entry.get("scores", {}))]
    hooks = [
        [
            hook,
            [
                [name, [_latent(entry, number_of, scores) for entry in latents]]
                for name, latents in members.items()
            ],
        ]
        for hook, members in run.contexts.items()
    ]
    return {
        "tokens": table,
        "hooks": hooks,
        "scores": [score_name(score) for score in scores],
        "images": run.thumbnails,
    }


def _latent(entry: Json, number_of: dict[str, int], scores: list[str]) -> list[object]:
    match, said, values = entry.get("match"), entry.get("explanation"), entry.get("scores", {})
    contexts = []
    for context in entry["contexts"]:
        active = ((i, _short(act)) for i, act in enumerate(context["acts"]))
        numbers = [number_of[token] for token in context["tokens"]]
        acts = [item for pair in active if pair[1] for item in pair]
        contexts.append([numbers, context.get("peak"), context.get("seq"), acts])
    return [
        int(entry["latent"]),
        *(_short(entry.get(key)) for key in ("density", "variance", "max")),
        None if not match else [match["member"], int(match["latent"]), _short(match.get("cosine"))],
        contexts,
        [_short(values.get(score)) for score in scores] if values else [],
        None if said is None else str(said),
        [str(token) for token in entry.get("tokens", [])],
    ]


def _short(value: object) -> float | int | None:
    """Round to three significant digits (whole numbers lose their point); None when not finite."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    rounded = float(f"{value:.3g}")
    return int(rounded) if rounded == int(rounded) else rounded

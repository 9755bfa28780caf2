"""What a record of a data set says: plain text, a conversation, or token ids; and records that say nothing.

A field is a key, or keys joined by dots for what lies deeper ("data.text", "choices.0.text").
"""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np

from wsae.core.errors import UserError, nearest

NULL, NO_FIELD = "null", "without the field"
"""Reasons to leave a record out."""
NO_TEXT_PARTS = "read without its parts that are no text"
"""What is told of a conversation with pictures or calls of tools in it."""
LOOK = 1000
"""A file of which none of the first records has the field is not the one that was meant."""
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
_MASK = "attention_mask"
_MISSING = object()


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


class Content(NamedTuple):
    """What a record says. With `ids` the text is empty; a conversation's `text` has a line "role: content" a turn."""

    text: str
    ids: np.ndarray | None = None
    messages: tuple[Message, ...] = ()
    note: str = ""
    """What of it was not read."""


class LeftOut(NamedTuple):
    """A record that is not read, and why."""

    reason: str


Record = Content | LeftOut


class NoField(UserError):
    """A file in which no record has the field."""


def read_row(row: Mapping[str, object], field: str, where: str) -> Record:
    """Return what a record says in its field; raises UserError beginning with `where` when that is no text."""
    value = _value(row, field)
    if value is _MISSING:
        return LeftOut(NO_FIELD)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return LeftOut(NULL)
    if isinstance(value, str):
        return Content(whole_text(value, where))
    if isinstance(value, list):
        return _listed(value, row, field, where)
    within = ""
    if isinstance(value, Mapping):
        within = f"; name a key in it: --field {field}.{next(iter(value), 'KEY')}"
    raise UserError(f"{where}: field {field!r} is a {type(value).__name__}, not text{within}")


def whole_text(text: str, where: str) -> str:
    """Return the text; raises UserError when half a character is in it."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: holds half a character (a lone surrogate); fix or remove the record"
            ) from error
    return text


def with_field(records: Iterator[Record], missing: Callable[[], NoField]) -> Iterator[Record]:
    """Yield a file's records; raises what `missing` returns when none of the first `LOOK`, or of all, has the field."""
    waiting = 0
    for record in records:
        if record != LeftOut(NO_FIELD):
            yield from repeat(LeftOut(NO_FIELD), waiting)
            yield record
            yield from records
            return
        waiting += 1
        if waiting == LOOK:
            break
    if waiting:
        raise missing()


def no_field(where: str, field: str, names: Mapping[str, bool], kind: str = "field") -> NoField:
    """Return the error for a file without the field; `names` of what it has: whether that could be read."""
    could = [name for name, readable in names.items() if readable]
    has = f" (it has: {', '.join(names) or 'none'})"
    near = nearest(field, names)
    advice = f"give --field {could[0]}" if len(could) == 1 else "see --field"
    return NoField(f"{where}: no {kind} {field!r}{near or has}; {advice}")


def readable(value: Any) -> bool:
    """Return whether a value could be what --field names: text, or a conversation."""
    is_talk = isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
    return isinstance(value, str) or (is_talk and _role(value[0]) is not None)


def _value(row: Mapping[str, object], field: str) -> object:
    if field in row:
        return row[field]
    at: Any = row
    for name in field.split("."):
        if isinstance(at, Mapping) and name in at:
            at = at[name]
        elif isinstance(at, list) and name.isdecimal() and int(name) < len(at):
            at = at[int(name)]
        else:
            return None if at is None else _MISSING
    return at


def _listed(value: list, row: Mapping[str, object], field: str, where: str) -> Content:
    kinds = {type(item) for item in value}
    if kinds <= {str}:
        return Content(whole_text("\n".join(value), where))
    if kinds <= {int}:
        return Content("", ids=_ids(value, _value(row, _beside(field)), where))
    if kinds <= {dict}:
        return _conversation(value, field, where)
    names = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise UserError(
        f"{where}: field {field!r} is a list of {names}; a list is read of text, of messages or of token ids"
    )


def _beside(field: str) -> str:
    """Return the field with the mask that goes with a field of token ids."""
    return ".".join([*field.split(".")[:-1], _MASK])


def mask_beside(field: str, names: list[str]) -> list[str]:
    """Return the columns to read for a field, besides its own."""
    return [_MASK] if field in names and _MASK in names and "." not in field else []


def _ids(value: list[int], mask: object, where: str) -> np.ndarray:
    low, high = min(value), max(value)
    if low < 0 or high >= 1 << 31:
        raise UserError(
            f"{where}: token id {low if low < 0 else high}, and ids are not negative (labels instead of input_ids?)"
        )
    ids = np.array(value, dtype=np.int32)
    if not isinstance(mask, list):
        return ids
    if len(mask) != len(ids) or not {*mask} <= {0, 1}:
        raise UserError(f"{where}: {_MASK} is not {len(ids)} times 0 or 1, as there are token ids")
    return ids[np.array(mask, dtype=bool)]


def _role(message: Mapping[str, object]) -> str | None:
    """Return who speaks, or None where the keys are not those of a message."""
    if not ("content" in message or "value" in message):
        return None
    role = message.get("role", message.get("from"))
    return _ROLES.get(role.lower(), role) if isinstance(role, str) else None


def _conversation(value: list[dict[str, object]], field: str, where: str) -> Content:
    messages, whole = [], True
    for turn in value:
        role = _role(turn)
        if role is None:
            raise UserError(
                f"{where}: field {field!r} is a list of objects with {', '.join(map(str, turn)) or 'nothing'}; "
                "messages have role and content, or from and value"
            )
        content = turn.get("content", turn.get("value"))
        parts = [content] if isinstance(content, str) else content or []
        if not isinstance(parts, list):
            raise UserError(f"{where}: a message whose content is a {type(content).__name__}")
        texts = [t for part in parts if (t := _part(part)) is not None]
        whole &= len(texts) == len(parts) and not turn.get("tool_calls")
        messages.append(Message(role, whole_text("\n".join(texts), where)))
    text = "\n".join(f"{message.role}: {message.content}" for message in messages)
    return Content(text, messages=tuple(messages), note="" if whole else NO_TEXT_PARTS)


def _part(part: object) -> str | None:
    """Return the text of a part of a message; None for pictures and the like."""
    found = part.get("text") if isinstance(part, Mapping) else part
    return found if isinstance(found, str) else None

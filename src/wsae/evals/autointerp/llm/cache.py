"""Answers on disk under the content hash of what was asked; no key, no header, no address beyond the host.

One file per answer, written atomically as soon as the answer is there, so that a killed run repeats no paid call.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from wsae.core.files import LINE_BYTES, as_user_error, digest, opened, parse_json, write_json
from wsae.evals.autointerp.llm.types import Answer, Token

Json = dict[str, Any]


class Cache:
    """A directory of answers; safe to share between processes."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, key: str) -> Path:
        """Return where the answer to a request lies."""
        return self.root / key[:2] / f"{key}.json"

    def load(self, key: str) -> tuple[Answer | None, str]:
        """Return the answer, or None and the name of the file if it is damaged ("" if there is none)."""
        path = self.path(key)
        try:
            with opened(path) as file:
                data = parse_json(file.read(LINE_BYTES))
        except FileNotFoundError:
            return None, ""
        except (ValueError, RecursionError):
            return None, str(path)
        except OSError as error:
            raise as_user_error(error, path) from error
        answer = _checked(data, key)
        return answer, "" if answer else str(path)

    def save(self, key: str, asked: Json, answer: Answer) -> None:
        """Write an answer beside what was asked, flushed to disk."""
        reply = _stored(answer)
        sealed = {"key": key, "asked": asked, "reply": reply, "sha256": digest([asked, reply])}
        write_json(self.path(key), sealed)


def _stored(answer: Answer) -> Json:
    fields = asdict(answer)
    kept = ("state", "text", "finish", "reason", "prompt_tokens", "completion_tokens")
    tokens = [[*token] for token in answer.tokens]
    return {**{name: fields[name] for name in kept}, "tokens": tokens, "values": [*answer.values]}


def _checked(data: object, key: str) -> Answer | None:
    """Return the answer of a file's content; None unless hashes and shape are what `save` wrote."""
    if not isinstance(data, dict) or data.get("key") != key or digest(data.get("asked")) != key:
        return None
    reply = data.get("reply")
    if not isinstance(reply, dict) or digest([data["asked"], reply]) != data.get("sha256"):
        return None
    try:
        tokens = tuple(Token(*token) for token in reply["tokens"])
        rest = {name: value for name, value in reply.items() if name not in ("tokens", "values")}
        return Answer(**rest, tokens=tokens, values=tuple(reply["values"]), cached=True)
    except (KeyError, TypeError):  # whole, but of another form: it is named, and asked again
        return None

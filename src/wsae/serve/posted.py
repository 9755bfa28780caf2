"""The body of a POST: a form or JSON, small, text fields only."""

import json
from urllib.parse import parse_qsl

import anyio
from starlette.requests import Request

from wsae.core.errors import UserError

MAX_BODY = 64 * 1024
BODY_S = 20
"""Seconds in which the whole body must be there."""
FIELDS = ("text", "member", "latent")


async def read_text(request: Request) -> dict[str, str]:
    """Return the known fields of a form or a JSON object.

    Raises UserError when the body is too long or neither, TimeoutError when it does not come.
    """
    body = b""
    with anyio.fail_after(BODY_S):
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                raise UserError(f"the request is larger than {MAX_BODY} bytes")
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind not in ("application/json", "application/x-www-form-urlencoded"):
        raise UserError("send a form or JSON (content-type)")
    try:
        found = _parsed(kind, body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError("the request's body cannot be read") from error
    if not isinstance(found, dict):
        raise UserError("a JSON object is needed")
    return {name: _field(name, found[name]) for name in FIELDS if found.get(name) is not None}


def _parsed(kind: str, text: str) -> object:
    if kind == "application/json":
        return json.loads(text)
    return dict(parse_qsl(text, keep_blank_values=True, max_num_fields=10))


def _field(name: str, value: object) -> str:
    if name == "latent" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{name}: is not text")
    return clean_text(value)


def clean_text(text: str) -> str:
    """Return text without halves of surrogate pairs, which JSON can carry and tokenizers cannot."""
    return text.encode("utf-8", "replace").decode()

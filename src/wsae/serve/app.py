"""The web application: addresses, the functions behind them, errors in one line. Pages are made in `pages`."""

import asyncio
import contextlib
import json
import logging
import os
import secrets
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl

import anyio
import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from wsae.core.errors import UserError
from wsae.run import Json, Run
from wsae.serve import pages
from wsae.serve.build import weights_digest
from wsae.serve.index import (
    CHANGED,
    ECHO,
    REMAKE,
    DamagedIndexError,
    Index,
    Member,
    Served,
    Shelf,
    asked,
    whole,
)
from wsae.serve.model import load
from wsae.serve.pages import latent_link, latent_view, list_view
from wsae.serve.schema import key_of
from wsae.serve.server import Gate, Guard

if TYPE_CHECKING:
    from wsae.acts.capture import Capture
    from wsae.acts.language import LanguageModel
    from wsae.sae import SparseAutoencoder

# A text typed by a visitor: which latents fire on which token. One model and one SAE at a time,
# loaded when asked.
#
# Texts are read one after the other in a thread of their own, which leaves a core and the right of
# way to the pages; few may wait.

MAX_CHARS, MAX_TOKENS = 2000, 256
PER_TOKEN, OVERALL = 8, 24
PLACES = 3
"""Texts that are read or wait at once."""


class Token(NamedTuple):
    """One token of the text and the latents that fire on it, strongest first: (latent, activation)."""

    text: str
    latents: list[tuple[int, float]]


class BusyError(UserError):
    """Too many others are being served."""


class Live:
    """The model and SAE last asked for, and the thread that reads with them."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._thread = ThreadPoolExecutor(1, "live", _give_way)
        self._places = threading.BoundedSemaphore(PLACES)
        self._model: tuple[str, LanguageModel] | None = None
        self._probed: tuple[LanguageModel, str, Capture] | None = None
        self._sae: tuple[tuple[Path, str], SparseAutoencoder] | None = None

    def submit(self, run: Served, member: Member, text: str) -> Future[Json]:
        """Have a text read: its tokens with their latents, and the latents of the whole text.

        Raises UserError when the text is empty or too long, or the model is not at hand, BusyError when others wait.
        """
        index = run.index
        check(text)
        if index.model["why_not"]:
            raise UserError(f"no live reading: {index.model['why_not']}")
        if not member.weights:
            raise UserError(f"no live reading: the run keeps no weights of {member.name}")
        if not self._places.acquire(blocking=False):
            raise BusyError("others are having texts read; try again in a moment")
        try:
            reading = self._thread.submit(self._read, run, member, text)
        except BaseException:
            self._places.release()
            raise
        reading.add_done_callback(lambda _: self._places.release())
        return reading

    def _read(self, run: Served, member: Member, text: str) -> Json:
        tokens = self._tokens(run.path, run.index.model["name"], member, text)
        return {
            "member": member.slug,
            "tokens": [{"text": t.text, "latents": t.latents} for t in tokens],
            "latents": _overall((run.base, run.index, member), tokens),
        }

    def _tokens(self, path: Path, name: str, member: Member, text: str) -> list[Token]:
        import torch

        from wsae.acts.text import automatic_bos
        from wsae.acts.tokens import decode_table, joined

        language, sae = self._language(name), self._member(path, member)
        body = language.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not body:
            raise UserError("text: holds no tokens")
        if len(body) > MAX_TOKENS:
            raise UserError(f"text: {len(body)} tokens, at most {MAX_TOKENS} are read")
        ids = [*automatic_bos(language.tokenizer), *body]
        capture = self._capture(language, member.hook)
        x = next(iter(capture(torch.tensor([ids], device=language.device)).values()))[0]
        with torch.inference_mode():  # what was captured may enter no gradient
            z = sae.encode(x.float().to(sae.W_dec.device)).cpu()
        strongest = z.topk(min(PER_TOKEN, z.shape[1]), dim=1)
        texts = decode_table(language.tokenizer, sorted(set(ids)))
        shown = joined([texts[i] for i in ids])
        found = zip(shown, strongest.indices.tolist(), strongest.values.tolist(), strict=True)
        return [
            Token(text, [(j, v) for j, v in zip(js, vs, strict=True) if v > 0])
            for text, js, vs in found
        ]

    def _capture(self, language: "LanguageModel", hook: str) -> "Capture":
        """Return what reads a hook; it is probed once."""
        from wsae.acts.capture import Capture, tokens
        from wsae.acts.hookpoints import probe

        if self._probed is None or self._probed[:2] != (language, hook):
            found = Capture(language.model, probe(language.model, [hook], tokens()).hooks)
            self._probed = (language, hook, found)
        return self._probed[2]

    def _language(self, name: str) -> "LanguageModel":
        if self._model is None or self._model[0] != name:
            self._model = self._probed = None  # before the next is loaded: one is held at a time
            self._model = (name, load(name, self.device))
        return self._model[1]

    def _member(self, path: Path, member: Member) -> "SparseAutoencoder":
        from wsae.sae import SparseAutoencoder

        wanted = (path, f"{member.hook}|{member.name}|{member.weights}")
        if self._sae is None or self._sae[0] != wanted:
            self._sae = None
            place = Run(path).place(member.hook, member.name)
            if weights_digest(place) != member.weights:
                raise UserError(f"no live reading: {CHANGED}")
            sae = SparseAutoencoder.load(place).to(self.device)
            if weights_digest(place) != member.weights:  # trained again while they were read
                raise UserError(f"no live reading: {CHANGED}")
            self._sae = (wanted, sae)
        return self._sae[1]


def _give_way() -> None:
    """Leave the pages a core, and the right of way on all others: threads that this one starts inherit it."""
    import torch

    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores - 1))
    if sys.platform == "linux":  # elsewhere it would be the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def check(text: str) -> None:
    """Raise UserError for a text that is not read."""
    if not text.strip():
        raise UserError("text: is empty; type some words")
    if len(text) > MAX_CHARS:
        raise UserError(f"text: {len(text):,} characters, at most {MAX_CHARS:,} are read")


def _overall(place: tuple[str, Index, Member], tokens: list[Token]) -> list[Json]:
    """Return the latents of the whole text, strongest first; the first token is an attention sink and left out."""
    base, index, member = place
    peak: dict[int, float] = {}
    for token in tokens[1:] or tokens:
        for latent, value in token.latents:
            peak[latent] = max(peak.get(latent, 0.0), value)
    best = sorted(peak, key=lambda latent: (-peak[latent], latent))[:OVERALL]
    keys = [key_of(member.id, latent) for latent in best]
    labels = index.labels(keys)
    return [
        {
            "latent": latent,
            "activation": peak[latent],
            "label": labels.get(key, ""),
            "link": latent_link(base, member, latent),
        }
        for latent, key in zip(best, keys, strict=True)
    ]


# The body of a POST: a form or JSON, small, text fields only.

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


T = TypeVar("T")
Endpoint = Callable[[Request], Awaitable[Response]]
THREADS = 4
"""Requests worked on at once: bounds the memory."""
WAITING = 64
"""Requests that may wait for their turn."""
TRIES = 3
LINE = 300
"""Characters of a message that a visitor gets."""
ALL = "all"
RETRY = {"retry-after": "2"}
_LOG = logging.getLogger("uvicorn.error")


@dataclass(frozen=True)
class Site:
    """What the application serves."""

    runs: dict[str, Shelf]
    live: Live
    key: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    """Stands in the address of the live form: see `guard`."""

    def on_run(self, request: Request, handler: Callable[[Served, Request], Response]) -> Response:
        """Answer from one index of the run that an address names, anew when it is replaced; 404 without one."""
        shelf = self.shelf(request)
        for left in range(TRIES - 1, -1, -1):
            run = shelf.now(root_of(request))
            try:
                answer = handler(run, request)
            except DamagedIndexError:
                if not left or shelf.has(run.index):
                    raise
                continue
            if not left or shelf.has(run.index):
                return answer
        raise AssertionError("the last try answers or raises")

    def shelf(self, request: Request) -> Shelf:
        """Return the place of the run that an address names; 404 where there is none."""
        found = self.runs.get(request.path_params["run"])
        if found is None:
            raise HTTPException(404, "no such run is served here")
        return found


class Place(NamedTuple):
    """A member (None: all of them) of a served run."""

    run: Served
    member: Member | None


def application(runs: list[Shelf], live: Live, gate: Gate = Gate()) -> Guard:  # noqa: B008  (frozen)
    """Return the application for some runs, reached as `gate` says."""
    site = Site({run.slug: run for run in runs}, live)
    handlers = {
        Exception: _broken,
        HTTPException: _failed,
        UserError: _bad_input,
        BusyError: _busy,
        DamagedIndexError: _damaged,
        TimeoutError: _late,
    }
    app = Starlette(routes=_routes(site), exception_handlers=handlers, lifespan=_bounded)
    app.router.redirect_slashes = False  # a redirect would name a host and a path of its own
    return Guard(app, gate, site.key)


def root_of(request: Request) -> str:
    """Return what leads to the start: from a page, or for programs from the host."""
    return request.scope["api_links" if _is_api(request) else "links"]


def _is_api(request: Request) -> bool:
    return request.url.path.startswith("/api/")


@contextlib.asynccontextmanager
async def _bounded(app: Starlette) -> AsyncIterator[None]:
    """Let at most THREADS requests work at once."""
    del app
    anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
    yield


async def _worked(work: Callable[..., T], *args: object) -> T:
    """Do some work in a thread when it is its turn; raises BusyError when too many wait."""
    limiter = anyio.to_thread.current_default_thread_limiter()
    if limiter.statistics().tasks_waiting >= WAITING:
        raise BusyError("too many requests at once; try again in a moment")
    return await anyio.to_thread.run_sync(work, *args)


def _routes(site: Site) -> list[BaseRoute]:
    def bound(handler: Callable[[Site, Request], Response]) -> Endpoint:
        async def answer(request: Request) -> Response:
            return await _worked(handler, site, request)

        return answer

    def of_run(handler: Callable[[Served, Request], Response]) -> Endpoint:
        async def answer(request: Request) -> Response:
            return await _worked(site.on_run, request, handler)

        return answer

    async def live(request: Request) -> Response:
        """Read the body here, the text in the thread for that."""
        try:
            posted = await read_text(request) if request.method == "POST" else None
        except ClientDisconnect:
            return Response(status_code=400)  # for nobody
        return await _live(site, request, posted)

    first = [
        Route("/r/{run}/live", live, methods=["GET", "POST"]),
        Route("/api/r/{run}/live", live, methods=["POST"]),
    ]
    of_all = {
        "/": _overview,
        "/static/{name}": _static,
        "/api/runs": _api_runs,
    }
    of_one = {
        "/r/{run}": _run,
        "/r/{run}/{member}": _list,
        "/r/{run}/{member}/{latent:int}": _latent,
        "/api/r/{run}": _api_run,
        "/api/r/{run}/{member}": _api_list,
        "/api/r/{run}/{member}/{latent:int}": _api_latent,
    }
    return [
        *first,
        *(Route(path, bound(handler)) for path, handler in of_all.items()),
        *(Route(path, of_run(handler)) for path, handler in of_one.items()),
    ]


def _place(run: Served, request: Request) -> Place:
    slug = request.path_params["member"]
    if slug == ALL:
        return Place(run, None)
    member = run.index.by_slug.get(slug)
    if member is None:
        raise HTTPException(404, "no such member in this run")
    return Place(run, member)


def _one(run: Served, request: Request) -> tuple[Member, int]:
    member, latent = _place(run, request).member, request.path_params["latent"]
    if member is None or not 0 <= latent < member.size:
        raise HTTPException(404, "no such latent")
    return member, latent


def _page(html: str, status: int = 200) -> Response:
    return HTMLResponse(html, status)


def _overview(site: Site, request: Request) -> Response:
    root = root_of(request)
    return _page(pages.overview([shelf.now(root) for shelf in site.runs.values()], root))


def _run(run: Served, request: Request) -> Response:
    del request
    return _page(pages.run(run))


def _list(run: Served, request: Request) -> Response:
    member = _place(run, request).member
    ask = asked(request.query_params, run.index)
    return _page(pages.latents(run, member, ask, list_view(run.base, run.index, member, ask)))


def _latent(run: Served, request: Request) -> Response:
    member, latent = _one(run, request)
    ask = asked(request.query_params, run.index)
    everywhere = request.query_params.get("in") == ALL
    view = latent_view(run.base, run.index, member, latent)
    return _page(pages.latent(run, (None if everywhere else member, member), ask, view))


def _static(site: Site, request: Request) -> Response:
    del site
    found = pages.ASSETS.get(request.path_params["name"])
    if found is None:
        raise HTTPException(404, "no such file")
    kind, text = found
    return Response(text, media_type=kind)


class Wish(NamedTuple):
    """What is asked of a live page: a member of one state of a run, its text, the latent to follow."""

    run: Served
    member: Member
    text: str
    latent: int | None


def _wish(site: Site, request: Request, posted: dict[str, str] | None) -> Wish:
    run = site.shelf(request).now(root_of(request))
    given = {**request.query_params, **(posted or {})}
    name = given.get("member") or run.index.members[-1].slug
    member = run.index.by_slug.get(name)
    if member is None:
        raise UserError(f"member: no {name[:ECHO]!r} in this run")
    chosen = whole(given["latent"], "latent", 0, member.size - 1) if given.get("latent") else None
    return Wish(run, member, given.get("text", ""), chosen)


async def _live(site: Site, request: Request, posted: dict[str, str] | None) -> Response:
    wish = await _worked(_wish, site, request, posted)
    run, api = wish.run, _is_api(request)
    found: Json | None = None
    problem, status = str(run.index.model["why_not"]), 200
    if api or (posted is not None and not problem):
        try:
            found = await asyncio.wrap_future(site.live.submit(run, wish.member, wish.text))
        except UserError as error:
            if api:
                raise
            problem, status = str(error), 503 if isinstance(error, BusyError) else 400
    elif posted is not None:
        status = 400
    if api:
        return _told(run, found or {})
    form = pages.Form(wish.text, wish.latent, f"?key={site.key}")
    html = await _worked(pages.live, run, wish.member, form, (found, problem))
    return HTMLResponse(html, status, RETRY if status == 503 else None)


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return JSON in ASCII, so that half a surrogate pair in a text survives; NaN and infinities become null."""
    plain = json.loads(json.dumps(value), parse_constant=lambda _: None)
    text = json.dumps(plain, allow_nan=False)
    return Response(text, status, headers, media_type="application/json")


def _told(run: Served, view: Json) -> Response:
    """Return what is known, with what should be known of it."""
    return _json({**view, "notice": run.notice} if run.notice else view)


def _api_runs(site: Site, request: Request) -> Response:
    found = [shelf.now(root_of(request)) for shelf in site.runs.values()]
    return _json([{"run": run.slug, "name": run.index.name} for run in found])


def _api_run(run: Served, request: Request) -> Response:
    del request
    index = run.index
    members = [
        {"member": m.slug, "hook": m.hook, "name": m.name, "latents": m.size, "alive": m.alive, "plain": m.plain}
        for m in index.members
    ]  # fmt: skip
    told = [measure._asdict() for measure in index.measures]
    return _told(run, {"members": members, "measures": told, "overview": index.overview})


def _api_list(run: Served, request: Request) -> Response:
    member = _place(run, request).member
    ask = asked(request.query_params, run.index)
    return _told(run, list_view(run.base, run.index, member, ask))


def _api_latent(run: Served, request: Request) -> Response:
    member, latent = _one(run, request)
    return _told(run, {"run": run.slug, **latent_view(run.base, run.index, member, latent)})


def _answer(request: Request, status: int, line: str) -> Response:
    line = line if len(line) <= LINE else f"{line[: LINE - 1]}…"
    headers = RETRY if status == 503 else None
    if _is_api(request):
        return _json({"error": line}, status, headers)
    return HTMLResponse(pages.problem(status, line, root_of(request)), status, headers)


def _failed(request: Request, error: Any) -> Response:
    return _answer(request, error.status_code, str(error.detail))


def _bad_input(request: Request, error: Exception) -> Response:
    return _answer(request, 400, str(error))


def _busy(request: Request, error: Exception) -> Response:
    return _answer(request, 503, str(error))


def _late(request: Request, error: Exception) -> Response:
    del error
    return _answer(request, 408, "the request did not come to its end in time")


def _damaged(request: Request, error: Exception) -> Response:
    """Tell the terminal where it lies; a visitor need not know."""
    _LOG.error("%s", error)
    return _answer(request, 500, f"the index of this run is gone or damaged; {REMAKE}")


def _broken(request: Request, error: Exception) -> Response:
    del request, error  # the server logs it; a visitor learns no more than that it happened
    return PlainTextResponse("something broke here; the terminal says what\n", 500)

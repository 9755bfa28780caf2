"""The web application: addresses, the functions behind them, errors in one line. Pages are made in `pages`."""

import asyncio
import contextlib
import json
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from wsae.core.errors import UserError
from wsae.report.rundata import Json
from wsae.serve import pages
from wsae.serve.guard import Gate, Guard
from wsae.serve.index import REMAKE, DamagedIndexError, Member
from wsae.serve.listing import ECHO, asked, whole
from wsae.serve.live import BusyError, Live
from wsae.serve.posted import read_text
from wsae.serve.served import Served, Shelf
from wsae.serve.views import latent_view, list_view

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

"""The web application: addresses, the functions behind them, errors in one line. Pages are made in `pages`."""

import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from wsae.core.errors import UserError
from wsae.report.rundata import Json
from wsae.serve import pages
from wsae.serve.guard import Guard
from wsae.serve.index import Member
from wsae.serve.listing import asked, whole
from wsae.serve.live import Live
from wsae.serve.posted import read_text
from wsae.serve.served import Served
from wsae.serve.views import latent_view, list_view

THREADS = 4
"""Requests answered at once, each with a connection of its own: bounds the memory."""
ALL = "all"


@dataclass(frozen=True)
class Site:
    """What the application serves."""

    runs: dict[str, Served]
    live: Live
    key: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    """Stands in the address of the live form: see `guard`."""

    def run(self, request: Request) -> Served:
        """Return the run an address names; 404 where there is none."""
        found = self.runs.get(request.path_params["run"])
        if found is None:
            raise HTTPException(404, "no such run is served here")
        return found


class Place(NamedTuple):
    """A member (None: all of them) of a served run."""

    run: Served
    member: Member | None


def application(runs: list[Served], live: Live, loopback: bool = True) -> Guard:
    """Return the application for some runs; `loopback`: whether it listens there alone."""
    site = Site({run.slug: run for run in runs}, live)
    handlers = {Exception: _broken, HTTPException: _failed, UserError: _bad_input}
    app = Starlette(routes=_routes(site), exception_handlers=handlers, lifespan=_bounded)
    return Guard(app, loopback, site.key)


@contextlib.asynccontextmanager
async def _bounded(app: Starlette) -> AsyncIterator[None]:
    """Let at most THREADS requests work at once."""
    del app
    anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
    yield


def _routes(site: Site) -> list[BaseRoute]:
    def bound(handler: Callable[[Site, Request], Response]) -> Callable[[Request], Response]:
        return lambda request: handler(site, request)

    async def live(request: Request) -> Response:
        """Read the body here, the text in a worker."""
        posted = await read_text(request) if request.method == "POST" else None
        return await anyio.to_thread.run_sync(_live, site, request, posted)

    pages_of = {
        "/": _overview,
        "/r/{run}": _run,
        "/r/{run}/{member}": _list,
        "/r/{run}/{member}/{latent:int}": _latent,
        "/static/{name}": _static,
        "/api/runs": _api_runs,
        "/api/r/{run}": _api_run,
        "/api/r/{run}/{member}": _api_list,
        "/api/r/{run}/{member}/{latent:int}": _api_latent,
    }
    first = [
        Route("/r/{run}/live", live, methods=["GET", "POST"]),
        Route("/api/r/{run}/live", live, methods=["POST"]),
    ]
    return [*first, *(Route(path, bound(handler)) for path, handler in pages_of.items())]


def _place(site: Site, request: Request) -> Place:
    run, slug = site.run(request), request.path_params["member"]
    if slug == ALL:
        return Place(run, None)
    member = run.index.by_slug.get(slug)
    if member is None:
        raise HTTPException(404, "no such member in this run")
    return Place(run, member)


def _one(site: Site, request: Request) -> tuple[Served, Member, int]:
    run, member = _place(site, request)
    latent = request.path_params["latent"]
    if member is None or not 0 <= latent < member.size:
        raise HTTPException(404, "no such latent")
    return run, member, latent


def _page(html: str, status: int = 200) -> Response:
    return HTMLResponse(html, status)


def _overview(site: Site, request: Request) -> Response:
    del request
    return _page(pages.overview([*site.runs.values()]))


def _run(site: Site, request: Request) -> Response:
    return _page(pages.run(site.run(request)))


def _list(site: Site, request: Request) -> Response:
    run, member = _place(site, request)
    ask = asked(request.query_params, run.index)
    return _page(pages.latents(run, member, ask, list_view(run.slug, run.index, member, ask)))


def _latent(site: Site, request: Request) -> Response:
    run, member, latent = _one(site, request)
    ask = asked(request.query_params, run.index)
    everywhere = request.query_params.get("in") == ALL
    view = latent_view(run.slug, run.index, member, latent)
    return _page(pages.latent(run, (None if everywhere else member, member), ask, view))


def _static(site: Site, request: Request) -> Response:
    del site
    found = pages.ASSETS.get(request.path_params["name"])
    if found is None:
        raise HTTPException(404, "no such file")
    kind, text = found
    return Response(text, media_type=kind)


def _live(site: Site, request: Request, posted: dict[str, str] | None) -> Response:
    run = site.run(request)
    given = {**request.query_params, **(posted or {})}
    member = run.index.by_slug.get(given.get("member") or run.index.members[-1].slug)
    if member is None:
        raise UserError(f"member: no {given['member'][:40]!r} in this run")
    if request.url.path.startswith("/api/"):
        return _json(site.live.read(run, member, given.get("text", "")))
    chosen = whole(given["latent"], "latent", 0, member.size - 1) if given.get("latent") else None
    found: Json | None = None
    problem = run.index.model["why_not"]
    if posted is not None and not problem:
        try:
            found = site.live.read(run, member, given.get("text", ""))
        except UserError as error:
            problem = str(error)
    form = pages.Form(given.get("text", ""), chosen, f"?key={site.key}")
    return _page(
        pages.live(run, member, form, (found, problem)), 400 if posted and problem else 200
    )


def _json(value: object, status: int = 200) -> Response:
    """Return JSON in ASCII, so that half a surrogate pair in a text survives; NaN and infinities become null."""
    plain = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return Response(json.dumps(plain, allow_nan=False), status, media_type="application/json")


def _api_runs(site: Site, request: Request) -> Response:
    del request
    return _json([{"run": r.slug, "name": r.index.name} for r in site.runs.values()])


def _api_run(site: Site, request: Request) -> Response:
    index = site.run(request).index
    members = [
        {"member": m.slug, "hook": m.hook, "name": m.name, "latents": m.size, "alive": m.alive, "plain": m.plain}
        for m in index.members
    ]  # fmt: skip
    told = [measure._asdict() for measure in index.measures]
    return _json({"members": members, "measures": told, "overview": index.overview})


def _api_list(site: Site, request: Request) -> Response:
    run, member = _place(site, request)
    ask = asked(request.query_params, run.index)
    return _json(list_view(run.slug, run.index, member, ask))


def _api_latent(site: Site, request: Request) -> Response:
    run, member, latent = _one(site, request)
    return _json(latent_view(run.slug, run.index, member, latent))


def _answer(request: Request, status: int, line: str) -> Response:
    if request.url.path.startswith("/api/"):
        return _json({"error": line}, status)
    return _page(pages.problem(status, line), status)


def _failed(request: Request, error: Any) -> Response:
    return _answer(request, error.status_code, str(error.detail))


def _bad_input(request: Request, error: Exception) -> Response:
    return _answer(request, 400, str(error))


def _broken(request: Request, error: Exception) -> Response:
    del request, error  # the server logs it; a visitor learns no more than that it happened
    return PlainTextResponse("something broke here; the terminal says what\n", 500)

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
from functools import partial
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
from wsae.run import NAME_CHARS, Json, NamedLatent, Run
from wsae.serve import pages
from wsae.serve.index import (
    CHANGED,
    ECHO,
    REMAKE,
    DamagedIndexError,
    Member,
    Served,
    Shelf,
    weights_digest,
)
from wsae.serve.model import load
from wsae.serve.pages import compared, latent_view, list_view
from wsae.serve.server import Gate, Guard
from wsae.serve.using import Ask, Work, ask_of, attributing, steering

if TYPE_CHECKING:
    from wsae.acts.capture import Capture
    from wsae.acts.language import LanguageModel
    from wsae.sae import SAE

# A text typed by a visitor: which latents fire on which token. One model and one SAE at a time,
# loaded when asked.
#
# Texts are read one after the other in a thread of their own, which leaves a core and the right of
# way to the pages; few may wait.

MAX_CHARS, MAX_TOKENS = 2000, 256
PER_TOKEN, OVERALL = 8, 24
PLACES = 3
"""Texts that are read or wait at once."""


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
        self._sae: tuple[Path, str, SAE] | None = None

    def submit(
        self, run: Served, member: Member, text: str, work: Work | None = None
    ) -> Future[Json]:
        """Have a text read: its tokens with the latents that fire on each, and the latents of the whole text.

        Or have some work done with it. Raises UserError when the text is empty or too long, or the model is not at
        hand, BusyError when others wait.
        """
        if not text.strip():
            raise UserError("text: is empty; type some words")
        if len(text) > MAX_CHARS:
            raise UserError(f"text: {len(text):,} characters, at most {MAX_CHARS:,} are read")
        if run.index.model["why_not"]:
            raise UserError(f"no live reading: {run.index.model['why_not']}")
        if not member.weights:
            raise UserError(f"no live reading: the run keeps no weights of {member.name}")
        if not self._places.acquire(blocking=False):
            raise BusyError("others are having texts read; try again in a moment")
        if work is None:
            reading = self._thread.submit(self._read, run, member, text)
        else:
            reading = self._thread.submit(self._used, run, member, text, work)
        reading.add_done_callback(lambda _: self._places.release())
        return reading

    def _read(self, run: Served, member: Member, text: str) -> Json:
        """Return the latents by token, and of the whole text; the first token is an attention sink, no part of that."""
        tokens = self._tokens(run, member, text)
        peak: dict[int, float] = {}
        for token in tokens[1:] or tokens:
            for latent, value in token["latents"]:
                peak[latent] = max(peak.get(latent, 0.0), value)
        best = sorted(peak, key=lambda latent: (-peak[latent], latent))[:OVERALL]
        lines = run.said([member.key(latent) for latent in best])
        overall = [
            {
                "latent": latent,
                "activation": peak[latent],
                "label": lines[member.key(latent)].label,
                "link": run.latent_link(member, latent),
            }
            for latent in best
        ]
        return {"member": member.slug, "tokens": tokens, "latents": overall}

    def _used(self, run: Served, member: Member, text: str, work: Work) -> Json:
        """Return what some work makes of a prompt."""
        from wsae.use.steer import Prompt

        language, sae = self._language(run.index.model["name"]), self._member(run.path, member)
        prompt = Prompt.of(language, text)
        if prompt.ids.shape[1] > MAX_TOKENS:
            raise UserError(f"text: {prompt.ids.shape[1]} tokens, at most {MAX_TOKENS} are read")
        return work(language, sae, prompt)

    def _tokens(self, run: Served, member: Member, text: str) -> list[Json]:
        """Return the tokens of a text and the latents that fire on each, strongest first: (latent, activation)."""
        import torch

        from wsae.acts.capture import refuse_too_long
        from wsae.acts.text import automatic_bos
        from wsae.acts.tokens import decode_table, joined

        language, sae = self._language(run.index.model["name"]), self._member(run.path, member)
        body = language.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not body:
            raise UserError("text: holds no tokens")
        if len(body) > MAX_TOKENS:
            raise UserError(f"text: {len(body)} tokens, at most {MAX_TOKENS} are read")
        ids = [*automatic_bos(language.tokenizer), *body]
        refuse_too_long(language.model, len(ids))
        capture = self._capture(language, member.hook)
        x = next(iter(capture(torch.tensor([ids], device=language.device)).values()))[0]
        with torch.inference_mode():  # what was captured may enter no gradient
            z = sae.encode(x.float().to(sae.W_dec.device)).cpu()
        strongest = z.topk(min(PER_TOKEN, z.shape[1]), dim=1)
        texts = decode_table(language.tokenizer, sorted(set(ids)))
        shown = joined([texts[i] for i in ids])
        found = zip(shown, strongest.indices.tolist(), strongest.values.tolist(), strict=True)
        return [
            {"text": text, "latents": [(j, v) for j, v in zip(js, vs, strict=True) if v > 0]}
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

    def _member(self, path: Path, member: Member) -> "SAE":
        """Return a member's SAE, if its weights are still those of the index."""
        from wsae.sae import SAE

        place = Run(path).weights(member.hook, member.name)
        if place is None:
            raise UserError(f"no live reading: {CHANGED}")
        if self._sae is None or self._sae[:2] != (place, member.weights):
            self._sae = None
            before = weights_digest(place)
            sae = SAE.load(place).to(self.device) if before == member.weights else None
            if sae is None or weights_digest(place) != before:  # trained again while they were read
                raise UserError(f"no live reading: {CHANGED}")
            self._sae = (place, member.weights, sae)
        return self._sae[2]


def _give_way() -> None:
    """Leave the pages a core, and the right of way on all others: threads that this one starts inherit it."""
    import torch

    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores - 1))
    if sys.platform == "linux":  # elsewhere it would be the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


# The body of a POST: a form or JSON, small, text fields only.

MAX_BODY = 64 * 1024
BODY_S = 20
"""Seconds in which the whole body must be there."""
FIELDS = ("text", "member", "latent", "name", "star", "kind", "value", "answer", "against")


async def read_text(request: Request) -> dict[str, str]:
    """Return the known fields of a form or a JSON object, without halves of surrogate pairs, which tokenizers refuse.

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
        text = body.decode("utf-8")
        found = (
            json.loads(text)
            if kind == "application/json"
            else dict(parse_qsl(text, keep_blank_values=True, max_num_fields=10))
        )
    except (ValueError, RecursionError) as error:
        raise UserError("the request's body cannot be read") from error
    if not isinstance(found, dict):
        raise UserError("a JSON object is needed")
    out = {name: found[name] for name in FIELDS if found.get(name) is not None}
    for name, value in out.items():
        if type(value) in {"latent": (int,), "star": (bool,), "value": (int, float)}.get(name, ()):
            out[name] = str(value if name == "value" else int(value))
        elif not isinstance(value, str):
            raise UserError(f"{name}: is not text")
        else:
            out[name] = value.encode("utf-8", "replace").decode()
    return out


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
GONE = f"the index of this run is gone or damaged; {REMAKE}"
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


def application(runs: list[Shelf], live: Live, gate: Gate = Gate()) -> Guard:  # noqa: B008  (frozen)
    """Return the application for some runs, reached as `gate` says."""
    site = Site({run.slug: run for run in runs}, live)
    handlers: dict[Any, Any] = dict.fromkeys((HTTPException, UserError, TimeoutError), _failed)
    handlers[Exception] = _broken
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
    def of_run(handler: Callable[[Served, Request], Response]) -> Endpoint:
        async def answer(request: Request) -> Response:
            return await _worked(site.on_run, request, handler)

        return answer

    async def overview(request: Request) -> Response:
        return await _worked(_overview, site, request)

    def of_form(
        handler: Callable[[Site, Request, dict[str, str] | None], Awaitable[Response]],
    ) -> Endpoint:
        async def answer(request: Request) -> Response:
            """Read the body here; what it asks is done elsewhere."""
            try:
                posted = await read_text(request) if request.method == "POST" else None
            except ClientDisconnect:
                return Response(status_code=400)  # for nobody
            return await handler(site, request, posted)

        return answer

    texts = {name: of_form(partial(_with_text, form)) for name, form in FORMS.items()}
    latent = of_form(_latent)
    of_one = {
        "/r/{run}": of_run(_run),
        "/r/{run}/compare": of_run(_compare),
        "/r/{run}/{member}": of_run(_list),
    }
    return [
        *(Route(f"/r/{{run}}/{n}", form, methods=["GET", "POST"]) for n, form in texts.items()),
        *(Route(f"/api/r/{{run}}/{n}", form, methods=["POST"]) for n, form in texts.items()),
        *(
            Route(prefix + "/r/{run}/{member}/{latent:int}", latent, methods=["GET", "POST"])
            for prefix in ("", "/api")
        ),
        Route("/", overview),
        Route("/api/runs", overview),
        Route("/static/{name}", _static),
        *(
            Route(prefix + path, answer)
            for prefix in ("", "/api")
            for path, answer in of_one.items()
        ),
    ]


def _member_of(run: Served, request: Request) -> Member | None:
    """Return the member that an address names, None for all of them; 404 where there is none."""
    slug = request.path_params["member"]
    if slug != ALL and slug not in run.index.by_slug:
        raise HTTPException(404, "no such member in this run")
    return run.index.by_slug.get(slug)


def _overview(site: Site, request: Request) -> Response:
    root = root_of(request)
    found: list[Served] = []
    gone: list[str] = []
    for shelf in site.runs.values():
        try:
            found.append(shelf.now(root))
        except DamagedIndexError as error:
            if len(site.runs) == 1:
                raise
            _LOG.error("%s", error)
            gone.append(shelf.slug)
    if _is_api(request):
        told = [{"run": slug, "error": GONE} for slug in gone]
        return _json([*({"run": run.slug, "name": run.index.name} for run in found), *told])
    return HTMLResponse(pages.overview(found, [f"{slug}: {GONE}" for slug in gone], root))


def _run(run: Served, request: Request) -> Response:
    if not _is_api(request):
        return HTMLResponse(pages.run(run))
    index = run.index
    members = [
        {"member": m.slug, "hook": m.hook, "name": m.name, "latents": m.size, "alive": m.alive, "plain": m.plain}
        for m in index.members
    ]  # fmt: skip
    told = [measure._asdict() for measure in index.measures]
    return _told(run, {"members": members, "measures": told, "overview": index.overview})


def _list(run: Served, request: Request) -> Response:
    member = _member_of(run, request)
    ask = run.asked(request.query_params)
    view = list_view(run, member, ask)
    if _is_api(request):
        return _told(run, view)
    return HTMLResponse(pages.latents(run, member, ask, view))


async def _latent(site: Site, request: Request, posted: dict[str, str] | None) -> Response:
    """Answer with a latent's page, its name and star changed before where that is asked."""
    if posted is not None:
        await _worked(_rename, site, request, posted)
    key = f"?key={site.key}"

    def handler(run: Served, request: Request) -> Response:
        member, latent = _latent_of(run, request)
        if _is_api(request):
            return _told(run, {"run": run.slug, **latent_view(run, member, latent)})
        ask = run.asked(request.query_params)
        scope = None if request.query_params.get("in") == ALL else member
        view = latent_view(run, member, latent)
        return HTMLResponse(pages.latent(run, scope, member, ask, view, key))

    return await _worked(site.on_run, request, handler)


def _rename(site: Site, request: Request, posted: dict[str, str]) -> None:
    """Keep a latent's name and star; what a program leaves out stays, what a form leaves out is not ticked.

    Raises UserError for a name that is too long, or cannot be kept.
    """
    run = site.shelf(request).now()
    member, latent = _latent_of(run, request)
    none = NamedLatent()
    known = run.names.get(member.key(latent), none) if _is_api(request) else none
    name = " ".join(posted.get("name", known.name).split())
    if len(name) > NAME_CHARS:
        raise UserError(f"name: {len(name):,} characters, at most {NAME_CHARS} are kept")
    star = posted["star"] in ("1", "on") if "star" in posted else known.star
    Run(run.path).name_latent(member.hook, member.name, latent, NamedLatent(name=name, star=star))


def _latent_of(run: Served, request: Request) -> tuple[Member, int]:
    """Return the latent that an address names; 404 where there is none."""
    member, latent = _member_of(run, request), request.path_params["latent"]
    if member is None or not 0 <= latent < member.size:
        raise HTTPException(404, "no such latent")
    return member, latent


def _compare(run: Served, request: Request) -> Response:
    """Answer with two members side by side: those asked for, else the last one and its twin."""
    members = run.index.members
    last = members[-1]
    twin = members[0] if last.twin is None else members[last.twin]
    chosen = []
    for name, other in (("a", twin), ("b", last)):
        slug = request.query_params.get(name) or other.slug
        if slug not in run.index.by_slug:
            raise UserError(f"{name}: no member {slug[:ECHO]!r} in this run")
        chosen.append(run.index.by_slug[slug])
    view = compared(run, *chosen)
    return _told(run, view) if _is_api(request) else HTMLResponse(pages.compare(run, view))


async def _static(request: Request) -> Response:
    kind, text = pages.ASSETS.get(request.path_params["name"], ("", ""))
    if not kind:
        raise HTTPException(404, "no such file")
    return Response(text, media_type=kind)


class TextForm(NamedTuple):
    """A page on which a text is typed: what is done with it (none: read it), and how the page is made."""

    work: Callable[[Served, Ask], Work] | None
    page: Callable[[Served, Ask, str, Json | None, str], str]


FORMS = {
    "live": TextForm(None, pages.live),
    "steer": TextForm(steering, pages.steered),
    "attribute": TextForm(attributing, pages.attributed),
}
"""End of the address -> form."""


async def _with_text(
    form: TextForm, site: Site, request: Request, posted: dict[str, str] | None
) -> Response:
    run: Served = await _worked(site.shelf(request).now, root_of(request))
    given = {**request.query_params, **(posted or {})}
    name = given.get("member") or run.index.members[-1].slug
    member = run.index.by_slug.get(name)
    if member is None:
        raise UserError(f"member: no {name[:ECHO]!r} in this run")
    ask = ask_of(member, given)

    async def answered() -> Json:
        work = None if form.work is None else await _worked(form.work, run, ask)
        return await asyncio.wrap_future(site.live.submit(run, member, ask.text, work))

    if _is_api(request):
        return _told(run, await answered())
    found: Json | None = None
    problem, status = str(run.index.model["why_not"]), 200
    if posted is not None and problem:
        status = 400
    elif posted is not None:
        try:
            found = await answered()
        except UserError as error:
            problem, status = str(error), 503 if isinstance(error, BusyError) else 400
    html = await _worked(form.page, run, ask, f"?key={site.key}", found, problem)
    return HTMLResponse(html, status, RETRY if status == 503 else None)


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return JSON in ASCII, so that half a surrogate pair in a text survives; NaN and infinities become null."""
    plain = json.loads(json.dumps(value), parse_constant=lambda _: None)
    text = json.dumps(plain, allow_nan=False)
    return Response(text, status, headers, media_type="application/json")


def _told(run: Served, view: Json) -> Response:
    """Return what is known, with what should be known of it."""
    return _json({**view, "notice": run.notice} if run.notice else view)


def _failed(request: Request, error: Exception) -> Response:
    """Answer in one line; where an index lies that is damaged the terminal is told, a visitor need not know."""
    status, line = 400, str(error)
    match error:
        case HTTPException():
            status, line = error.status_code, str(error.detail)
        case BusyError():
            status = 503
        case TimeoutError():
            status, line = 408, "the request did not come to its end in time"
        case DamagedIndexError():
            _LOG.error("%s", error)
            status, line = 500, GONE
    line = line if len(line) <= LINE else f"{line[: LINE - 1]}…"
    headers = RETRY if status == 503 else None
    if _is_api(request):
        return _json({"error": line}, status, headers)
    return HTMLResponse(pages.problem(status, line, root_of(request)), status, headers)


def _broken(request: Request, error: Exception) -> Response:
    del request, error  # the server logs it; a visitor learns no more than that it happened
    return PlainTextResponse("something broke here; the terminal says what\n", 500)

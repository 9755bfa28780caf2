"""Pages as HTML. Every text goes through the template's escaping; only charts, which escape their own, are markup."""

from importlib.resources import files
from typing import NamedTuple

import jinja2

from wsae.core.version import __version__
from wsae.report.rundata import Json
from wsae.report.words import number
from wsae.serve import draw
from wsae.serve.index import Index, Member
from wsae.serve.listing import LATENT, Asked, words_of
from wsae.serve.served import Served
from wsae.serve.text import level_of, pieces, shown_token, visible
from wsae.serve.views import latent_view, list_link, shown_number, ways

_ASSETS = files("wsae.serve") / "assets"
_REPORT = files("wsae.report") / "assets"
ASSETS = {
    "style.css": (
        "text/css",
        (_REPORT / "report.css").read_text("utf-8") + (_ASSETS / "serve.css").read_text("utf-8"),
    ),
    "serve.js": ("text/javascript", (_ASSETS / "serve.js").read_text("utf-8")),
}
"""Every file there is, by name: (content type, text)."""
FIRST_CONTEXTS = 6
BESIDE_CONTEXTS = 4


class Form(NamedTuple):
    """The live form: its text, the latent to follow, and what its address ends in."""

    text: str
    latent: int | None
    key: str


def _environment() -> jinja2.Environment:
    def source(name: str) -> str | None:
        place = _ASSETS / name
        return place.read_text("utf-8") if place.is_file() else None

    made = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(source),
    )
    made.filters |= {"number": number, "visible": visible, "token": shown_token}
    made.globals |= {"version": __version__, "shown": shown_number}
    return made


_PAGES = _environment()


def _render(name: str, **values: object) -> str:
    page = _PAGES.get_template(f"{name}.html.j2").render(**values)
    return page.encode("utf-8", "replace").decode()


def problem(status: int, line: str, root: str) -> str:
    """Return the page of an error."""
    return _render("problem", title=f"{status}", run=None, root=root, line=line)


def overview(runs: list[Served], root: str) -> str:
    """Return the first page: the runs that are served."""
    if len(runs) == 1:
        return run(runs[0])
    return _render("runs", title="Runs", run=None, root=root, runs=runs)


def run(served: Served) -> str:
    """Return a run's page: its members side by side."""
    index = served.index
    charts = {m.slug: draw.density_chart(m, unit=index.unit) for m in index.members}
    hooks = [
        (hook, [m for m in index.members if m.hook == hook["name"]])
        for hook in index.overview["hooks"]
    ]
    return _render(
        "run",
        title=index.name,
        run=served,
        root=served.root,
        hooks=hooks,
        charts=charts,
        about=index.overview,
    )


def latents(served: Served, member: Member | None, ask: Asked, view: Json) -> str:
    """Return a page of a list of latents."""
    index = served.index
    slug = member.slug if member else "all"
    names = {measure.key: measure for measure in index.measures}
    turn = {
        name: list_link(served.base, slug, ask, page=ask.page + step)
        for name, step in (("before", -1), ("after", 1))
    }
    heads = [(names[key], _sorted_by(served.base, slug, ask, key)) for key in view["columns"]]
    return _render(
        "latents",
        title=f"{member.name if member else 'All members'} · {index.name}",
        run=served,
        root=served.root,
        member=member,
        slug=slug,
        ask=ask,
        view=view,
        heads=heads,
        turn=turn,
        names=names,
        filtered=bool(ask.low or ask.high or ask.alive != "any" or ask.shown != "any"),
        by_slug=index.by_slug,
        latent_sort=LATENT,
    )


def _sorted_by(base: str, slug: str, ask: Asked, key: str) -> str:
    """Return the address of the same list sorted by a measure: highest first, the other way when it is already."""
    down = not (ask.sort == key and ask.down)
    return list_link(base, slug, ask, sort=("-" if down else "") + key, page=1)


def latent(served: Served, place: tuple[Member | None, Member], ask: Asked, view: Json) -> str:
    """Return the page of one latent, its match in the twin beside it."""
    index, (scope, member) = served.index, place
    words = words_of(ask.query)
    before, after = ways(served.base, index, (scope, member, view["latent"]), ask)
    match = view["matches"][0] if view["matches"] else None
    twin = None
    if match is not None:
        owner = index.by_slug[match["member"]]
        twin = _side(
            index,
            owner,
            latent_view(served.base, index, owner, match["latent"]),
            words,
            BESIDE_CONTEXTS,
        )
    acts = [act for context in view.get("contexts", []) for act in context["acts"]]
    measures = [
        (m, shown_number(m.key, view["measures"][m.key]))
        for m in index.measures
        if view["measures"][m.key] is not None
    ]
    return _render(
        "latent",
        title=f"Latent {view['latent']} · {member.name} · {index.name}",
        run=served,
        root=served.root,
        member=member,
        view=view,
        own=_side(index, member, view, words, FIRST_CONTEXTS),
        twin=twin,
        match=match,
        measures=measures,
        before=before,
        after=after,
        up=list_link(served.base, scope.slug if scope else "all", ask),
        density=draw.density_chart(member, view["measures"]["density"], index.unit),
        acts=draw.acts_chart(view["histogram"], acts, member.kind),
        collected=bool(view["histogram"]),
        model=index.model,
    )


def _side(index: Index, member: Member, view: Json, words: list[str], first: int) -> Json:
    """Return one latent's explanation, scores and contexts as they are drawn."""
    contexts = view.get("contexts", [])
    most = view["measures"]["max"]
    drawn = [_context(index, context, most, words) for context in contexts]
    names = {measure.key: measure.name for measure in index.measures}
    scores = [
        (names.get(k, k), number(v)) for k, v in view.get("scores", {}).items() if v is not None
    ]
    return {
        "member": member,
        "latent": view["latent"],
        "link": view["link"],
        "alive": view["alive"],
        "explanation": view.get("explanation"),
        "tokens": view.get("tokens", []),
        "scores": scores,
        "first": drawn[:first] if not any(c["image"] for c in drawn) else drawn,
        "rest": drawn[first:] if not any(c["image"] for c in drawn) else [],
        "promotes": view["promotes"],
        "measures": view["measures"],
    }


def _context(index: Index, context: Json, most: float | None, words: list[str]) -> Json:
    image = index.image(context["seq"]) if len(context["tokens"]) == 1 else ""
    if image:
        label = visible(str(context["tokens"][0]))
        tip = f"image {context['seq']}, activation {number(float(context['acts'][0]))}"
        return {"image": image, "label": label, "tip": tip, "pieces": []}
    return {"image": "", "label": "", "tip": "", "pieces": pieces(context, most, words)}


def live(served: Served, member: Member, form: Form, answer: tuple[Json | None, str]) -> str:
    """Return the page on which a text is typed, with what fires on it."""
    found, trouble = answer
    tokens = []
    if found is not None:
        follow = form.latent if form.latent is not None else _strongest(found)
        values = [dict(token["latents"]).get(follow, 0.0) for token in found["tokens"]]
        most = max([*values[1:], 0.0])
        for place, (token, value) in enumerate(zip(found["tokens"], values, strict=True)):
            level = level_of(value, most) if place or not most else min(level_of(value, most), 6)
            tokens.append((token["text"], level, value, token["latents"]))
        form = form._replace(latent=follow)
    return _render(
        "live",
        title=f"Try a text · {served.index.name}",
        run=served,
        root=served.root,
        member=member,
        form=form,
        found=found,
        problem=trouble,
        tokens=tokens,
    )


def _strongest(found: Json) -> int | None:
    return found["latents"][0]["latent"] if found["latents"] else None

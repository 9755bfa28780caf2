"""Pages as HTML. Every text goes through the template's escaping; only charts, which escape their own, are markup."""

import math
from importlib.resources import files
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

import jinja2
from markupsafe import Markup

from wsae.core.version import __version__
from wsae.report.charts import Axis, Chart, axis
from wsae.report.words import number
from wsae.run import Json
from wsae.serve.index import (
    LATENT,
    PER_PAGE,
    Asked,
    Found,
    Index,
    Member,
    Served,
    beside,
    find,
    member_of,
    words_of,
)
from wsae.serve.schema import BASIC, key_of, level_of, occupied, pieces, shown_token, visible

# The browser's charts: how a latent's density lies among the others', and how strongly it fires.

_BINS = 12
_DEAD_GAP = 0.5
SMALL = (440, 200)


def density_chart(member: Member, density: float | None = None, unit: str = "token") -> Markup:
    """Draw the member's densities, with one latent's among them; the left bar counts the dead."""
    edges, counts = member.density["edges"], member.density["counts"]
    dead = member.density["dead"]
    first = next((i for i, count in enumerate(counts) if count), len(counts) - 4)
    low = min(edges[first], -3.0)
    kept = [i for i in range(len(counts)) if edges[i] >= low - 1e-9]
    edges, counts = [edges[i] for i in kept] + [edges[-1]], [counts[i] for i in kept]
    at_dead = low - _DEAD_GAP
    ticks = ((at_dead, "0"), *((float(p), _power(p)) for p in range(math.ceil(low), 1)))
    x = Axis(f"share of {unit}s on which a latent fires", at_dead - 0.2, 0.05, ticks=ticks)
    top = max([dead, *counts, 1])
    chart = Chart(f"Density of {member.name}", x, Axis("latents", 0.0, 1.08 * top), *SMALL)
    chart.steps([at_dead - 0.2, at_dead + 0.2], [float(dead)], member.kind, f"{dead} dead latents")
    chart.steps(edges, [float(count) for count in counts], member.kind, member.name)
    if density is not None:
        place = math.log10(density) if density > 0 else at_dead
        chart.rule((place, 0.0), (place, float(top)))
        chart.spot(place, 0.0, member.kind, f"this latent: {number(density)}")
    return chart.svg()


def acts_chart(counts: list[int], acts: list[float], kind: str) -> Markup | None:
    """Draw how strongly a latent fires: the collected counts, else the activations in its contexts."""
    edges, kept = occupied(counts)
    if kept:
        x = Axis(
            "activation", edges[0], edges[-1], ticks=tuple((e, number(10**e)) for e in edges[::4])
        )
        chart = Chart("Activations", x, Axis("rows", 0.0, 1.08 * max(kept)), *SMALL)
        chart.steps(edges, [float(count) for count in kept], kind)
        return chart.svg()
    found = [act for act in acts if act > 0]
    if len(found) < 2:
        return None
    width = max(found) / _BINS
    edges = [width * i for i in range(_BINS + 1)]
    counted = [0] * _BINS
    for act in found:
        counted[min(_BINS - 1, int(act / width))] += 1
    return _acts(edges, counted, kind, "tokens of the contexts shown")


def _acts(edges: list[float], counts: list[int], kind: str, what: str) -> Markup:
    x = axis("activation", edges, pad=0.0)
    y = Axis(what, 0.0, 1.08 * max([*counts, 1]))
    chart = Chart("Activations", x, y, *SMALL)
    chart.steps(edges, [float(count) for count in counts], kind)
    return chart.svg()


def _power(exponent: int) -> str:
    if exponent == 0:
        return "1"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


# What pages and the JSON interface show of a latent and of a list: plain values, no markup.

SUITORS = 6
LIST_SCORES = 3
PERCENT = ("density",)


def shown_number(key: str, value: float | None) -> str:
    """Return a measure as readers see it."""
    if value is not None and key in PERCENT:
        return f"{number(100 * value)} %"
    return number(value)


def latent_link(
    base: str, member: Member, latent: int, ask: Asked | None = None, everywhere: bool = False
) -> str:
    """Return the address of a latent's page, with the list it was found in; `base` is the run's, here and below."""
    params = {} if ask is None else ask.address(page=1)
    if everywhere:
        params["in"] = "all"
    tail = f"?{urlencode(params)}" if params else ""
    return f"{base}/{quote(member.slug)}/{latent}{tail}"


def list_link(base: str, slug: str, ask: Asked, **changes: str | int) -> str:
    """Return the address of a list."""
    params = ask.address(**changes)
    return f"{base}/{quote(slug)}" + (f"?{urlencode(params)}" if params else "")


def columns_of(index: Index, ask: Asked, found: list[dict[str, float | None]]) -> list[str]:
    """Return the measures worth a column of a list: the common ones, what is sorted by, and scores."""
    known = {k for values in found for k, v in values.items() if v is not None}
    scores = [m.key for m in index.measures[len(BASIC) :] if m.key in known][:LIST_SCORES]
    common = [key for key in ("density", "variance", "gamma", "match") if key in known]
    wanted = [*common, *scores, *([ask.sort] if ask.sort in index.column else [])]
    wanted += [key for key in (*ask.low, *ask.high)]
    return list(dict.fromkeys(wanted))


def list_view(base: str, index: Index, member: Member | None, ask: Asked) -> Json:
    """Return one page of a list."""
    found: Found = find(index, member, ask)
    numbers, labels = index.numbers(found.keys), index.labels(found.keys)
    fired = index.alive(found.keys)
    columns = columns_of(index, ask, list(numbers.values()))
    rows = []
    for key in found.keys:
        owner, latent = member_of(index, key)
        rows.append(
            {
                "member": owner.slug,
                "latent": latent,
                "alive": fired[key],
                "label": labels.get(key, ""),
                "stored": key in labels,
                "measures": numbers[key],
                "link": latent_link(base, owner, latent, ask, member is None),
            }
        )
    pages = max(1, -(-found.total // PER_PAGE))
    return {
        "total": found.total,
        "page": ask.page,
        "pages": pages,
        "columns": columns,
        "latents": rows,
    }


def latent_view(base: str, index: Index, member: Member, latent: int) -> Json:
    """Return everything the index knows of one latent, the same for pages and the JSON interface."""
    key = key_of(member.id, latent)
    alive, twin = index.state(key)
    near, logits, counts = index.packed(key)
    half = len(logits) // 2
    texts = index.tokens([token for token, _ in logits])
    return {
        "member": member.slug,
        "latent": latent,
        "alive": alive,
        "measures": index.numbers([key])[key],
        **index.record(key),
        "neighbours": _neighbours(base, index, member, near),
        "promotes": [[texts.get(token, "?"), value] for token, value in logits[:half]],
        "demotes": [[texts.get(token, "?"), value] for token, value in logits[half:]],
        "histogram": counts,
        "matches": _matches(base, index, key, twin),
        "link": latent_link(base, member, latent),
    }


def _neighbours(
    base: str, index: Index, member: Member, near: list[tuple[int, float]]
) -> list[Json]:
    keys = [key_of(member.id, latent) for latent, _ in near]
    labels, fired = index.labels(keys), index.alive(keys)
    return [
        {
            "latent": latent,
            "cosine": cosine,
            "label": labels.get(key, ""),
            "alive": fired[key],
            "link": latent_link(base, member, latent),
        }
        for key, (latent, cosine) in zip(keys, near, strict=True)
    ]


def _matches(base: str, index: Index, key: int, twin: int | None) -> list[Json]:
    """Return the match in the twin; for a latent of the twin itself, those that chose it, most alike first."""
    cosine = index.numbers([key])[key]["match"]
    pairs: list[tuple[int, Any]] = index.suitors(key, SUITORS) if twin is None else [(twin, cosine)]
    labels = index.labels([other for other, _ in pairs])
    out = []
    for other, value in pairs:
        owner, latent = member_of(index, other)
        out.append(
            {
                "member": owner.slug,
                "name": owner.name,
                "kind": owner.kind,
                "latent": latent,
                "cosine": value,
                "label": labels.get(other, ""),
                "link": latent_link(base, owner, latent),
            }
        )
    return out


def ways(
    base: str, index: Index, place: tuple[Member | None, Member, int], ask: Asked
) -> tuple[str, str]:
    """Return the addresses of the latents before and after this one in the list it was found in; '' at the ends."""
    scope, member, latent = place
    found = beside(index, scope, ask, key_of(member.id, latent))
    links = []
    for key in found:
        owner, other = (member, 0) if key is None else member_of(index, key)
        links.append("" if key is None else latent_link(base, owner, other, ask, scope is None))
    return links[0], links[1]


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
    charts = {m.slug: density_chart(m, unit=index.unit) for m in index.members}
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
        density=density_chart(member, view["measures"]["density"], index.unit),
        acts=acts_chart(view["histogram"], acts, member.kind),
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

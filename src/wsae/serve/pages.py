"""Pages as HTML. Every text goes through the template's escaping; only charts, which escape their own, are markup."""

from importlib.resources import files
from typing import Any

from wsae.report.charts import acts_chart, member_densities
from wsae.report.contexts import Span, spans, visible
from wsae.report.html import environment
from wsae.report.words import number
from wsae.run import NAME_CHARS, Json, NamedLatent
from wsae.serve.index import LATENT, PER_PAGE, Asked, Member, Served, beside, find, words_of
from wsae.serve.schema import BASIC, occupied
from wsae.serve.using import NEW_TOKENS, USUAL, Ask, heat
from wsae.serve.worth import ALIKE, worth

# What pages and the JSON interface show of a latent and of a list: plain values, no markup.

SUITORS = 6
LIST_SCORES = 3


def shown_number(key: str, value: float | None) -> str:
    """Return a measure as readers see it."""
    if value is not None and key == "sequences":
        return f"{value:,.0f}"
    return f"{number(100 * value)} %" if value is not None and key == "density" else number(value)


def list_view(run: Served, member: Member | None, ask: Asked) -> Json:
    """Return one page of a list, with the measures worth a column: common ones, some scores, what is asked for."""
    index = run.index
    found = find(index, member, ask)
    numbers, lines = index.numbers(found.keys), run.said(found.keys)
    known = {k for values in numbers.values() for k, v in values.items() if v is not None}
    scores = [m.key for m in index.measures[len(BASIC) :] if m.key in known][:LIST_SCORES]
    common = [key for key in ("density", "variance", "gamma", "match") if key in known]
    asked_for = [*([ask.sort] if ask.sort in index.column else []), *ask.low, *ask.high]
    rows = []
    for key in found.keys:
        (owner, latent), said = index.owner(key), lines[key]
        rows.append(
            {
                "member": owner.slug,
                "latent": latent,
                "alive": said.alive,
                "label": said.label,
                "star": said.star,
                "measures": numbers[key],
                "link": run.latent_link(owner, latent, ask, member is None),
            }
        )
    return {
        "total": found.total,
        "page": ask.page,
        "pages": max(1, -(-found.total // PER_PAGE)),
        "columns": [*dict.fromkeys([*common, *scores, *asked_for])],
        "latents": rows,
    }


def latent_view(run: Served, member: Member, latent: int) -> Json:
    """Return everything the index knows of one latent, the same for pages and the JSON interface.

    Its match is the latent of the twin; for a latent of the twin itself, those that chose it, most alike first.
    """
    index, key = run.index, member.key(latent)
    alive, twin = index.state(key)
    near, logits, counts = index.packed(key)
    fires = index.fires(key)
    texts = index.tokens([token for token, _ in (*logits, *fires)])
    tokens = [[texts[token], value] for token, value in logits]
    named = run.names.get(key, NamedLatent())
    measures = index.numbers([key])[key]
    pairs = index.suitors(key, SUITORS) if twin is None else [(twin, measures["match"])]
    neighbours = [(member.key(other), cosine) for other, cosine in near]
    lines = run.said([other for other, _ in (*neighbours, *pairs)])
    matches = []
    for other, cosine in pairs:
        owner, number_there = index.owner(other)
        matches.append(
            {
                "member": owner.slug,
                "name": owner.name,
                "kind": owner.kind,
                "latent": number_there,
                "cosine": cosine,
                "label": lines[other].label,
                "link": run.latent_link(owner, number_there),
            }
        )
    return {
        "member": member.slug,
        "latent": latent,
        "alive": alive,
        "name": named.name,
        "star": named.star,
        "measures": measures,
        **index.record(key),
        "neighbours": [
            {
                "latent": index.owner(other)[1],
                "cosine": cosine,
                "label": lines[other].label,
                "alive": lines[other].alive,
                "link": run.latent_link(member, index.owner(other)[1]),
            }
            for other, cosine in neighbours
        ],
        "promotes": tokens[: len(tokens) // 2],
        "demotes": tokens[len(tokens) // 2 :],
        "fires": [[texts[token], share] for token, share in fires],
        "histogram": counts,
        "matches": matches,
        "link": run.latent_link(member, latent),
    }


_ASSETS, _REPORT = (files(f"wsae.{package}") / "assets" for package in ("serve", "report"))
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

_PAGES = environment("wsae.serve", "wsae.report")
_PAGES.globals["shown"] = shown_number


def _render(name: str, run: Served | None, root: str = "", **values: object) -> str:
    root = run.root if run else root
    page = _PAGES.get_template(f"{name}.html.j2").render(run=run, root=root, **values)
    return page.encode("utf-8", "replace").decode()


def problem(status: int, line: str, root: str) -> str:
    """Return the page of an error."""
    return _render("problem", None, root, title=f"{status}", line=line)


def overview(runs: list[Served], root: str) -> str:
    """Return the first page: the runs that are served."""
    return run(runs[0]) if len(runs) == 1 else _render("runs", None, root, title="Runs", runs=runs)


def run(served: Served) -> str:
    """Return a run's page: its members side by side."""
    index = served.index
    return _render(
        "run",
        served,
        title=index.name,
        hooks=[
            (hook, [m for m in index.members if m.hook == hook["name"]])
            for hook in index.overview["hooks"]
        ],
        charts={
            m.slug: member_densities(m.name, m.kind, m.density, index.unit) for m in index.members
        },
        about=index.overview,
        worth=worth(served),
        stars=sum(named.star for named in served.names.values()),
    )


def compare(served: Served, view: Json) -> str:
    """Return the page of two members side by side."""
    index = served.index
    members = [index.by_slug[view[side]] for side in ("a", "b")]
    charts = [member_densities(m.name, m.kind, m.density, index.unit) for m in members]
    title = f"{members[0].name} and {members[1].name} · {index.name}"
    return _render(
        "compare", served, title=title, view=view, members=members, charts=charts, alike=ALIKE
    )


def latents(served: Served, member: Member | None, ask: Asked, view: Json) -> str:
    """Return a page of a list of latents."""
    index, slug = served.index, member.slug if member else "all"
    names = {measure.key: measure for measure in index.measures}
    heads = []
    for key in view["columns"]:  # sorted by it, highest first; the other way where it is already
        sign = "" if ask.sort == key and ask.down else "-"
        heads.append((names[key], served.list_link(slug, ask, sort=sign + key, page=1)))
    return _render(
        "latents",
        served,
        title=f"{member.name if member else 'All members'} · {index.name}",
        member=member,
        slug=slug,
        ask=ask,
        view=view,
        heads=heads,
        turn={
            name: served.list_link(slug, ask, page=ask.page + step)
            for name, step in (("before", -1), ("after", 1))
        },
        filtered=bool(
            ask.low or ask.high or ask.alive != "any" or ask.shown != "any" or ask.star != "any"
        ),
        by_slug=index.by_slug,
        latent_sort=LATENT,
    )


def latent(
    served: Served, scope: Member | None, member: Member, ask: Asked, view: Json, key: str
) -> str:
    """Return the page of one latent, its match in the twin beside it; `scope`: whose list it was found in.

    `key` stands in the address of the form for its name.
    """
    index, words = served.index, words_of(ask.query)
    turn = ["", ""]
    for place, other in enumerate(beside(index, scope, ask, member.key(view["latent"]))):
        if other is not None:
            turn[place] = served.latent_link(*index.owner(other), ask, scope is None)
    match, twin = next(iter(view["matches"]), None), None
    if match is not None:
        owner = index.by_slug[match["member"]]
        theirs = latent_view(served, owner, match["latent"])
        theirs |= {"contexts": theirs.get("contexts", [])[: 2 * BESIDE_CONTEXTS], "samples": []}
        twin = _side(served, theirs, words, BESIDE_CONTEXTS)
    acts = [act for context in view.get("contexts", []) for act in context["acts"]]
    numbers = view["measures"]
    return _render(
        "latent",
        served,
        title=f"Latent {view['latent']} · {member.name} · {index.name}",
        member=member,
        view=view,
        key=key,
        name_chars=NAME_CHARS,
        own=_side(served, view, words, FIRST_CONTEXTS),
        twin=twin,
        match=match,
        measures=[
            (m, shown_number(m.key, numbers[m.key]))
            for m in index.measures
            if numbers[m.key] is not None
        ],
        before=turn[0],
        after=turn[1],
        up=served.list_link(scope.slug if scope else "all", ask),
        density=member_densities(
            member.name, member.kind, member.density, index.unit, numbers["density"]
        ),
        acts=acts_chart(*occupied(view["histogram"]), acts, member.kind),
        collected=bool(view["histogram"]),
        model=index.model,
        usual=USUAL,
    )


def _side(served: Served, view: Json, words: list[str], first: int) -> Json:
    """Return one latent's explanation, scores and contexts as they are drawn: images all, texts some first."""
    drawn, pictured = [], False
    samples = [spans(c, view["measures"]["max"], words) for c in view.get("samples", [])]
    for context in view.get("contexts", []):
        image = served.index.image(context["seq"]) if len(context["tokens"]) == 1 else ""
        if image:
            act, pictured = number(float(context["acts"][0])), True
            tip = f"image {context['seq']}, activation {act}"
            drawn.append({"image": image, "label": visible(context["tokens"][0]), "tip": tip})
        else:
            text = spans(context, view["measures"]["max"], words)
            drawn.append({"image": "", "label": "", "tip": "", "spans": text})
    first = len(drawn) if pictured else first
    names = {measure.key: measure.name for measure in served.index.measures}
    scores = {names.get(key, key): value for key, value in view.get("scores", {}).items()}
    return {
        "alive": view["alive"],
        "explanation": view.get("explanation"),
        "tokens": view.get("tokens", []),
        "scores": [(name, number(value)) for name, value in scores.items() if value is not None],
        "first": drawn[:first],
        "rest": drawn[first:],
        "samples": [{"spans": text} for text in samples],
        "fires": view["fires"],
        "labels": view.get("labels", []),
    }


def live(served: Served, ask: Ask, key: str, found: Json | None, problem: str) -> str:
    """Return the page on which a text is typed, with what fires on it; without a latent the strongest is followed.

    `key` stands in the address of the form.
    """
    reading: list[Span] = []
    latent = ask.latent
    if found is not None:
        if latent is None and found["latents"]:
            latent = found["latents"][0]["latent"]
        acts = [dict(token["latents"]).get(latent, 0.0) for token in found["tokens"]]
        read = {"tokens": [token["text"] for token in found["tokens"]], "acts": acts}
        reading = spans(read, max(acts[1:], default=0.0), [])
    title, own = f"Try a text · {served.index.name}", {"latent": latent, "reading": reading}
    return _form("live", served, ask, key, found, problem, title=title, **own)


def steered(served: Served, ask: Ask, key: str, found: Json | None, problem: str) -> str:
    """Return the page of the steer form, with what the model wrote."""
    own = {
        "kind": ask.given.get("kind", "set"),
        "value": ask.given.get("value") or USUAL,
        "latent": ask.latent,
        "new_tokens": NEW_TOKENS,
    }
    return _form(
        "steer", served, ask, key, found, problem, title=f"Steer · {served.index.name}", **own
    )


def attributed(served: Served, ask: Ask, key: str, found: Json | None, problem: str) -> str:
    """Return the page of the attribution form, with the table of tokens and latents."""
    own = {name: ask.given.get(name, "") for name in ("answer", "against")}
    title, cells = f"Attribute · {served.index.name}", heat(found) if found else []
    return _form("attribute", served, ask, key, found, problem, title=title, cells=cells, **own)


def _form(
    name: str, served: Served, ask: Ask, key: str, found: Json | None, problem: str, **own: Any
) -> str:
    shared = {"member": ask.member, "text": ask.text, "key": key}
    return _render(name, served, found=found, problem=problem, **shared, **own)

"""What pages show as plain values, and pages as HTML.

Every text goes through the template's escaping; only charts, which escape their own, are markup.
"""

from dataclasses import replace
from importlib.resources import files
from typing import Any, NamedTuple

from wsae.report.charts import Span, acts_chart, member_densities, spans, visible
from wsae.report.html import environment
from wsae.report.view import number
from wsae.run import NAME_CHARS, Json, NamedLatent
from wsae.serve.index import LATENT, PER_PAGE, Asked, Index, Member, Served, beside, find, words_of
from wsae.serve.schema import BASIC, occupied
from wsae.serve.using import NEW_TOKENS, USUAL, Ask, heat

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


# What is worth looking at in a run: lists like any other, so that each links to the whole of itself.

ALIKE = 0.7
"""Decoder cosine from which two latents count as the same one."""
COPIES = 0.9
"""Decoder cosine from which two latents of one SAE count as copies."""
DENSE = 0.1
"""Share of the rows from which a latent is dense."""
OFTEN = 5
"""Firings from which those in one sequence alone are suspicious."""
SHOWN = 5


class Kind(NamedTuple):
    """A list that is worth looking at: its heading, what it holds, and what it asks."""

    name: str
    about: str
    ask: Asked


def kinds(index: Index, member: Member) -> list[Kind]:
    """Return the lists that a member can have; a run without scores, twin or counts has fewer."""
    has = index.measured(member) - ({"match"} if member.twin is None else set())
    scores = [m for m in index.measures[len(BASIC) :] if m.key in has][:1]
    rows = max(1, round(1 / max(index.resolution(member), 1e-12)))
    out = [
        Kind(
            f"Highest {m.name}",
            f"live latents of the highest {m.name}",
            Asked(sort=m.key, down=True, alive="yes"),
        )
        for m in scores
    ]
    strong = Asked(sort="variance", down=True, alive="yes")
    said = {
        "match": (
            "Gained",
            "unlike any latent of the plain twin",
            replace(strong, high={"match": ALIKE}),
        ),
        "kept": (
            "Lost",
            "unlike any latent of the other members",
            replace(strong, high={"kept": ALIKE}),
        ),
        "density": (
            "Dense",
            f"fire on {100 * DENSE:.0f} % of the rows or more",
            Asked(sort="density", down=True, low={"density": DENSE}),
        ),
        "nearest": (
            "Copies",
            f"cosine {COPIES} or more with another latent of this SAE",
            Asked(sort="nearest", down=True, low={"nearest": COPIES}, alive="yes"),
        ),
        "sequences": (
            "In one sequence alone",
            f"fire {OFTEN} times or more, and nowhere else",
            Asked(
                sort="density",
                down=True,
                high={"sequences": 1.0},
                low={"density": float(f"{OFTEN / rows:.6g}")},
                alive="yes",
            ),
        ),
    }
    out += [Kind(*told) for key, told in said.items() if key in has]
    out.append(Kind("Dead", "never fired on held-out data", Asked(alive="no")))
    return out


def worth(run: Served) -> dict[str, list[Json]]:
    """Return by member the lists that hold something: their names, sizes, first latents and addresses."""
    index = run.index
    out: dict[str, list[Json]] = {}
    for member in index.members:
        entries = []
        for nth, kind in enumerate(kinds(index, member)):
            found = index.first(member, nth, kind.ask, SHOWN)
            if found.total:
                entries.append(
                    {
                        "name": kind.name,
                        "about": kind.about,
                        "total": found.total,
                        "link": run.list_link(member.slug, kind.ask),
                        "latents": []
                        if kind.ask.alive == "no"
                        else [line(run, key, kind.ask) for key in found.keys],
                    }
                )
        out[member.slug] = entries
    return out


def line(run: Served, key: int, ask: Asked | None = None) -> Json:
    """Return one line on a latent: where it is, what it is called or fires on."""
    member, latent = run.index.owner(key)
    said = run.said([key])[key]
    return {
        "member": member.slug,
        "kind": member.kind,
        "latent": latent,
        "label": said.label,
        "alive": said.alive,
        "star": said.star,
        "link": run.latent_link(member, latent, ask),
    }


# Two members side by side.

PAIRS = 12
"""Latents of each kind that are shown."""


def compared(run: Served, a: Member, b: Member) -> Json:
    """Return two members side by side: their counts, and the latents that one has and the other lacks.

    Latents of a member and its plain twin are paired by their match; those of two members with one twin by way of it.
    """
    index = run.index
    pairs, values = _pairs(index, a, b)
    out: Json = {"a": a.slug, "b": b.slug, "facts": _facts(index, a, b), "paired": bool(pairs)}
    if not pairs:
        return out | {"both": [], "only_a": [], "only_b": [], "counts": {}}
    strength = index.column["variance"]
    alike = f"SELECT a, b, cosine FROM ({pairs}) WHERE cosine >= {ALIKE}"
    sql = f"SELECT a, b, cosine FROM ({alike}) JOIN latent ON key = a ORDER BY {strength} DESC, a LIMIT {PAIRS}"
    both = index.rows(sql, values)
    ((n,),) = index.rows(f"SELECT count(*) FROM ({alike})", values)
    counts, only = {"both": n}, {}
    for side, member in (("a", a), ("b", b)):
        where = f"FROM latent WHERE alive = 1 AND key BETWEEN ? AND ? AND key NOT IN (SELECT {side} FROM ({alike}))"
        bound = [*member.keys, *values]
        ((counts[f"only_{side}"],),) = index.rows(f"SELECT count(*) {where}", bound)
        sql = f"SELECT key {where} ORDER BY {strength} DESC, key LIMIT {PAIRS}"
        only[f"only_{side}"] = [line(run, key) for key in index.keys(sql, bound)]
    shown = [
        {"a": line(run, index.checked(x)), "b": line(run, index.checked(y)), "cosine": cosine}
        for x, y, cosine in both
    ]
    return out | {"both": shown, "counts": counts} | only


def _pairs(index: Index, a: Member, b: Member) -> tuple[str, list[int]]:
    """Return a query for pairs (a, b, cosine) of two members' live latents, and its values; none where none match."""
    match = index.column["match"]
    live = "alive = 1 AND twin IN (SELECT key FROM latent WHERE alive = 1)"  # the dead are alike from the start
    if a.twin == b.id:
        sql = f"SELECT key AS a, twin AS b, {match} AS cosine FROM latent"
        return f"{sql} WHERE key BETWEEN ? AND ? AND {live}", [*a.keys]
    if b.twin == a.id:
        sql = f"SELECT twin AS a, key AS b, {match} AS cosine FROM latent"
        return f"{sql} WHERE key BETWEEN ? AND ? AND {live}", [*b.keys]
    if a.twin is None or a.twin != b.twin:
        return "", []
    sql = (
        f"SELECT x.key AS a, y.key AS b, min(x.{match}, y.{match}) AS cosine FROM latent AS x JOIN latent AS y ON "
        "x.twin = y.twin WHERE x.key BETWEEN ? AND ? AND y.key BETWEEN ? AND ? AND x.alive = 1 AND y.alive = 1"
    )
    return sql, [*a.keys, *b.keys]


def _facts(index: Index, a: Member, b: Member) -> list[Json]:
    """Return counts and mean measures of two members, a line each, in words."""
    lines: dict[str, list[float | None]] = {
        "latents": [a.size, b.size],
        "fire on held-out data": [a.alive, b.alive],
        "dead": [m.size - m.alive for m in (a, b)],
    }
    dense = Asked(low={"density": DENSE})
    lines["dense"] = [find(index, m, dense).total for m in (a, b)]
    copies = Asked(low={"nearest": COPIES}, alive="yes")
    lines["copies"] = [find(index, m, copies).total for m in (a, b)]
    means = [index.means(m) for m in (a, b)]
    for measure in index.measures:
        found = [mean[measure.key] for mean in means]
        if measure.key not in ("match", "kept") and any(v is not None for v in found):
            lines[f"mean {measure.name}"] = found
    return [{"name": name, "a": x, "b": y} for name, (x, y) in lines.items()]


# The pages.

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


def overview(runs: list[Served], problems: list[str], root: str) -> str:
    """Return the first page: the runs that are served, and why others are not."""
    if len(runs) == 1 and not problems:
        return run(runs[0])
    return _render("runs", None, root, title="Runs", runs=runs, problems=problems)


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

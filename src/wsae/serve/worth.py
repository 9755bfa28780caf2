"""What is worth looking at in a run, and two members side by side: plain values, no markup.

What the first page names are lists like any other, so each links to the whole of itself.
"""

from dataclasses import replace
from typing import NamedTuple

from wsae.run import Json
from wsae.serve.index import Asked, Index, Member, Served, find
from wsae.serve.schema import BASIC

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
        for number, kind in enumerate(kinds(index, member)):
            found = index.first(member, number, kind.ask, SHOWN)
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
        where = (
            "FROM latent WHERE alive = 1 AND key BETWEEN ? AND ? "
            f"AND key NOT IN (SELECT {side} FROM ({alike}))"
        )
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
    """Return a query for pairs (a, b, cosine) of two members' latents, and its values; none where none were matched."""
    match = index.column["match"]
    if a.twin == b.id:
        sql = f"SELECT key AS a, twin AS b, {match} AS cosine FROM latent"
        return f"{sql} WHERE key BETWEEN ? AND ? AND twin IS NOT NULL", [*a.keys]
    if b.twin == a.id:
        sql = f"SELECT twin AS a, key AS b, {match} AS cosine FROM latent"
        return f"{sql} WHERE key BETWEEN ? AND ? AND twin IS NOT NULL", [*b.keys]
    if a.twin is None or a.twin != b.twin:
        return "", []
    sql = (
        f"SELECT x.key AS a, y.key AS b, min(x.{match}, y.{match}) AS cosine "
        "FROM latent AS x JOIN latent AS y ON x.twin = y.twin "
        "WHERE x.key BETWEEN ? AND ? AND y.key BETWEEN ? AND ?"
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

"""What pages and the JSON interface show of a latent and of a list: plain values, no markup."""

from typing import Any
from urllib.parse import quote, urlencode

from wsae.report.rundata import Json
from wsae.report.words import number
from wsae.serve.index import Index, Member
from wsae.serve.listing import PER_PAGE, Asked, Found, beside, find, member_of
from wsae.serve.measures import BASIC
from wsae.serve.schema import key_of

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

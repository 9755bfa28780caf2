"""The browser's charts: how a latent's density lies among the others', and how strongly it fires."""

import math

from markupsafe import Markup

from wsae.report.svg import Axis, Chart, axis
from wsae.report.words import number
from wsae.serve.histogram import occupied
from wsae.serve.index import Member

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

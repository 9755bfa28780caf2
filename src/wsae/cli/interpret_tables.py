"""The tables of `wsae interpret`."""

from typing import Any

from wsae.cli.evaluate import counted, interval, likeness, scored
from wsae.cli.ui import UI


def show_plan(plan: dict[str, dict[str, int]], ui: UI) -> None:
    """Print the requests and tokens of each score."""
    columns = ("requests", "cached", "prompt_tokens", "completion_tokens", "limit_tokens")
    names = ("to send", "on disk", "prompt tokens", "answer tokens", "at most")
    rows = [[score, *(f"{part[key]:,}" for key in columns)] for score, part in plan.items()]
    total = [f"{sum(part[key] for part in plan.values()):,}" for key in columns]
    ui.table("would be asked (tokens estimated)", ("score", *names), [*rows, ["total", *total]])


def show_scores(result: dict[str, Any], ui: UI) -> None:
    """Print a table per hook: members and controls as rows, mean scores with intervals; then the comparisons."""
    for hook, found in result["hooks"].items():
        scores = list(result["judges"])
        rows = [
            [name, *(scored(e["summary"].get(s)) for s in scores), counted(e["counts"])]
            for name, e in {**found["members"], **found["controls"]}.items()
        ]
        ui.table(f"{hook}: interpretability", ("", *scores, "latents"), rows)
        lines = [
            [line["a"], line["b"], line["metric"], line["over"], difference(line), str(line["n"])]
            for line in found["comparisons"]
            if line["over"] != "control"
        ]
        if lines:
            columns = ("a", "b", "score", "over latents", "a - b", "n")
            ui.table(f"{hook}: differences", columns, lines)
        for text in [*compared(found["comparisons"]), *unanswered(found)]:
            ui.say(text)


def compared(lines: list[dict[str, Any]]) -> list[str]:
    """Return a line per pair of members and score: how many matched latents are compared, and how alike they are."""
    return [
        f"{line['a']} against {line['b']}, {line['metric']}: {line['n']} of {line['sampled']} sampled latents have a "
        f"match that was scored, {likeness(line['cosine'], line['chance'])}"
        for line in lines
        if line.get("cosine") is not None
    ]


def difference(line: dict[str, Any]) -> str:
    """Return a difference with its interval."""
    return interval({"value": line["difference"], "low": line["low"], "high": line["high"]})


def unanswered(found: dict[str, Any]) -> list[str]:
    """Return a line for every member and score whose requests were not all parsed."""
    out = []
    for name, entry in {**found["members"], **found["controls"]}.items():
        for score, part in entry["summary"].items():
            if part.get("requested", 0) != part.get("parsed", 0):
                reasons = ", ".join(f"{n} {why}" for why, n in part["reasons"].items())
                out.append(
                    f"{name}, {score}: {part['requested']} requested = {part['parsed']} parsed + "
                    f"{part['failed']} failed + {part['not_asked']} not asked ({reasons})"
                )
    return out


def show_agreement(lines: list[dict[str, Any]], ui: UI) -> None:
    """Print the rank correlations."""
    if lines:
        rows = [[line["score"], line["with"], interval(line), str(line["n"])] for line in lines]
        ui.table("agreement", ("score", "with", "Spearman", "latents"), rows)

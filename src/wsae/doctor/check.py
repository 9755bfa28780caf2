"""One finding of the pre-flight: what was looked at, how it stands, and what to do about it."""

from typing import Literal, NamedTuple

Status = Literal["ok", "warn", "fail"]


class Check(NamedTuple):
    """A finding. `fail`: the run would not work; `warn`: it would, but not as you think; `advice` is the mend."""

    name: str
    status: Status
    value: str
    advice: str = ""


TIGHT = 0.8
"""Share of what is free above which memory or disk is called tight."""


def room(need: int | float, free: float, mend: str) -> tuple[Status, str]:
    """Return how a need stands to what is free, and `mend` where it is tight or too much."""
    if need <= TIGHT * free:
        return "ok", ""
    return ("fail" if need > free else "warn"), mend


def report(subject: str, checks: list[Check]) -> dict[str, object]:
    """Return the JSON-ready report of all findings."""
    count = {s: sum(c.status == s for c in checks) for s in ("ok", "warn", "fail")}
    return {
        "subject": subject,
        "checks": [check._asdict() for check in checks],
        "warnings": count["warn"],
        "failed": count["fail"],
    }

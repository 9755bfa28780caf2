"""One finding of the pre-flight: what was looked at, how it stands, and what to do about it."""

from typing import Literal, NamedTuple

Status = Literal["ok", "warn", "fail"]


class Check(NamedTuple):
    """A finding. `fail`: the run would not work; `warn`: it would, but not as you think; `advice` is the mend."""

    name: str
    status: Status
    value: str
    advice: str = ""


def report(subject: str, checks: list[Check]) -> dict[str, object]:
    """Return the JSON-ready report of all findings."""
    count = {s: sum(c.status == s for c in checks) for s in ("ok", "warn", "fail")}
    return {
        "subject": subject,
        "checks": [check._asdict() for check in checks],
        "warnings": count["warn"],
        "failed": count["fail"],
    }

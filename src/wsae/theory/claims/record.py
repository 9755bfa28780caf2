"""One checked claim: what it says, whether it holds, and the numbers found."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["holds", "holds if", "counterexample"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One line of the ledger.

    `holds`: no instance tried contradicts it. `holds if`: true under the extra `condition` and not without it.
    `counterexample`: an instance within the paper's own assumptions contradicts it; `condition` says what saves it.
    """

    claim: str
    """What the paper says, or we, in one sentence."""
    source: str
    """Where the paper says it: "Theorem 1", "Eq. 14", "Section 4.3.2" ...; "Ours 3" for a theorem of docs/theory.md."""
    verdict: Verdict
    condition: str = ""
    """The extra condition, or what saves the claim; "" when it holds as stated."""
    evidence: str
    """One or two sentences with the numbers found."""
    instances: int
    """How many instances were tried."""
    numbers: dict[str, float] = field(default_factory=dict)
    """The numbers behind the evidence, by name."""

    def as_dict(self) -> dict[str, Any]:
        """Return the claim as JSON-ready values."""
        return asdict(self)


Check = Callable[[int], Claim]
"""A check takes the seed and returns what it found.

The first line of its docstring is "SOURCE: the claim in words." with the same SOURCE as the Claim it returns:
`wsae theory --only` looks there, so that it need not run what was not asked for.
"""

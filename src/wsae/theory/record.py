"""What the paper says: the form of a checked claim, and the numbers of Tables 1 to 3. No torch here."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from wsae.core.config import Config

Verdict = Literal["holds", "holds if", "counterexample", "ill-posed"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One line of the ledger.

    `holds`: no instance tried contradicts it. `holds if`: true under the extra `condition` and not without it.
    `counterexample`: an instance within the paper's own assumptions contradicts it; `condition` says what saves it.
    `ill-posed`: a definition that does not determine what it defines; `condition` says when it does.
    """

    claim: str
    """What the paper says, or we, in one sentence."""
    source: str = ""
    """Where the paper says it: "Theorem 1", "Eq. 14", "Section 4.3.2" ...; "Ours 3" for a theorem of docs/theory.md.
    The ledger fills it in, from the check's docstring."""
    verdict: Verdict
    slip: bool = False
    """Whether a counterexample is to the writing alone: put right, no conclusion of the paper changes."""
    condition: str = ""
    """The extra condition, or what saves the claim; "" when it holds as stated."""
    evidence: str
    """One or two sentences with the numbers found."""
    instances: int
    """How many instances were tried."""
    numbers: dict[str, float] = field(default_factory=dict)
    """The numbers behind the evidence, by name."""


Check = Callable[[int], Claim]
"""A check takes the seed and returns what it found.

The first line of its docstring is "SOURCE: the claim in words.": `wsae theory --only` looks there, so that it need not
run what was not asked for.
"""


# Tables 1 to 3: auto-interpretability scores in percent, by layer and method.

TableName = Literal["table1", "table2", "table3"]

PLAIN, HALF, ONE = "plain", "variance-a0.5", "variance-a1"
"""The paper's three methods, by the labels of their members."""


class PaperTable(Config):
    """One table: `scores` of each method, in the order of `layers`."""

    title: str
    model: str
    layers: tuple[int, ...]
    """Counted from 0; for Llama-3-8B the last of 32."""
    scores: dict[str, tuple[float, ...]]

    def gains(self, method: str) -> list[float]:
        """Return a method's score minus the plain SAE's, by layer, in points (rounded as the table's are)."""
        return [
            round(a - b, 1) for a, b in zip(self.scores[method], self.scores[PLAIN], strict=True)
        ]


PAPER: dict[TableName, PaperTable] = {
    "table1": PaperTable(
        title="Table 1: Top-k 32, 32x",
        model="Pythia-160M",
        layers=tuple(range(12)),
        scores={
            PLAIN: (74.7, 74.1, 76.7, 77.8, 78.5, 79.5, 79.3, 77.8, 74.6, 75.6, 71.6, 72.5),
            HALF: (75.4, 77.6, 76.4, 77.9, 79.3, 79.6, 79.8, 77.4, 78.6, 79.3, 76.1, 72.6),
            ONE: (77.2, 78.9, 81.3, 84.6, 83.9, 83.3, 83.9, 79.6, 81.5, 77.6, 72.4, 73.5),
        },
    ),
    "table2": PaperTable(
        title="Table 2: group Top-k 32, 32x",
        model="Pythia-160M",
        layers=(9, 10, 11),
        scores={PLAIN: (69.0, 61.8, 56.3), ONE: (71.5, 63.7, 59.0)},
    ),
    "table3": PaperTable(
        title="Table 3: the last layer",
        model="Llama-3-8B",
        layers=(31,),
        scores={PLAIN: (41.6,), ONE: (63.6,)},
    ),
}

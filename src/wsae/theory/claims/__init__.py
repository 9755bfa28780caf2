"""The ledger: every theorem, example and claim of the paper's theory, checked numerically; then our own."""

from dataclasses import replace
from inspect import isfunction
from types import ModuleType

from wsae.core.calls import one_thread
from wsae.core.errors import UserError
from wsae.core.progress import Progress, quiet
from wsae.theory.claims import limits, minima, ours, weights
from wsae.theory.record import Check, Claim

MODULES = (minima, weights, limits, ours)
"""The modules of checks, they and their checks in the order of the paper (Appendix A last); then our own theorems."""


def checks(only: str | None = None) -> list[Check]:
    """Return the checks whose docstring ("SOURCE: claim") contains `only`, in the paper's order.

    Raises UserError when nothing matches.
    """
    known = [check for module in MODULES for check in checks_in(module)]
    if only is None:
        return known
    found = [check for check in known if only.casefold() in title(check).casefold()]
    if not found:
        sources = dict.fromkeys(map(source, known))
        raise UserError(f"--only '{only}': no claim matches; the sources are {', '.join(sources)}")
    return found


def checks_in(module: ModuleType) -> list[Check]:
    """Return the functions of a module that return a `Claim`, in the order in which they are written."""
    functions = filter(isfunction, vars(module).values())
    return [f for f in functions if f.__annotations__.get("return") is Claim]


def title(check: Check) -> str:
    """Return the first paragraph of a check's docstring: "SOURCE: the claim in words."."""
    return " ".join((check.__doc__ or "").split("\n\n")[0].split())


def source(check: Check) -> str:
    """Return where the claim of a check is made."""
    return title(check).split(":")[0]


def ledger(seed: int = 0, only: str | None = None, progress: Progress = quiet) -> list[Claim]:
    """Run the checks and return what they found, in the paper's order; `only` keeps those whose title contains it.

    Deterministic for a seed. Raises UserError when `only` matches nothing.
    """
    chosen = checks(only)
    found = []
    with one_thread(), progress("claims", len(chosen), "claims") as tick:
        for check in chosen:
            found.append(replace(check(seed), source=source(check)))
            tick(1)
    return found

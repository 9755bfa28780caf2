"""`wsae theory`: the ledger of the paper's claims and of our theorems, each checked numerically."""

import shlex
from dataclasses import asdict
from typing import Any

from wsae.cli.common import UI, Common, CommonFlags, MaybeName, MaybePlace
from wsae.core.config import Config
from wsae.core.files import write_json

ABOUT = "Check every claim of the paper's theory, and our own theorems; takes about half a minute."
SAVES = {
    "holds": "",
    "holds if": "Holds if: ",
    "counterexample": "What saves it: ",
    "ill-posed": "What saves it: ",
}


class Flags(Config):
    """Flags of `wsae theory`."""

    only: MaybeName = None
    """Keep the claims with this in their source or words ("Theorem 3", "Section 4.1", "polygon")."""
    out: MaybePlace = None
    """Write ledger.json and the pictures (PNG and SVG) into this directory; without it nothing is written."""
    common: CommonFlags = Common()


def run(flags: Flags, ui: UI) -> dict[str, Any]:
    """Check the claims and return them, with the files written."""
    from wsae.theory.claims import checks, ledger

    checks(flags.only)
    if flags.out is not None:
        from wsae.studies.drawing import need_matplotlib

        need_matplotlib()
    claims = [asdict(claim) for claim in ledger(flags.common.seed, flags.only, ui.progress)]
    result: dict[str, Any] = {"claims": claims, "files": []}
    if flags.out is not None:
        from wsae.studies.theory_figures import theory_figures

        flags.out.mkdir(parents=True, exist_ok=True)
        write_json(flags.out / "ledger.json", {"seed": flags.common.seed, "claims": claims})
        pictures = theory_figures(flags.out, flags.common.seed, ui.progress)
        result["files"] = [str(path) for path in (flags.out / "ledger.json", *pictures)]
    return result


def as_json(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what --json prints: the list of claims."""
    return result["claims"]


def show(result: dict[str, Any], ui: UI) -> None:
    """Print the ledger as a table, then how many claims hold."""
    ours = [claim for claim in result["claims"] if claim["source"].startswith("Ours")]
    papers = [claim for claim in result["claims"] if claim not in ours]
    between = [["", "", "", ""]] if ui.stdout.isatty() else []
    for heading, claims in (
        ("The paper's claims", papers),
        ("Our theorems (docs/theory.md)", ours),
    ):
        if claims:
            rows = [line for claim in claims for line in (_row(claim), *between)]
            ui.table(heading, ("source", "verdict", "claim", "evidence"), rows)
            ui.say(_counted(claims))
    if result["files"]:
        ui.say(f"wrote {', '.join(shlex.quote(path) for path in result['files'])}")


def _counted(claims: list[dict[str, Any]]) -> str:
    count = {verdict: sum(c["verdict"] == verdict for c in claims) for verdict in SAVES}
    slips = sum(claim["slip"] for claim in claims)
    return (
        f"{len(claims)} claims: {count['holds']} hold, {count['holds if']} hold under a condition, "
        f"{count['counterexample']} have a counterexample"
        + (f" ({slips} of them slips that change no conclusion)" if slips else "")
        + (f", {count['ill-posed']} is ill-posed" if count["ill-posed"] else "")
    )


def _row(claim: dict[str, Any]) -> list[str]:
    saves = SAVES[claim["verdict"]] + claim["condition"] if claim["condition"] else ""
    evidence = " ".join(part for part in (claim["evidence"], saves) if part)
    verdict = f"{claim['verdict']} (slip)" if claim["slip"] else claim["verdict"]
    return [claim["source"], verdict, claim["claim"], evidence]

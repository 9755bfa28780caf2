"""What a run already says of single latents: contexts, explanation, scores, typical tokens, ready for the index."""

from collections.abc import Iterator

from wsae.acts.tokens import owner_of
from wsae.core.errors import UserError
from wsae.report.rundata import Json, RunData, finite
from wsae.serve.text import shown_token, spaced

Texts = tuple[str, str, str]
"""Explanation, contexts and typical tokens, as they are searched."""
_KEPT = ("explanation", "tokens", "contexts", "scores", "match")
_LABEL = 160


def entries(run: RunData, who: tuple[str, str], size: int) -> dict[int, Json]:
    """Return latent -> what evaluation and interpretation say of it, for a member of `size` latents.

    Raises UserError when they name a latent that the member does not have, or a context is not one.
    """
    hook, member = who
    out: dict[int, Json] = {}
    for entry in run.contexts.get(hook, {}).get(member, []):
        latent = entry.get("latent")
        if not isinstance(latent, int) or not 0 <= latent < size:
            raise UserError(
                f"{run.path}: its contexts name latent {latent!r} of {member}, which has {size}; "
                "evaluate and interpret it again"
            )
        if not all(_is_context(context) for context in entry.get("contexts", [])):
            raise UserError(
                f"{run.path}: a context of {member}'s latent {latent} is damaged; evaluate it again"
            )
        out[latent] = entry
    return out


def _is_context(context: object) -> bool:
    if not isinstance(context, dict):
        return False
    tokens, acts = context.get("tokens"), context.get("acts")
    whole = isinstance(tokens, list) and isinstance(acts, list) and len(tokens) == len(acts)
    peak, seq = context.get("peak"), context.get("seq")
    placed = peak is None or (isinstance(peak, int) and whole and 0 <= peak < len(tokens or []))
    return (
        whole
        and placed
        and (seq is None or isinstance(seq, int))
        and all(isinstance(token, str) for token in tokens or [])
        and all(finite(act) is not None for act in acts or [])
    )


def stored_rows(
    run: RunData, who: tuple[str, str], size: int, fresh: dict[int, list[Json]] | None = None
) -> Iterator[tuple[int, str, Texts, Json]]:
    """Yield (latent, label, texts, record) of each latent that has contexts, scores or an explanation.

    `fresh`: contexts collected now, for latents that have none stored.
    """
    hook, member = who
    details = _details(run, hook, member)
    found = entries(run, who, size)
    for latent, contexts in (fresh or {}).items():
        entry = found.get(latent, {"latent": latent})
        found[latent] = entry if entry.get("contexts") else {**entry, "contexts": contexts}
    for latent, entry in sorted(found.items()):
        kept = {name: entry[name] for name in _KEPT if entry.get(name)}
        if latent in details:
            kept["details"] = details[latent]
        yield latent, label(entry), texts(entry), kept


def label(entry: Json) -> str:
    """Return one line that stands for a latent in lists: its explanation, else what it fires on."""
    said = entry.get("explanation")
    if said:
        return clean(str(said))[:_LABEL]
    tokens = [str(token) for token in entry.get("tokens", [])] or _peaks(entry)
    shown = dict.fromkeys(shown_token(clean(token)) for token in tokens)
    return "fires on " + ", ".join(f"“{token}”" for token in [*shown][:5]) if shown else ""


def _peaks(entry: Json) -> list[str]:
    contexts = [c for c in entry.get("contexts", []) if isinstance(c.get("peak"), int)]
    return list(dict.fromkeys(owner_of(c["tokens"], c["peak"]) for c in contexts))


def texts(entry: Json) -> Texts:
    """Return what a search looks through (`spaced`)."""
    contexts = "\n".join("".join(map(str, c["tokens"])) for c in entry.get("contexts", []))
    typical = " ".join(str(token) for token in entry.get("tokens", []))
    said = str(entry.get("explanation") or "")
    return spaced(clean(said)), spaced(clean(contexts)), spaced(clean(typical))


def clean(text: str) -> str:
    """Return text that UTF-8 can carry (half a surrogate pair becomes a question mark)."""
    return text.encode("utf-8", "replace").decode()


def _details(run: RunData, hook: str, member: str) -> dict[int, Json]:
    """Return latent -> how each score came about, from the interpretation."""
    found = run.interpretation.get("hooks", {}).get(hook, {}).get("members", {}).get(member, {})
    rows = found.get("latents", [])
    return {int(row["latent"]): row["details"] for row in rows if row.get("details")}

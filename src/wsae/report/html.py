"""`write_report`: one HTML file that opens from disk. Nothing is loaded from elsewhere and no text becomes markup.

Text from data reaches the page through autoescaping or through JSON blocks with `<`, `>`, `&` escaped, which the
script shows as text nodes only. A content security policy allows exactly this page's one script and one style sheet.
"""

import base64
import hashlib
import json
import math
from importlib.resources import files
from pathlib import Path

import jinja2  # torch brings it along, so it is always there
from markupsafe import Markup

from wsae.core.errors import UserError
from wsae.core.files import write_text
from wsae.core.version import __version__
from wsae.report.rundata import RunData, read_run
from wsae.report.view import cards, glossary, hook_view, score_name
from wsae.run import Json

REPORT_NAME = "report.html"
_ASSETS = files("wsae.report") / "assets"
_SIGNIFICANT = 3
_ESCAPES = {
    "<": "\\u003c",
    ">": "\\u003e",
    "&": "\\u0026",
    "\u2028": "\\u2028",
    "\u2029": "\\u2029",
}


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of a run directory and return its path (default: `RUN/report.html`).

    Parts that are missing (no evaluation, no contexts) are said to be missing. Raises UserError when `run` is no
    run directory, a part of it is cut or altered, or `out` cannot be written.
    """
    data = read_run(Path(run))
    path = Path(run) / REPORT_NAME if out is None else Path(out)
    if path.is_dir():
        raise UserError(f"{path}: is a directory; give --out a file name such as {REPORT_NAME}")
    write_text(path, render(data))
    return path


def render(run: RunData) -> str:
    """Return the page of a run as text (always encodable as UTF-8)."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style, script = _asset("report.css"), _asset("report.js")
    page = environment.from_string(_asset("report.html.j2")).render(
        policy=policy(script, style),
        style=Markup(style),
        script=Markup(script),
        title=f"{run.path.resolve().name}: weighted sparse autoencoders beside their plain twin",
        hooks=[hook_view(run, hook, index) for index, hook in enumerate(run.hooks)],
        cards=cards(run),
        notes=run.notes,
        glossary=glossary(run),
        has_contexts=bool(run.contexts),
        pictured=bool(run.thumbnails),
        contexts=json_block(pack_contexts(run)),
        version=__version__,
        config=json.dumps(run.config, indent=2, ensure_ascii=False),
        manifest=json.dumps(
            {k: v for k, v in run.manifest.items() if k != "config"}, indent=2, ensure_ascii=False
        ),
    )
    return page.encode("utf-8", "replace").decode("utf-8")


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def policy(script: str, style: str) -> str:
    """Return a content security policy that allows these two texts and nothing else."""
    script_hash, style_hash = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (script, style)
    )
    return (
        f"default-src 'none'; img-src data:; script-src 'sha256-{script_hash}'; "
        f"style-src 'sha256-{style_hash}'; "
        "base-uri 'none'; form-action 'none'"
    )


def json_block(value: object) -> Markup:
    """Return JSON that cannot end its script element: pure ASCII, with `<`, `>` and `&` escaped."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    for char, escaped in _ESCAPES.items():
        text = text.replace(char, escaped)
    return Markup(text)


def pack_contexts(run: RunData) -> Json:
    """Return the contexts in compact form: a token table, and per context token numbers and the activations above 0.

    A latent is [index, density, variance, max, match or null, contexts, scores, explanation or null, typical tokens], a
    match [member, latent, cosine], a context [token numbers, peak position, sequence, [position, activation, ...]];
    scores are [value or null, ...] in the order of `scores`. A context in an image has one token, its class, and the
    image's number as sequence; `images` holds the thumbnails.
    """
    counts: dict[str, int] = {}
    for members in run.contexts.values():
        for latents in members.values():
            for token in (t for latent in latents for c in latent["contexts"] for t in c["tokens"]):
                counts[token] = counts.get(token, 0) + 1
    table = sorted(counts, key=lambda token: (-counts[token], token))
    number_of = {token: i for i, token in enumerate(table)}
    scores = _score_names(run)
    hooks = [
        [
            hook,
            [
                [name, [_latent(entry, number_of, list(scores)) for entry in latents]]
                for name, latents in members.items()
            ],
        ]
        for hook, members in run.contexts.items()
    ]
    return {
        "tokens": table,
        "hooks": hooks,
        "scores": list(scores.values()),
        "images": run.thumbnails,
    }


def _score_names(run: RunData) -> dict[str, str]:
    """Return the scores that some latent on the page has, with their names."""
    entries = (e for named in run.contexts.values() for latents in named.values() for e in latents)
    found = dict.fromkeys(score for entry in entries for score in entry.get("scores", {}))
    return {score: score_name(score) for score in found}


def _latent(entry: Json, number_of: dict[str, int], scores: list[str]) -> list[object]:
    match, said, values = entry.get("match"), entry.get("explanation"), entry.get("scores", {})
    return [
        int(entry["latent"]),
        *(_short(entry.get(key)) for key in ("density", "variance", "max")),
        None if not match else [match["member"], int(match["latent"]), _short(match.get("cosine"))],
        [_context(context, number_of) for context in entry["contexts"]],
        [_short(values.get(score)) for score in scores] if values else [],
        None if said is None else str(said),
        [str(token) for token in entry.get("tokens", [])],
    ]


def _context(context: Json, number_of: dict[str, int]) -> list[object]:
    active = [(i, _short(act)) for i, act in enumerate(context["acts"])]
    return [
        [number_of[token] for token in context["tokens"]],
        context.get("peak"),
        context.get("seq"),
        [item for pair in active if pair[1] for item in pair],
    ]


def _short(value: object) -> float | int | None:
    """Round to three significant digits (whole numbers lose their point); None when not finite."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    rounded = float(f"{value:.{_SIGNIFICANT}g}")
    return int(rounded) if rounded == int(rounded) else rounded

"""`write_report`: one HTML file that opens from disk. Nothing is loaded from elsewhere and no text becomes markup.

Text from data reaches the page through autoescaping or through JSON blocks with `<`, `>`, `&` escaped, which the
script shows as text nodes only. A content security policy allows exactly this page's one script and one style sheet.
"""

import base64
import hashlib
import json
from importlib.resources import files
from pathlib import Path

import jinja2  # torch brings it along, so it is always there
from markupsafe import Markup

from wsae.core import __version__
from wsae.core.errors import UserError
from wsae.core.files import write_text
from wsae.report import charts, view
from wsae.report.charts import pack_contexts, shown_token, visible
from wsae.report.rundata import RunData, read_run
from wsae.report.view import number

REPORT_NAME = "report.html"
_ASSETS = files("wsae.report") / "assets"


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


def environment(*packages: str) -> jinja2.Environment:
    """Return what makes pages of the templates in the assets of some packages; all text is escaped."""
    made = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(name, "assets") for name in packages]),
    )
    made.globals["version"] = __version__
    made.filters |= {"number": number, "visible": visible, "token": shown_token}
    return made


def render(run: RunData) -> str:
    """Return the page of a run as text (always encodable as UTF-8)."""
    style, script = ((_ASSETS / f"report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    several = (
        "Weighted sparse autoencoders beside their plain twin"
        if run.weighted
        else "Sparse autoencoders"
    )
    what = "One sparse autoencoder" if run.single else several
    manifest = {key: value for key, value in run.manifest.items() if key != "config"}
    page = (
        environment("wsae.report")
        .get_template("report.html.j2")
        .render(
            policy=policy(script, style),
            style=Markup(style),
            script=Markup(script),
            title=f"{run.path.resolve().name}: {what[0].lower()}{what[1:]}",
            what=what,
            run=run,
            about=view.overview(run),
            view=view,
            charts=charts,
            contexts=json_block(pack_contexts(run)),
            config=json.dumps(run.config, indent=2, ensure_ascii=False),
            manifest=json.dumps(manifest, indent=2, ensure_ascii=False),
        )
    )
    return page.encode("utf-8", "replace").decode("utf-8")


def policy(script: str, style: str) -> str:
    """Return a content security policy that allows these two texts and nothing else."""
    script_hash, style_hash = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (script, style)
    )
    return (
        f"default-src 'none'; img-src data:; script-src 'sha256-{script_hash}'; style-src 'sha256-{style_hash}'; "
        "base-uri 'none'; form-action 'none'"
    )


def json_block(value: object) -> Markup:
    """Return JSON that cannot end its script element: pure ASCII, with `<`, `>` and `&` escaped."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return Markup(text.translate({ord(char): f"\\u{ord(char):04x}" for char in "<>&"}))

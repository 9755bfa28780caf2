"""`wsae serve`: browse the latents of runs in a browser."""

import importlib.util
import socket
import time
import webbrowser
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from wsae.cli.common import (
    UI,
    Common,
    CommonFlags,
    Count,
    MaybeCount,
    MaybePlace,
    Name,
    Switch,
    device,
)
from wsae.cli.evaluate import measured
from wsae.cli.live import ReadingFlags, reopen
from wsae.core.config import Config
from wsae.core.errors import UserError
from wsae.serve.config import IndexConfig

if TYPE_CHECKING:
    from wsae.serve.server import Gate

ABOUT = """\
Browse every latent of some runs: search explanations and contexts, sort, filter, compare with the plain twin, try a
text. An index (RUN/browser.sqlite) is made once, and again when the run's scores change; it is served to this machine
alone unless --host says otherwise. Ctrl-C ends it."""
DEFAULTS = IndexConfig()


class Flags(Config):
    """Flags of `wsae serve`."""

    run: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")]
    """Evaluated runs' directories; or SAEs alone: their folders, whatever wsae import reads, RELEASE:ID included."""
    reading: tyro.conf.OmitArgPrefixes[ReadingFlags] = ReadingFlags()
    """A text on which SAEs alone are evaluated first."""
    port: Count = 8137
    """Port to listen on; 0: any free one."""
    host: Name = "127.0.0.1"
    """Address to listen on; 0.0.0.0: everybody who can reach this machine can read the runs."""
    allow_host: Annotated[tuple[Name, ...], tyro.conf.UseAppendAction] = ()
    """Another name by which a proxy or a tunnel reaches it (hub.example.org); give it once for each name."""
    root_path: Name = ""
    """Path under which a proxy shows it (/user/me/proxy/8137), where the proxy does not tell it."""
    open: Switch = False
    """Open a browser window."""
    contexts: MaybeCount = DEFAULTS.contexts
    """Latents of each member to collect contexts for, from the run's held-out data; 0: only the stored ones; default:
    all."""
    neighbours: Count = DEFAULTS.neighbours
    """Nearest latents kept for each latent."""
    logits: Count = DEFAULTS.logits
    """Promoted and demoted tokens kept for each latent; 0: none, the model is not loaded."""
    index_only: Switch = False
    """Make the index and stop."""
    out: MaybePlace = None
    """Directory for the index, where the run's own cannot be written."""
    common: CommonFlags = Common()


def run(flags: Flags, ui: UI) -> dict[str, Any]:
    """Index the runs and serve them until interrupted; return what was served."""
    for package in ("jinja2", "starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed; pip install 'wsae[serve]'")
    from wsae.serve import server
    from wsae.serve.build import ensure_index, slugs

    if not flags.run:
        raise UserError("missing: RUN; name at least one evaluated run")
    sizes = {name: getattr(flags, name) for name in ("contexts", "neighbours", "logits")}
    cfg = IndexConfig.parse({**sizes, "seed": flags.common.seed}, where="flags")
    gate = server.Gate(
        hosts=(*map(server.host_name, flags.allow_host), flags.host.lower()),
        root_path=server.path_prefix(flags.root_path),
    )
    # it listens before any work: the port may be taken
    place = nullcontext() if flags.index_only else server.listen(flags.host, flags.port)
    told = []
    with place as listening:
        asked = flags.reading.asked()
        paths = [measured(path, asked, flags.common, ui).path for path in flags.run]
        for path, slug in zip(paths, slugs([p.resolve().name for p in paths]), strict=True):
            begin = time.monotonic()
            where = None if flags.out is None else flags.out / f"{slug}.sqlite"
            index, made = ensure_index(
                path, where, cfg, lambda run: reopen(run, "cpu"), ui.progress, ui.note
            )
            told.append(
                {
                    "run": str(path),
                    "slug": slug,
                    "index": str(index),
                    "bytes": index.stat().st_size,
                    "made": made,
                    "seconds": round(time.monotonic() - begin, 3),
                }
            )
        if listening is None:
            return {"runs": told}
        return {"runs": told, "url": _serve(flags, listening, gate, told, ui)}


def _serve(
    flags: Flags, listening: socket.socket, gate: "Gate", told: list[dict[str, Any]], ui: UI
) -> str:
    from wsae.serve import server
    from wsae.serve.app import Live, Shelf, application

    runs = [Shelf(t["slug"], Path(t["run"]), Path(t["index"])) for t in told]
    for run in runs:
        run.now()  # what cannot be read is said before anybody asks
    url, inside = server.address_of(listening), server.is_loopback(listening)
    if not inside:
        ui.note(
            f"warning: --host {flags.host} lets everybody who can reach this machine read the runs"
        )
    ui.note(f"serving {len(runs)} run{'s' if len(runs) > 1 else ''} on {url} (Ctrl-C ends it)")
    if flags.open:
        webbrowser.open(url)
    gate = replace(gate, loopback=inside)
    server.serve(application(runs, Live(device(flags.common.device)), gate), listening)
    return url


def show(result: dict[str, Any], ui: UI) -> None:
    """Print where the indexes lie."""
    for told in result["runs"]:
        ui.say(f"index: {told['index']} ({told['bytes'] / 1e6:.1f} MB)")


KEPT = "an index is written whole or not at all; the same command keeps those that are there and makes the others"

"""`wsae publish`: an SAE's latents to Neuronpedia, or the files that it and SAEDashboard read."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from wsae.cli.common import UI, Common, CommonFlags, MaybeName, MaybePlace, Name, Switch
from wsae.cli.live import reopen
from wsae.core.config import Config
from wsae.core.errors import UserError
from wsae.serve.config import IndexConfig

if TYPE_CHECKING:
    from wsae.interop.saes import Chosen
    from wsae.run import Run
    from wsae.serve.neuronpedia import Source
    from wsae.serve.upload import Neuronpedia

ABOUT = """\
Put every latent of an SAE that has contexts on Neuronpedia: contexts, tokens it promotes, density, explanation, as
`wsae serve` shows them. --dry-run writes SAEDashboard's batches and Neuronpedia's export to a folder and sends nothing.
The key is read from NEURONPEDIA_API_KEY; what was stopped goes on with the same command."""


class Flags(Config):
    """Flags of `wsae publish`."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|SAE")]
    """An evaluated run, or one SAE that was evaluated."""
    to: Literal["neuronpedia"] = "neuronpedia"
    """Where to."""
    member: MaybeName = None
    """Which member of a run."""
    hook: MaybeName = None
    """Which hook of a run that has several."""
    model_id: MaybeName = None
    """The model's name on Neuronpedia (gpt2-small, gemma-2-2b); default: the run's, in lower case."""
    set: MaybeName = None
    """Name of the set of sources, made if need be; default: wsae-MEMBER."""
    dry_run: Switch = False
    """Write the files and send nothing; needs no network and no key."""
    url: Name = "https://www.neuronpedia.org"
    """Another Neuronpedia than the public one."""
    out: MaybePlace = None
    """Folder for the files; default: not written, for a dry run one called LAYER-SET here."""
    common: CommonFlags = Common()
    """Flags of every command."""


def run(flags: Flags, ui: UI) -> dict[str, Any]:
    """Write or send one SAE's latents, and return what was done and how many were left out."""
    from wsae.interop.saes import choose, open_run
    from wsae.serve.neuronpedia import source_of

    opened = open_run(flags.run)
    (chosen,) = choose(opened.path, flags.member, flags.hook)
    source = source_of(chosen.about, flags.model_id, flags.set)
    if flags.dry_run:
        return _publish(flags, ui, opened, chosen, source, None)
    if importlib.util.find_spec("httpx") is None:
        raise UserError("httpx is not installed; pip install 'wsae[interp]'")
    from wsae.serve.upload import site_at

    with site_at(flags.url, note=ui.note) as site:  # no key: said before any work
        return _publish(flags, ui, opened, chosen, source, site)


def _publish(
    flags: Flags,
    ui: UI,
    opened: "Run",
    chosen: "Chosen",
    source: "Source",
    site: "Neuronpedia | None",
) -> dict[str, Any]:
    from wsae.serve.build import ensure_index
    from wsae.serve.index import Index
    from wsae.serve.neuronpedia import batches, latents, write

    cfg = IndexConfig(seed=flags.common.seed)
    path, _ = ensure_index(
        opened.path, None, cfg, lambda run: reopen(run, "cpu"), ui.progress, ui.note
    )
    index = Index(path)
    places = {f"{member.hook}/{member.name}": member for member in index.members}
    member = places.get(chosen.place or next(iter(places), ""))
    if member is None:
        raise UserError(f"{flags.run}: its evaluation knows no latents of {chosen.place}")
    named = opened.names.get(member.hook, {}).get(member.name, {})
    about = {"model": source.model, "source": source.id, "latents": member.size}
    out = flags.out or (Path(source.id) if site is None else None)
    if out is not None:
        sequences = int(opened.evaluation.heldout_sequences or 0)
        written = write(out, latents(index, member, named), member, source, sequences)
        about |= {"folder": str(out), "published": written.latents, "files": written.files}
    if site is not None:
        found = batches(latents(index, member, named))
        sent = site.send(source, found, member.shown, ui.progress)
        url = f"{site.url}/{source.model}/{source.id}"
        about |= {"url": url, "published": sent.new + sent.there, "sent": sent.new}
    return about


def show(result: dict[str, Any], ui: UI) -> None:
    """Print what lies where, and what was left out."""
    left = result["latents"] - result["published"]
    out = f"; {left} left out, they have no contexts" if left else ""
    if "folder" in result:
        ui.say(
            f"{result['folder']}: {result['published']} latents, {len(result['files'])} files{out}"
        )
    if "url" in result:
        there = result["published"] - result["sent"]
        before = f", {there} were there" if there else ""
        ui.say(f"{result['url']}: {result['sent']} latents sent{before}{out}")


KEPT = "what there is of the folder is marked unfinished; the same command writes it again and sends nothing twice"

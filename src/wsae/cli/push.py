"""`wsae push`: SAEs to the model hub, with a model card."""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import tyro

from wsae.cli.common import UI, Common, CommonFlags, MaybeName, Switch
from wsae.core.config import Config

ABOUT = """\
Put an SAE, or every SAE of a run, on the model hub: weights, configuration, manifests and a model card with scores,
loss weights and provenance. `hub:owner/name` then stands wherever an SAE's directory does. The token is read from
HF_TOKEN."""


class Flags(Config):
    """Flags of `wsae push`."""

    sae: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SAE|RUN")]
    """An SAE's directory, or a finished run, best after `wsae evaluate`."""
    repo: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OWNER/NAME")]
    """The repository; it is made if need be."""
    member: MaybeName = None
    """One member of the run; default: all."""
    hook: MaybeName = None
    """One hook of the run; default: all."""
    dry_run: Switch = False
    """Write the folder and send nothing; needs no network and no token."""
    private: Switch = False
    """A repository that is made is private."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    """Keep the folder here; default: not kept, for a dry run one called NAME here."""
    common: CommonFlags = Common()
    """Flags of every command."""


def run(flags: Flags, ui: UI) -> dict[str, Any]:  # noqa: ARG001  (every command takes the terminal)
    """Write the folder, send it unless told not to, and return what is in it."""
    from wsae.interop.card import check_repo

    check_repo(flags.repo)
    out = flags.out
    if out is None and flags.dry_run:
        out = Path(flags.repo.split("/")[1])
    if out is not None:
        return _push(flags, out)
    with tempfile.TemporaryDirectory() as place:
        return {**_push(flags, Path(place)), "folder": None}


def _push(flags: Flags, out: Path) -> dict[str, Any]:
    from wsae.interop.card import upload, write_folder
    from wsae.interop.saes import choose, open_run

    every = not open_run(flags.sae).single
    chosen = choose(flags.sae, flags.member, flags.hook, every=every)
    files = write_folder(chosen, out, flags.repo)
    url = None if flags.dry_run else upload(out, files, flags.repo, flags.private)
    return {"repo": flags.repo, "folder": str(out), "files": files, "url": url}


def show(result: dict[str, Any], ui: UI) -> None:
    """Print where the SAEs are now, or the folder."""
    if result["url"] is None:
        ui.say(f"{result['folder']}: {len(result['files'])} files, nothing sent")
        return
    ui.say(f"{result['url']}: load with wsae.SAE.load('hub:{result['repo']}')")

"""`wsae export`: SAEs as SAELens, sparsify, dictionary_learning or circuit-tracer read them."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from wsae.cli.common import UI, Common, CommonFlags, MaybeName, Switch
from wsae.core.config import Config
from wsae.interop.config import FormatName

ABOUT = """\
Write SAEs as another tool's own loader reads them, with the same latents and reconstructions there. What has no equal
there is refused. Gamma travels beside the weights, so that `wsae import` gives the SAE back to the bit."""


class Flags(Config):
    """Flags of `wsae export`."""

    sae: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SAE")]
    """A finished run's directory; or one SAE: its folder, whatever wsae import reads, RELEASE:ID included."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The folder; with --all one below it for each SAE, HOOK/NAME."""
    format: Annotated[FormatName, tyro.conf.arg(metavar="NAME")] = "saelens"
    """saelens, sparsify, dictionary_learning, of crosscoders crosscoder, or of transcoders circuit_tracer (with --all a
    model's layers go into one folder, of several members NAME below it)."""
    member: MaybeName = None
    """Which member of a run."""
    hook: MaybeName = None
    """Which hook of a run that has several."""
    all: Switch = False
    """Every member of a run (of --hook, of --member), those without an equal left out and named."""
    force: Switch = False
    """Write over an export that is already there."""
    common: CommonFlags = Common()
    """Flags of every command."""


def run(flags: Flags, ui: UI) -> dict[str, Any]:  # noqa: ARG001  (every command takes the terminal)
    """Export and return what was written where, and what was refused why."""
    from wsae.core.errors import UserError
    from wsae.interop.saes import KINDS, NoEqual, choose

    chosen = choose(flags.sae, flags.member, flags.hook, flags.all)
    refused: list[dict[str, str]] = []
    sets = flags.all and flags.format == "circuit_tracer"
    written: list[dict[str, Any]] = _sets(chosen, flags) if sets else []
    for one in () if sets else chosen:
        out = flags.out / one.place if flags.all else flags.out
        try:
            new = _export(one, out, flags)
        except NoEqual as error:
            if not flags.all:
                raise
            refused.append({"sae": one.place, "reason": str(error)})
            continue
        written.append({"sae": one.place or str(flags.sae), "path": str(out), "new": new})
    if not written:
        raise UserError(
            f"{flags.sae}: nothing written; {refused[0]['sae']}: {refused[0]['reason']}"
        )
    opens = KINDS[flags.format].opens.format(path=written[0]["path"])
    return {"format": flags.format, "written": written, "refused": refused, "open": opens}


def _export(one: Any, out: Path, flags: Flags) -> bool:
    """Write one SAE unless the same export lies there already; returns whether it was written."""
    from wsae.core.artifact import read_manifest
    from wsae.interop.saes import same, save
    from wsae.sae import SAE

    inputs = {"sae": read_manifest(one.path, "sae").digest()}
    if same(out, "export", flags.format, inputs) and not flags.force:
        return False
    save(SAE.load(one.path), out, flags.format, one.about, inputs, flags.force)
    return True


def _sets(chosen: list[Any], flags: Flags) -> list[dict[str, Any]]:
    """Write each member's transcoders of all layers as one folder."""
    from wsae.interop.circuit_tracer import save_set
    from wsae.sae import SAE

    written, names = [], list(dict.fromkeys(one.about.member or "" for one in chosen))
    for name in names:
        own = {one.about.hook: one for one in chosen if (one.about.member or "") == name}
        out = flags.out / name if len(names) > 1 else flags.out
        saes = {hook: SAE.load(one.path) for hook, one in own.items()}
        layers = save_set(saes, {h: one.about for h, one in own.items()}, out, flags.force)
        written.append({"sae": name, "path": str(out), "new": True, "layers": layers})
    return written


def show(result: dict[str, Any], ui: UI) -> None:
    """Print where the folders lie, what was left out, and how the other tool opens one."""
    for entry in result["written"]:
        ui.say(f"{entry['path']}" + ("" if entry["new"] else " (already there)"))
    for entry in result["refused"]:
        ui.say(f"left out {entry['sae']}: {entry['reason']}")
    ui.say(f"open it: {result['open']}")

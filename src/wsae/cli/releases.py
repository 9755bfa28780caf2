"""`wsae releases`: published SAEs by name."""

from typing import Annotated, Any

import tyro

from wsae.cli.common import UI, Common, CommonFlags, JsonFile, MaybeName
from wsae.core.config import Config
from wsae.core.errors import UserError, nearest

ABOUT = """\
List published SAEs under the names of SAELens' registry: the releases, or the ids of one. RELEASE:ID then stands
wherever a command takes an SAE; its files are fetched from the hub once. The registry is that of the installed package
sae-lens, else a table of wsae's own with the same names."""


class Flags(Config):
    """Flags of `wsae releases`."""

    release: Annotated[
        str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RELEASE", help_behavior_hint="")
    ] = None
    """A release, whose SAEs are listed; none: all releases."""
    model: MaybeName = None
    """Only those of this model, or of models with this in their name."""
    out: JsonFile = None
    """Write the result as JSON here too."""
    common: CommonFlags = Common()


def run(flags: Flags, ui: UI) -> dict[str, Any]:  # noqa: ARG001  (every command takes the terminal)
    """Return the releases, or the SAEs of one."""
    from wsae.interop.releases import hub_model, registry

    known = registry()
    names = known.texts if flags.release is None else [flags.release]
    found, models = [], set()
    for name in names:
        saes = list(known.release(name).values())
        model = hub_model(saes[0].model)
        models.add(model)
        if flags.model is not None and flags.model.lower() not in model.lower():
            continue
        why = next((one.refusal for one in saes if one.refusal), None)
        listed = {"release": name, "model": model, "repository": saes[0].repo, "n": len(saes)}
        found.append({**listed, "example": f"{name}:{saes[0].sae_id}", "refused": why})
        if flags.release is not None:
            found[0]["saes"] = [{"id": one.sae_id, "path": one.path} for one in saes]
    if not found:
        raise UserError(
            f"--model {flags.model}: no release is of such a model{nearest(str(flags.model), models)}"
        )
    return {"registry": known.whose, "releases": found}


def show(result: dict[str, Any], ui: UI) -> None:
    """Print a table of what can be opened, and how many releases cannot."""
    releases = result["releases"]
    if "saes" in releases[0]:
        one = releases[0]
        for sae in one["saes"]:
            ui.say(f"{one['release']}:{sae['id']}")
        ui.say(one["refused"] or f"open one: wsae import {one['example']} --out DIR")
        return
    opened = [one for one in releases if not one["refused"]]
    rows = [[one["release"], one["model"], f"{one['n']:,}", one["example"]] for one in opened]
    ui.table(f"releases ({result['registry']})", ("release", "model", "SAEs", "for example"), rows)
    if left := len(releases) - len(opened):
        ui.say(
            f"left out: {left} releases of cross-layer transcoders or temporal SAEs, which have no equal here"
        )
    ui.say("list one: wsae releases RELEASE; open one: wsae import RELEASE:ID --out DIR")

"""`wsae import`: an SAE that another tool wrote, as a directory of ours."""

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from wsae.cli.common import UI, Common, CommonFlags, Switch
from wsae.core.config import Config
from wsae.interop.config import SourceName

ABOUT = """\
Read an SAE of SAELens, sparsify, dictionary_learning or a published release (Gemma Scope, Llama Scope, Qwen Scope ...)
and write it as an SAE directory of wsae, with the same latents and reconstructions. What has no equal here is refused,
naming what."""


class Flags(Config):
    """Flags of `wsae import`."""

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """The folder another tool wrote (cfg.json and weights, ae.pt and config.json, params.npz), a .pt file,
    hub:owner/name/folder, or RELEASE:ID as wsae releases lists them."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The SAE directory to write."""
    format: Annotated[Literal["auto"] | SourceName, tyro.conf.arg(metavar="NAME")] = "auto"
    """saelens, sparsify, dictionary_learning, circuit_tracer, crosscoder, gemma_scope, llama_scope, llama_scope_r1 or
    torch; auto looks at the files."""
    force: Switch = False
    """Write over an SAE that is already there."""
    common: CommonFlags = Common()


def run(flags: Flags, ui: UI) -> dict[str, Any]:  # noqa: ARG001  (every command takes the terminal)
    """Convert and return where the SAE lies and what it is."""
    from wsae.core.artifact import MANIFEST, begun
    from wsae.core.errors import UserError
    from wsae.interop.saes import load
    from wsae.run import Run

    loaded = load(flags.path, flags.format)
    if loaded.format == "wsae":
        raise UserError(f"{flags.path}: is an SAE of wsae already; every command takes it as it is")
    result = {
        "sae": str(flags.out),
        "format": loaded.format,
        "config": loaded.sae.cfg.to_dict(),
        "provenance": loaded.about.to_dict(),
        "new": True,
    }
    if (flags.out / MANIFEST).is_file() and not flags.force and not begun(flags.out, "sae"):
        there = load(flags.out)
        if there.format == "wsae" and _equal(there, loaded):
            return {**result, "new": False}
    Run.of_sae(loaded.sae, flags.out, loaded.about, flags.force)
    return result


def _equal(a: Any, b: Any) -> bool:
    """Whether two loaded SAEs are the same to the bit, with the same provenance."""
    import torch

    mine, other = a.sae.tensors(), b.sae.tensors()
    return (
        a.sae.cfg == b.sae.cfg
        and a.about == b.about
        and mine.keys() == other.keys()
        and all(torch.equal(mine[name], other[name]) for name in mine)
    )


def show(result: dict[str, Any], ui: UI) -> None:
    """Print what was read and where it lies."""
    cfg = result["config"]
    k = cfg["activation"].get("k")
    kind = cfg["activation"]["kind"] + (f", k = {k}" if k else "")
    note = "" if result["new"] else " (already there)"
    for text in result["provenance"]["notes"]:
        ui.note(text)
    ui.say(f"{result['format']}: {cfg['d_in']} -> {cfg['d_sae']} latents, {kind}")
    ui.say(f"{result['sae']}{note}: wsae.SAE.load({result['sae']!r})")

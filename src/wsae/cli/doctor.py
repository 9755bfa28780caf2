"""`wsae doctor`: will it work here, and what will it cost?"""

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from wsae.acts.config import LiveConfig
from wsae.cli.common import UI, Common, CommonFlags, Count, MaybeCount, config_values, device
from wsae.cli.live import TOKENS, LiveFlags, MixingFlags, PlanFlags, is_data
from wsae.core.config import FLAGS, Config

ABOUT = """\
Check a model, its text and the planned SAEs before spending hours: hooks and widths, order of
rows, attention sinks and outlier dimensions, number formats, k and groups, memory, disk and time.
Or check a store or a run that you have: its rows against its model's, tokens, repeated documents.
Exit code 1 when a check fails; warnings do not count."""


class Flags(Config):
    """Flags of `wsae doctor`."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A model (with --hook), or a store, an array or a run that lies on disk."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path(".")
    """Where the store would go (its free space is looked up)."""
    d_in: MaybeCount = None
    """The width you expect at the hook."""
    store_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the planned store."""
    probe_seqs: Count = 8
    """Sequences run through the model."""
    plan: tyro.conf.OmitArgPrefixes[PlanFlags] = PlanFlags()
    """The SAEs and their training."""
    live: tyro.conf.OmitArgPrefixes[LiveFlags] = LiveFlags()
    """For a model: its text and the rows to keep."""
    mixing: tyro.conf.OmitArgPrefixes[MixingFlags] = MixingFlags()
    """How a live model's rows are mixed."""
    common: CommonFlags = Common()


def run(flags: Flags, ui: UI) -> dict[str, Any]:
    """Examine the subject and return the report."""
    from wsae.doctor.run import DoctorConfig, examine

    where = device(flags.common.device)
    live = flags.live
    on_disk = is_data(flags.model)
    if not on_disk and live.text is None:
        live = live.model_copy(update={"text": "builtin"})
    tokens = flags.plan.tokens or TOKENS
    extra = {"dtype": flags.plan.dtype, "store_dtype": flags.store_dtype, "tokens": tokens}
    seed = flags.common.seed
    harvest = None if on_disk else live.config(flags.model, seed=seed, device=where, **extra)
    data = {
        "train": flags.plan.config(None, seed),
        "harvest": harvest,
        "mixing": config_values(flags.mixing, LiveConfig),
        "data": flags.model if on_disk else None,
        "d_in": flags.d_in,
        "out": str(flags.out),
        "device": where,
        "probe_seqs": flags.probe_seqs,
    }
    return examine(DoctorConfig.parse(data, where=FLAGS), ui.progress)


def show(result: dict[str, Any], ui: UI) -> None:
    """Print the findings as a table and the verdict below."""
    rows = [[c["status"], c["name"], _value(c)] for c in result["checks"]]
    ui.table(f"wsae doctor: {result['subject']}", ("", "what", "finding"), rows)
    failed, warnings = result["failed"], result["warnings"]
    if failed and result.get("on_disk"):
        ui.say(f"\n{failed} failed, {warnings} to heed: do not build on it as it is")
    elif failed:
        ui.say(f"\n{failed} failed, {warnings} to heed: this run would not work as planned")
    elif warnings:
        ui.say(f"\nnothing stands in the way; {warnings} to heed")
    else:
        ui.say("\nnothing stands in the way")


def _value(check: dict[str, str]) -> str:
    return f"{check['value']} -> {check['advice']}" if check["advice"] else check["value"]

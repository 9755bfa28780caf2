"""Before hours are spent: is the model there, and what will it take of memory, disk and time?"""

from collections.abc import Callable
from pathlib import Path

from wsae.acts.language import load_tokenizer, locate
from wsae.core.errors import UserError
from wsae.core.hub import hub_reachable
from wsae.core.progress import Progress
from wsae.doctor.config import DoctorConfig
from wsae.doctor.run import examine
from wsae.experiments.tables.config import StudyConfig

SHOWN = ("memory", "disk", "time")
"""What `wsae doctor` finds that is told before a long study."""


def refuse_or_estimate(
    cfg: StudyConfig, out: Path, progress: Progress, say: Callable[[str], None]
) -> None:
    """Before a study on a live model: tell memory, disk and time; raises UserError where it cannot work.

    Studies by way of a store are small enough to find out, and the harvest checks its own disk.
    """
    if cfg.live is None:
        return
    if any((out / "runs").glob("*/*/config.json")):
        return  # under way: it was estimated before
    _reachable(cfg)
    found = examine(doctor_config(cfg, out), progress)
    for check in found["checks"]:
        if check["name"] in SHOWN or check["status"] == "fail":
            say(f"{check['name']}: {check['value']}")
        if check["status"] == "fail" and check["name"] != "disk":  # nothing is stored
            mend = check["advice"] or "see `wsae doctor`"
            raise UserError(f"{cfg.plan.name}: {check['name']}: {check['value']}; {mend}")


def doctor_config(cfg: StudyConfig, out: Path) -> DoctorConfig:
    """Return what the doctor examines: the model and one family at every hook."""
    return DoctorConfig(
        train=cfg.training(0, None),
        harvest=cfg.harvest,
        out=str(out),
        device=cfg.harvest.device,
    )


def _reachable(cfg: StudyConfig) -> None:
    """Raise UserError in one line when the model or the text can only come from a hub that is not there."""
    model, text = cfg.harvest.model, cfg.harvest.text.path
    if hub_reachable():
        return
    if isinstance(locate(model), str):
        try:
            load_tokenizer(model)  # perhaps it is in the hub's cache
        except UserError as error:
            raise UserError(
                f"{cfg.plan.name}: the hub is not reachable and {model} is not here; "
                "give --model DIRECTORY, or use --preset small"
            ) from error
    if text != "builtin" and not Path(text).exists():
        raise UserError(
            f"{cfg.plan.name}: the hub is not reachable and the text {text} is not here; give --text FILE"
        )

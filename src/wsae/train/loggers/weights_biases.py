"""Weights & Biases: a run under `wandb/` of the run directory, uploaded only where the user is logged in."""

import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from wsae.core.errors import UserError
from wsae.core.files import read_json, write_json
from wsae.train.loggers.config import WandbConfig
from wsae.train.loggers.mirror import Logger, needed

_ID = "wandb.json"


def wandb(cfg: WandbConfig | None = None) -> Logger:
    """Return the logger that writes or uploads a W&B run."""
    chosen = cfg or WandbConfig()
    return Logger("wandb", lambda: _check(chosen), lambda run: WandbRun(run, chosen))


def _check(cfg: WandbConfig) -> None:
    module: Any = needed("wandb", "wandb")
    mode = cfg.mode or os.environ.get("WANDB_MODE") or "online"
    if mode == "online" and not module.login(prompt=False, verify=False):
        raise UserError(
            "--logger wandb: no W&B key here; run `wandb login`, set WANDB_API_KEY, or add --wandb-mode offline"
        )


class WandbRun:
    """A W&B run with the id that the run directory keeps, so that a resumed run goes on in it.

    Online, steps that the server has already are left out. Offline there is no server to ask: a run begun again takes
    the place of the former files, and holds every step.
    """

    def __init__(self, run: Path, cfg: WandbConfig) -> None:
        module: Any = needed("wandb", "wandb")
        key = run_id(run)
        former = list((run / "wandb").glob(f"offline-run-*-{key}"))
        self._run = module.init(
            project=cfg.project,
            name=cfg.name or run.resolve().name,
            id=key,
            resume="allow",
            dir=str(run),
            mode=cfg.mode,
            config=read_json(run / "config.json"),
            settings=module.Settings(
                console="off", silent=True, disable_git=True, disable_code=True, save_code=False
            ),
        )
        self._first = int(self._run.step)
        for path in former if self._run.offline else []:
            if path.name != Path(self._run.dir).parent.name:
                shutil.rmtree(path)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log one step's scalars, unless the server has them."""
        if step >= self._first:
            self._run.log(values, step=step)

    def close(self, finished: bool) -> None:
        """Write or upload what is left."""
        self._run.finish(exit_code=0 if finished else 1)


def run_id(run: Path) -> str:
    """Return the W&B id of the run in a directory, made once and kept there."""
    path = run / _ID
    if not path.exists():
        write_json(path, {"id": secrets.token_hex(4)})
    data = read_json(path)
    key = data.get("id") if isinstance(data, dict) else None
    if not isinstance(key, str) or not key.isalnum():
        raise UserError(f"{path}: holds no W&B id; remove it to begin another W&B run")
    return key

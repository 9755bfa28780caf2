"""Flags that name loggers, and the context in which they copy a run's metrics."""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated

import tyro

from wsae.cli.flags import MaybeName, Name
from wsae.cli.ui import UI
from wsae.core.config import Config
from wsae.core.errors import UserError
from wsae.train.loggers.config import LoggerName, WandbConfig, WandbMode

if TYPE_CHECKING:
    from wsae.train.loggers.mirror import Logger, Mirror

_WANDB = WandbConfig()


class LoggerFlags(Config):
    """Copies of the metrics for other tools."""

    logger: Annotated[
        tuple[LoggerName, ...],
        tyro.conf.arg(metavar="{tensorboard,wandb} ...", help_behavior_hint=""),
    ] = ()
    """Copy metrics.jsonl for these as it is written: tensorboard to the run's tensorboard/, wandb (Weights & Biases) to
    its wandb/ and, with your key, to the server. A resumed run has each step once."""
    wandb_project: Name = _WANDB.project
    """Project of the W&B run."""
    wandb_name: MaybeName = _WANDB.name
    """Name of the W&B run; none means that of the run's directory."""
    wandb_mode: Annotated[WandbMode | None, tyro.conf.arg(help_behavior_hint="")] = _WANDB.mode
    """offline uploads nothing; none means what WANDB_MODE says, else online."""

    def made(self) -> "list[Logger]":
        """Return the loggers; raises UserError for one that cannot work here."""
        if not self.logger:
            return []
        from wsae.train.loggers.events import tensorboard
        from wsae.train.loggers.weights_biases import wandb

        data = {"project": self.wandb_project, "name": self.wandb_name, "mode": self.wandb_mode}
        cfg = WandbConfig.parse(data, where="flags")
        known = {"tensorboard": tensorboard, "wandb": lambda: wandb(cfg)}
        twice = [name for name in known if self.logger.count(name) > 1]
        if twice:
            raise UserError(f"--logger {twice[0]} {twice[0]}: name each logger once")
        loggers = [known[name]() for name in self.logger]
        for logger in loggers:
            logger.check()
        return loggers


def mirrored(
    loggers: "list[Logger]", ui: UI, first: bool = True
) -> "AbstractContextManager[Mirror]":
    """Copy the metrics of the run trained inside, where this process is the one that writes (`first`)."""
    from wsae.train.loggers.mirror import mirrored as copying

    return copying(loggers if first else [], lambda text: ui.note(f"wsae: {text}"))

"""Which copies of the metrics a run makes; no torch here."""

from typing import Literal

from wsae.core.config import Config

LoggerName = Literal["tensorboard", "wandb"]
WandbMode = Literal["online", "offline"]


class WandbConfig(Config):
    """Where a Weights & Biases run goes."""

    project: str = "wsae"
    """Project of the W&B run."""
    name: str | None = None
    """Name of the W&B run; default: that of the run's directory."""
    mode: WandbMode | None = None
    """online uploads with the user's own key, offline writes files; default: what WANDB_MODE says, else online."""

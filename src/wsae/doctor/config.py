"""What a pre-flight examines. No torch here."""

from pydantic import Field, PositiveInt

from wsae.acts.config import HarvestConfig, LiveConfig
from wsae.core.config import Config
from wsae.train.config import TrainConfig


class DoctorConfig(Config):
    """The run to be examined, and how long to look."""

    train: TrainConfig
    """The SAEs and the training that are planned."""
    harvest: HarvestConfig | None = None
    """The model, text and hook points; none when the subject is a store or an array."""
    mixing: LiveConfig = LiveConfig()
    """How its rows are mixed when they go straight to training."""
    data: str | None = None
    """A store's directory or an array file."""
    d_in: PositiveInt | None = None
    """The width the caller expects, if any."""
    out: str = "."
    """Where a store would be written (free space is looked up there)."""
    device: str = "cpu"
    """Where the model and the SAEs would run."""
    probe_seqs: PositiveInt = 8
    """Sequences run through the model."""
    probe_seconds: float = Field(default=2.0, gt=0)
    """Time spent on measuring training steps, about."""

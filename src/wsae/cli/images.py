"""Flags that name images, and the harvest they lead to."""

from typing import Annotated, Any, Literal

import tyro

from wsae.acts.images.config import ImageHarvestConfig
from wsae.cli.flags import Count, MaybeCount, Name, Number
from wsae.cli.live import LiveFlags
from wsae.core.config import Config
from wsae.core.errors import UserError

DEFAULTS = ImageHarvestConfig(model="")
SHARED = ("hook", "split", "subset")
"""Flags of `LiveFlags` that images take too."""


class ImageFlags(Config):
    """Images for a vision model, and the rows to keep."""

    images: Annotated[str | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    """Images for the model, in place of --text: a folder of class folders, .npz, a folder of IDX files, .parquet, a hub
    dataset's name, or "digits"."""
    size: MaybeCount = None
    """Side in pixels; none means the model's own, cut as the model's own preparation does."""
    limit: MaybeCount = None
    """Images read at most, a random choice; none means all."""
    workers: Count = DEFAULTS.images.workers
    """Processes that decode images; 0: the main one."""
    batch_size: Count = DEFAULTS.batch_size
    """Images per forward pass."""
    heldout_fraction: Number = DEFAULTS.heldout_fraction
    """Share of the images kept for evaluation."""
    image_field: Name = DEFAULTS.images.image_field
    """Column of a table that holds the images."""
    label_field: Name = DEFAULTS.images.label_field
    """Column of a table that holds their classes."""
    on_error: Literal["skip", "raise"] = DEFAULTS.images.on_error
    """What an unreadable image does: it is left out, named and counted, or ends the command."""

    def config(self, model: str, live: LiveFlags, **rest: object) -> ImageHarvestConfig:
        """Return the harvest these flags describe; raises UserError in one line, also for flags of text."""
        if live.text is not None:
            raise UserError(f"--images {self.images} and --text {live.text}: give one of them")
        for name, field in LiveFlags.model_fields.items():
            if name not in SHARED and getattr(live, name) != field.default:
                raise UserError(f"--{name.replace('_', '-')}: is for --text, not for --images")
        read = ("size", "workers", "image_field", "label_field", "on_error")
        images = {name: getattr(self, name) for name in read}
        images |= {"path": self.images, "split": live.split, "subset": live.subset}
        own = ("limit", "batch_size", "heldout_fraction")
        data: dict[str, Any] = {name: getattr(self, name) for name in own}
        hooks = {"hooks": live.hook} if live.hook else {}
        return ImageHarvestConfig.parse(
            {**data, **hooks, "model": model, "images": images, **rest}, where="flags"
        )

    def refuse(self) -> None:
        """Raise UserError where a flag of images is given without --images."""
        for name, field in ImageFlags.model_fields.items():
            if getattr(self, name) != field.default:
                raise UserError(f"--{name.replace('_', '-')}: is for --images, which is not given")

"""Settings of Figures 4 and 5: images, backbones, SAEs, scores. No torch here."""

from pathlib import Path

from pydantic import Field

from wsae.acts.images.config import ImageHarvestConfig, ImagesConfig
from wsae.core.config import Config
from wsae.evals.classes.config import ClassesConfig
from wsae.evals.config import EvalConfig
from wsae.experiments.vision.plan import Plan
from wsae.train.config import TrainConfig
from wsae.vision.config import PretrainConfig


class VisionChoices(Config):
    """What a user may change of a preset."""

    images: str | None = None
    """Labelled images, as in `wsae pretrain`; none: the preset's."""
    pretrained: tuple[Path, ...] = ()
    """Finished pretraining runs to use in place of one for each method."""

    def given(self) -> bool:
        """Say whether anything is chosen."""
        return self != VisionChoices()


class Backbone(Config):
    """An encoder to be pretrained, or one that is there."""

    name: str
    pretrain: PretrainConfig
    """How it is, or was, pretrained; its held-out images are the ones scored."""
    run: Path | None = None
    """The finished run, where there is one."""


class VisionConfig(Config):
    """One figure, complete: its results follow from this and the files it names."""

    images: ImagesConfig
    backbones: tuple[Backbone, ...] = Field(min_length=1)
    plan: Plan
    classes: ClassesConfig = ClassesConfig()
    evaluation: EvalConfig = EvalConfig()
    device: str = "cpu"

    def backbone(self, name: str) -> Backbone:
        """Return the backbone of this name."""
        return next(backbone for backbone in self.backbones if backbone.name == name)

    def used(self) -> list[Backbone]:
        """Return the backbones that the plan reads, in order."""
        names = dict.fromkeys(run.backbone for run in self.plan.runs)
        return [self.backbone(name) for name in names]

    def hooks(self, name: str) -> tuple[str, ...]:
        """Return the hooks read of a backbone."""
        return tuple(dict.fromkeys(run.hook for run in self.plan.runs if run.backbone == name))

    def harvest(self, name: str, model: Path) -> ImageHarvestConfig:
        """Return the harvest of a backbone's embeddings: its own held-out images stay held out."""
        pretrained = self.backbone(name).pretrain
        return ImageHarvestConfig(
            model=str(model),
            images=self.images,
            hooks=self.hooks(name),
            limit=pretrained.limit,
            heldout_fraction=pretrained.heldout_fraction,
            seed=pretrained.seed,
            device=self.device,
        )

    def training(self, run: int, rows: int, top: tuple[float, ...] | None) -> TrainConfig:
        """Return run number `run`'s training over `rows` stored rows."""
        planned, sae = self.plan.runs[run], self.plan.sae
        data = {
            "members": tuple(sae.member(weighting, top) for weighting in planned.weightings),
            "tokens": rows * sae.passes,
            "batch_size": min(sae.batch_size, rows),
            "seed": planned.seed,
        }
        return TrainConfig.parse(data, where=f"{planned.backbone}, {planned.hook}")

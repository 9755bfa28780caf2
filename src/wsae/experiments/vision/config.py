"""Settings of Figures 4 and 5: images, backbones, SAEs, scores. No torch here."""

from pathlib import Path
from typing import Any

from pydantic import Field

from wsae.acts.images.config import ImageHarvestConfig, ImagesConfig
from wsae.core.artifact import read_manifest
from wsae.core.config import Config
from wsae.core.errors import UserError
from wsae.evals.classes.config import ClassesConfig
from wsae.evals.config import EvalConfig
from wsae.experiments.presets import Preset
from wsae.experiments.vision.plan import FigureName, Members, Plan, SAEPlan, figure_plan
from wsae.train.config import TrainConfig
from wsae.vision.config import Method, PretrainConfig, preset


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


# The sizes of Figures 4 and 5: tiny (digits, seconds), small (Fashion-MNIST), paper (ImageNet-100).
# No torch here.

FASHION = (Path("/usr/share/dataset-fashion-mnist"), Path("/usr/share/datasets/fashion-mnist"))
"""Where Debian's dataset-fashion-mnist may lie."""
IMAGENET100 = "clane9/imagenet-100"
"""ImageNet-100 on the hub (126,689 training images, the split that is read here; some are held out)."""

SAES: dict[Preset, SAEPlan] = {
    "tiny": SAEPlan(d_sae=64, k=4, lr=3e-3, passes=8, batch_size=128),
    # 48,000 rows of 512, 281 steps. Plain SAE's FVU after 5 passes: 0.030, 0.019, 0.014 at lr 5e-4, 1e-3, 2e-3
    "small": SAEPlan(lr=2e-3, passes=6, batch_size=1024),
    "paper": SAEPlan(lr=5e-4, passes=50, batch_size=4096),
}
MEMBERS: dict[Preset, Members] = {
    "tiny": Members(alphas=(0.5, 1.0), seeds=2),
    "small": Members(),
    "paper": Members(),
}
METHODS: dict[Preset, tuple[Method, ...]] = {
    "tiny": ("ncl",),
    "small": ("ncl", "simclr"),
    "paper": ("ncl",),
}
PRETRAINING: dict[Preset, tuple[str, dict[str, Any]]] = {
    "tiny": ("tiny", {}),
    "small": ("small", {}),
    "paper": ("imagenet100", {"heldout_fraction": 0.1}),
}
CLASSES: dict[Preset, ClassesConfig] = {
    "tiny": ClassesConfig(n_top=10, min_support=10, groups=10, permutations=200, draws=500),
    "small": ClassesConfig(),
    "paper": ClassesConfig(),
}
SHOWN: dict[Preset, int] = {"tiny": 8, "small": 100, "paper": 200}
"""Latents per member whose strongest images are kept for the report."""


def vision_config(
    name: FigureName,
    size: Preset,
    choices: VisionChoices,
    seed: int = 0,
    device: str = "cpu",
) -> VisionConfig:
    """Return a figure at a preset's size with the user's choices; raises UserError for ones that do not go together."""
    given = [_given(path) for path in choices.pretrained]
    images = _images(name, size, choices, given)
    backbones = _named(given) if given else _wanted(size, images, seed)
    methods: dict[str, Method] = {backbone.name: backbone.pretrain.method for backbone in backbones}
    if name == "figure5" and "ncl" not in methods.values():
        raise UserError(
            "figure5: is about NCL's embeddings; give --pretrained a run of that method"
        )
    settings = {
        "images": images,
        "backbones": tuple(backbones),
        "plan": figure_plan(name, SAES[size], MEMBERS[size], methods, seed),
        "classes": CLASSES[size].model_copy(update={"seed": seed}),
        "evaluation": EvalConfig(
            splice_tokens=0, n_latents=SHOWN[size], assignment_max=2048, seed=seed
        ),
        "device": device,
    }
    return VisionConfig.parse(settings, where=f"{name}, preset {size}")


def _images(
    name: FigureName, size: Preset, choices: VisionChoices, given: list[Backbone]
) -> ImagesConfig:
    if choices.images is not None:
        return ImagesConfig(path=choices.images)
    if given:
        return given[0].pretrain.images
    if size == "tiny":
        return ImagesConfig()
    if size == "paper":
        return ImagesConfig(path=IMAGENET100)
    found = next((place for place in FASHION if place.is_dir()), None)
    if found is None:
        raise UserError(
            f"{name}, preset small: Fashion-MNIST is not at {FASHION[0]}; install Debian's dataset-fashion-mnist, or "
            "give --images PATH (a folder of IDX files, an .npz file, class folders, .parquet files)"
        )
    return ImagesConfig(path=str(found))


def _wanted(size: Preset, images: ImagesConfig, seed: int) -> list[Backbone]:
    base, changes = PRETRAINING[size]
    return [
        Backbone(
            name=method,
            pretrain=preset(base, **changes, method=method, images=images, seed=seed),
        )
        for method in METHODS[size]
    ]


def _given(path: Path) -> Backbone:
    """Return a finished pretraining run as a backbone called by its method."""
    manifest = read_manifest(path, "pretrain", verify=False)
    data = {**manifest.config["pretrain"], "images": manifest.config["source"]}
    cfg = PretrainConfig.parse(data, where=str(path))
    return Backbone(name=cfg.method, pretrain=cfg, run=path.resolve())


def _named(given: list[Backbone]) -> list[Backbone]:
    """Return the backbones with names that differ: a method that comes twice takes its directory's name along."""
    names = [backbone.name for backbone in given]
    out = [
        backbone
        if names.count(backbone.name) == 1
        else backbone.model_copy(update={"name": f"{backbone.name}-{Path(str(backbone.run)).name}"})
        for backbone in given
    ]
    twice = [b.name for b in out if [other.name for other in out].count(b.name) > 1]
    if twice:
        raise UserError(f"--pretrained: two runs are called {twice[0]}; rename one's directory")
    return out

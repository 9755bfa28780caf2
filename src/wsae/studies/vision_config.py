"""Settings of Figures 4 and 5: which SAEs on which embeddings of which images, and their scores. No torch here."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from wsae.acts.config import ImageHarvestConfig, ImagesConfig
from wsae.core.artifact import read_manifest
from wsae.core.config import Config
from wsae.core.errors import UserError
from wsae.evals.config import ClassesConfig, EvalConfig
from wsae.sae.config import GammaConfig, TopK
from wsae.studies.sweep_config import Preset
from wsae.train.config import MemberConfig, TrainConfig
from wsae.vision.config import Method, PretrainConfig, preset

FigureName = Literal["figure4", "figure5"]
Proxy = Literal["none", "consistency", "top", "variance"]
"""consistency: beta as NCL's code counts it. top: the share of the most frequent class among each dimension's n most
strongly activated training images, as the paper words it. variance: of the dimension. All from training images."""

PLAIN = "plain"
HOOKS = ("pooler", "projector")
"""The paper trains on "the learned representations" and does not say which: embeddings, or NCL's projections."""


class Weighting(Config):
    """The loss weights of one member: gamma_i = proxy_i ^ alpha, scaled to mean square 1."""

    proxy: Proxy = "none"
    alpha: float = Field(default=1.0, gt=0)

    @property
    def label(self) -> str:
        """The member's name."""
        return PLAIN if self.proxy == "none" else f"{self.proxy}-a{self.alpha:g}"

    def gamma(self, top: tuple[float, ...] | None) -> GammaConfig:
        """Return the gamma rule; `top` is the proxy of that name, one value a dimension."""
        if self.proxy == "none":
            return GammaConfig()
        if self.proxy == "top":
            return GammaConfig(rule="vector", alpha=self.alpha, vector=top)
        return GammaConfig(rule=self.proxy, alpha=self.alpha)


class FigureSAEs(Config):
    """What all members have in common."""

    d_sae: PositiveInt = 16_384
    k: PositiveInt = 16
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    passes: PositiveInt = 20
    """Passes over the training rows."""
    batch_size: PositiveInt = 1024
    auxk: NonNegativeFloat = 0.0
    """Weight of the dead latents' loss. None by default: with tens of thousands of images most of 16,384 latents are
    dead whatever one does, and reviving them left more of them dead (97 % against 76 %) in four times the time."""

    def member(self, weighting: Weighting, top: tuple[float, ...] | None) -> MemberConfig:
        """Return one member."""
        return MemberConfig(
            gamma=weighting.gamma(top),
            d_sae=self.d_sae,
            activation=TopK(k=self.k),
            lr=self.lr,
            auxk=self.auxk,
            label=weighting.label,
        )


class BackboneRun(Config):
    """One training run: a backbone, a hook, a seed, and the members that share its batches."""

    backbone: str
    hook: str
    seed: int
    weightings: tuple[Weighting, ...] = Field(min_length=1)


class FigurePlan(Config):
    """All runs of a figure."""

    name: FigureName
    sae: FigureSAEs
    runs: tuple[BackboneRun, ...] = Field(min_length=1)

    @property
    def n_members(self) -> int:
        """Return how many SAEs are trained."""
        return sum(len(run.weightings) for run in self.runs)


def figure_plan(
    name: FigureName,
    sae: FigureSAEs,
    backbones: dict[str, Method],
    alphas: tuple[float, ...] = (0.5, 1.0, 2.0),
    seeds: int = 3,
    seed: int = 0,
) -> FigurePlan:
    """Return a figure's runs: both figures share those on NCL's backbones, Figure 4 has the others' embeddings too.

    On NCL's every weighting is tried, with all `alphas` of the consistency for Figure 5 (a) and (c); on others' what
    Figure 4 needs. Others' projections are left out: no dimension of theirs is asked to mean anything.
    """
    one = [Weighting(proxy="consistency"), Weighting(proxy="top"), Weighting(proxy="variance")]
    powers = [Weighting(proxy="consistency", alpha=alpha) for alpha in alphas]
    tried = tuple(dict.fromkeys([Weighting(), *powers, *one]))
    runs = [
        BackboneRun(
            backbone=backbone,
            hook=hook,
            seed=seed + s,
            weightings=tried if method == "ncl" else (Weighting(), *one),
        )
        for backbone, method in backbones.items()
        if name == "figure4" or method == "ncl"
        for hook in (HOOKS if method == "ncl" else HOOKS[:1])
        for s in range(seeds)
    ]
    return FigurePlan(name=name, sae=sae, runs=tuple(runs))


# A figure as settings.


class VisionChoices(Config):
    """What a user may change of a preset."""

    images: str | None = None
    """Labelled images, as in `wsae pretrain`; none: the preset's."""
    pretrained: tuple[Path, ...] = ()
    """Finished pretraining runs to use in place of one for each method."""


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
    plan: FigurePlan
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

FASHION = (Path("/usr/share/dataset-fashion-mnist"), Path("/usr/share/datasets/fashion-mnist"))
"""Where Debian's dataset-fashion-mnist may lie."""
IMAGENET100 = "clane9/imagenet-100"
"""ImageNet-100 on the hub (126,689 training images, the split that is read here; some are held out)."""

SAES: dict[Preset, FigureSAEs] = {
    "tiny": FigureSAEs(d_sae=64, k=4, lr=3e-3, passes=8, batch_size=128),
    # 48,000 rows of 512, 281 steps. Plain SAE's FVU after 5 passes: 0.030, 0.019, 0.014 at lr 5e-4, 1e-3, 2e-3
    "small": FigureSAEs(lr=2e-3, passes=6, batch_size=1024),
    "paper": FigureSAEs(lr=5e-4, passes=50, batch_size=4096),
}
MEMBERS: dict[Preset, dict[str, Any]] = {
    "tiny": {"alphas": (0.5, 1.0), "seeds": 2},
    "small": {},
    "paper": {},
}
"""What of `figure_plan` is another than its default."""
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
    given = _given(choices.pretrained)
    images = _images(name, size, choices, given)
    base, changes = PRETRAINING[size]
    backbones = given or [
        Backbone(
            name=method,
            pretrain=preset(base, **changes, method=method, images=images, seed=seed),
        )
        for method in METHODS[size]
    ]
    methods: dict[str, Method] = {backbone.name: backbone.pretrain.method for backbone in backbones}
    if name == "figure5" and "ncl" not in methods.values():
        raise UserError(
            "figure5: is about NCL's embeddings; give --pretrained a run of that method"
        )
    settings = {
        "images": images,
        "backbones": tuple(backbones),
        "plan": figure_plan(name, SAES[size], methods, **MEMBERS[size], seed=seed),
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


def _given(paths: tuple[Path, ...]) -> list[Backbone]:
    """Return finished pretraining runs as backbones, called by their methods.

    A method that comes twice takes its directory's name along.
    """
    found = []
    for path in paths:
        manifest = read_manifest(path, "pretrain", verify=False)
        data = {**manifest.config["pretrain"], "images": manifest.config["source"]}
        cfg = PretrainConfig.parse(data, where=str(path))
        found.append(Backbone(name=cfg.method, pretrain=cfg, run=path.resolve()))
    methods = [backbone.name for backbone in found]
    names = [
        name if methods.count(name) == 1 else f"{name}-{Path(str(backbone.run)).name}"
        for name, backbone in zip(methods, found, strict=True)
    ]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"--pretrained: two runs are called {twice[0]}; rename one's directory")
    return [b.model_copy(update={"name": name}) for b, name in zip(found, names, strict=True)]

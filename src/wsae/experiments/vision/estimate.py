"""What a figure is about to do, and roughly what it takes. No torch here."""

from wsae.core.units import duration, size
from wsae.experiments.vision.config import Backbone, VisionConfig

FORWARD = {"imagenet": 3.6e9 / 224**2, "small": 1.1e9 / 32**2, "smallest": 0.28e9 / 32**2}
"""Operations of ResNet-18's forward pass per pixel of an image, by stem (a multiplication and an addition: two)."""
SPEED = {"cpu": 5e10, "cuda": 2e13}
"""Operations a second that training reaches on a core and on a graphics card like the paper's: a guess."""


def announce(cfg: VisionConfig, images: int, torchrun_hint: bool = False) -> list[str]:
    """Return what will be done, line by line, with rough times for a single device."""
    sae, plan = cfg.plan.sae, cfg.plan
    rate = SPEED["cpu" if cfg.device == "cpu" else "cuda"]
    lines = [
        f"{plan.name}: {images:,} images, backbones: {', '.join(b.name for b in cfg.used())}; {plan.n_members} SAEs of "
        f"{sae.d_sae} latents, k {sae.k}, families: {len(plan.runs)}; finished stages are not run again"
    ]
    for backbone in cfg.used():
        if backbone.run is None:
            seconds = pretraining_operations(backbone, images) / rate
            lines.append(
                f"pretraining {backbone.name}: {backbone.pretrain.epochs} epochs, about {duration(seconds)} if nothing "
                "waits for images"
            )
    rows = round(images * (1 - cfg.used()[0].pretrain.heldout_fraction))
    widths = {"pooler": cfg.used()[0].pretrain.widths[-1]}
    total = sum(
        len(run.weightings) * widths.get(run.hook, cfg.used()[0].pretrain.projector_out)
        for run in plan.runs
    )
    seconds = 4 * total * sae.d_sae * rows * sae.passes / rate
    groups = cfg.classes.groups * sae.d_sae * 4
    lines.append(
        f"training the SAEs: {sae.passes} passes over {rows:,} rows, about {duration(seconds)}; scoring holds "
        f"{size(groups)} for each class"
    )
    if torchrun_hint:
        lines.append(
            "on several cards: pretrain first (torchrun --nproc-per-node 2 -m wsae.cli pretrain ...), then give "
            "--pretrained RUN"
        )
    return lines


def pretraining_operations(backbone: Backbone, images: int) -> float:
    """Return the operations of a pretraining run: two views, forward and backward (twice the forward)."""
    cfg = backbone.pretrain
    narrow = (cfg.widths[-1] / 512) ** 2
    each = FORWARD[cfg.stem] * cfg.size**2 * narrow * 2 * 3
    used = min(cfg.limit or images, images) * (1 - cfg.heldout_fraction)
    return each * used * cfg.epochs

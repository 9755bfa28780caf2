"""How large a reproduction is: the paper's own setting, or smaller ones to try it. No torch here."""

from typing import Any, Literal

from wsae.experiments.sweep.config import ToySweepConfig, TrainingConfig, methods
from wsae.toy.config import FAST
from wsae.train.bank.config import BankConfig

Preset = Literal["tiny", "small", "paper"]
LR = 0.01
"""Learning rate of the paper's SAEs here: the reconstruction loss reaches about 0 at every S (the paper gives none)."""

_SIZES: dict[Preset, dict[str, Any]] = {
    "paper": {
        "n_features": 200,
        "d_in": 20,
        "seeds": 5,
        "toy_steps": FAST["steps"],
        "toy_lr": FAST["lr"],
        "toy_decay": FAST["decay"],
    },
    "small": {
        "n_features": 100,
        "d_in": 10,
        "seeds": 3,
        "sparsities": (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.99),
        "toy_steps": 3000,
        "toy_decay": 0.3,
    },
    "tiny": {
        "n_features": 12,
        "d_in": 3,
        "seeds": 2,
        "sparsities": (0.0, 0.5, 0.9),
        "toy_steps": 300,
        "toy_batch": 256,
        "toy_lr": 0.01,
    },
}
_TRAINING: dict[Preset, TrainingConfig] = {
    "paper": TrainingConfig(bank=BankConfig(steps=10_000, decay=0.5), batch_size=32),
    "small": TrainingConfig(bank=BankConfig(steps=4000, decay=0.5), batch_size=32),
    "tiny": TrainingConfig(
        bank=BankConfig(steps=200), batch_size=64, statistics_rows=4096, rows=512
    ),
}


def toy_sweep(preset: Preset, seed: int = 0, **changes: Any) -> ToySweepConfig:
    """Return the sweep behind Figures 2 and 3 at a preset's size; `changes` are ToySweepConfig's fields."""
    size = _SIZES[preset]
    data = {
        **size,
        "training": _TRAINING[preset],
        "methods": methods(size["n_features"], lr=LR),
        "seed": seed,
        **changes,
    }
    return ToySweepConfig.parse(data, where=f"preset {preset}")


def training(preset: Preset, **bank: Any) -> TrainingConfig:
    """Return a preset's training, in batches of 256 where it is not tiny, with some of the bank's settings changed."""
    base = _TRAINING[preset]
    batch = base.batch_size if preset == "tiny" else 256
    return base.model_copy(update={"batch_size": batch, "bank": base.bank.model_copy(update=bank)})

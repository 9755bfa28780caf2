"""What a sweep over synthetic worlds is, as values. No torch here."""

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from wsae.core.config import Config
from wsae.evals.config import RecoveryConfig
from wsae.sae.config import KINDS, GammaConfig, Kind, ReLU
from wsae.toy.config import (
    FAST,
    EqualImportance,
    FeatureConfig,
    Importance,
    Isotropic,
    Noise,
    ToyModelConfig,
    Unit,
)
from wsae.train.config import BankConfig, MemberConfig

RAW = GammaConfig(rule="variance", alpha=1.0, normalise="none")
"""The paper's weights, gamma_i = s_i (Section 5.1)."""
LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)
"""Sparsity levels, from dense to nearly one-sparse."""


class Method(Config):
    """One way to train an SAE; every world and seed gets one SAE of each method."""

    name: str
    member: MemberConfig
    scale_as: GammaConfig | None = None
    """Multiply gamma by the root mean square of this rule's weights: another rule's loss scale, without its shape."""
    init_scale: float = Field(default=1.0, gt=0)
    """Length of a tied SAE's rows at the start of training (untied rows always have length 1)."""
    gamma_from_truth: bool = False
    """Gamma = Sigma^(-1/2), Sigma the noise's covariance, in place of the member's rule (normalised as it says)."""
    k_from_truth: bool = False
    """A Top-k kind takes the world's mean number of active features as its k (at most half its latents)."""


class TrainingConfig(Config):
    """How every SAE of a sweep is trained and scored."""

    bank: BankConfig = BankConfig()
    batch_size: PositiveInt = 256
    """Rows per step; every step draws fresh ones."""
    unit_scale: bool = False
    """Divide activations by a power of two near their root mean variance while training, as `wsae train` does."""
    statistics_rows: PositiveInt = 65_536
    """Rows behind the weights gamma."""
    rows: PositiveInt = 4096
    """Fresh rows every SAE is scored on."""
    recovery: RecoveryConfig = RecoveryConfig()


class ToySweepConfig(Config):
    """Toy models at several sparsity levels, and SAEs of several methods and seeds on each (paper Section 5.1)."""

    n_features: PositiveInt = 200
    d_in: PositiveInt = 20
    """Width of the toy models' hidden layer, the SAEs' input."""
    sparsities: tuple[float, ...] = Field(default=LEVELS, min_length=1)
    seeds: PositiveInt = 5
    """SAEs per method and level: other initial weights, other data."""
    toy_seeds: Literal["one", "each"] = "one"
    """one: a level's toy model serves all its seeds, as in the paper; each: every seed has its own."""
    toy_sparsity: Unit | None = None
    """S that the toy models are trained at, whose W_p then serves all levels; None: each level has its own W_p."""
    importance: Importance = EqualImportance()
    noise: Noise = Isotropic()
    """Noise on the activations that the SAEs see; toy models never see any."""
    methods: tuple[Method, ...] = Field(min_length=1)
    training: TrainingConfig = TrainingConfig()
    toy_steps: PositiveInt = 10_000
    toy_batch: PositiveInt = 1024
    toy_lr: float = Field(default=1e-3, gt=0)
    toy_decay: float = Field(default=0.0, ge=0, le=1)
    """Share of the toy models' steps, at the end, over which their learning rate falls to 0."""
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _levels_make_sense(self) -> "ToySweepConfig":
        for level in self.sparsities:
            if not 0 <= level <= 1:
                raise ValueError(f"sparsity {level:g}: a probability, so from 0 to 1")
            if level == 1:
                raise ValueError("sparsity 1: no feature is ever active, so there is no signal")
        if self.toy_sparsity == 1:
            raise ValueError("toy sparsity 1: a toy model has nothing to train on; use less than 1")
        if len(set(self.sparsities)) < len(self.sparsities):
            raise ValueError("a sparsity level is given twice; its SAEs would count as other seeds")
        names = [method.name for method in self.methods]
        if len(set(names)) < len(names):
            raise ValueError(f"two methods of one name among {', '.join(names)}; rename one")
        return self

    def toy_models(self) -> list[ToyModelConfig]:
        """Return the toy models: one per level, or one per level and seed, levels outermost."""
        seeds = range(self.seeds) if self.toy_seeds == "each" else (0,)
        levels = self.sparsities if self.toy_sparsity is None else (self.toy_sparsity,)
        return [
            ToyModelConfig(
                features=FeatureConfig(n_features=self.n_features, sparsity=level),
                d_in=self.d_in,
                importance=self.importance,
                steps=self.toy_steps,
                batch=self.toy_batch,
                lr=self.toy_lr,
                decay=self.toy_decay,
                seed=self.seed + seed,
            )
            for level in levels
            for seed in seeds
        ]


def paper_method(name: str, d_sae: int, gamma: GammaConfig | None = None, **fields: Any) -> Method:
    """Return a tied ReLU SAE without biases or penalties (paper Eq. 2-4, Section 5.1)."""
    own = {key: fields.pop(key) for key in ("scale_as", "init_scale") if key in fields}
    data = {
        "gamma": gamma or GammaConfig(),
        "d_sae": d_sae,
        "activation": ReLU(),
        "tied": True,
        "lr": 1e-3,
        "auxk": 0.0,
        "encoder_scale": 1.0,
        "label": name,
        **fields,
    }
    member = MemberConfig.parse(data, where=f"method {name}")
    return Method.parse({"name": name, "member": member, **own}, where="method")


PLAIN, WSAE, UNIT, SCALED = "SAE", "WSAE", "WSAE, mean weight 1", "SAE at WSAE's loss scale"


def methods(d_sae: int, **fields: Any) -> tuple[Method, ...]:
    """Return the plain SAE and WSAE as in the paper, and two that take weighting and loss scale apart."""
    unit = GammaConfig(rule="variance", alpha=1.0)
    return (
        paper_method(PLAIN, d_sae, **fields),
        paper_method(WSAE, d_sae, RAW, **fields),
        paper_method(UNIT, d_sae, unit, **fields),
        paper_method(SCALED, d_sae, scale_as=RAW, **fields),
    )


TOP_K = tuple(kind for kind, made in KINDS.items() if "k" in made.model_fields)
ONLY = {"tied": "relu", "l1": "relu", "l0": "jumprelu"}
"""Fields of a member that one kind alone takes from the sweep."""


def toy_methods(
    kinds: Iterable[Kind], gammas: Iterable[GammaConfig], k: int | None = None, **fields: Any
) -> tuple[Method, ...]:
    """Return one method per kind and rule, each kind's plain twin first, called "kind rule".

    `k` serves the Top-k kinds; None takes the world's mean number of active features. Of `fields` (those of
    MemberConfig) tied and l1 serve the kind relu alone, l0 the kind jumprelu. Raises UserError for bad values.
    """
    rules = list(dict.fromkeys([GammaConfig(), *gammas]))
    methods = []
    for kind in dict.fromkeys(kinds):
        own = {name: value for name, value in fields.items() if kind == ONLY.get(name, kind)}
        own |= {"activation": {"kind": kind}, "auxk": 0.0, "encoder_scale": 1.0}
        if kind in TOP_K:
            own["activation"] = {"kind": kind, "k": 1 if k is None else k}
            own["auxk"] = MemberConfig().auxk
        guess = kind in TOP_K and k is None
        for gamma in rules:
            member = MemberConfig.parse({"gamma": gamma, **own}, where="flags")
            methods.append(Method(name=f"{kind} {gamma.label}", member=member, k_from_truth=guess))
    return tuple(methods)


# How large a reproduction is: the paper's own setting, or smaller ones to try it.

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
    found = methods(size["n_features"], lr=LR)
    data = {**size, "training": _TRAINING[preset], "methods": found, "seed": seed, **changes}
    return ToySweepConfig.parse(data, where=f"preset {preset}")


def preset_training(preset: Preset, **bank: Any) -> TrainingConfig:
    """Return a preset's training, in batches of 256 where it is not tiny, with some of the bank's settings changed."""
    base = _TRAINING[preset]
    batch = base.batch_size if preset == "tiny" else 256
    return base.model_copy(update={"batch_size": batch, "bank": base.bank.model_copy(update=bank)})

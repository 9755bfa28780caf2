"""What a training run is, as values: a family of members over the same batches. No torch here."""

from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from wsae.core.config import Config
from wsae.core.errors import UserError
from wsae.sae.config import (
    WIDER,
    Activation,
    GammaConfig,
    MultiTopK,
    PreconditionConfig,
    SAEConfig,
    SourcePart,
    TopK,
)

FEW_STEPS = 100
"""Steps below which a run is called too short."""
CONTROLS = "control-"
"""How the names of the controls begin that results have beside members."""


class MemberConfig(Config):
    """One SAE of a family: what may differ between members."""

    gamma: GammaConfig = GammaConfig()
    """Loss weights."""
    precondition: PreconditionConfig | None = None
    """A linear map of the activations in which the SAE is trained; it is folded into the weights when saved."""
    d_sae: PositiveInt | None = None
    """Number of latents; default: expansion * d_in."""
    expansion: PositiveInt = 8
    """Latents per input dimension where d_sae is not given."""
    activation: Activation = TopK()
    tied: bool = False
    """The theory's form: decoder = encoder transposed, no biases."""
    lr: PositiveFloat | None = Field(default=None, allow_inf_nan=False)
    """Peak learning rate; default: 2e-4 / sqrt(d_sae / 2^14), the field's scaling (Gao et al. 2025)."""
    seed: int | None = None
    """Initial weights; by default the run's seed, so that members start alike."""
    l1: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Coefficient of the L1 penalty sum_j z_j ||W_dec[j]|| (of gated kinds: of the gate's z)."""
    l0: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Coefficient of the L0 penalty (moves JumpReLU thresholds)."""
    l0_penalty: Literal["step", "tanh", "quadratic"] | None = None
    """What the L0 penalty sums. step: the active latents (default); tanh: tanh(4 z_j ||W_dec[j]||) over all, which
    moves any kind (Anthropic); quadratic: 2 / target_l0 (L0 - target_l0)^2 (Gemma Scope 2)."""
    target_l0: float | None = Field(default=None, ge=1, allow_inf_nan=False)
    """Mean number of active latents at which a JumpReLU SAE is held: after each step all thresholds are multiplied by
    1 + 0.3 (L0 / target - 1), with the batch's L0 (0.3 falls with the root of the learning rate)."""
    penalty_warmup: float | None = Field(default=None, gt=0, le=1)
    """Share of the steps over which the coefficients of penalties rise from 0; default: none."""
    pre_act: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Coefficient of the pre-activation loss, which draws dead JumpReLU latents up to their thresholds (Anthropic:
    3e-6); default: none."""
    p_end: float | None = Field(default=None, gt=0, lt=1)
    """Anneal the L1 penalty to sum_j z_j^p: p falls from 1 to this in steps, and the coefficient follows, so that the
    penalty keeps its size (Karvonen et al. 2024); default: p stays 1."""
    anneal_from: float | None = Field(default=None, ge=0, lt=1)
    """Share of the steps after which p falls; default: 0.1."""
    auxk: float = Field(default=1 / 32, ge=0, allow_inf_nan=False)
    """Coefficient of the loss that revives dead latents; 0 revives none."""
    k_aux: PositiveInt | None = None
    """Dead latents that model the residual; default: d_in / 2."""
    encoder_scale: PositiveFloat | None = Field(default=None, allow_inf_nan=False)
    """Norm of the encoder's rows at the start (untied; the decoder's are 1). Default: 1 / sqrt(3) for the Top-k kinds
    and with target_l0, near the scale of least squared error; for others, of whose latents half begin active, 0.1 or,
    if less, that scale: 1 / (1 + d_sae / (2 d_in)). A transcoder's is found from its first batch."""
    label: str | None = None
    """Name of the member, and of its folder; by default made from what it is."""
    skip: bool | None = None
    """Of a transcoder: add a linear map of the input, x @ W_skip^T."""

    @field_validator("label")
    @classmethod
    def _is_a_folder_of_its_own(cls, label: str | None) -> str | None:
        if not label:
            return label
        parts = label.split("/")
        free = label.isprintable() and "|" not in label and not {"", ".", ".."} & {*parts}
        if not free or max(len(part.encode()) for part in parts) > 100:
            raise ValueError("cannot name a folder and results; give letters, digits, . _ and -")
        if label.startswith(CONTROLS):
            raise ValueError(f"names that begin with {CONTROLS} are of what stands beside members")
        return label

    @model_validator(mode="after")
    def _a_map_unties(self) -> "MemberConfig":
        if self.precondition is None:
            return self
        if self.tied:
            raise ValueError(
                "a preconditioner does not go with tied weights: folded, the decoder is not the encoder transposed"
            )
        if self.gamma.rule == "consistency":
            raise ValueError(
                "gamma rule consistency is one of the activations' own dimensions; leave the preconditioner out"
            )
        if self.precondition.needs_pilot and self.gamma.needs_pilot:
            raise ValueError(
                f"gamma rule {self.gamma.rule} weighs by a pilot's residual, which precondition residual does by "
                "itself; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _penalties_meet_something(self) -> "MemberConfig":
        kind, thresholds = self.activation.kind, hasattr(self.activation, "threshold")
        if self.target_l0 is not None and not thresholds:
            raise ValueError(
                f"target_l0 {self.target_l0:g}: is held by thresholds, and {kind} has none; use jumprelu, or "
                + ("k" if hasattr(self.activation, "k") else "the coefficient l1")
            )
        if self.pre_act is not None and not thresholds:
            raise ValueError(f"pre_act {self.pre_act:g}: {kind} has no thresholds; use jumprelu")
        if self.l0_penalty == "quadratic" and self.target_l0 is None:
            raise ValueError("l0_penalty quadratic needs target_l0, the L0 it draws to")
        if self.l0_penalty is not None and not self.l0:
            raise ValueError(
                f"l0_penalty {self.l0_penalty}: costs nothing without a coefficient, l0"
            )
        if self.p_end is not None and not self.l1:
            raise ValueError(
                f"p_end {self.p_end:g}: anneals the L1 penalty; give its coefficient, l1"
            )
        if self.anneal_from is not None and self.p_end is None:
            raise ValueError(f"anneal_from {self.anneal_from:g}: goes with p_end")
        return self

    @property
    def plain(self) -> bool:
        """Whether nothing is weighted or mapped: the twin that others are compared with."""
        return self.gamma.rule == "none" and self.precondition is None

    @property
    def weights(self) -> str:
        """The names of the gamma rule and the preconditioner, which make it another SAE than the plain one."""
        if self.precondition is None:
            return self.gamma.label
        label = self.precondition.label
        return label if self.gamma.rule == "none" else f"{self.gamma.label}-{label}"

    @property
    def shape(self) -> "MemberConfig":
        """What it is without its weights, preconditioner and name."""
        own = {"gamma": GammaConfig(), "precondition": None, "label": None}
        return self.model_copy(update=own)

    @property
    def needs_pilot(self) -> bool:
        """Whether its loss weights or its preconditioner come from what another SAE, trained before, leaves."""
        mapped = self.precondition is not None and self.precondition.needs_pilot
        return mapped or self.gamma.needs_pilot

    @property
    def needs_covariance(self) -> bool:
        """Whether its loss weights or its preconditioner come from the covariance of the activations."""
        return self.gamma.needs_covariance or self.precondition is not None

    def width(self, d_in: int) -> int:
        """Return d_sae for activations of width d_in."""
        return self.d_sae if self.d_sae is not None else self.expansion * d_in

    def sae_config(
        self,
        d_in: int,
        d_out: int | None = None,
        sources: tuple[SourcePart, ...] | None = None,
    ) -> SAEConfig:
        """Return the SAE's shape for activations of width d_in (a transcoder's: to d_out; a crosscoder's: of sources).

        Raises UserError when k does not fit, or what is of transcoders alone has no d_out.
        """
        data = {
            "d_in": d_in,
            "d_sae": self.width(d_in),
            "activation": self.activation,
            "tied": self.tied,
            "d_out": d_out,
            "skip": self.skip,
            "sources": sources,
        }
        kind = self.activation
        if isinstance(kind, MultiTopK) and WIDER * kind.k > self.width(d_in):
            raise UserError(
                f"multi_topk with k = {kind.k} is trained with {WIDER * kind.k} active latents too, of only d_sae = "
                f"{self.width(d_in)}; lower k or raise d_sae"
            )
        if self.target_l0 is not None and self.target_l0 > self.width(d_in):
            raise UserError(
                f"target_l0 {self.target_l0:g}: more than all d_sae = {self.width(d_in)} latents; lower it"
            )
        return SAEConfig.parse(data, where="SAE")

    def revived(self, d_out: int) -> int:
        """Return how many dead latents model the residual, which is d_out wide."""
        return self.k_aux or max(1, d_out // 2)

    def start_scale(self, d_in: int) -> float:
        """Return the norm of the encoder's rows at the start.

        With unit rows w_j and r = sum_j max(w_j . x, 0) w_j, E <r, x> = m |x|^2 and E |r|^2 = (m + m^2) |x|^2 for
        m = d_sae / (2 d_in) and any x, so that s r is nearest to x at s = 1 / (1 + m), with an FVU of 1 / (1 + m) too.
        Under penalties a code that starts shorter, and grows where it pays, ends better: 0.1.
        """
        if self.encoder_scale is not None:
            return self.encoder_scale
        if hasattr(self.activation, "k") or self.target_l0 is not None:
            return 3**-0.5
        return min(0.1, 1 / (1 + self.width(d_in) / (2 * d_in)))

    def anneal_start(self, steps: int) -> int:
        """Return the step after which p-annealing begins."""
        return int((0.1 if self.anneal_from is None else self.anneal_from) * steps)

    def learning_rate(self, d_in: int) -> float:
        """Return the peak learning rate."""
        return self.lr if self.lr is not None else 2e-4 / (self.width(d_in) / 2**14) ** 0.5


class TrainConfig(Config):
    """A run: members trained in one pass over the same batches."""

    members: tuple[MemberConfig, ...] = Field(min_length=1)
    tokens: PositiveInt
    """Training tokens (rows) per member; the data are repeated, reshuffled, when there are fewer."""
    batch_size: PositiveInt = 2048
    """Rows per step."""
    warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of the steps over which the learning rate rises from 0."""
    decay: float = Field(default=0.2, ge=0, le=1)
    """Share of the steps, at the end, over which it falls to 0."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of a preconditioner's map, and of the encoder product of eager and triton; all else is float32."""
    kernels: Literal["auto", "eager", "native", "triton"] = "auto"
    """What computes a step: compiled CPU kernels (native), Triton's on a CUDA device (triton), PyTorch (eager), or the
    fast ones of the device where they work, else PyTorch (auto)."""
    max_grad_norm: PositiveFloat | None = Field(default=1.0, allow_inf_nan=False)
    """A member's gradient is multiplied by this over the norm of its step before, where that is more than this (the
    compiled kernels move each row before the norm of all is known); None: by nothing."""
    dead_after: PositiveInt | None = None
    """Tokens without firing after which a latent counts as dead; default: 10 M, or a fifth of all
    tokens if less."""
    latent_variance_decay: float = Field(default=0.99, gt=0, lt=1)
    """Per-step decay of the running latent variances behind the rule latent_variance."""
    log_every: PositiveInt = 20
    """Steps per row of metrics.jsonl (means over those steps)."""
    seed: int = 0
    loss: Literal["ce", "kl"] | None = None
    """What is minimised through the model, with reconstructions in place of its activations (a live model only): ce,
    the cross-entropy of the next token, or kl, the divergence from the untouched model's predictions. Default: the
    reconstruction's error."""
    init_from: str | None = None
    """Digest of the SAEs that training starts from (`wsae.train.family.Start`); None: from new ones."""
    hook_out: dict[str, str] | None = None
    """Of transcoders: each hook that they read, and the hook whose activations they are to give."""
    crosscoder: tuple[SourcePart, ...] | None = None
    """Of crosscoders: the sources that the rows of the data are side by side (`wsae.acts.source.JoinedSource`)."""

    def read(self, hooks: Iterable[str]) -> list[str]:
        """Return which of the data's hooks SAEs read: all, or those of transcoders; UserError where one is missing."""
        hooks = list(hooks)
        if self.hook_out is None:
            return hooks
        for hook in (*self.hook_out, *self.hook_out.values()):
            if hook not in hooks:
                raise UserError(
                    f"hook {hook!r}: a transcoder needs a module's input and its output, and the data have "
                    f"{', '.join(hooks)}"
                )
        return list(self.hook_out)

    def given(self, hook: str) -> str | None:
        """Return the hook that transcoders of `hook` are to give; none for SAEs."""
        return (self.hook_out or {}).get(hook)

    @model_validator(mode="after")
    def _names_differ(self) -> "TrainConfig":
        names = self.names()
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"two members are called '{twice[0]}'; give them different labels")
        return self

    @model_validator(mode="after")
    def _a_loss_through_the_model_weighs_no_dimensions(self) -> "TrainConfig":
        if self.loss is not None and any(m.gamma.rule != "none" for m in self.members):
            raise ValueError(
                f"loss {self.loss} has no errors by dimension to weigh; leave the gamma rules out"
            )
        if self.loss is not None and self.kernels in ("native", "triton"):
            raise ValueError(f"loss {self.loss} is computed by PyTorch; leave the kernels out")
        return self

    @model_validator(mode="after")
    def _residuals_are_of_what_is_read(self) -> "TrainConfig":
        if self.hook_out is not None and any(
            m.precondition and m.precondition.needs_pilot for m in self.members
        ):
            raise ValueError(
                "precondition residual: maps by the errors of what is read, and a transcoder's are of what it gives; "
                "use whiten"
            )
        return self

    @model_validator(mode="after")
    def _a_crosscoder_reads_all_its_sources_together(self) -> "TrainConfig":
        if self.crosscoder is None:
            return self
        if self.hook_out is not None:
            raise ValueError("hook_out: is of transcoders; a crosscoder gives what it reads")
        if self.loss is not None:
            raise ValueError(
                f"loss {self.loss}: is for SAEs of one hook; a crosscoder reads several, and is trained on its error"
            )
        if any(m.precondition and m.precondition.shrinkage == "ledoit-wolf" for m in self.members):
            raise ValueError("shrinkage ledoit-wolf: is not for crosscoders; give a number")
        return self

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return max(1, self.tokens // self.batch_size)

    @property
    def trained(self) -> int:
        """Rows that every member is trained on: those of whole steps."""
        return self.steps * self.batch_size

    def doubts(self) -> tuple[str, ...]:
        """Return what to know of a run too short to have learned anything."""
        if self.steps >= FEW_STEPS:
            return ()
        return (
            f"only {self.steps} training steps ({self.tokens:,} tokens, {self.batch_size:,} a step): an SAE needs "
            "thousands; give more tokens or a smaller batch size",
        )

    @property
    def dead_tokens(self) -> int:
        """Tokens without firing after which a latent counts as dead."""
        return self.dead_after or max(self.batch_size, min(10_000_000, self.tokens // 5))

    def names(self) -> list[str]:
        """Return the members' names: the gamma rule and the preconditioner, then whatever else sets them apart.

        Thresholds and other numbers of a kind are named only where two would be called the same without.
        """
        names: list[str] = []
        for numbers in (False, True):
            apart = zip(self.members, told_apart(self.members, numbers), strict=True)
            names = [m.label or "-".join([m.weights, *parts]) for m, parts in apart]
            if len({*names}) == len(names):
                break
        return names


PENALTIES = ("l1", "l0", "target_l0")
"""What is not named where it is 0, and else with a hyphen before the value, as the name ends in a digit."""


def told_apart(members: Sequence[MemberConfig], numbers: bool = False) -> list[list[str]]:
    """Return what sets each member apart from the others beside weights and preconditioner: topk-k32, lr0.003 ...

    With `numbers`, those of its kind beside k too: threshold0.1.
    """
    fields = ("activation", "tied", "lr", "seed", "l1", "l0", "d_sae", "expansion")
    fields += ("auxk", "k_aux", "encoder_scale", "skip", "l0_penalty", "target_l0")
    fields += ("penalty_warmup", "pre_act", "p_end", "anneal_from")
    varying = [f for f in fields if len({str(getattr(m, f)) for m in members}) > 1]
    return [
        _parts(member, varying, _numbers_apart(member, members) if numbers else [])
        for member in members
    ]


def _numbers_apart(member: MemberConfig, members: Sequence[MemberConfig]) -> list[str]:
    own = dict(member.activation)
    alike = [dict(m.activation) for m in members if m.activation.kind == own["kind"]]
    return [
        f"{name.replace('_', '-')}{value:g}"
        for name, value in own.items()
        if name != "k" and type(value) in (int, float) and len({a[name] for a in alike}) > 1
    ]


def _parts(member: MemberConfig, varying: list[str], numbers: list[str]) -> list[str]:
    parts = []
    for field in varying:
        value = getattr(member, field)
        if field == "activation":
            k = getattr(value, "k", None)
            parts += [value.kind.replace("_", "-") + (f"-k{k}" if k else ""), *numbers]
        elif field == "tied":
            parts.append("tied" if value else "untied")
        elif field == "skip":
            parts += ["skip"] if value else []
        elif value is not None and (field not in PENALTIES or value):
            gap = "-" if field[-1].isdigit() else ""
            shown = value if isinstance(value, str) else f"{value:g}"
            parts.append(f"{field.replace('_', '-')}{gap}{shown}")
    return parts


def family(members: list[MemberConfig], twin: bool = True) -> tuple[MemberConfig, ...]:
    """Return the members with a plain twin first for each distinct setting that has none (unless twin is False)."""
    out: list[MemberConfig] = []
    for member in members:
        plain = member.shape
        if twin and plain not in out and plain not in members:
            out.append(plain)
        if member not in out:
            out.append(member)
    return tuple(out)


class BankConfig(Config):
    """What all members of a bank share; what may differ is in each MemberConfig."""

    steps: PositiveInt = 5000
    """Optimiser steps."""
    warmup: float = Field(default=0.02, ge=0, le=1)
    """Share of the steps over which the learning rate rises from 0."""
    decay: float = Field(default=0.3, ge=0, le=1)
    """Share of the steps, at the end, over which it falls to 0."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam without weight decay, or plain gradient descent."""
    max_grad_norm: PositiveFloat | None = None
    """As in TrainConfig."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of weights and updates."""
    dead_after: PositiveInt | None = None
    """Rows without firing after which a latent counts as dead; by default a fifth of all rows."""
    latent_variance_decay: float = Field(default=0.99, gt=0, lt=1)
    """Per-step decay of the running latent variances behind the rule latent_variance."""
    count_dead: bool = False
    """Follow which latents are dead also where there is no revival."""
    log_every: PositiveInt = 50
    """Steps per row of the record of losses."""

"""Flags that say which SAEs to train and for how long."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from wsae.cli.flags import Count, MaybeCount, MaybeNumber, MaybePlace, Number
from wsae.core.config import Config
from wsae.core.errors import UserError
from wsae.losses.config import Normalise, Robust, Rule
from wsae.sae.config import Kind
from wsae.train.config import MemberConfig, TrainConfig, family

if TYPE_CHECKING:
    import numpy as np

TOKENS = 250_000
"""Training tokens where neither --tokens nor the data say how many."""


class PlanFlags(Config):
    """The SAEs: their shape, their loss weights and their training."""

    d_sae: MaybeCount = None
    """Latents; none means expansion x the width of the activations."""
    expansion: Count = 8
    """Latents per input dimension."""
    k: MaybeCount = None
    """Active latents per sample of the Top-k kinds; none means 32."""
    activation: Kind = "topk"
    """Which latents may be active."""
    gamma: Rule = "variance"
    """What the loss weights follow; "vector" reads --gamma-file."""
    alpha: Annotated[tuple[float, ...], tyro.conf.arg(metavar="A ...")] = (1.0,)
    """Exponents of the weights; each gives one SAE on the same batches."""
    normalise: Normalise = "rms"
    """Scale of the weights: rms makes their mean square 1; none is the paper's raw s^alpha."""
    robust: Robust = "none"
    """Tame outlier dimensions: clip their proxy at a quantile, use its rank, or drop them from the loss."""
    quantile: Number = 0.99
    """Where --robust winsor clips."""
    gamma_file: MaybePlace = None
    """A .npy vector of width d_in for --gamma vector."""
    ridge: MaybeNumber = None
    """Ridge of --gamma whiten, as a share of the mean eigenvalue of the covariance; none means 0.01."""
    tied: bool = False
    """The theory's form: decoder = encoder transposed, no biases."""
    twin: bool = True
    """Train the plain SAE beside them, for comparison."""
    l1: Number = 0.0
    """L1 penalty on the latents."""
    l0: Number = 0.0
    """L0 penalty (moves JumpReLU's thresholds)."""
    tokens: MaybeCount = None
    """Training rows; none means once through the data, or 250,000 from a live model."""
    batch_size: Count = 2048
    """Rows per step."""
    lr: MaybeNumber = None
    """Peak learning rate; none means 2e-4 / sqrt(d_sae / 2^14)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the model and of the dense encoder product; weights stay float32."""

    def config(self, rows: int | None, seed: int) -> TrainConfig:
        """Return the run these flags describe over `rows` rows of data; raises UserError in one line."""
        tokens = self.tokens if self.tokens is not None else (rows or TOKENS)
        data = {
            "members": family([self._member(gamma) for gamma in self._gammas()], self.twin),
            "tokens": tokens,
            "batch_size": self.batch_size,
            "dtype": self.dtype,
            "seed": seed,
        }
        return TrainConfig.parse(data, where="flags")

    def _gammas(self) -> list[dict[str, object]]:
        if self.gamma == "none":
            if self.robust != "none":
                raise UserError(
                    f"--robust {self.robust}: the plain loss has no proxy to tame; for the plain loss without outlier "
                    "dimensions use --gamma variance --alpha 0 --robust drop"
                )
            return [{}]
        if not self.alpha:
            raise UserError("--alpha: give at least one number")
        base = {
            "rule": self.gamma,
            "normalise": self.normalise,
            "robust": self.robust,
            "quantile": self.quantile,
            "vector": self._vector(),
            "ridge": self.ridge,
        }
        return [{**base, "alpha": alpha} for alpha in self.alpha]

    def _member(self, gamma: dict[str, object]) -> MemberConfig:
        data = {
            "gamma": gamma,
            "d_sae": self.d_sae,
            "expansion": self.expansion,
            "activation": self._activation(),
            "tied": self.tied,
            "lr": self.lr,
            "l1": self.l1,
            "l0": self.l0,
        }
        return MemberConfig.parse(data, where="flags")

    def _activation(self) -> dict[str, object]:
        if self.activation in ("relu", "jumprelu"):
            if self.k is not None:
                raise UserError(
                    f"--k {self.k}: {self.activation} has no k; leave it out, or use --activation topk"
                )
            return {"kind": self.activation}
        return {"kind": self.activation, "k": 32 if self.k is None else self.k}

    def _vector(self) -> tuple[float, ...] | None:
        if self.gamma_file is None:
            return None
        values = read_vector(
            "--gamma-file", self.gamma_file, "fiu", "one number per input dimension"
        )
        return tuple(float(v) for v in values)


def read_vector(flag: str, path: Path, kinds: str, needed: str) -> "np.ndarray":
    """Return the one-dimensional .npy array at `path` with a dtype among `kinds`; raises UserError else."""
    from wsae.core.npy import mapped_npy

    values = mapped_npy(path, f"{flag} {path}")
    if values.ndim != 1 or values.dtype.kind not in kinds:
        raise UserError(
            f"{flag} {path}: shape {values.shape} of {values.dtype}; {needed} is needed"
        )
    return values.copy()

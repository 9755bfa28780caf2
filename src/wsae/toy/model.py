"""The trained toy model of superposition: where superposition matrices W_p come from (paper Section 5.1).

x_p = W_p x,  x_hat = ReLU(W_p^T x_p + b),  loss = mean_i importance_i (x_i - x_hat_i)^2  (Elhage et al. 2022).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from wsae.core.artifact import MANIFEST, read_manifest, write_manifest
from wsae.core.errors import UserError, understood
from wsae.core.progress import Progress, quiet
from wsae.core.tensors import load_tensors, save_tensors
from wsae.toy.config import ToyModelConfig
from wsae.toy.training import Job, side_by_side

WEIGHTS = "toy.safetensors"


@dataclass(frozen=True)
class ToyModels:
    """Trained toy models: column i of `W_p[m]` [d_in, n_features] is the direction of feature i in model m."""

    W_p: Float[Tensor, "models d_in n_features"]
    b: Float[Tensor, "models n_features"]
    loss: Float64[Tensor, " models"]
    """The training loss, mean over rows and features, on fresh rows."""
    configs: tuple[ToyModelConfig, ...]

    def represented(self, above: float = 0.5) -> list[int]:
        """Return how many features each model represents: those with ||W_p,i|| > `above`."""
        return (self.W_p.norm(dim=1) > above).sum(1).tolist()

    def save(self, path: Path | str) -> None:
        """Write the models to a directory: toy.safetensors, manifest.json last."""
        path = Path(path)
        save_tensors(path / WEIGHTS, {"W_p": self.W_p, "b": self.b, "loss": self.loss})
        config = {"models": [cfg.to_dict() for cfg in self.configs]}
        info = {"loss": self.loss.tolist(), "represented": self.represented()}
        write_manifest(path, "toy", config, [WEIGHTS], info=info)

    @classmethod
    def load(cls, path: Path | str) -> "ToyModels":
        """Read models from a directory; raises UserError when it is missing, cut or altered."""
        path = Path(path)
        manifest = read_manifest(path, "toy")
        tensors = load_tensors(path / WEIGHTS) if WEIGHTS in manifest.files else {}
        with understood(path / MANIFEST):
            data = manifest.config.get("models", [])
            configs = tuple(ToyModelConfig.parse(cfg, where=str(path / MANIFEST)) for cfg in data)
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        if not configs or shapes != _shapes(configs):
            raise UserError(
                f"{path / WEIGHTS}: does not hold the manifest's models; train them again"
            )
        return cls(**tensors, configs=configs)


def train_toy_models(
    cfgs: Sequence[ToyModelConfig],
    progress: Progress = quiet,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ToyModels:
    """Train the toy models side by side: levels of S, seeds, importances; a member equals its lone run.

    They share shape and schedule (n_features, d_in, steps, batch, lr, decay, weight_decay); data are drawn on the CPU.
    Raises UserError for models that do not go together, and for one whose loss is not finite.
    """
    _check_alike(cfgs)
    job = Job(tuple(cfgs), device, dtype)
    with progress("toy models", len(cfgs) * cfgs[0].steps, "model steps") as tick:
        parameters, loss = side_by_side(job, tick)
    for cfg, value in zip(cfgs, loss.tolist(), strict=True):
        if not value < float("inf"):
            raise UserError(
                f"toy model with sparsity {cfg.features.sparsity:g}, seed {cfg.seed}: its loss became {value}; "
                f"lower lr (now {cfg.lr:g})"
            )
    return ToyModels(parameters.W_p, parameters.b, loss, tuple(cfgs))


def _shapes(configs: tuple[ToyModelConfig, ...]) -> dict[str, tuple[int, ...]]:
    m, n, d_in = len(configs), configs[0].features.n_features, configs[0].d_in
    return {"W_p": (m, d_in, n), "b": (m, n), "loss": (m,)}


def _check_alike(cfgs: Sequence[ToyModelConfig]) -> None:
    if not cfgs:
        raise UserError("no toy models to train; give at least one ToyModelConfig")
    common = {"n_features": {cfg.features.n_features for cfg in cfgs}}
    for name in ("d_in", "steps", "batch", "lr", "decay", "weight_decay"):
        common[name] = {getattr(cfg, name) for cfg in cfgs}
    for name, values in common.items():
        if len(values) > 1:
            raise UserError(
                f"toy models trained together differ in {name} ({sorted(values)}); train them apart"
            )

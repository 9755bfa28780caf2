"""The demo's settings. No torch here."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from wsae.acts.config import HarvestConfig, TextConfig
from wsae.core.config import Config
from wsae.evals.config import EvalConfig
from wsae.sae.config import GammaConfig, TopK
from wsae.train.config import MemberConfig, TrainConfig, family


class DemoConfig(Config):
    """The main job on one hook: harvest, train WSAE beside its plain twin, evaluate, report."""

    model: str = "builtin"
    """Hub id, local directory, .gguf file, or "builtin" (SmolLM2-135M)."""
    text: TextConfig = TextConfig()
    """Documents; by default the public-domain text in this package."""
    hook: str = "layers.9"
    """The module to read."""
    tokens: PositiveInt = 300_000
    """Training rows to harvest."""
    heldout_tokens: PositiveInt = 32_768
    """Rows to measure on, from other documents."""
    passes: PositiveInt = 3
    """Passes over the training rows."""
    expansion: PositiveInt = 8
    """Latents per input dimension."""
    k: PositiveInt = 32
    """Active latents per token."""
    alpha: tuple[float, ...] = (1.0, 0.5)
    """One WSAE for each exponent of the variance."""
    lr: PositiveFloat = 3e-3
    """Peak learning rate: high, because the run is short (chosen on the plain SAE)."""
    splice_tokens: int = Field(default=4096, ge=0)
    """Held-out tokens run through the model with reconstructions in place; 0 skips it."""
    n_latents: int = Field(default=200, ge=0)
    """Latents per SAE shown in the report."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the model and of the dense encoder product."""
    seed: int = 0
    device: str = "cpu"

    @model_validator(mode="after")
    def _one_hook(self) -> "DemoConfig":
        if "*" in self.hook:
            raise ValueError(f"the demo takes one hook, {self.hook!r} may be several; name one")
        return self

    def harvest(self) -> HarvestConfig:
        """Return the harvest."""
        return HarvestConfig(
            model=self.model,
            text=self.text,
            hooks=(self.hook,),
            tokens=self.tokens,
            heldout_tokens=self.heldout_tokens,
            dtype=self.dtype,
            seed=self.seed,
            device=self.device,
        )

    def training(self, rows: int) -> TrainConfig:
        """Return the training run over `rows` harvested rows."""
        weighted = [
            MemberConfig(
                gamma=GammaConfig(rule="variance", alpha=alpha),
                expansion=self.expansion,
                activation=TopK(k=self.k),
                lr=self.lr,
            )
            for alpha in self.alpha
        ]
        data = {
            "members": family(weighted),
            "tokens": rows * self.passes,
            "batch_size": min(2048, rows),
            "dtype": self.dtype,
            "seed": self.seed,
        }
        return TrainConfig.parse(data, where="demo")

    def evaluation(self) -> EvalConfig:
        """Return the evaluation."""
        return EvalConfig(
            splice_tokens=self.splice_tokens, n_latents=self.n_latents, seed=self.seed
        )

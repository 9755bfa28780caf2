"""An SAE of ours as the object SAEBench evaluates: pass `selected_saes=[("name", SAEBenchSAE(sae, about))]`.

SAEBench wants unit decoder rows. Where ours are not unit (tied SAEs, imports), latents are given multiplied by the
row's norm and decoding divides it out: the choice of latents and the reconstructions stay ours.
"""

import copy
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from wsae.acts.hooknames import hook_name
from wsae.core.errors import UserError
from wsae.interop.format import named
from wsae.sae.config import Provenance
from wsae.sae.model import SAE


@dataclass
class SAEBenchConfig:
    """The fields SAEBench reads; plain and mutable, because it adds fields of its own."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    context_size: int
    architecture: str
    dtype: str = "float32"
    device: str = "cpu"
    prepend_bos: bool = True
    dataset_path: str = ""
    hook_head_index: int | None = None
    apply_b_dec_to_input: bool = True
    finetuning_scaling_factor: bool = False
    activation_fn_str: str = ""
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    normalize_activations: str = "none"
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_trust_remote_code: bool = False
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = -1
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict of JSON's types."""
        return asdict(self)


class SAEBenchSAE(nn.Module):
    """`encode`, `decode` and `forward` over [batch, d_in] or [batch, tokens, d_in], unit decoder rows, `cfg`.

    What `about` does not know (model, hook, context, BOS) can be given as a field of `SAEBenchConfig`.
    """

    norms: Tensor

    def __init__(
        self,
        sae: SAE,
        about: Provenance = Provenance(),  # noqa: B008  (frozen)
        **fields: Any,
    ) -> None:
        super().__init__()
        if sae.cfg.transcoder:
            raise UserError("SAEBench measures SAEs; a transcoder has no equal there")
        self._sae = copy.deepcopy(sae).requires_grad_(False)
        weights = named(sae)
        norms = weights.W_dec.norm(dim=1)
        unit = torch.allclose(norms, torch.ones_like(norms), atol=1e-5)
        norms = torch.ones_like(norms) if unit else norms
        self.register_buffer("norms", norms)
        self.W_enc = nn.Parameter(weights.W_enc * norms, requires_grad=False)
        rows = weights.W_dec / norms.clamp(min=1e-30)[:, None]
        self.W_dec = nn.Parameter(rows, requires_grad=False)
        self.b_enc = nn.Parameter(weights.b_enc * norms, requires_grad=False)
        self.b_dec = nn.Parameter(weights.b_dec.clone(), requires_grad=False)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.cfg = _config(sae, about, fields)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the latents, times their decoder row's norm."""
        flat = x.reshape(-1, x.shape[-1]).to(self.dtype)
        return (self._sae.encode(flat) * self.norms).reshape(*x.shape[:-1], -1)

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """Return the reconstruction of such latents."""
        return feature_acts @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Return the reconstruction."""
        return self.decode(self.encode(x))

    def to(self, *args: Any, **kwargs: Any) -> "SAEBenchSAE":
        """Move or cast, and keep `device`, `dtype` and `cfg` true to it."""
        super().to(*args, **kwargs)
        self.device, self.dtype = self.W_dec.device, self.W_dec.dtype
        self.cfg.device = str(self.device)
        self.cfg.dtype = str(self.dtype).removeprefix("torch.")
        return self


def _config(sae: SAE, about: Provenance, fields: dict[str, Any]) -> SAEBenchConfig:
    hook = hook_name(about.hook or "")
    known: dict[str, Any] = {
        "model_name": about.model or "",
        "hook_name": hook.name,
        "hook_layer": hook.layer if hook.layer is not None else -1,
        "context_size": about.context or 128,
        "prepend_bos": bool(about.prepend_bos),
        "dataset_path": about.dataset or "",
        "training_tokens": about.tokens or -1,
        "architecture": sae.cfg.activation.kind,
        "d_in": sae.cfg.d_in,
        "d_sae": sae.cfg.d_sae,
    }
    return SAEBenchConfig(**(known | fields))

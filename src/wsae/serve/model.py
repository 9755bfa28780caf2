"""The language model behind a run, and what decoder rows say alone and through it.

A model is used if it is on this machine: nothing is downloaded for a browser. Rows, in blocks: nearest latents, what a
latent's direction weighs, and the tokens it promotes, through the model's final norm and unembedding. The norm's gain
is folded in (and, for LayerNorm, its centring); its division by the length of the residual stream is left out, which is
the same for all tokens: the order of tokens is exact for a residual that lies along the row, the scale is not in nats.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from wsae.core.artifact import MANIFEST
from wsae.core.errors import UserError
from wsae.core.files import Json, read_json
from wsae.evals.latents import unit_rows
from wsae.run import Run

if TYPE_CHECKING:
    from wsae.acts.language import LanguageModel


class ModelName(NamedTuple):
    """A model's name as the run gives it, or why there is none: one of the two is empty."""

    name: str
    why_not: str


def model_of(run: Path) -> ModelName:
    """Name the language model that the activations are of, when it can be loaded without a network."""
    source: Json = Run(run).source
    store = _store(source)
    harvest = source.get("harvest") or store.get("config", {})
    name = harvest.get("model") or source.get("model")
    if not isinstance(name, str):
        if source.get("kind") == "joined":
            return ModelName(
                "", "a crosscoder reads several hooks together and is not put into a model"
            )
        return ModelName("", "the run's data are arrays, not the activations of a known model")
    if harvest.get("images") is not None or (harvest and "text" not in harvest):
        return ModelName("", "the run's data are of images")
    if not is_local(name):
        return ModelName("", f"the model {name} is not on this machine")
    made = store.get("inputs", {}).get("model")
    if made not in (None, fingerprint_of(name)):
        return ModelName("", f"the model {name} is another than it was in training (files differ)")
    return ModelName(name, "")


def is_local(name: str) -> bool:
    """Return whether a model is a file or directory here, comes with a package, or lies in the hub's cache."""
    from wsae.acts.language import locate

    if importlib.util.find_spec("transformers") is None:
        return False
    try:
        place = locate(name)
    except UserError:
        return False
    if isinstance(place, Path):
        return True
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def fingerprint_of(name: str) -> str:
    """Return a digest of a local model's files (see `wsae.acts.language.fingerprint`)."""
    from wsae.acts.language import fingerprint, locate

    return fingerprint(locate(name))


def load(name: str, device: str) -> "LanguageModel":
    """Load a local model; raises UserError when that fails."""
    from wsae.acts.language import load_language

    return load_language(name, device=device)


def _store(source: Json) -> Json:
    """Return config and inputs of a run's store; empty where there is none."""
    path = source.get("path")
    manifest = Path(path) / MANIFEST if isinstance(path, str) else None
    if manifest is None or source.get("kind") != "store" or not manifest.is_file():
        return {}
    found = read_json(manifest)
    parts = found if isinstance(found, dict) else {}
    return {k: parts[k] for k in ("config", "inputs") if isinstance(parts.get(k), dict)}


BLOCK = 1 << 24
"""Numbers of a product held at once (64 MB in fp32)."""


def neighbours(
    W_dec: Float[Tensor, "d_sae d_in"], n: int
) -> Iterator[tuple[Float[Tensor, "block n"], Int64[Tensor, "block n"]]]:
    """Yield, block by block, the n other latents of largest signed decoder cosine: (cosines, latents), best first.

    A latent whose row is zero has cosine 0 with every other.
    """
    units = unit_rows(W_dec)
    d_sae = len(units)
    n = min(n, d_sae - 1)
    size = max(1, BLOCK // d_sae)
    for start in range(0, d_sae, size):
        cosine = units[start : start + size] @ units.T
        cosine.diagonal(start).fill_(-torch.inf)
        best = cosine.topk(n, dim=1)
        yield best.values.clamp(-1.0, 1.0).cpu(), best.indices.cpu()


def influence(
    W_dec: Float[Tensor, "d_sae d_in"], gamma: Float[Tensor, "..."]
) -> Float64[Tensor, " d_sae"]:
    """Return ||Gamma d||^2 / ||d||^2 for every decoder row d: what an error along it counts in the weighted loss.

    1 without weights. `gamma` is the diagonal [d_in] or the matrix [d_in, d_in]. A row of zeros gives NaN.
    """
    weights = gamma.detach().double()
    out = []
    for rows in W_dec.split(max(1, BLOCK // W_dec.shape[1])):
        units = unit_rows(rows).double()
        weighed = units * weights if weights.ndim == 1 else units @ weights.T
        length = units.square().sum(1)
        out.append(torch.where(length > 0, weighed.square().sum(1) / length, torch.nan).cpu())
    return torch.cat(out)


class Unembedding(NamedTuple):
    """Rows of the unembedding with the final norm's gain folded in, and what was folded, in words."""

    rows: Float[Tensor, "vocabulary d_model"]
    about: str


class Promoted(NamedTuple):
    """The most promoted and the most demoted tokens of some latents, strongest first."""

    up: tuple[Float[Tensor, "block n"], Int64[Tensor, "block n"]]
    down: tuple[Float[Tensor, "block n"], Int64[Tensor, "block n"]]


def unembedding(model: nn.Module) -> Unembedding | None:
    """Return a causal language model's unembedding; None when it has none that is a plain matrix.

    None too where the model's files lack its weights or the final norm's: they are NaN.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    rows = weight.detach().float()
    found = [  # the norm before the unembedding is the last one of this width outside the blocks
        module
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and not any(part.isdigit() for part in name.split("."))
        and getattr(getattr(module, "weight", None), "shape", None) == (rows.shape[1],)
    ]
    norm = found[-1] if found else None
    if any(bool(x.isnan().any()) for x in (rows, *(norm.parameters() if norm else ()))):
        return None
    if norm is None:
        return Unembedding(rows, "without a final norm, none was found")
    gain, centred = _gain(norm, rows.shape[1])
    rows = rows * gain.to(rows.device)
    kind = type(norm).__name__
    if not centred:
        return Unembedding(rows, f"gain of the final {kind} folded in")
    return Unembedding(
        rows - rows.mean(1, keepdim=True), f"gain and centring of the final {kind} folded in"
    )


@torch.no_grad()
def _gain(norm: nn.Module, d_model: int) -> tuple[Float[Tensor, " d_model"], bool]:
    """Read a norm's gain off two probes, whatever its kind, and whether it takes the mean away.

    The odd part of norm(x) at x = +-1 in turn is gain * x: both have mean 0 (even widths) and mean square 1.
    """
    parameter = next(norm.parameters())
    signs = torch.ones(d_model, device=parameter.device, dtype=parameter.dtype)
    flat = signs.clone()
    signs[1::2] = -1

    def odd(x: Tensor) -> Tensor:
        return ((norm(x[None]) - norm(-x[None])) / 2)[0].float()

    gain = odd(signs) * signs.float()
    centred = float(odd(flat).abs().max()) < 1e-3 * float(gain.abs().max())
    return gain, centred


def promoted(W_dec: Float[Tensor, "d_sae d_model"], out: Unembedding, n: int) -> Iterator[Promoted]:
    """Yield, block by block, the n tokens each decoder row raises most and lowers most."""
    rows = out.rows
    n = min(n, len(rows))
    size = max(1, BLOCK // len(rows))
    W_dec = W_dec.detach().float().to(rows.device)
    for start in range(0, len(W_dec), size):
        logits = W_dec[start : start + size] @ rows.T
        up, down = logits.topk(n, dim=1), logits.topk(n, dim=1, largest=False)
        yield Promoted((up.values.cpu(), up.indices.cpu()), (down.values.cpu(), down.indices.cpu()))

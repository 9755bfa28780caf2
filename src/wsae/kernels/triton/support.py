"""What the kernels do and do not do. Imports no Triton, so it answers where there is none."""

from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

MAX_WIDTH = 8_192
"""The update holds a whole row of W, its gradient and both moments in one program's registers."""
MAX_CANDIDATES = 8_192
"""One program sorts a row's candidates."""
MAX_D_SAE = 1 << 20
"""Two candidates from each tile of 256 latents still fit in MAX_CANDIDATES."""
MIN_GROUP = 16
"""A tensor core's tile has at least 16 columns; narrower groups would leave most of it idle."""
BUCKETS_PER_CHOICE = 8
"""Buckets per chosen latent: few hold three of the k best, which costs a second look at the bucket."""


def check(device: torch.device, tensor: Tensor | None, *shape: int) -> None:
    """Raise ValueError for a tensor that a kernel would read beyond its end, in another order or elsewhere."""
    if tensor is None:
        return
    if tensor.shape != shape or not tensor.is_contiguous() or tensor.device != device:
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)}, strides {tensor.stride()}, on {tensor.device} "
            f"where the kernels read {shape}, contiguous, on {device}"
        )


def unsupported(
    W: Float[Tensor, "d_sae d_in"], dtype: torch.dtype, k: int | None = None, grouped: bool = False
) -> str | None:
    """Return why the kernels do not do a step with these weights, or None if they do.

    `dtype` is the precision of the encoder's product; `k` that of Top-k or, with `grouped`, group Top-k, None for
    activations that compare with a threshold. The caller says the reason once and uses the eager code.
    """
    return _missing(W) or _wrong_type(W, dtype) or _wrong_shape(W, k, grouped)


def _missing(W: Tensor) -> str | None:
    if W.device.type != "cuda":
        return f"the kernels run on CUDA devices, the weights are on {W.device.type}"
    if find_spec("triton") is None:
        return "triton is not installed"
    major, minor = torch.cuda.get_device_capability(W.device)
    if major < 8:
        return f"the device has compute capability {major}.{minor}, the kernels need 8.0"
    return None


def _wrong_type(W: Tensor, dtype: torch.dtype) -> str | None:
    if W.dtype != torch.float32:
        return f"weights are {_name(W.dtype)}, the kernels keep them in float32"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the encoder's product in {_name(dtype)}: the kernels do float32 and bfloat16"
    if not W.is_contiguous():
        return f"weights have strides {W.stride()}, the kernels read whole rows"
    return None


def _wrong_shape(W: Tensor, k: int | None, grouped: bool) -> str | None:
    d_sae, width = W.shape
    if width > MAX_WIDTH:
        return f"a width of {width:,} is above {MAX_WIDTH:,}, what one program holds of a row"
    if d_sae > MAX_D_SAE:
        return f"d_sae = {d_sae:,} is above {MAX_D_SAE:,} latents"
    if k is None:
        return None
    if grouped and d_sae // k < MIN_GROUP:
        return f"groups of {d_sae // k} latents are narrower than {MIN_GROUP}"
    if not grouped and min(2 * BUCKETS_PER_CHOICE * k, d_sae) > MAX_CANDIDATES:
        return f"k = {k:,} of {d_sae:,} leaves more than {MAX_CANDIDATES:,} candidates per row"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

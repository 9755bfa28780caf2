"""Whether the Triton kernels can train a member. Imports no Triton, so it answers where there is none."""

import functools

import torch

from wsae.ops.triton import unsupported
from wsae.sae.config import GroupTopK, TopK
from wsae.train.config import TrainConfig
from wsae.train.state import MemberState


def unfit(member: MemberState, run: TrainConfig) -> str | None:
    """Return why the Triton kernels cannot train this member here, or None if they can."""
    activation, W = member.sae.cfg.activation, member.sae.W_dec.detach()
    # batch Top-k compares with a threshold: its k bounds nothing
    k = activation.k if isinstance(activation, TopK | GroupTopK) else None
    dtype = torch.bfloat16 if run.dtype == "bfloat16" else torch.float32
    return unsupported(W, dtype, k, isinstance(activation, GroupTopK)) or _fails(W.device)


@functools.cache
def _fails(device: torch.device) -> str | None:
    """Try one small kernel: Triton needs a C compiler and a driver that fits, and finds out when it launches."""
    try:
        from wsae.ops.triton.update import adam_rows_
        from wsae.ops.update import AdamStep

        W, grad, m, v = torch.zeros(4, 1, 1, dtype=torch.float32, device=device)
        with torch.cuda.device(device):
            adam_rows_(W, grad, m, v, AdamStep(0.0, 1), unit=False)
            torch.cuda.synchronize()
    except Exception as error:  # whatever stops it, the caller says why
        first = str(error).strip().partition("\n")[0]
        return f"triton does not work here ({type(error).__name__}: {first})"
    return None

"""What every fixture has: inputs, and what the library that wrote the folder makes of them."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

D_IN, D_SAE, K, ROWS = 6, 16, 4, 16
REFUSED = {"saelens-matching-pursuit", "crosscoder-decoupled"}
OUT = Path(__file__).resolve().parents[2] / "tests" / "fixtures" / "interop"


def inputs(seed: int = 0) -> Tensor:
    """Return rows [ROWS, D_IN] whose mean is far from 0, so that subtracting b_dec or not shows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, D_IN, generator=generator) * 2 + torch.linspace(-2, 2, D_IN)


@torch.no_grad()
def shake(module: nn.Module, seed: int = 0, size: float = 0.3) -> None:
    """Move every parameter at random: biases are not 0, decoder and encoder are no transposes, norms differ."""
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in module.parameters():
        parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter)


@torch.no_grad()
def record(
    name: str, encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor]
) -> None:
    """Write the inputs and what upstream's own code makes of them beside the folder it wrote.

    Not for SAEs without an equal here: of those the tests want the refusal alone.
    """
    if name in REFUSED:
        return
    x = inputs()
    z = encode(x)
    tensors = {"x": x, "z": z.float(), "x_hat": decode(z).float()}
    save_file(
        {k: t.detach().contiguous().clone() for k, t in tensors.items()},
        OUT / name / "expected.safetensors",
    )
    print(f"{name}: L0 {float((z != 0).float().sum(1).mean()):.2f}")


def folder(name: str) -> Path:
    """Make and return a fixture's folder."""
    (OUT / name).mkdir(parents=True, exist_ok=True)
    return OUT / name

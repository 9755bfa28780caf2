"""Appendix A's formulas for JumpReLU and Top-k."""

import torch
from jaxtyping import Float64
from torch import Tensor

from wsae.core.seeds import seed_for
from wsae.theory.claims.record import Claim

THRESHOLD = 0.25


def jumprelu(seed: int) -> Claim:
    """Appendix A: JumpReLU(x, c) = ReLU(x - c)."""
    x = _rows(seed, "jumprelu")
    true, paper = x * (x > THRESHOLD), (x - THRESHOLD).relu()
    active = true > 0
    same_support = bool((active == (paper > 0)).all())
    shift = float((true - paper)[active].mean())
    added = float((true - paper - THRESHOLD * active).abs().max())
    at_zero = float((x * (x > 0) - x.relu()).abs().max())
    return Claim(
        claim="JumpReLU(x, c) = ReLU(x - c), so results for ReLU carry over.",
        source="Appendix A",
        verdict="counterexample",
        condition="c = 0; or ReLU(x - c) + c H(x - c) with H(0) = 0, which is JumpReLU.",
        evidence=f"A shifted ReLU: at c = {THRESHOLD} it is {shift:.2f} below JumpReLU(x) = x H(x - c) wherever it "
        f"is active, over {x.numel():,} values (same active set: {same_support}). JumpReLU exists to avoid that "
        f"shrinkage. With c H(x - c) added the difference is {added:.0e}; at c = 0 it is {at_zero:.0e}.",
        instances=x.numel(),
        numbers={"threshold": THRESHOLD, "mean_shift": shift, "with_the_step": added}
        | {"at_threshold_zero": at_zero},
    )


def top_k(seed: int) -> Claim:
    """Appendix A: Top-k(x) = ReLU(x - x_(k+1)) + x_(k+1) H(x - x_(k+1)), H(0) = 1."""
    example = torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64)
    x = _rows(seed, "topk")
    sizes = range(1, x.shape[1])
    wrong = [int((_paper(x, k) != _top_k(x, k)).any(1).sum()) for k in sizes]
    extra = [int((_paper(x, k) != 0).sum(1).max()) - k for k in sizes]
    strict = max(float((_paper(x, k, strict=True) - _top_k(x, k)).abs().max()) for k in sizes)
    tied = _paper(torch.tensor([[2.0, 2.0, 1.0]], dtype=torch.float64), 1, strict=True)
    shown = _paper(example, 1)[0].tolist()
    return Claim(
        claim="Top-k(x) = ReLU(x - x_(k+1) 1) + x_(k+1) H(x - x_(k+1) 1) with H(x) = 1[x >= 0].",
        source="Appendix A",
        verdict="counterexample",
        condition="H(0) = 0 (a strict step) and the k-th and (k+1)-th entries differ.",
        evidence=f"It keeps the (k+1)-th entry too: x = (3, 2, 1), k = 1 gives ({', '.join(f'{v:g}' for v in shown)}). "
        f"Wrong on {sum(wrong) / (len(x) * len(wrong)):.0%} of {len(x) * len(wrong):,} random cases, by {max(extra)} "
        f"entry each. With a strict step the difference is {strict:.0e}; a tie, x = (2, 2, 1), then keeps none "
        f"({int((tied != 0).sum())} entries).",
        instances=len(x) * len(wrong) + 2,
        numbers={"wrong_share": sum(wrong) / (len(x) * len(wrong)), "extra_entries": float(max(extra))}
        | {"strict_error": strict, "entries_at_a_tie": float((tied != 0).sum())},
    )  # fmt: skip


def _rows(seed: int, name: str) -> Float64[Tensor, "rows 6"]:
    made = torch.Generator().manual_seed(seed_for(seed, "activations", name))
    return torch.randn(500, 6, generator=made, dtype=torch.float64)


def _top_k(x: Tensor, k: int) -> Tensor:
    """Keep the k largest entries of each row, whatever their sign; the rest are 0."""
    values, places = x.topk(k, dim=1)
    return torch.zeros_like(x).scatter(1, places, values)


def _paper(x: Tensor, k: int, strict: bool = False) -> Tensor:
    """Return Appendix A's formula; `strict` takes H(0) = 0."""
    next_one = x.sort(dim=1, descending=True).values[:, k : k + 1]
    step = x > next_one if strict else x >= next_one
    return (x - next_one).relu() + next_one * step


CHECKS = (jumprelu, top_k)

"""Which tokens are kept: not padding, not special, not at the start, not an attention sink; counted by reason."""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor

from wsae.acts.config import HarvestConfig
from wsae.core.errors import UserError

REASONS = ("kept", "padding", "special", "first", "norm")
"""Codes of `reasons`; a token is counted under the first that applies, in this order."""
KEPT, PADDING, SPECIAL, FIRST, NORM = range(5)


class SkipRule:
    """Assigns each token a reason; the norm test needs the medians of `calibrate`."""

    def __init__(self, cfg: HarvestConfig, special_ids: Iterable[int]) -> None:
        self._cfg = cfg
        ids = sorted(set(special_ids)) if cfg.skip_special else []
        self._special = torch.tensor(ids, dtype=torch.long)
        self.medians: dict[str, float] | None = None

    def by_token(
        self, ids: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
    ) -> Int8[Tensor, "batch seq"]:
        """Return the reasons that ids, padding and position give."""
        reasons = torch.full(ids.shape, KEPT, dtype=torch.int8)
        reasons[:, : self._cfg.skip_first] = FIRST
        if len(self._special):
            reasons[torch.isin(ids, self._special)] = SPECIAL
        reasons[~mask] = PADDING
        return reasons

    def calibrate(
        self, norms: Mapping[str, Float[Tensor, " tokens"]], reasons: Int8[Tensor, " tokens"]
    ) -> None:
        """Fix each hook's median norm from the tokens kept so far; raises UserError when there are none."""
        kept = reasons == KEPT
        if not bool(kept.any()):
            raise UserError(
                "the first batch has no token to calibrate on: all are padding, special or first; "
                "raise seq_len or lower skip_first"
            )
        self.medians = {hook: float(norm[kept].double().median()) for hook, norm in norms.items()}

    def by_norm(
        self, norms: Mapping[str, Float[Tensor, " tokens"]], reasons: Int8[Tensor, " tokens"]
    ) -> Int8[Tensor, " tokens"]:
        """Mark tokens whose norm exceeds sink_norm_ratio times the median at any hook."""
        ratio = self._cfg.sink_norm_ratio
        if ratio is None:
            return reasons
        assert self.medians is not None, "calibrate first"
        reasons = reasons.clone()
        for hook, norm in norms.items():
            reasons[(norm > ratio * self.medians[hook]) & (reasons == KEPT)] = NORM
        return reasons


def count_reasons(reasons: Int8[Tensor, " tokens"]) -> dict[str, int]:
    """Return how many tokens each reason holds, the kept ones included."""
    counts = torch.bincount(reasons.long(), minlength=len(REASONS)).tolist()
    return dict(zip(REASONS, counts, strict=True))

"""The learning rate as a function of the step: nothing to save, nothing to get out of step."""

import math


def lr_factor(step: int, steps: int, warmup: float, decay: float) -> float:
    """Return the share of the peak learning rate at `step` of `steps`.

    Linear from 0 over the first `warmup` share of the steps, then 1, then linear to 0 over the last `decay` share.
    """
    rise = min(1.0, (step + 1) / max(1.0, warmup * steps))
    fall = min(1.0, (steps - step) / max(1.0, decay * steps))
    return min(rise, fall)


def warmup_cosine(step: int, steps: int, warmup: int, start: float, peak: float) -> float:
    """Return the learning rate at `step` of `steps`.

    Linear from `start` to `peak` over the first `warmup` steps, then along a cosine to 0.
    """
    if step < warmup:
        return start + step * (peak - start) / max(1, warmup - 1)
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

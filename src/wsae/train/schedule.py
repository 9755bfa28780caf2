"""The learning rate as a function of the step: nothing to save, nothing to get out of step."""


def lr_factor(step: int, steps: int, warmup: float, decay: float) -> float:
    """Return the share of the peak learning rate at `step` of `steps`.

    Linear from 0 over the first `warmup` share of the steps, then 1, then linear to 0 over the last `decay` share.
    """
    rise = min(1.0, (step + 1) / max(1.0, warmup * steps))
    fall = min(1.0, (steps - step) / max(1.0, decay * steps))
    return min(rise, fall)

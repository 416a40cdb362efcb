"""The learning-rate schedule of a phase."""

import math

import torch
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(optimizer: torch.optim.Optimizer, steps: int, *, warmup: float = 0.1) -> LambdaLR:
    """Return a schedule that rises linearly over the first ``warmup`` share of ``steps``, then falls to 0.

    It scales each group's ``initial_lr`` and counts optimizer steps, not epochs; past ``steps`` it stays at 0.

    Raises:
        ValueError: If ``steps`` is below 1 or ``warmup`` not in [0, 1).
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup: expected a share in [0, 1), got {warmup}")
    rise = round(steps * warmup)

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / (rise + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / (steps - rise))))

    return LambdaLR(optimizer, factor)

"""The learning-rate schedules of a phase, all as factors on each group's own ``initial_lr``.

So groups with different rates keep their proportions. torch's ``OneCycleLR`` would overwrite ``initial_lr``, and
with it the rates of the phases that follow; the one-cycle policy here (Smith and Topin 2017, arXiv 1708.07120)
gives the same rates and leaves ``initial_lr`` alone.
"""

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR

from .errors import InputError, suggestion

RISE, START, END = 0.3, 1 / 25, 1 / 25e4  # of the one-cycle policy, as in torch's OneCycleLR


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * min(1.0, share)))


def _one_cycle(step: int, steps: int) -> float:
    top, last = RISE * steps - 1, steps - 1
    if step <= top:
        return _cosine(START, 1.0, step / top if top else 1.0)
    top = max(0.0, top)  # fewer than four steps: no rise
    return _cosine(1.0, END, (step - top) / (last - top) if last > top else 0.0)


DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "linear": lambda share: 1 - min(1.0, share),
    "cosine": lambda share: _cosine(1.0, 0.0, share),
}
SCHEDULES = (*DECAYS, "one-cycle")


def make_schedule(name: str, optimizer: torch.optim.Optimizer, steps: int, *, warmup: float = 0.1) -> LambdaLR:
    """Return the schedule called ``name``; it counts optimizer steps, not epochs, and stays at its end.

    Args:
        name: ``"constant"``, ``"linear"`` (down to 0) or ``"cosine"`` (down to 0), each after a linear rise that
            starts above 0; or ``"one-cycle"``, a rise by cosine from 1/25 of the rate over the first 30 % of the
            steps, then a fall by cosine to 1/250,000 of it.
        optimizer: Its groups' ``initial_lr``, or ``lr`` where there is none, are the peak rates.
        steps: Optimizer steps in the phase.
        warmup: Share of the steps that the linear rise takes; ``"one-cycle"`` has its own.

    Raises:
        InputError: If there is no schedule of that name.
        ValueError: If ``steps`` is below 1 or ``warmup`` not in [0, 1).
    """
    if name not in SCHEDULES:
        near = suggestion(name, SCHEDULES)
        raise InputError(f"--schedule: expected one of {', '.join(SCHEDULES)}, got {name!r}{near}")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup: expected a share in [0, 1), got {warmup}")
    if name == "one-cycle":
        return LambdaLR(optimizer, lambda step: _one_cycle(step, steps))
    rise, decay = round(steps * warmup), DECAYS[name]

    def factor(step: int) -> float:
        return (step + 1) / (rise + 1) if step < rise else decay((step - rise) / max(1, steps - rise))

    return LambdaLR(optimizer, factor)

"""The learning-rate schedule of a phase: by which factor each group's own rate is multiplied at each step.

A factor leaves the proportions of discriminative rates as they are, whichever the schedule, and asks nothing of
the groups but ``initial_lr``; torch's ``OneCycleLR`` writes its own rates over that.

Sources: Loshchilov and Hutter, arXiv 1608.03983 (cosine); Smith and Topin, arXiv 1708.07120 (one-cycle).
"""

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from .errors import InputError, suggestion

ONE_CYCLE_RISE = 0.3  # share of the steps
ONE_CYCLE_START = 1 / 25
ONE_CYCLE_END = ONE_CYCLE_START / 1e4


def make_schedule(name: str, optimizer: torch.optim.Optimizer, steps: int, *, warmup: float = 0.1) -> LRScheduler:
    """Return the schedule ``name`` over ``steps`` optimizer steps, which starts at once.

    Make it anew to resume, and load its state.

    Args:
        name: ``"constant"``, ``"linear"`` or ``"cosine"``: the factor rises linearly to 1, then stays there or
            falls to 0 like that. ``"one-cycle"``: it rises from 1/25 to 1 over 30 % of the steps, then falls to
            1/250,000 at the last one, both by cosine.
        optimizer: Each group's ``initial_lr`` is its highest rate.
        steps: Steps to the end of the schedule, after which it stays where it is.
        warmup: Share of ``steps`` that the linear rise takes; its first step is above 0. One-cycle has its own.

    Raises:
        InputError: If there is no such schedule.
        ValueError: If ``steps`` is below 1 or ``warmup`` not in [0, 1).
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup: expected a share in [0, 1), got {warmup}")
    if name not in SCHEDULES:
        close = suggestion(name, SCHEDULES)
        raise InputError(f"--schedule: expected one of {', '.join(SCHEDULES)}, got {name!r}{close}")
    factor = _one_cycle(steps) if name == "one-cycle" else _after_warmup(FALLS[name], steps, round(steps * warmup))
    return LambdaLR(optimizer, factor)


def _cosine(progress: float) -> float:
    """Fall from 1 to 0 as ``progress`` goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))


FALLS: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": _cosine,
}
SCHEDULES = (*FALLS, "one-cycle")


def _after_warmup(fall: Callable[[float], float], steps: int, rise: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / (rise + 1)
        return fall(min(1.0, (step - rise) / (steps - rise)))

    return factor


def _one_cycle(steps: int) -> Callable[[int], float]:
    last = steps - 1
    peak = ONE_CYCLE_RISE * steps - 1  # as in torch, between two steps unless it is a whole number

    def factor(step: int) -> float:
        if step <= peak:
            return 1 + (ONE_CYCLE_START - 1) * _cosine(step / peak if peak else 1.0)
        return ONE_CYCLE_END + (1 - ONE_CYCLE_END) * _cosine(min(1.0, (step - peak) / (last - peak)))

    return factor

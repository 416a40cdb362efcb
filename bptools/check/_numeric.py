"""Numerical derivatives that can be trusted to about nine digits, and one-sided ones for kinks.

A central difference at steps h, h/2 and h/4, extrapolated twice (Richardson), has an error of order h⁶. The
difference of the last two extrapolations, with the rounding noise of the function, estimates what is left. Of a
few h, each number takes the one with the least estimated error: large steps where the function is smooth, small
ones beside a kink.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STEPS = (1e-2, 1e-3, 1e-4, 1e-6)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The real inner product Re⟨a, b⟩; a loss moves by that of its gradient and a direction."""
    return (a.conj() * b).real.sum() if a.is_complex() or b.is_complex() else (a * b).sum()


def double(t: Tensor) -> Tensor:
    """In double precision, real or complex."""
    return t.to(torch.complex128 if t.is_complex() else torch.float64)


def derivative(f: Callable[[float], Tensor], tolerance: float = 1e-9) -> tuple[Tensor, Tensor]:
    """The derivative at 0 of a function of one number, and an estimate of its error, in the shape of its value."""
    best = error = None
    for h in STEPS:
        values = [(f(s), f(-s)) for s in (h, h / 2, h / 4)]
        d = [(a - b) / (2 * s) for (a, b), s in zip(values, (h, h / 2, h / 4), strict=True)]
        once = (4 * d[1] - d[0]) / 3, (4 * d[2] - d[1]) / 3
        twice = (16 * once[1] - once[0]) / 15
        size = torch.maximum(values[2][0].abs(), values[2][1].abs())
        noise = 8 * torch.finfo(size.dtype).eps * size / h
        doubt = torch.nan_to_num((twice - once[1]).abs() + noise, nan=torch.inf)
        if best is None:
            best, error = twice, doubt
        else:
            better = doubt < error
            best, error = torch.where(better, twice, best), torch.where(better, doubt, error)
        if bool((error <= tolerance * best.abs()).all()):
            break
    return best, error


def one_sided(f: Callable[[float], Tensor], h: float = 1e-5) -> tuple[Tensor, Tensor]:
    """The left and the right derivative at 0, each to about five digits."""
    here = f(0.0)
    sides = []
    for sign in (-1.0, 1.0):
        whole, half = ((f(sign * s) - here) / (sign * s) for s in (h, h / 2))
        sides.append(2 * half - whole)
    return sides[0], sides[1]


def step_of(x: Tensor) -> float:
    """The magnitude of a tensor, which steps are measured in."""
    size = float(x.detach().abs().square().mean().sqrt()) if x.numel() else 1.0
    return size if 0 < size < torch.inf else 1.0

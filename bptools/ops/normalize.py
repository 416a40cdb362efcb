"""Normalisation of vectors to p-norm 1.

Index legend: `d` the elements of a vector (the dimensions `dim` of x); each line holds for every vector.

    N = (Σ_d |x[d]|^p)^(1/p)         m = max(N, ε)         y[d] = x[d] / m

x[d] reaches y directly and, where N ≥ ε, through m, whose slope is that of the norm, r:

    dx[d] = (dy[d] - r[d] Σ_d dy[d] y[d]) / m              r[d] = ∂N/∂x[d] = sgn(x[d]) (|x[d]| / N)^(p-1)

For p = 2, r is y itself: the part of dy along y is taken out. For p = 1, r is a sign. For p = ∞ (and -∞), N is the
largest (smallest) magnitude and r is shared by the elements that hold it. For p = 0, N counts and r is 0. Where
p < 1, the slope at x[d] = 0 is infinite and taken to be 0, as torch does; a vector shorter than ε has r = 0.

x and one number a vector are kept.

Source: the chain rule.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Op


def normalize_norm(x: Tensor, p: float, dim: tuple[int, ...]) -> Tensor:
    """x (..., d, ...) -> its norms (..., 1, ...)."""
    return torch.linalg.vector_norm(x, p, dim, keepdim=True)


def normalize_forward(x: Tensor, p: float, dim: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor]:
    """x (..., d, ...), d stands for the dimensions `dim` -> y (..., d, ...), norm (..., 1, ...)."""
    norm = normalize_norm(x, p, dim)
    return x / norm.clamp_min(eps), norm


def normalize_backward(
    dy: Tensor, x: Tensor, norm: Tensor, p: float, dim: tuple[int, ...], eps: float, needs=EVERY
) -> tuple[Tensor]:
    """dy, x (..., d, ...), norm (..., 1, ...) -> dx (..., d, ...)."""
    m = norm.clamp_min(eps)
    along = (dy * (x / m)).sum(dim, keepdim=True)
    return ((dy - torch.where(norm >= eps, _slope(x, norm, p, dim), 0) * along) / m,)


def _slope(x: Tensor, norm: Tensor, p: float, dim: tuple[int, ...]) -> Tensor:
    """r (..., d, ...), 0 for what is 0."""
    if p == 0:
        return torch.zeros_like(x)
    if p == 1:
        return x.sgn()
    if abs(p) == math.inf:
        holds = x.abs() == norm
        return torch.where(holds, x.sgn(), 0) / holds.sum(dim, keepdim=True)
    norm = torch.where(norm == 0, 1, norm)
    if p == 2:
        return x / norm
    size = torch.where(x == 0, 1, x.abs())  # its power, and the derivative of that, stay finite
    return torch.where(x == 0, 0, x.sgn() * (size / norm) ** (p - 1))


normalize = Op(
    normalize_forward,
    normalize_backward,
    outputs="y norm",
    grads="x",
    residuals=normalize_norm,
    autocast={"cuda": "float32"},
)

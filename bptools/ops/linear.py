"""The affine map, `y = x wᵀ + b`.

Index legend: `n` rows (all leading dimensions of x), `i` input features, `o` output features.

    y[n,o] = Σ_i x[n,i] w[o,i] + b[o]

The chain rule gives each gradient as a sum over the index that its variable does not have:

    dx[n,i] = Σ_o dy[n,o] w[o,i]        dx = dy w       reads w alone
    dw[o,i] = Σ_n dy[n,o] x[n,i]        dw = dyᵀ x      reads x alone
    db[o]   = Σ_n dy[n,o]                               reads nothing

so a frozen weight costs no activation memory: x is kept only for dw, and w only for dx.

Source: Rumelhart, Hinton and Williams, "Learning representations by back-propagating errors", 1986.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Kernel, Op


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., i), weight (o, i), bias (o,) -> y (..., o)."""
    y = x @ weight.mT
    return y if bias is None else y + bias


def linear_backward(dy: Tensor, x: Tensor, weight: Tensor, needs=EVERY) -> tuple[Tensor | None, ...]:
    """dy (..., o), x (..., i), weight (o, i) -> dx (..., i), dw (o, i), db (o,)."""
    dx = dy @ weight if "x" in needs else None
    dw = rows(dy).mT @ rows(x) if "weight" in needs else None
    db = rows(dy).sum(0) if "bias" in needs else None
    return dx, dw, db


def rows(t: Tensor) -> Tensor:
    """(..., d) -> (n, d), also where a dimension is zero."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


linear = Op(
    linear_forward,
    linear_backward,
    outputs="y",
    grads="x weight bias",
    keep_for={"x": "weight", "weight": "x"},
    # The same matrix products in the input's own precision: hardware accumulates half precision in float32.
    kernel=Kernel(torch.nn.functional.linear, linear_backward),
    trace="kernel",
    autocast={"cpu": "lower", "cuda": "lower"},
)

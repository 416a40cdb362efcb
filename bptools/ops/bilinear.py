"""The bilinear map of two inputs, `y = x1ᵀ W x2 + b`.

Index legend: `n` rows (all leading dimensions), `i` and `j` features of the first and the second input, `o` output
features.

    y[n,o] = Σ_ij x1[n,i] w[o,i,j] x2[n,j] + b[o]

It is linear in each of x1, x2 and w, so each gradient is the same sum without its own variable, and with dy:

    dx1[n,i]  = Σ_oj dy[n,o] w[o,i,j] x2[n,j]           dw[o,i,j] = Σ_n dy[n,o] x1[n,i] x2[n,j]
    dx2[n,j]  = Σ_oi dy[n,o] x1[n,i] w[o,i,j]           db[o]     = Σ_n dy[n,o]

Source: Tenenbaum and Freeman, "Separating style and content with bilinear models", 2000.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Op
from bptools.ops.linear import rows


def bilinear_forward(x1: Tensor, x2: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x1 (..., i), x2 (..., j), weight (o, i, j), bias (o,) -> y (..., o)."""
    y = (_first(x1, weight) * rows(x2).unsqueeze(1)).sum(-1)  # (n, o)
    y = y.reshape(*x1.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


def bilinear_backward(
    dy: Tensor,
    x1: Tensor,
    x2: Tensor,
    weight: Tensor,
    x1_shape: torch.Size,
    x2_shape: torch.Size,
    needs=EVERY,
) -> tuple[Tensor | None, ...]:
    """dy (..., o), x1 (..., i), x2 (..., j), weight (o, i, j)
    -> dx1 (..., i), dx2 (..., j), dw (o, i, j), db (o,).
    """
    dx1 = dx2 = dw = None
    g = rows(dy).unsqueeze(1)  # (n, 1, o)
    if "x1" in needs:
        dx1 = (g @ _first(x2, weight.mT)).reshape(x1_shape)
    if "x2" in needs:
        dx2 = (g @ _first(x1, weight)).reshape(x2_shape)
    if "weight" in needs:
        dy_x1 = g.mT * rows(x1).unsqueeze(1)  # (n, o, i)
        n, o, i = dy_x1.shape
        dw = (dy_x1.reshape(n, o * i).mT @ rows(x2)).reshape(o, i, x2_shape[-1])
    return dx1, dx2, dw, g.sum((0, 1)) if "bias" in needs else None


def _first(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., i), weight (o, i, j) -> Σ_i x[n,i] w[o,i,j], (n, o, j)."""
    o, i, j = weight.shape
    return (rows(x) @ weight.transpose(0, 1).reshape(i, o * j)).reshape(math.prod(x.shape[:-1]), o, j)


bilinear = Op(
    bilinear_forward,
    bilinear_backward,
    outputs="y",
    grads="x1 x2 weight bias",
    keep_for={"x1": "x2 weight", "x2": "x1 weight", "weight": "x1 x2"},
    autocast={"cuda": "lower"},
)

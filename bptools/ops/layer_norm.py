"""Layer normalisation over the last dimensions.

Index legend: `n` rows, `d` features (the last `dims` dimensions of x, D elements in all).

    μ[n] = 1/D Σ_d x[n,d]        σ²[n] = 1/D Σ_d (x[n,d] - μ[n])²        rstd = 1 / √(σ² + ε)
    x̂[n,d] = (x[n,d] - μ[n]) rstd[n]                y[n,d] = x̂[n,d] w[d] + b[d]

With g = dy w, the gradient that reaches x̂, and ⟨·⟩ the mean over d:

    db[d] = Σ_n dy[n,d]          dw[d] = Σ_n dy[n,d] x̂[n,d]
    dx    = rstd (g - ⟨g⟩ - x̂ ⟨g x̂⟩)

The two means are what flows through μ and σ²: shifting or scaling a row does not change x̂, so the part of g
along 1 and the part along x̂ are taken out. x and two numbers a row are kept; x̂ is rebuilt from them.

Source: Ba, Kiros and Hinton, "Layer normalization", arXiv 1607.06450.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Kernel, Op

aten = torch.ops.aten


def layer_norm_statistics(x: Tensor, dims: int, eps: float) -> tuple[Tensor, Tensor]:
    """x (..., d) -> mean (..., 1), rstd (..., 1): one 1 for each normalised dimension."""
    over = tuple(range(-dims, 0))
    mean = x.mean(over, keepdim=True)
    var = ((x - mean) ** 2).mean(over, keepdim=True)
    return mean, torch.rsqrt(var + eps)


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, dims: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x (..., d), weight, bias (d); d stands for `dims` dimensions -> y (..., d), mean, rstd (..., 1)."""
    mean, rstd = layer_norm_statistics(x, dims, eps)
    y = (x - mean) * rstd
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y, mean, rstd


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dims: int,
    eps: float,
    needs=EVERY,
) -> tuple[Tensor | None, ...]:
    """dy, x (..., d), weight (d), mean and rstd (..., 1) -> dx (..., d), dw (d), db (d)."""
    dx = dw = db = None
    rows, over = tuple(range(dy.dim() - dims)), tuple(range(-dims, 0))
    if "x" in needs or "weight" in needs:
        x_hat = (x - mean) * rstd
    if "x" in needs:
        g = dy if weight is None else dy * weight
        dx = rstd * (g - g.mean(over, keepdim=True) - x_hat * (g * x_hat).mean(over, keepdim=True))
    if "weight" in needs:
        dw = (dy * x_hat).sum(rows) if rows else dy * x_hat
    if "bias" in needs:
        db = dy.sum(rows) if rows else dy
    return dx, dw, db


def _kernel_forward(x, weight, bias, dims, eps):
    return aten.native_layer_norm(x, x.shape[x.dim() - dims :], weight, bias, eps)


def _kernel_backward(dy, x, weight, mean, rstd, dims, eps, needs):
    if x is None:  # the bias alone learns, and the kernel would want an x
        return layer_norm_backward(dy, x, weight, mean, rstd, dims, eps, needs)
    shape = x.shape[x.dim() - dims :]
    mask = ["x" in needs, "weight" in needs, "bias" in needs]
    # Of a parameter that learns the kernel wants to see one, whatever its values.
    some = mean.new_empty(shape) if weight is None else weight
    return aten.native_layer_norm_backward(dy, x, shape, mean, rstd, some if mask[1] else weight, some, mask)


layer_norm = Op(
    layer_norm_forward,
    layer_norm_backward,
    outputs="y mean rstd",
    grads="x weight bias",
    keep_for={"x": "x weight", "weight": "x", "mean": "x weight", "rstd": "x weight"},
    residuals=layer_norm_statistics,
    kernel=Kernel(_kernel_forward, _kernel_backward),
    autocast={"cuda": "float32"},
    mixed=True,
)

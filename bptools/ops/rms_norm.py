"""Root mean square normalisation over the last dimensions: layer normalisation without the mean.

Index legend: `n` rows, `d` features (the last `dims` dimensions of x), ⟨·⟩ the mean over d.

    rstd[n] = 1 / √(⟨x²⟩ + ε)        x̂[n,d] = x[n,d] rstd[n]        y[n,d] = x̂[n,d] w[d]

rstd depends on every feature of its row: ∂rstd/∂x[d] = -rstd³ x[d] / D, with D the number of features. With
g = dy w, the gradient that reaches x̂:

    dx[n,d] = g rstd - rstd³ x[n,d] ⟨g x⟩ = rstd (g - x̂ ⟨g x̂⟩)
    dw[d]   = Σ_n dy[n,d] x̂[n,d]

Scaling a row does not change x̂, so the part of g along x̂ is taken out. x and one number a row are kept; x̂ is
rebuilt from them.

Source: Zhang and Sennrich, "Root mean square layer normalization", arXiv 1910.07467.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Op


def rms_norm_statistics(x: Tensor, dims: int, eps: float) -> Tensor:
    """x (..., d) -> rstd (..., 1): one 1 for each normalised dimension."""
    return torch.rsqrt((x * x).mean(tuple(range(-dims, 0)), keepdim=True) + eps)


def rms_norm_forward(x: Tensor, weight: Tensor | None, dims: int, eps: float) -> tuple[Tensor, Tensor]:
    """x (..., d), weight (d), dims how many dimensions d stands for -> y (..., d), rstd (..., 1)."""
    rstd = rms_norm_statistics(x, dims, eps)
    y = x * rstd
    return y if weight is None else y * weight, rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, dims: int, eps: float, needs=EVERY
) -> tuple[Tensor | None, ...]:
    """dy, x (..., d), weight (d), rstd (..., 1) -> dx (..., d), dw (d)."""
    dx = dw = None
    rows, over = tuple(range(dy.dim() - dims)), tuple(range(-dims, 0))
    x_hat = x * rstd
    if "x" in needs:
        g = dy if weight is None else dy * weight
        dx = rstd * (g - x_hat * (g * x_hat).mean(over, keepdim=True))
    if "weight" in needs:
        dw = (dy * x_hat).sum(rows) if rows else dy * x_hat
    return dx, dw


rms_norm = Op(
    rms_norm_forward,
    rms_norm_backward,
    outputs="y rstd",
    grads="x weight",
    keep_for={"weight": "x"},
    residuals=rms_norm_statistics,
    # ATen has no kernel on the CPU; from this size on, forward and backward take 0.4-0.6x of torch's time.
    fuses=lambda x, weight, dims, eps: x.device.type == "cpu" and x.numel() >= 2**18,
    autocast={"cuda": "float32"},
    mixed=True,
)

"""Batch normalisation over the batch, one channel at a time.

Index legend: `n` everything but the channel (samples and positions, m in all), `c` channels.

    μ[c] = 1/m Σ_n x[n,c]        σ²[c] = 1/m Σ_n (x[n,c] - μ[c])²        rstd = 1 / √(σ² + ε)
    x̂[n,c] = (x[n,c] - μ[c]) rstd[c]                y[n,c] = x̂[n,c] w[c] + b[c]

The gradients of weight and bias are two sums a channel:

    db[c] = Σ_n dy[n,c]          dw[c] = Σ_n dy[n,c] x̂[n,c]

x reaches y along three paths: directly, through μ, and through σ². With g = dy w, the gradient that reaches x̂:

    direct        g rstd
    through μ     ∂x̂/∂μ = -rstd,  ∂μ/∂x[n] = 1/m          gives  -rstd 1/m Σ_n g
    through σ²    ∂x̂/∂σ² = -½ x̂ rstd²,  ∂σ²/∂x[n] = 2/m (x[n] - μ) = 2/m x̂[n] / rstd
                                                           gives  -rstd x̂[n] 1/m Σ_n g x̂

(μ moves σ² by nothing, since Σ (x - μ) = 0.) w is one number for all n, so the two sums are db and dw again:

    dx[n,c] = w rstd (dy[n,c] - db[c] / m - x̂[n,c] dw[c] / m)

x and two numbers a channel are kept; x̂ is rebuilt from them. Nothing is written: the running statistics, which
training moves towards the batch's by `momentum`, come in as constants and go out as two more outputs,

    running_mean ← (1 - momentum) running_mean + momentum μ
    running_var  ← (1 - momentum) running_var  + momentum σ² m / (m - 1)

and it is the caller who stores them. In evaluation, `frozen_batch_norm`, μ and σ² are the running ones, hence
constants, and of the three paths the direct one alone is left:

    dx[n,c] = dy[n,c] w rstd

Source: Ioffe and Szegedy, "Batch normalization", arXiv 1502.03167.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Kernel, Op

aten = torch.ops.aten


def batch_norm_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (n, c, ...) -> mean, rstd (c,)."""
    var, mean = torch.var_mean(x, _all_but_channel(x), correction=0)
    return mean, torch.rsqrt(var + eps)


def batch_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, ...]:
    """x (n, c, ...), all other tensors (c,) -> y (n, c, ...); mean, rstd and the new running statistics (c,)."""
    mean, rstd = batch_norm_statistics(x, eps)
    unbiased = torch.var(x, _all_but_channel(x), correction=1)
    new_mean = momentum * mean + (1 - momentum) * running_mean
    new_var = momentum * unbiased + (1 - momentum) * running_var
    return _affine(_normalise(x, mean, rstd), weight, bias), mean, rstd, new_mean, new_var


def batch_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, eps: float, needs=EVERY
) -> tuple[Tensor | None, ...]:
    """dy, x (n, c, ...), weight, mean and rstd (c,) -> dx (n, c, ...), dw, db (c,)."""
    dx = dw = db = None
    if "x" in needs or "weight" in needs:
        x_hat = _normalise(x, mean, rstd)
        dw = (dy * x_hat).sum(_all_but_channel(dy))
    if "x" in needs or "bias" in needs:
        db = dy.sum(_all_but_channel(dy))
    if "x" in needs:
        m = x.numel() / max(x.shape[1], 1)
        scale = rstd if weight is None else weight * rstd
        dx = _beside(scale, x) * (dy - _beside(db / m, x) - x_hat * _beside(dw / m, x))
    return dx, dw if "weight" in needs else None, db if "bias" in needs else None


def frozen_batch_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """x (n, c, ...), all other tensors (c,) -> y (n, c, ...)."""
    return _affine(_normalise(x, mean, torch.rsqrt(var + eps)), weight, bias)


def frozen_batch_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, eps: float, needs=EVERY
) -> tuple[Tensor | None, ...]:
    """dy, x (n, c, ...), weight, mean and var (c,) -> dx (n, c, ...), dw, db (c,)."""
    dx = dw = db = None
    if "x" in needs or "weight" in needs:
        rstd = torch.rsqrt(var + eps)
    if "x" in needs:
        dx = dy * _beside(rstd if weight is None else weight * rstd, dy)
    if "weight" in needs:
        dw = (dy * _normalise(x, mean, rstd)).sum(_all_but_channel(dy))
    if "bias" in needs:
        db = dy.sum(_all_but_channel(dy))
    return dx, dw, db


def _all_but_channel(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.dim()))


def _beside(t: Tensor, x: Tensor) -> Tensor:
    """(c,) -> (c, 1, ...), to stand beside x (n, c, ...)."""
    return t.reshape(t.shape + (1,) * (x.dim() - 2))


def _normalise(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (x - _beside(mean, x)) * _beside(rstd, x)


def _affine(x_hat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = x_hat if weight is None else x_hat * _beside(weight, x_hat)
    return y if bias is None else y + _beside(bias, x_hat)


def _only_bias(dy):  # the kernel would want an x
    return None, None, dy.sum(_all_but_channel(dy))


def _kernel_forward(x, weight, bias, running_mean, running_var, momentum, eps):
    new_mean, new_var = running_mean.clone(), running_var.clone()  # the kernel writes them
    y, mean, rstd = aten.native_batch_norm(x, weight, bias, new_mean, new_var, True, momentum, eps)
    return y, mean, rstd, new_mean, new_var


def _dense(t):
    """Without gaps: for (N, C) inputs the CPU's backward kernel overlooks the strides of these (torch 2.15)."""
    return None if t is None else t.contiguous()


def _kernel_backward(dy, x, weight, mean, rstd, eps, needs):
    if x is None:
        return _only_bias(dy)
    mask = ["x" in needs, "weight" in needs, "bias" in needs]
    return aten.native_batch_norm_backward(dy, x, _dense(weight), None, None, mean, rstd, True, eps, mask)


def _frozen_kernel_forward(x, weight, bias, mean, var, eps):
    return aten.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]


def _frozen_kernel_backward(dy, x, weight, mean, var, eps, needs):
    if mean is None:
        return _only_bias(dy)
    mask = ["x" in needs, "weight" in needs, "bias" in needs]
    x = dy if x is None else x  # dw alone reads it
    parameters = _dense(weight), _dense(mean), _dense(var)
    return aten.native_batch_norm_backward(dy, x, *parameters, None, None, False, eps, mask)


batch_norm = Op(
    batch_norm_forward,
    batch_norm_backward,
    outputs="y mean rstd new_mean new_var",
    grads="x weight bias",
    keep_for={"x": "x weight", "weight": "x", "mean": "x weight", "rstd": "x weight"},
    residuals=batch_norm_statistics,
    kernel=Kernel(_kernel_forward, _kernel_backward),
    mixed=True,
)

frozen_batch_norm = Op(
    frozen_batch_norm_forward,
    frozen_batch_norm_backward,
    outputs="y",
    grads="x weight bias",
    keep_for={"x": "weight", "weight": "x", "mean": "x weight", "var": "x weight"},
    kernel=Kernel(_frozen_kernel_forward, _frozen_kernel_backward, lambda x, *args: x.numel() > 0),
    mixed=True,
)

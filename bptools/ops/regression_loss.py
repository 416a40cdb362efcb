"""Losses of an error, the difference between a number and what was wanted.

Index legend: `n` elements; d[n] = x[n] - target[n]. Each loss is a function f of the error alone, with a weight
for each element (1 if not given), and is returned as it is, summed, or averaged:

    loss[n] = weight[n] f(d[n])

    mse_loss        d²                                                      f' = 2 d
    l1_loss         |d|                                                     f' = sign d
    huber_loss      d² / 2 if |d| ≤ δ, else δ (|d| - δ / 2)                 f' = d, kept between -δ and δ
    smooth_l1_loss  Huber's loss for δ = β, divided by β                    f' = d / β, kept between -1 and 1

Let g[n] be the gradient that reaches loss[n]: dy, divided as the mean divides. Then

    dx[n] = g[n] weight[n] f'(d[n])         dtarget = -dx           dweight[n] = g[n] f(d[n])

The mean divides by the number of elements, or, of the weighted mse_loss and l1_loss, by the sum of the weights (as
torch's does; the weighted huber_loss stays with the number). Then the weight is in the divisor too, and from
dweight goes g times the mean loss. At the kink of |d| the derivative is 0, the middle of -1 and 1.

x and target are kept: both are there already, and d is their difference.

Sources: Legendre, 1805 (least squares); Boscovich, 1757 (least absolute deviations); Huber, "Robust estimation of
a location parameter", 1964; Girshick, arXiv 1504.08083 (smooth_l1_loss).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Kernel, Op
from bptools.ops._reduction import REDUCTIONS, reduce_rows, row_gradient

aten = torch.ops.aten

FLOAT32 = {"cpu": "float32", "cuda": "float32"}


def error_gradients(
    dy: Tensor, slope: Tensor, reduction: str, total: Tensor | int, needs, weight: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """dy (n) or (), slope f'(d) (n), weight (n) -> dx and dtarget (n)."""
    if "x" not in needs and "target" not in needs:
        return None, None
    dx = row_gradient(dy, reduction, total) * slope
    return _either(dx if weight is None else weight * dx, needs)


def _either(dx: Tensor, needs) -> tuple[Tensor | None, Tensor | None]:
    return (dx if "x" in needs else None), (-dx if "target" in needs else None)


def weight_gradient(dy: Tensor, loss: Tensor, reduction: str, weight: Tensor) -> Tensor:
    """dy (n) or (), loss f(d) (n), weight (n), by whose sum the mean divides -> dweight (n)."""
    total = weight.sum()
    g = row_gradient(dy, reduction, total)
    dweight = (g * loss).sum_to_size(weight.shape)
    return dweight - g * (weight * loss).sum() / total if reduction == "mean" else dweight


def _same_shape(x: Tensor, target: Tensor, *constants) -> bool:
    return x.shape == target.shape and x.dtype is target.dtype


# Squared error ------------------------------------------------------------------------------------------------


def mse_loss_forward(x: Tensor, target: Tensor, reduction: str) -> Tensor:
    """x and target broadcast to (...) -> y (...) or ()."""
    d = x - target
    return reduce_rows(d * d, reduction, d.numel())


def mse_loss_backward(
    dy: Tensor, x: Tensor, target: Tensor, reduction: str, needs=EVERY
) -> tuple[Tensor | None, ...]:
    """dy (...) or (), x and target (...) -> dx and dtarget (...)."""
    d = x - target
    return error_gradients(dy, 2 * d, reduction, d.numel(), needs)


def _mse_kernel_backward(dy, x, target, reduction, needs):
    return _either(aten.mse_loss_backward(dy, x, target, REDUCTIONS.index(reduction)), needs)


mse_loss = Op(
    mse_loss_forward,
    mse_loss_backward,
    outputs="y",
    grads="x target",
    kernel=Kernel(
        lambda x, target, reduction: aten.mse_loss(x, target, REDUCTIONS.index(reduction)),
        _mse_kernel_backward,
        usable=_same_shape,
    ),
    autocast=FLOAT32,
)


def weighted_mse_loss_forward(x: Tensor, target: Tensor, weight: Tensor, reduction: str) -> Tensor:
    """x and target broadcast to (...), weight as x -> y (...) or ()."""
    d = x - target
    return reduce_rows(weight * (d * d), reduction, weight.sum())


def weighted_mse_loss_backward(
    dy: Tensor, x: Tensor, target: Tensor, weight: Tensor, reduction: str, needs=EVERY
) -> tuple[Tensor | None, ...]:
    """dy (...) or (), x and target (...), weight as x -> dx and dtarget (...), dweight as x."""
    d = x - target
    dx, dtarget = error_gradients(dy, 2 * d, reduction, weight.sum(), needs, weight)
    return dx, dtarget, (weight_gradient(dy, d * d, reduction, weight) if "weight" in needs else None)


weighted_mse_loss = Op(
    weighted_mse_loss_forward,
    weighted_mse_loss_backward,
    outputs="y",
    grads="x target weight",
    autocast={"cuda": "float32"},
)


# Absolute error -----------------------------------------------------------------------------------------------


def l1_loss_forward(x: Tensor, target: Tensor, reduction: str) -> Tensor:
    """x and target broadcast to (...) -> y (...) or ()."""
    d = x - target
    return reduce_rows(d.abs(), reduction, d.numel())


def l1_loss_backward(
    dy: Tensor, x: Tensor, target: Tensor, reduction: str, needs=EVERY
) -> tuple[Tensor | None, ...]:
    """dy (...) or (), x and target (...) -> dx and dtarget (...)."""
    d = x - target
    return error_gradients(dy, d.sign(), reduction, d.numel(), needs)


l1_loss = Op(l1_loss_forward, l1_loss_backward, outputs="y", grads="x target", autocast=FLOAT32)


def weighted_l1_loss_forward(x: Tensor, target: Tensor, weight: Tensor, reduction: str) -> Tensor:
    """x and target broadcast to (...), weight as x -> y (...) or ()."""
    return reduce_rows(weight * (x - target).abs(), reduction, weight.sum())


def weighted_l1_loss_backward(
    dy: Tensor, x: Tensor, target: Tensor, weight: Tensor, reduction: str, needs=EVERY
) -> tuple[Tensor | None, ...]:
    """dy (...) or (), x and target (...), weight as x -> dx and dtarget (...), dweight as x."""
    d = x - target
    dx, dtarget = error_gradients(dy, d.sign(), reduction, weight.sum(), needs, weight)
    return dx, dtarget, (weight_gradient(dy, d.abs(), reduction, weight) if "weight" in needs else None)


weighted_l1_loss = Op(
    weighted_l1_loss_forward,
    weighted_l1_loss_backward,
    outputs="y",
    grads="x target weight",
    autocast={"cuda": "float32"},
)


# Huber's loss -------------------------------------------------------------------------------------------------


def _huber(d: Tensor, delta: float) -> Tensor:
    size = d.abs()
    return torch.where(size <= delta, 0.5 * d * d, delta * (size - 0.5 * delta))


def huber_loss_forward(x: Tensor, target: Tensor, weight: Tensor | None, delta: float, reduction: str) -> Tensor:
    """x and target broadcast to (...), weight as x -> y (...) or ()."""
    rows = _huber(x - target, delta)
    return reduce_rows(rows if weight is None else weight * rows, reduction, rows.numel())


def huber_loss_backward(
    dy: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, delta: float, reduction: str, needs=EVERY
) -> tuple[Tensor | None, ...]:
    """dy (...) or (), x and target (...), weight as x -> dx and dtarget (...), dweight as x."""
    d = x - target
    dx, dtarget = error_gradients(dy, d.clamp(-delta, delta), reduction, d.numel(), needs, weight)
    dweight = row_gradient(dy, reduction, d.numel()) * _huber(d, delta) if "weight" in needs else None
    return dx, dtarget, dweight


def _huber_kernel_backward(dy, x, target, weight, delta, reduction, needs):
    return (*_either(aten.huber_loss_backward(dy, x, target, REDUCTIONS.index(reduction), delta), needs), None)


huber_loss = Op(
    huber_loss_forward,
    huber_loss_backward,
    outputs="y",
    grads="x target weight",
    kernel=Kernel(
        lambda x, target, weight, delta, reduction: aten.huber_loss(x, target, REDUCTIONS.index(reduction), delta),
        _huber_kernel_backward,
        usable=lambda x, target, weight, *constants: weight is None and _same_shape(x, target),
    ),
    autocast=FLOAT32,
)


def smooth_l1_loss_forward(x: Tensor, target: Tensor, beta: float, reduction: str) -> Tensor:
    """x and target broadcast to (...), beta > 0 -> y (...) or ()."""
    d = x - target
    return reduce_rows(_huber(d, beta) / beta, reduction, d.numel())


def smooth_l1_loss_backward(
    dy: Tensor, x: Tensor, target: Tensor, beta: float, reduction: str, needs=EVERY
) -> tuple[Tensor | None, ...]:
    """dy (...) or (), x and target (...) -> dx and dtarget (...)."""
    d = x - target
    return error_gradients(dy, (d / beta).clamp(-1, 1), reduction, d.numel(), needs)


def _smooth_l1_kernel_backward(dy, x, target, beta, reduction, needs):
    return _either(aten.smooth_l1_loss_backward(dy, x, target, REDUCTIONS.index(reduction), beta), needs)


smooth_l1_loss = Op(
    smooth_l1_loss_forward,
    smooth_l1_loss_backward,
    outputs="y",
    grads="x target",
    kernel=Kernel(
        lambda x, target, beta, reduction: aten.smooth_l1_loss(x, target, REDUCTIONS.index(reduction), beta),
        _smooth_l1_kernel_backward,
        usable=_same_shape,
    ),
    autocast=FLOAT32,
)

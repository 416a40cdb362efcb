"""Losses that are the negative logarithm of a likelihood, or a divergence of one distribution from another.

Index legend: `n` elements. x is what is predicted of an element, t the target, w its weight (1 if not given):

    binary_cross_entropy                x a probability: -t log x - (1 - t) log(1 - x)
    binary_cross_entropy_with_logits    x a logit: the same of σ(x), with a weight v for what is positive
                                        (1 - t) x + l s(-x),  l = 1 + (v - 1) t,  s(x) = log(1 + eˣ) = -log σ(-x)
    kl_div                              x = log q, the divergence of q from t: t (log t - x);
                                        where t is log p: eᵗ (t - x)
    gaussian_nll_loss                   x a mean, V = max(var, ε): ½ (log V + (x - t)² / V),  + ½ log 2π if full
    poisson_nll_loss                    x the logarithm of a rate: eˣ - t x;  or a rate: x - t log(x + ε);
                                        if full, and t > 1, + t log t - t + ½ log 2πt, which is Stirling's log t!

Each is of one element alone, so with g[n] the gradient that reaches loss[n] (dy, divided as the mean divides),

    dx = g w ∂f/∂x          dtarget = g w ∂f/∂t

    binary_cross_entropy                ∂x  (x - t) / (x (1 - x))               ∂t  log(1 - x) - log x
      with_logits (s' = σ)              ∂x  1 - t - l σ(-x)                     ∂t  -x + (v - 1) s(-x)
    kl_div                              ∂x  -t                                  ∂t  log t + 1 - x
      of log p                          ∂x  -eᵗ                                 ∂t  eᵗ (t - x + 1)
    gaussian_nll_loss                   ∂x  (x - t) / V                         ∂t  -∂x
                                        ∂var  ½ (1 - (x - t)² / V) / V
    poisson_nll_loss                    ∂x  eˣ - t                              ∂t  -x
      of a rate                         ∂x  1 - t / (x + ε)                     ∂t  -log(x + ε)
      full, t > 1                                                               ∂t  + log t + 1 / 2t

Where a probability is 0 or 1 a logarithm is kept from falling under -100, and x (1 - x) from falling under 1e-12,
as torch's are: the loss is large there, but a number. As with torch, var gets the gradient of V, even under ε.

The inputs are kept, and nothing else: all the above is of them.

Sources: Kullback and Leibler, "On information and sufficiency", 1951; Nix and Weigend, "Estimating the mean and
variance of the target probability distribution", 1994 (gaussian_nll_loss).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bptools.ops._core import EVERY, Kernel, Op, outside_transforms
from bptools.ops._reduction import REDUCTIONS, reduce_rows, row_gradient

aten = torch.ops.aten

FLOAT32 = {"cpu": "float32", "cuda": "float32"}


def weighted(rows: Tensor, weight: Tensor | None) -> Tensor:
    """rows (...), weight broadcasts with them -> (...)."""
    return rows if weight is None else weight * rows


# Binary cross entropy -----------------------------------------------------------------------------------------


def binary_cross_entropy_forward(x: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """x and target (...), weight broadcasts to it -> y (...) or ()."""
    log_x, log_rest = x.log().clamp_min(-100), torch.log1p(-x).clamp_min(-100)
    return reduce_rows(weighted(-target * log_x - (1 - target) * log_rest, weight), reduction, x.numel())


def binary_cross_entropy_backward(
    dy: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, reduction: str, needs=EVERY
) -> tuple[Tensor | None, ...]:
    """dy (...) or (), x and target (...), weight -> dx and dtarget (...)."""
    dx = dtarget = None
    g = weighted(row_gradient(dy, reduction, x.numel()), weight)
    if "x" in needs:
        dx = g * (x - target) / (x * (1 - x)).clamp_min(1e-12)
    if "target" in needs:
        dtarget = g * (torch.log1p(-x).clamp_min(-100) - x.log().clamp_min(-100))
    return dx, dtarget


def _bce_kernel_backward(dy, x, target, weight, reduction, needs):
    dx = dtarget = None
    if "x" in needs:
        dx = aten.binary_cross_entropy_backward(dy, x, target, weight, REDUCTIONS.index(reduction))
    if "target" in needs:
        _, dtarget = binary_cross_entropy_backward(dy, x, target, weight, reduction, {"target"})
    return dx, dtarget


binary_cross_entropy = Op(
    binary_cross_entropy_forward,
    binary_cross_entropy_backward,
    outputs="y",
    grads="x target",
    keep_for={"target": "x"},
    kernel=Kernel(
        lambda x, target, weight, reduction: aten.binary_cross_entropy(
            x, target, weight, REDUCTIONS.index(reduction)
        ),
        _bce_kernel_backward,
        usable=outside_transforms,
    ),
    autocast={"cpu": "float32"},  # on CUDA torch's refuses to run under autocast, and so does ours
)


def logit_rows(x: Tensor, target: Tensor, pos_weight: Tensor | None) -> Tensor:
    """The cross entropy of σ(x): x and target (...), pos_weight broadcasts to it -> (...)."""
    return (1 - target) * x - _log_weight(target, pos_weight) * F.logsigmoid(x)


def logit_slope(x: Tensor, target: Tensor, pos_weight: Tensor | None) -> Tensor:
    """Its derivative with respect to x: (...) -> (...)."""
    return 1 - target - _log_weight(target, pos_weight) * torch.sigmoid(-x)


def logit_target_slope(x: Tensor, pos_weight: Tensor | None) -> Tensor:
    """Its derivative with respect to target: (...) -> (...)."""
    return -x if pos_weight is None else (1 - pos_weight) * F.logsigmoid(x) - x


def _log_weight(target: Tensor, pos_weight: Tensor | None) -> Tensor | int:
    return 1 if pos_weight is None else 1 + (pos_weight - 1) * target


def binary_cross_entropy_with_logits_forward(
    x: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str
) -> Tensor:
    """x and target (...), weight and pos_weight broadcast to it -> y (...) or ()."""
    return reduce_rows(weighted(logit_rows(x, target, pos_weight), weight), reduction, x.numel())


def binary_cross_entropy_with_logits_backward(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    needs=EVERY,
) -> tuple[Tensor | None, ...]:
    """dy (...) or (), x and target (...), weight and pos_weight -> dx and dtarget (...)."""
    g = weighted(row_gradient(dy, reduction, x.numel()), weight)
    dx = g * logit_slope(x, target, pos_weight) if "x" in needs else None
    dtarget = g * logit_target_slope(x, pos_weight) if "target" in needs else None
    return dx, dtarget


binary_cross_entropy_with_logits = Op(
    binary_cross_entropy_with_logits_forward,
    binary_cross_entropy_with_logits_backward,
    outputs="y",
    grads="x target",
    keep_for={"target": "x"},
    autocast=FLOAT32,
)


# Kullback-Leibler divergence ----------------------------------------------------------------------------------


def kl_div_forward(x: Tensor, target: Tensor, log_target: bool, reduction: str) -> Tensor:
    """x and target (n, ...) -> y (n, ...) or (); "batchmean" divides the sum by n."""
    rows = target.exp() * (target - x) if log_target else torch.special.xlogy(target, target) - target * x
    return reduce_rows(rows, *_divisor(target, reduction))


def kl_div_backward(
    dy: Tensor, x: Tensor, target: Tensor, log_target: bool, reduction: str, needs=EVERY
) -> tuple[Tensor | None, ...]:
    """dy (n, ...) or (), x and target (n, ...) -> dx and dtarget (n, ...)."""
    g = row_gradient(dy, *_divisor(target, reduction))
    dx = dtarget = None
    if "x" in needs:
        dx = -g * (target.exp() if log_target else target)
    if "target" in needs:
        dtarget = g * (target.exp() * (target - x + 1) if log_target else target.log() + 1 - x)
    return dx, dtarget


def _divisor(target: Tensor, reduction: str) -> tuple[str, int]:
    """The reduction, with "batchmean" as a mean of another number, and what a mean divides by."""
    if reduction == "batchmean":
        return "mean", target.shape[0] if target.dim() else 1
    return reduction, target.numel()


kl_div = Op(
    kl_div_forward,
    kl_div_backward,
    outputs="y",
    grads="x target",
    keep_for={"x": "target"},
    autocast=FLOAT32,
)


# Gaussian and Poisson likelihood ------------------------------------------------------------------------------


def gaussian_nll_loss_forward(
    x: Tensor, target: Tensor, var: Tensor, full: bool, eps: float, reduction: str
) -> Tensor:
    """x, target and var broadcast to (...) -> y (...) or ()."""
    v, d = var.clamp_min(eps), x - target
    rows = 0.5 * (v.log() + d * d / v)
    if full:
        rows = rows + 0.9189385332046727  # ½ log 2π
    return reduce_rows(rows, reduction, rows.numel())


def gaussian_nll_loss_backward(
    dy: Tensor, x: Tensor, target: Tensor, var: Tensor, eps: float, reduction: str, needs=EVERY
) -> tuple[Tensor | None, ...]:
    """dy (...) or (), x, target and var broadcast to (...) -> dx, dtarget and dvar (...)."""
    dx = dvar = None
    v, d = var.clamp_min(eps), x - target
    slope = d / v
    g = row_gradient(dy, reduction, slope.numel())
    if "x" in needs or "target" in needs:
        dx = g * slope
    if "var" in needs:
        dvar = g * (0.5 * (1 - d * slope) / v)
    return (dx if "x" in needs else None), (-dx if "target" in needs else None), dvar


gaussian_nll_loss = Op(
    gaussian_nll_loss_forward,
    gaussian_nll_loss_backward,
    outputs="y",
    grads="x target var",
    autocast={"cuda": "float32"},
)


def poisson_nll_loss_forward(
    x: Tensor, target: Tensor, log_input: bool, full: bool, eps: float, reduction: str
) -> Tensor:
    """x and target (...) -> y (...) or ()."""
    rows = x.exp() - target * x if log_input else x - target * (x + eps).log()
    if full:
        t = torch.where(target > 1, target, 1)  # so that no logarithm of 0 or less is differentiated
        stirling = t * t.log() - t + 0.5 * (2 * math.pi * t).log()
        rows = rows + torch.where(target > 1, stirling, 0)
    return reduce_rows(rows, reduction, rows.numel())


def poisson_nll_loss_backward(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    log_input: bool,
    full: bool,
    eps: float,
    reduction: str,
    needs=EVERY,
) -> tuple[Tensor | None, ...]:
    """dy (...) or (), x and target (...) -> dx and dtarget (...)."""
    g = row_gradient(dy, reduction, x.numel())
    dx = dtarget = None
    if "x" in needs:
        dx = g * (x.exp() - target if log_input else 1 - target / (x + eps))
    if "target" in needs:
        slope = -x if log_input else -(x + eps).log()
        if full:
            t = torch.where(target > 1, target, 1)
            slope = slope + torch.where(target > 1, t.log() + 0.5 / t, 0)
        dtarget = g * slope
    return dx, dtarget


poisson_nll_loss = Op(
    poisson_nll_loss_forward,
    poisson_nll_loss_backward,
    outputs="y",
    grads="x target",
    autocast=FLOAT32,
)

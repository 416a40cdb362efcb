"""Elementwise activations made of pieces: straight ones, and the parabola of hardswish.

As in activation.py, y = f(x) and dx = dy f'(x). Where f' has y in it below, y alone is kept, and else x.

    hardtanh     clamp(x, min, max)                   f' = [min < y < max]
    relu6        clamp(x, 0, 6)                       hardtanh from 0 to 6
    hardsigmoid  clamp(x + 3, 0, 6) / 6               f' = [0 < y < 1] / 6
    hardswish    x clamp(x + 3, 0, 6) / 6             f' = 0 to x = -3, from x = 3 on 1, x/3 + 1/2 between
    threshold    x if x > t else v                    f' = [y > t] for v <= t, [x > t] else
    hardshrink   x if |x| > λ else 0                  f' = [|y| > λ]
    softshrink   x - λ, x + λ, or 0 if |x| <= λ       f' = [y ≠ 0]
    prelu        x if x > 0 else w x                  f' = 1 if x > 0 else w,  dw = Σ dy min(x, 0)
    rrelu        s x                                  f' = s

At a kink we follow torch. prelu's w is learned, one number for all or one for each channel, and the sum is over
all elements that share it. rrelu's s is 1 where x > 0, and elsewhere a number between lower and upper, drawn for
each element before the op: y is then linear in x, and s alone is kept.

Sources: Collobert 2004 (hardtanh); Krizhevsky 2010 (relu6); Howard et al., arXiv 1905.02244 (hardswish and
hardsigmoid); Donoho 1995 (softshrink, hardshrink); He et al., arXiv 1502.01852 (prelu); Xu et al., arXiv
1505.00853 (rrelu).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Kernel, Op, outside_transforms
from bptools.ops.activation import pointwise

aten = torch.ops.aten


def hardtanh_forward(x: Tensor, min_val: float, max_val: float) -> Tensor:
    """x (...) -> y (...)."""
    return x.clamp(min_val, max_val)


def hardtanh_backward(dy: Tensor, y: Tensor, min_val: float, max_val: float, needs=EVERY) -> tuple[Tensor]:
    """dy, y (...) -> dx (...)."""
    return (torch.where((y <= min_val) | (y >= max_val), 0, dy),)


hardtanh = pointwise(
    hardtanh_forward,
    hardtanh_backward,
    kernel=Kernel(
        aten.hardtanh, lambda dy, y, min_val, max_val, needs: (aten.hardtanh_backward(dy, y, min_val, max_val),)
    ),
)


def hardsigmoid_forward(x: Tensor) -> Tensor:
    """x (...) -> y (...)."""
    return (x + 3).clamp(0, 6) / 6


def hardsigmoid_backward(dy: Tensor, y: Tensor, needs=EVERY) -> tuple[Tensor]:
    """dy, y (...) -> dx (...)."""
    return (torch.where((y > 0) & (y < 1), dy / 6, 0),)


hardsigmoid = pointwise(
    hardsigmoid_forward,
    hardsigmoid_backward,
    kernel=Kernel(aten.hardsigmoid, lambda dy, y, needs: (aten.hardtanh_backward(dy, y, 0, 1).div_(6),)),
)


def hardswish_forward(x: Tensor) -> Tensor:
    """x (...) -> y (...)."""
    return x * ((x + 3).clamp(0, 6) / 6)


def hardswish_backward(dy: Tensor, x: Tensor, needs=EVERY) -> tuple[Tensor]:
    """dy, x (...) -> dx (...)."""
    between = torch.where(x < 3, dy * (x / 3 + 0.5), dy)
    return (torch.where(x <= -3, 0, between),)


hardswish = pointwise(
    hardswish_forward,
    hardswish_backward,
    kernel=Kernel(aten.hardswish, lambda dy, x, needs: (aten.hardswish_backward(dy, x),)),
)


def threshold_forward(x: Tensor, threshold: float, value: float) -> Tensor:
    """x (...) -> y (...)."""
    return torch.where(x <= threshold, value, x)


def threshold_backward(dy: Tensor, y: Tensor, threshold: float, needs=EVERY) -> tuple[Tensor]:
    """dy, y (...) -> dx (...), for a value of at most the threshold."""
    return (torch.where(y <= threshold, 0, dy),)


threshold = pointwise(
    threshold_forward,
    threshold_backward,
    kernel=Kernel(aten.threshold, lambda dy, y, threshold, needs: (aten.threshold_backward(dy, y, threshold),)),
)


def raised_threshold_backward(dy: Tensor, x: Tensor, threshold: float, needs=EVERY) -> tuple[Tensor]:
    """dy, x (...) -> dx (...), for any value."""
    return threshold_backward(dy, x, threshold)


raised_threshold = pointwise(
    threshold_forward,
    raised_threshold_backward,
    kernel=Kernel(aten.threshold, lambda dy, x, threshold, needs: (aten.threshold_backward(dy, x, threshold),)),
)


def hardshrink_forward(x: Tensor, lambd: float) -> Tensor:
    """x (...) -> y (...)."""
    return torch.where(x.abs() <= lambd, 0, x)


def hardshrink_backward(dy: Tensor, y: Tensor, lambd: float, needs=EVERY) -> tuple[Tensor]:
    """dy, y (...) -> dx (...)."""
    return (torch.where(y.abs() <= lambd, 0, dy),)


hardshrink = pointwise(
    hardshrink_forward,
    hardshrink_backward,
    kernel=Kernel(aten.hardshrink, lambda dy, y, lambd, needs: (aten.hardshrink_backward(dy, y, lambd),)),
)


def softshrink_forward(x: Tensor, lambd: float) -> Tensor:
    """x (...), lambd of at least 0 -> y (...)."""
    return x - x.clamp(-lambd, lambd)


def softshrink_backward(dy: Tensor, y: Tensor, needs=EVERY) -> tuple[Tensor]:
    """dy, y (...) -> dx (...)."""
    return (torch.where(y == 0, 0, dy),)


softshrink = pointwise(
    softshrink_forward,
    softshrink_backward,
    kernel=Kernel(aten.softshrink, lambda dy, y, needs: (aten.hardshrink_backward(dy, y, 0),)),
)


def prelu_forward(x: Tensor, weight: Tensor) -> Tensor:
    """x (n, c, ...), weight () or (c, 1...) -> y (n, c, ...)."""
    return torch.where(x > 0, x, weight * x)


def prelu_backward(dy: Tensor, x: Tensor, weight: Tensor, needs=EVERY) -> tuple[Tensor | None, ...]:
    """dy, x (n, c, ...), weight () or (c, 1...) -> dx, and dw (n, c, ...), which is still to be summed."""
    dx = torch.where(x > 0, dy, weight * dy) if "x" in needs else None
    return dx, (torch.where(x > 0, 0, dy * x) if "weight" in needs else None)


def _prelu_kernel_backward(dy, x, weight, needs):
    if "x" in needs and "weight" in needs:
        return aten._prelu_kernel_backward(dy, x, weight)
    return prelu_backward(dy, x, weight, needs)


prelu = Op(
    prelu_forward,
    prelu_backward,
    outputs="y",
    grads="x weight",
    keep_for={"weight": "x"},
    kernel=Kernel(aten._prelu_kernel, _prelu_kernel_backward, usable=outside_transforms),
    autocast={"cpu": "lower", "cuda": "lower"},
)


def draw_slopes(x: Tensor, lower: float, upper: float) -> Tensor:
    """x (...) -> slope (...): 1 where x > 0, elsewhere uniform numbers, those that torch's rrelu would draw."""
    if not outside_transforms():  # ATen's has no rule for vmap, but draws these very numbers
        drawn = lower + (upper - lower) * torch.rand(x.numel(), dtype=torch.float64, device=x.device)
        place = (x <= 0).flatten().cumsum(0) - 1  # one for each that is not positive, in their order
        return torch.where(x <= 0, drawn[place].reshape(x.shape), 1).to(x.dtype)
    return aten.rrelu_with_noise_functional(x.detach(), torch.zeros_like(x), lower, upper, True)[1]


def rrelu_forward(x: Tensor, slope: Tensor) -> Tensor:
    """x and slope (...) -> y (...)."""
    return x * slope


def rrelu_backward(dy: Tensor, slope: Tensor, needs=EVERY) -> tuple[Tensor]:
    """dy and slope (...) -> dx (...)."""
    return (dy * slope,)


# In the input's own precision, as torch: a product has no sum to be careful with.
rrelu = pointwise(rrelu_forward, rrelu_backward, kernel=Kernel(rrelu_forward, rrelu_backward))

"""Dropout: each element is zeroed with probability p, and the others grow so that the mean stays.

    y = x keep / (1 - p)        dx = dy keep / (1 - p)        keep = 1 with probability 1 - p, else 0

keep is drawn once, before the op, and is a constant of it. It alone is kept, at one byte an element (torch keeps
1 / (1 - p) or 0 in the dtype of x); neither x nor y is. Its dtype is uint8, which is cast to floating numbers in a
quarter of the time that bool takes.

Drawing outside the op has two reasons. The op is then a function, so it gives the same result each time that it is
run; and under torch.vmap the draw is seen where it happens, so that `randomness` means what it says.

What is dropped together shares one number of keep, which has size 1 in the other dimensions: a channel in
dropout1d to dropout3d, (n, c, 1...), and a sample in stochastic depth, (n, 1...).

**Alpha dropout.** After selu, an activation at its lowest is not 0 but s = -λα = -1.7581. So what is dropped
becomes s, and an affine map restores mean 0 and variance 1:

    y = a (x keep + s (1 - keep)) - a s p           dx = dy a keep          a = 1 / √((1 - p) (1 + p s²))

Of x with mean 0 and variance 1, the bracket has mean p s and variance (1 - p) + p s² - p² s² = (1 - p) (1 + p s²).

Sources: Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR 15, 2014;
Tompson et al., arXiv 1411.4280 (of channels); Huang et al., arXiv 1603.09382 (stochastic depth); Klambauer et al.,
arXiv 1706.02515 (alpha dropout).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Kernel, Op, outside_transforms
from bptools.ops.activation import SELU_ALPHA, SELU_SCALE

LOWEST = -SELU_SCALE * SELU_ALPHA


def draw(keep: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """An empty tensor of bytes (...) -> keep (...): on the CPU the numbers that torch's dropout would draw."""
    if p == 1:
        return torch.zeros_like(keep)
    if not outside_transforms():  # the one way in which vmap knows each kind of randomness
        return torch.bernoulli(torch.empty(keep.shape, dtype=torch.uint8, device=keep.device), p=1 - p)
    return keep.bernoulli_(1 - p, generator=generator)  # in the order of keep's memory, as torch


def dropout_factor(x: Tensor, keep: Tensor, p: float) -> Tensor:
    """keep / (1 - p), as keep (...), in the dtype of x, rounded as torch rounds it; 0 for p = 1."""
    scale = x.new_ones(()) / (1 - p if p < 1 else 1)
    return keep.to(x.dtype) * scale


def dropout_forward(x: Tensor, keep: Tensor, p: float) -> Tensor:
    """x (...), keep as x or 1 in some dimensions -> y (...)."""
    return x * dropout_factor(x, keep, p)


def dropout_backward(dy: Tensor, keep: Tensor, p: float, needs=EVERY) -> tuple[Tensor]:
    """dy (...), keep as in the forward -> dx (...)."""
    return (dy * dropout_factor(dy, keep, p),)


dropout = Op(
    dropout_forward,
    dropout_backward,
    outputs="y",
    grads="x",
    # In the input's own precision, as torch: a product by 0 or by one constant has no sum to be careful with.
    kernel=Kernel(dropout_forward, dropout_backward),
)


def alpha_dropout_forward(x: Tensor, keep: Tensor, p: float) -> Tensor:
    """x (...), keep as x or 1 in some dimensions, p below 1 -> y (...)."""
    a = _alpha_scale(p)
    return torch.where(keep > 0, a * x, a * LOWEST) - a * LOWEST * p


def alpha_dropout_backward(dy: Tensor, keep: Tensor, p: float, needs=EVERY) -> tuple[Tensor]:
    """dy (...), keep as in the forward -> dx (...)."""
    return (dy * (_alpha_scale(p) * keep.to(dy.dtype)),)


def _alpha_scale(p: float) -> float:
    return 1 / math.sqrt((1 - p) * (1 + p * (LOWEST * LOWEST)))


alpha_dropout = Op(alpha_dropout_forward, alpha_dropout_backward, outputs="y", grads="x")

"""Dropout: each element is zeroed with probability p, and the others grow so that the mean stays.

    y = x keep / (1 - p)        dx = dy keep / (1 - p)        keep = 1 with probability 1 - p, else 0

keep is drawn once, before the op, and is a constant of it. It alone is kept, at one byte an element (torch keeps
1 / (1 - p) or 0 in the dtype of x); neither x nor y is. Its dtype is uint8, which is cast to floating numbers in a
quarter of the time that bool takes.

Drawing outside the op has two reasons. The op is then a function, so it gives the same result each time that it is
run; and under torch.vmap the draw is seen where it happens, so that `randomness` means what it says.

Source: Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR 15, 2014.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Kernel, Op


def draw(keep: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """An empty tensor of bytes (...) -> keep (...): on the CPU the numbers that torch's dropout would draw."""
    if p == 1:
        return torch.zeros_like(keep)
    if torch._C._are_functorch_transforms_active():  # the one way in which vmap knows each kind of randomness
        return torch.bernoulli(torch.empty(keep.shape, dtype=torch.uint8, device=keep.device), p=1 - p)
    return keep.bernoulli_(1 - p, generator=generator)  # in the order of keep's memory, as torch


def dropout_factor(x: Tensor, keep: Tensor, p: float) -> Tensor:
    """keep / (1 - p) (...) in the dtype of x, rounded as torch rounds it; 0 for p = 1."""
    scale = x.new_ones(()) / (1 - p if p < 1 else 1)
    return keep.to(x.dtype) * scale


def dropout_forward(x: Tensor, keep: Tensor, p: float) -> Tensor:
    """x and keep (...) -> y (...)."""
    return x * dropout_factor(x, keep, p)


def dropout_backward(dy: Tensor, keep: Tensor, p: float, needs=EVERY) -> tuple[Tensor]:
    """dy and keep (...) -> dx (...)."""
    return (dy * dropout_factor(dy, keep, p),)


dropout = Op(
    dropout_forward,
    dropout_backward,
    outputs="y",
    grads="x",
    # In the input's own precision, as torch: a product by 0 or by one constant has no sum to be careful with.
    kernel=Kernel(dropout_forward, dropout_backward),
)

"""Unfold and fold: from an image to what its windows see, and back.

Index legend: `i` places in the image, `p` windows, `k` places in a window (taps), each over height and width;
images and channels are not written. Window p sees place i(p,k) = p s + k d - a through tap k (see `_windows`).

    unfold      t[k,p] = x[i(p,k)]                                 0 in the padding
    fold        x[i]   = Σ_(p,k : i(p,k) = i) t[k,p]               what falls on the padding is dropped

Unfold copies each number to the windows that see it; fold sums over these. So they are each other's transpose, and
the gradient of one is the other of its output's gradient:

    unfold      dx = fold(dt)                   fold        dt = unfold(dx)

Fold is no inverse: fold(unfold(x)) is x times the number of windows that see a place. Nothing is kept but sizes.

Source: Chellapilla, Puri and Simard, "High performance convolutional neural networks for document processing",
2006 (a convolution as unfold and a matrix product).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Kernel, Op
from bptools.ops._windows import Ints, folded_windows, output_size, windows

aten = torch.ops.aten


def unfold_forward(x: Tensor, kernel_size: Ints, dilation: Ints, padding: Ints, stride: Ints) -> Tensor:
    """x (n, c, *size) -> t (n, c k, p): the taps and windows in row-major order."""
    out = output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    t = windows(x, kernel_size, stride, padding, dilation, out)
    return t.reshape(x.shape[0], x.shape[1] * math.prod(kernel_size), math.prod(out))


def unfold_backward(
    dt: Tensor, kernel_size: Ints, dilation: Ints, padding: Ints, stride: Ints, x_shape: torch.Size, needs=EVERY
) -> tuple[Tensor]:
    """dt (n, c k, p) -> dx (n, c, *size)."""
    return (fold_forward(dt, x_shape[2:], kernel_size, dilation, padding, stride),)


def fold_forward(t: Tensor, size: Ints, kernel_size: Ints, dilation: Ints, padding: Ints, stride: Ints) -> Tensor:
    """t (n, c k, p) -> x (n, c, *size)."""
    out, taps = output_size(size, kernel_size, stride, padding, dilation), math.prod(kernel_size)
    t = t.reshape(t.shape[0], t.shape[1] // taps, taps, *out)
    return folded_windows(t, kernel_size, stride, padding, dilation, size)


def fold_backward(
    dx: Tensor, size: Ints, kernel_size: Ints, dilation: Ints, padding: Ints, stride: Ints, needs=EVERY
) -> tuple[Tensor]:
    """dx (n, c, *size) -> dt (n, c k, p)."""
    return (unfold_forward(dx, kernel_size, dilation, padding, stride),)


unfold = Op(
    unfold_forward,
    unfold_backward,
    outputs="t",
    grads="x",
    kernel=Kernel(
        aten.im2col,
        lambda dt, kernel_size, dilation, padding, stride, x_shape, needs: (
            aten.col2im(dt, x_shape[2:], kernel_size, dilation, padding, stride),
        ),
    ),
    trace="kernel",
)

fold = Op(
    fold_forward,
    fold_backward,
    outputs="x",
    grads="t",
    kernel=Kernel(
        aten.col2im,
        lambda dx, size, kernel_size, dilation, padding, stride, needs: (
            aten.im2col(dx, kernel_size, dilation, padding, stride),
        ),
    ),
    trace="kernel",
)

"""Pooling over two spatial dimensions: the largest, or the average, of what each window sees.

Index legend: `i` places in the input, `p` places in the output, `k` places in the window (taps), each over height
and width. Images and channels are not written: each is pooled on its own. Let t[p,k] be what output p sees through
tap k (see `_windows`).

**Max pooling.** The largest is one of the inputs, so the gradient goes there and nowhere else:

    m[p] = the place of the largest t[p,k]         y[p] = x[m[p]]         dx[i] = Σ_(p : m[p] = i) dy[p]

The places m alone are kept. Where windows overlap, one input may be the largest of several, and their gradients
add up. Ties and NaN are torch's: of equal numbers the first is taken; NaN is the largest, and of several the last.

**Average pooling** is linear. With S[p,i] = 1 where p sees i, else 0, and n[p] the divisor (how many places p
sees, with or without the padding, or a given number):

    y[p] = Σ_i S[p,i] x[i] / n[p]                  dx[i] = Σ_p S[p,i] dy[p] / n[p]

Both are sums over windows, of x and, transposed, of dy / n. Nothing is kept but sizes.

**Adaptive average pooling** is linear too, with windows of unequal sizes. Along a dimension, I places are cut into
P equal parts, and a part averages the places that it touches. Part p is the interval [p/P, (p+1)/P) and place i is
[i/I, (i+1)/I), so

    S[p,i] = 1 where the two intervals overlap, else 0:   ⌊p I / P⌋ <= i < ⌈(p+1) I / P⌉

To overlap is mutual: Sᵀ is the S of P places cut into I parts. So what sums x also sums dy / n, for dx.

Sources: Scherer, Müller and Behnke, "Evaluation of pooling operations in convolutional architectures", 2010; He et
al., arXiv 1406.4729 (windows that adapt).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bptools.ops._core import EVERY, Kernel, Op
from bptools.ops._windows import Ints, output_size, transposed_windows, windows

aten = torch.ops.aten


def _like_input(dy: Tensor, x_shape: torch.Size) -> Tensor:
    """An x in dy's memory format, for kernels that read nothing of it but that: if it can be, of one number."""
    n, c, h, w = x_shape
    if dy.stride(1) < dy.stride(3):  # channels last
        return dy.new_empty(n, h, w, c).permute(0, 3, 1, 2)
    return dy.new_empty(1, 1, 1, 1).expand(x_shape) if dy.device.type == "cpu" else dy.new_empty(x_shape)


# Max pooling --------------------------------------------------------------------------------------------------


def max_pool2d_forward(
    x: Tensor, kernel_size: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    """x (n, c, *size) -> y (n, c, *out), indices (n, c, *out): the places of y in the flattened size."""
    size = x.shape[2:]
    out = output_size(size, kernel_size, stride, padding, dilation, ceil_mode)
    places = torch.arange(math.prod(size), device=x.device).view(1, 1, *size)
    places = windows(places, kernel_size, stride, padding, dilation, out, fill=-1)  # (1, 1, k, *out)
    t = windows(x, kernel_size, stride, padding, dilation, out, fill=-math.inf)  # (n, c, k, *out)
    taps = torch.arange(t.shape[2], device=x.device)[:, None, None]
    largest = (t == t.amax(2, keepdim=True)) & (places >= 0)  # all False where the largest is NaN
    rank = torch.where(t.isnan(), taps, torch.where(largest, -taps, -len(taps)))
    indices = places.expand(t.shape).gather(2, rank.argmax(2, keepdim=True)).squeeze(2)
    y = _flat(x).gather(-1, _flat(indices)).reshape(indices.shape)
    return y, indices


def max_pool2d_backward(
    dy: Tensor,
    indices: Tensor,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    ceil_mode: bool,
    x_shape: torch.Size,
    needs=EVERY,
) -> tuple[Tensor]:
    """dy, indices (n, c, *out) -> dx (n, c, *size)."""
    dx = dy.new_zeros(*x_shape[:2], math.prod(x_shape[2:]))
    return (dx.scatter_add(-1, _flat(indices), _flat(dy)).reshape(x_shape),)


def _flat(t: Tensor) -> Tensor:
    """(..., height, width) -> (..., height width)."""
    return t.reshape(*t.shape[:-2], t.shape[-2] * t.shape[-1])


def _max_kernel_backward(dy, indices, kernel_size, stride, padding, dilation, ceil_mode, x_shape, needs):
    return (
        aten.max_pool2d_with_indices_backward(
            dy, _like_input(dy, x_shape), kernel_size, stride, padding, dilation, ceil_mode, indices
        ),
    )


max_pool2d = Op(
    max_pool2d_forward,
    max_pool2d_backward,
    outputs="y indices",
    grads="x",
    kernel=Kernel(aten.max_pool2d_with_indices, _max_kernel_backward),
    trace="kernel",
)


# Average pooling ----------------------------------------------------------------------------------------------


def avg_pool2d_forward(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """x (n, c, *size) -> y (n, c, *out)."""
    size = x.shape[2:]
    out = output_size(size, kernel_size, stride, padding, (1, 1), ceil_mode)
    sums = windows(x, kernel_size, stride, padding, (1, 1), out).sum(2)
    return sums / _divisor(x, kernel_size, stride, padding, count_include_pad, divisor_override, size, out)


def avg_pool2d_backward(
    dy: Tensor,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    x_shape: torch.Size,
    needs=EVERY,
) -> tuple[Tensor]:
    """dy (n, c, *out) -> dx (n, c, *size)."""
    size, out = x_shape[2:], dy.shape[2:]
    g = dy / _divisor(dy, kernel_size, stride, padding, count_include_pad, divisor_override, size, out)
    return (transposed_windows(g, kernel_size, stride, padding, (1, 1), size).sum(2),)


def _divisor(
    like: Tensor,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    count_include_pad: bool,
    divisor_override: int | None,
    size: Ints,
    out: Ints,
) -> Tensor | int:
    """n[p], (1, 1, *out): how many ones a window sees. What hangs over the padding counts for nothing."""
    if divisor_override is not None:
        return divisor_override
    h, w = padding
    seen = F.pad(like.new_ones(1, 1, *size), (w, w, h, h), value=float(count_include_pad))
    return windows(seen, kernel_size, stride, (0, 0), (1, 1), out).sum(2)


def _avg_kernel_backward(
    dy, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, x_shape, needs
):
    options = kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    return (aten.avg_pool2d_backward(dy, _like_input(dy, x_shape), *options),)


avg_pool2d = Op(
    avg_pool2d_forward,
    avg_pool2d_backward,
    outputs="y",
    grads="x",
    kernel=Kernel(aten.avg_pool2d, _avg_kernel_backward),
    trace="kernel",
)


# Adaptive average pooling -------------------------------------------------------------------------------------


def adaptive_avg_pool2d_forward(x: Tensor, output_size: Ints) -> Tensor:
    """x (n, c, *size) -> y (n, c, *output_size)."""
    return _overlap_sum(x, output_size) / _overlap_sum(x.new_ones(1, 1, *x.shape[2:]), output_size)


def adaptive_avg_pool2d_backward(dy: Tensor, output_size: Ints, x_shape: torch.Size, needs=EVERY) -> tuple[Tensor]:
    """dy (n, c, *output_size) -> dx (n, c, *size)."""
    size = x_shape[2:]
    return (_overlap_sum(dy / _overlap_sum(dy.new_ones(1, 1, *size), output_size), size),)


def _overlap_sum(x: Tensor, parts: Ints) -> Tensor:
    """x (n, c, *size) -> S x (n, c, *parts): each part the sum of the places that it overlaps."""
    height, width = parts
    return _overlap_sum_1d(_overlap_sum_1d(x.mT, height).mT, width)


def _overlap_sum_1d(x: Tensor, parts: int) -> Tensor:
    """x (..., i) -> S x (..., p)."""
    size, shortest = x.shape[-1], x.shape[-1] // max(parts, 1)
    p = torch.arange(parts, device=x.device)[:, None]
    i = p * size // max(parts, 1) + torch.arange(shortest + 2, device=x.device)  # (p, k): from ⌊p I / P⌋ on
    i = i.masked_fill(i * parts >= (p + 1) * size, size)  # what lies behind part p: to the zero that is appended
    return F.pad(x, (0, 1))[..., i].sum(-1)


adaptive_avg_pool2d = Op(
    adaptive_avg_pool2d_forward,
    adaptive_avg_pool2d_backward,
    outputs="y",
    grads="x",
    kernel=Kernel(
        aten.adaptive_avg_pool2d,
        lambda dy, output_size, x_shape, needs: (
            aten._adaptive_avg_pool2d_backward(dy, _like_input(dy, x_shape)),
        ),
        usable=lambda x, output_size: 0 not in (*output_size, *x.shape[-3:]),  # ATen has no backward for these
    ),
    trace="kernel",
)

"""Pooling by averages and power averages, over two or three spatial dimensions.

Index legend: `i` places in the input, `p` places in the output, `k` places in the window (taps), each over all
spatial dimensions. Images and channels are not written: each is pooled on its own.

**Average pooling** is linear. With S[p,i] = 1 where p sees i, else 0, and n[p] the divisor (how many places p
sees, with or without the padding, or a given number):

    y[p] = Σ_i S[p,i] x[i] / n[p]                  dx[i] = Σ_p S[p,i] dy[p] / n[p]

Both are sums over windows, of x and, transposed, of dy / n. Nothing is kept but sizes.

**Adaptive average pooling** is linear too, with windows of unequal sizes. Along a dimension, I places are cut into
P equal parts, and a part averages the places that it touches. Part p is the interval [p/P, (p+1)/P) and place i is
[i/I, (i+1)/I), so

    S[p,i] = 1 where the two intervals overlap, else 0:   ⌊p I / P⌋ <= i < ⌈(p+1) I / P⌉

To overlap is mutual: Sᵀ is the S of P places cut into I parts. So what sums x also sums dy / n, for dx.

**Power average pooling** of norm q, for windows of K taps, is a norm of what a window sees, by way of the average
m[p] of x^q:

    u = x^q                                        dx = q x^(q-1) du
    y = (K m)^(1/q)                                dm = K / q (K m)^(1/q-1) dy

Where m = 0 the norm has a kink, and as in torch the gradient there is 0. For q = 1 this is K times the average;
for q → ∞ the largest |x|, which is max pooling of

    y = |x|                                        dx = sign(x) dy

Sources: LeCun et al., "Handwritten digit recognition with a back-propagation network", 1990; He et al., arXiv
1406.4729 (adaptive); Sermanet, Chintala and LeCun, arXiv 1204.3968 (power averages).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bptools.ops._core import EVERY, HALF, Kernel, Op
from bptools.ops._windows import Ints, like_input, output_size, transposed_windows, windows

aten = torch.ops.aten


# Average pooling ----------------------------------------------------------------------------------------------


def avg_pool_forward(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """x (n, c, *size) -> y (n, c, *out)."""
    size, once = x.shape[2:], [1] * len(kernel_size)
    out = output_size(size, kernel_size, stride, padding, once, ceil_mode)
    sums = windows(x, kernel_size, stride, padding, once, out).sum(2)
    return sums / _divisor(x, kernel_size, stride, padding, count_include_pad, divisor_override, size, out)


def avg_pool_backward(
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
    return (transposed_windows(g, kernel_size, stride, padding, [1] * len(size), size).sum(2),)


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
    ends = [a for a in reversed(padding) for _ in range(2)]
    seen = F.pad(like.new_ones(1, 1, *size), ends, value=float(count_include_pad))
    none, once = [0] * len(size), [1] * len(size)
    return windows(seen, kernel_size, stride, none, once, out).sum(2)


def _kernel_forward(x, *window):
    return (aten.avg_pool2d if x.dim() == 4 else aten.avg_pool3d)(x, *window)


def _kernel_backward(
    dy, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, x_shape, needs
):
    options = kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    kernel = aten.avg_pool2d_backward if len(x_shape) == 4 else aten.avg_pool3d_backward
    return (kernel(dy, like_input(dy, x_shape), *options),)


avg_pool2d, avg_pool3d = (
    Op(
        avg_pool_forward,
        avg_pool_backward,
        outputs="y",
        grads="x",
        kernel=Kernel(
            _kernel_forward,
            _kernel_backward,  # of volumes, ATen's for the CPU knows no half precision
            usable=lambda x, *args: not (x.dim() == 5 and x.dtype in HALF and x.device.type == "cpu"),
        ),
        trace="kernel",
        autocast=policy,
    )
    for policy in (None, {"cpu": "float32"})  # as torch's
)


# Adaptive average pooling -------------------------------------------------------------------------------------


def adaptive_avg_pool_forward(x: Tensor, output_size: Ints) -> Tensor:
    """x (n, c, *size) -> y (n, c, *output_size)."""
    return _overlap_sum(x, output_size) / _overlap_sum(x.new_ones(1, 1, *x.shape[2:]), output_size)


def adaptive_avg_pool_backward(dy: Tensor, output_size: Ints, x_shape: torch.Size, needs=EVERY) -> tuple[Tensor]:
    """dy (n, c, *output_size) -> dx (n, c, *size)."""
    size = x_shape[2:]
    return (_overlap_sum(dy / _overlap_sum(dy.new_ones(1, 1, *size), output_size), size),)


def _overlap_sum(x: Tensor, parts: Ints) -> Tensor:
    """x (n, c, *size) -> S x (n, c, *parts): each part the sum of the places that it overlaps."""
    for dim, p in enumerate(parts, start=2):
        x = _overlap_sum_1d(x.transpose(dim, -1), p).transpose(dim, -1)
    return x


def _overlap_sum_1d(x: Tensor, parts: int) -> Tensor:
    """x (..., i) -> S x (..., p)."""
    size, shortest = x.shape[-1], x.shape[-1] // max(parts, 1)
    p = torch.arange(parts, device=x.device)[:, None]
    i = p * size // max(parts, 1) + torch.arange(shortest + 2, device=x.device)  # (p, k): from ⌊p I / P⌋ on
    i = i.masked_fill(i * parts >= (p + 1) * size, size)  # what lies behind part p: to the zero that is appended
    return F.pad(x, (0, 1))[..., i].sum(-1)


def _adaptive_kernel_forward(x, output_size):
    return (aten.adaptive_avg_pool2d if x.dim() == 4 else aten._adaptive_avg_pool3d)(x, output_size)


def _adaptive_kernel_backward(dy, output_size, x_shape, needs):
    two = dy.dim() == 4
    kernel = aten._adaptive_avg_pool2d_backward if two else aten._adaptive_avg_pool3d_backward
    return (kernel(dy, like_input(dy, x_shape)),)


adaptive_avg_pool2d, adaptive_avg_pool3d = (
    Op(
        adaptive_avg_pool_forward,
        adaptive_avg_pool_backward,
        outputs="y",
        grads="x",
        kernel=Kernel(
            _adaptive_kernel_forward,
            _adaptive_kernel_backward,
            usable=lambda x, output_size: 0 not in (*output_size, *x.shape[1:]),  # ATen has no backward for these
        ),
        trace="kernel",
        autocast=policy,
    )
    for policy in (None, {"cpu": "float32"})  # as torch's
)


# What power average pooling does before and after -------------------------------------------------------------


def power_forward(x: Tensor, norm_type: float, dtype: torch.dtype) -> Tensor:
    """x (...) -> y (...), of half precision in a dtype that holds it."""
    return x**norm_type


def power_backward(dy: Tensor, x: Tensor, norm_type: float, needs=EVERY) -> tuple[Tensor]:
    """dy, x (...) -> dx (...)."""
    return (dy * norm_type * x ** (norm_type - 1),)


power = Op(power_forward, power_backward, outputs="y", grads="x", result="dtype")


def root_forward(x: Tensor, taps: int, norm_type: float, dtype: torch.dtype) -> Tensor:
    """x (...) -> y (...) in dtype."""
    return ((taps * x) ** (1 / norm_type)).to(dtype)


def root_backward(dy: Tensor, x: Tensor, taps: int, norm_type: float, needs=EVERY) -> tuple[Tensor]:
    """dy, x (...) -> dx (...)."""
    flat = x == 0
    slope = torch.where(flat, 1, taps * x) ** (1 / norm_type - 1)
    return (torch.where(flat, 0, dy * taps / norm_type * slope),)


root = Op(root_forward, root_backward, outputs="y", grads="x")


def absolute_forward(x: Tensor) -> Tensor:
    """x (...) -> y (...)."""
    return x.abs()


def absolute_backward(dy: Tensor, x: Tensor, needs=EVERY) -> tuple[Tensor]:
    """dy, x (...) -> dx (...)."""
    return (dy * x.sign(),)


absolute = Op(absolute_forward, absolute_backward, outputs="y", grads="x")

"""Convolution over 1, 2 or 3 spatial dimensions, and the transposed convolution.

Index legend: `n` images, `g` groups, `c` input channels of a group, `o` output channels of a group, `i` places in
the input, `p` places in the output, `k` places in the kernel (taps), the last three over all spatial dimensions.
Let i(p,k) = p s + k d - a be the place that output p sees through tap k (see `_windows`):

    t[n,g,ck,p] = x[n,g,c,i(p,k)]                                   0 in the padding
    y[n,g,o,p]  = Σ_ck w[g,o,ck] t[n,g,ck,p] + b[g,o]

which is a matrix product for each image and group. Each gradient is the sum over the indices that its variable
does not have:

    db[g,o]     = Σ_np dy[n,g,o,p]                                  reads nothing
    dw[g,o,ck]  = Σ_np dy[n,g,o,p] t[n,g,ck,p]                      reads x alone
    dx[n,g,c,i] = Σ_ok w[g,o,ck] u[n,g,ok,i]                        reads w alone

where u[n,g,ok,i] is dy at the output that sees place i through tap k, and 0 if there is none. So dw correlates x
with dy, and dx is the transposed convolution; u comes with the taps in the opposite order, and meets the flipped
kernel. A frozen weight costs no activation memory: x is kept only for dw, and w only for dx.

**The transposed convolution** is that dx, taken as a forward. Now x lives at the places p and y at the places i; c
counts the channels of x, o those of y, and w is laid out as the weight of the convolution from y's shape to x's
which it transposes. With u[n,g,ck,i] what place i receives of x[n,g,c] through tap k, and t[n,g,ok,p] what place p
sees of dy[n,g,o] through it:

    y[n,g,o,i]  = Σ_ck w[g,c,ok] u[n,g,ck,i] + b[g,o]
    db[g,o]     = Σ_ni dy[n,g,o,i]
    dx[n,g,c,p] = Σ_ok w[g,c,ok] t[n,g,ok,p]                        a convolution of dy; reads w alone
    dw[g,c,ok]  = Σ_np x[n,g,c,p] t[n,g,ok,p]                       reads x alone

as <x, conv(dy)> = <convᵀ(x), dy>. A stride s > 1 maps s sizes of y to one of x: the output padding a⁺ picks one of
them, i = (p - 1) s - 2 a + (k - 1) d + 1 + a⁺. Places that no tap reaches hold the bias.

Sources: LeCun et al., "Backpropagation applied to handwritten zip code recognition", 1989; Zeiler et al.,
"Deconvolutional networks", 2010; Dumoulin and Visin, arXiv 1603.07285 (the transposed convolution).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Kernel, Op
from bptools.ops._windows import Ints, output_size, transposed_output_size, transposed_windows, windows

aten = torch.ops.aten


def convolution_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
) -> Tensor:
    """x (n, c, *size), weight (o, c / groups, *kernel_size), bias (o,) -> y (n, o, *out)."""
    kernel_size = weight.shape[2:]
    out = output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    t = _columns(windows(x, kernel_size, stride, padding, dilation, out), groups)
    w = weight.reshape(groups, weight.shape[0] // groups, t.shape[2])  # (g, o, c k)
    y = (w @ t).reshape(x.shape[0], weight.shape[0], *out)
    return y if bias is None else y + bias.reshape(bias.shape[0], *[1] * len(out))


def convolution_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    x_shape: torch.Size,
    weight_shape: torch.Size,
    needs=EVERY,
) -> tuple[Tensor | None, ...]:
    """dy (n, o, *out), x and weight as in the forward -> dx (n, c, *size), dw like weight, db (o,)."""
    dx = dw = db = None
    n, o, *out = dy.shape
    (_, c, *kernel_size), size = weight_shape, x_shape[2:]
    if "x" in needs:
        u = _columns(transposed_windows(dy, kernel_size, stride, padding, dilation, size), groups)
        w = weight.reshape(groups, o // groups, c, math.prod(kernel_size)).flip(-1)  # (g, o, c, k)
        dx = (w.transpose(1, 2).reshape(groups, c, u.shape[2]) @ u).reshape(x_shape)
    if "weight" in needs:
        t = _columns(windows(x, kernel_size, stride, padding, dilation, out), groups)
        dw = dy.reshape(n, groups, o // groups, math.prod(out)) @ t.mT  # (n, g, o, c k)
        dw = dw.sum(0).reshape(weight_shape)
    if "bias" in needs:
        db = dy.sum((0, *range(2, dy.dim())))
    return dx, dw, db


def _columns(t: Tensor, groups: int) -> Tensor:
    """(n, g c, k, *places) -> (n, g, c k, places)."""
    n, channels, k, *places = t.shape
    return t.reshape(n, groups, channels // groups * k, math.prod(places))


def _kernel_forward(x, weight, bias, stride, padding, dilation, groups):
    x, weight = _regular(x), _regular(weight)
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, (0,) * len(stride), groups)


def _kernel_backward(dy, x, weight, stride, padding, dilation, groups, x_shape, weight_shape, needs):
    numbers = stride, padding, dilation, False, [0] * len(stride), groups
    return _gradients(dy, x, weight, x_shape, weight_shape, numbers, needs)


def _gradients(dy, x, weight, x_shape, weight_shape, numbers, needs):
    """What ATen's backward gives, of a convolution or a transposed one."""
    if x is None and weight is None:
        return None, None, dy.sum((0, *range(2, dy.dim())))
    # Of the one that was not kept the kernel reads nothing but the shape.
    x = dy.new_empty(x_shape) if x is None else _regular(x)
    weight = dy.new_empty(weight_shape) if weight is None else _regular(weight)
    mask = ["x" in needs, "weight" in needs, "bias" in needs]
    return aten.convolution_backward(dy, x, weight, [dy.shape[1]], *numbers, mask)


def _regular(t: Tensor) -> Tensor:
    """t, seen with the strides of its layout in dimensions of size 1 too, where any stride finds the numbers.

    By those strides ATen tells a channels-last tensor from a contiguous one, but not alike for x and weight: on a
    CPU (torch 2.15) it then reads the one in the order of the other, or raises. Nothing is copied.
    """
    sizes, strides, seen = t.shape, t.stride(), None
    if not torch.compiler.is_compiling() and 1 not in sizes:  # Dynamo cannot ask it of a size that is data
        return t
    for order in (range(t.dim()), (0, *range(2, t.dim()), 1)):  # contiguous, and channels last
        regular, step = [0] * t.dim(), 1
        for i in reversed(order):
            regular[i], step = step, step * sizes[i]
        if strides == tuple(regular):
            return t
        fits = (a == b or size == 1 for a, b, size in zip(strides, regular, sizes, strict=True))
        if seen is None and all(fits):
            seen = regular
    return t if seen is None else t.as_strided(sizes, seen)


convolution = Op(
    convolution_forward,
    convolution_backward,
    outputs="y",
    grads="x weight bias",
    keep_for={"x": "weight", "weight": "x"},
    # ATen gives no output channels where there are no input channels, not the bias alone.
    kernel=Kernel(_kernel_forward, _kernel_backward, usable=lambda x, *_: x.shape[1] > 0),
    trace="kernel",
    autocast={"cpu": "lower", "cuda": "lower"},
)


# The transposed convolution -----------------------------------------------------------------------------------


def conv_transpose_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    output_padding: Ints,
    dilation: Ints,
    groups: int,
) -> Tensor:
    """x (n, c, *size), weight (c, o / groups, *kernel_size), bias (o,) -> y (n, o, *out)."""
    (c, o, *kernel_size), size = weight.shape, x.shape[2:]
    out = transposed_output_size(size, kernel_size, stride, padding, output_padding, dilation)
    u = _columns(transposed_windows(x, kernel_size, stride, padding, dilation, out), groups)
    w = weight.reshape(groups, c // groups, o, math.prod(kernel_size)).flip(-1)  # (g, c, o, k), as u has its taps
    y = w.transpose(1, 2).reshape(groups, o, u.shape[2]) @ u
    y = y.reshape(x.shape[0], groups * o, *out)
    return y if bias is None else y + bias.reshape(bias.shape[0], *[1] * len(out))


def conv_transpose_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Ints,
    padding: Ints,
    output_padding: Ints,
    dilation: Ints,
    groups: int,
    x_shape: torch.Size,
    weight_shape: torch.Size,
    needs=EVERY,
) -> tuple[Tensor | None, ...]:
    """dy (n, o, *out), x and weight as in the forward -> dx (n, c, *size), dw like weight, db (o,)."""
    dx = dw = db = None
    n, c, *size = x_shape
    if "x" in needs or "weight" in needs:
        t = _columns(windows(dy, weight_shape[2:], stride, padding, dilation, size), groups)  # (n, g, o k, p)
    if "x" in needs:
        dx = (weight.reshape(groups, c // groups, t.shape[2]) @ t).reshape(x_shape)
    if "weight" in needs:
        dw = x.reshape(n, groups, c // groups, math.prod(size)) @ t.mT  # (n, g, c, o k)
        dw = dw.sum(0).reshape(weight_shape)
    if "bias" in needs:
        db = dy.sum((0, *range(2, dy.dim())))
    return dx, dw, db


def _transposed_kernel_forward(x, weight, bias, stride, padding, output_padding, dilation, groups):
    x, weight = _regular(x), _regular(weight)
    return torch.convolution(x, weight, bias, stride, padding, dilation, True, output_padding, groups)


def _transposed_kernel_backward(
    dy, x, weight, stride, padding, output_padding, dilation, groups, x_shape, weight_shape, needs
):
    numbers = stride, padding, dilation, True, output_padding, groups
    return _gradients(dy, x, weight, x_shape, weight_shape, numbers, needs)


conv_transpose = Op(
    conv_transpose_forward,
    conv_transpose_backward,
    outputs="y",
    grads="x weight bias",
    keep_for={"x": "weight", "weight": "x"},
    kernel=Kernel(_transposed_kernel_forward, _transposed_kernel_backward),
    trace="kernel",
    autocast={"cpu": "lower", "cuda": "lower"},
)

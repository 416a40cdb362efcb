"""Padding: more places at either end of the last dimensions, or fewer.

Index legend: `i` places in the input of one dimension, I in all, `p` places in the output, of which `a` lie before
the input; the dimensions are padded one after another, and the others are not written.

**Constant.** A negative number of places crops instead:

    y[p] = x[p - a]  where  0 <= p - a < I,  else v                dx[i] = dy[i + a]  where there is one, else 0

So the gradient is dy padded by as many places with the sign turned, and zeros: what was added is cropped, and what
was cropped has not been seen.

**Reflect, replicate, circular.** What lies outside repeats the input: output p shows the place m[p], which is the
input mirrored at its first and last place, the nearest of these two, or the input again. Each place collects the
gradients of all outputs that show it:

    y[p] = x[m[p]]                                                 dx[i] = Σ_(p : m[p] = i) dy[p]

    reflect     m[p] = (I - 1) - | (I - 1) - |p - a| |
    replicate   m[p] = p - a, at least 0 and at most I - 1
    circular    m[p] = (p - a) mod I                               after negative numbers have cropped x

All are linear with constant coefficients: nothing is kept but sizes.

Source: none; the transpose of a copy.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bptools.ops import _taps
from bptools.ops._core import EVERY, Kernel, Op
from bptools.ops._windows import Ints

aten = torch.ops.aten


def _sides(dims: int, pad: Ints) -> Iterator[tuple[int, int, int]]:
    """Which dimension, and how many places before and after it: torch begins with the last one."""
    return zip(reversed(range(dims)), pad[::2], pad[1::2], strict=False)


# Constant -----------------------------------------------------------------------------------------------------


def constant_pad_forward(x: Tensor, pad: Ints, value: float) -> Tensor:
    """x (..., *size), pad (before, after) for each of the last dimensions, the last first -> y (..., *out)."""
    y = x.clone()
    for dim, before, after in _sides(x.dim(), pad):
        size = y.shape[dim] + min(before, 0) + min(after, 0)
        y = y.narrow(dim, max(-before, 0), size)
        ends = [y.new_full((*y.shape[:dim], max(n, 0), *y.shape[dim + 1 :]), value) for n in (before, after)]
        y = torch.cat([ends[0], y, ends[1]], dim)
    return y


def constant_pad_backward(dy: Tensor, pad: Ints, value: float, needs=EVERY) -> tuple[Tensor]:
    """dy (..., *out) -> dx (..., *size)."""
    return (constant_pad_forward(dy, [-n for n in pad], 0),)


constant_pad = Op(
    constant_pad_forward,
    constant_pad_backward,
    outputs="y",
    grads="x",
    kernel=Kernel(
        aten.constant_pad_nd,
        lambda dy, pad, value, needs: (aten.constant_pad_nd(dy, [-n for n in pad]),),
    ),
    trace="kernel",
)


# What repeats the input ---------------------------------------------------------------------------------------


def repeating_pad_forward(x: Tensor, pad: Ints, mode: str) -> Tensor:
    """x (..., *size), pad as above, mode "reflect", "replicate" or "circular" -> y (..., *out)."""
    for dim, before, after in _sides(x.dim(), pad):
        x = _taps.gather(x, dim, _places(mode, x.shape[dim], before, after, x.device))
    return x


def repeating_pad_backward(dy: Tensor, pad: Ints, mode: str, x_shape: torch.Size, needs=EVERY) -> tuple[Tensor]:
    """dy (..., *out) -> dx (..., *size)."""
    for dim, before, after in _sides(dy.dim(), pad):
        dy = _taps.scatter(dy, dim, x_shape[dim], _places(mode, x_shape[dim], before, after, dy.device))
    return (dy,)


def _places(mode: str, size: int, before: int, after: int, device: torch.device) -> Tensor:
    """m (p,): the place of the input that each output shows."""
    if mode == "circular":
        left = size + min(before, 0) + min(after, 0)  # what is cropped does not come round again
        return torch.arange(-max(before, 0), left + max(after, 0), device=device) % left - min(before, 0)
    i, last = torch.arange(-before, size + after, device=device), size - 1
    return i.clamp(0, last) if mode == "replicate" else last - (last - i.abs()).abs()


_FORWARD = {
    "reflect": (aten.reflection_pad1d, aten.reflection_pad2d, aten.reflection_pad3d),
    "replicate": (aten.replication_pad1d, aten.replication_pad2d, aten.replication_pad3d),
}
_BACKWARD = {
    "reflect": (aten.reflection_pad1d_backward, aten.reflection_pad2d_backward, aten.reflection_pad3d_backward),
    "replicate": (
        aten.replication_pad1d_backward,
        aten.replication_pad2d_backward,
        aten.replication_pad3d_backward,
    ),
}


def _kernel_backward(dy, pad, mode, x_shape, needs):
    like = dy.new_empty(1).expand(x_shape)  # of x the kernel reads nothing but the shape
    return (_BACKWARD[mode][len(pad) // 2 - 1](dy, like, pad),)


_REPEATING = {
    "outputs": "y",
    "grads": "x",
    "kernel": Kernel(
        lambda x, pad, mode: _FORWARD[mode][len(pad) // 2 - 1](x, pad),
        _kernel_backward,
        usable=lambda x, pad, mode: mode != "circular",  # which ATen composes of copies
    ),
}
repeating_pad = Op(repeating_pad_forward, repeating_pad_backward, **_REPEATING)
# Torch's autocast on a CPU wants float32 of most of these kernels.
repeating_pad_in_float32 = Op(
    repeating_pad_forward, repeating_pad_backward, **_REPEATING, autocast={"cpu": "float32"}
)

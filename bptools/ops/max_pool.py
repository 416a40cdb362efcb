"""Pooling by the largest number, over two or three spatial dimensions, and what undoes it.

Index legend: `i` places in the input, `p` places in the output, `k` places in the window (taps), each over all
spatial dimensions. Images and channels are not written: each is pooled on its own. The place i[p,k] is what output
p sees through tap k, if that is in the input.

    m[p] = the i[p,k] where x is largest           y[p] = x[m[p]]         dx[i] = Σ_(p : m[p] = i) dy[p]

The largest is one of the inputs, so the gradient goes there and nowhere else. The places m alone are kept. Where
windows overlap, one input may be the largest of several, and their gradients add up. Ties and NaN are torch's: of
equal numbers the first is taken; NaN is the largest, and of several the last.

Three kinds of pooling differ in what a window sees, along each dimension of I places and P outputs:

    max pooling             i = p s + k d - a          a grid of stride s, dilation d and padding a, see `_windows`
    adaptive                ⌊p I / P⌋ <= i < ⌈(p+1) I / P⌉         the places that part p of P equal parts touches
    fractional              i = ⌊(p + u) r⌋ - ⌊u r⌋ + k            steps of r = (I - K) / (P - 1) from a random u,
                                                                  and the last window ends with the input

**Unpooling** puts x[p] at the place m[p] and 0 elsewhere: the transpose of the above. Its own gradient is the
reverse, dx[p] = dy[m[p]].

Sources: Scherer, Müller and Behnke, "Evaluation of pooling operations in convolutional architectures", 2010; He et
al., arXiv 1406.4729 (adaptive); Graham, arXiv 1412.6071 (fractional); Zeiler and Fergus, arXiv 1311.2901
(unpooling).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Kernel, Op, outside_transforms
from bptools.ops._windows import Ints, like_input, output_size, windows

aten = torch.ops.aten


def _largest(x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, c, *size), places (n or 1, c or 1, k, *out), -1 for none -> y, indices (n, c, *out)."""
    x, places = _flat(x), places.expand(*x.shape[:2], *places.shape[2:])
    taps, out = places.shape[2], places.shape[3:]
    seen = places.reshape(*places.shape[:3], math.prod(out))  # (n, c, k, p)
    t = x.gather(2, _flat(seen.clamp_min(0))).reshape(seen.shape)
    t = torch.where(seen < 0, -math.inf, t)
    order = torch.arange(taps, device=x.device)[:, None]
    largest = (t == t.amax(2, keepdim=True)) & (seen >= 0)  # all False where the largest is NaN
    rank = torch.where(t.isnan(), order, torch.where(largest, -order, -taps))
    indices = seen.gather(2, rank.argmax(2, keepdim=True)).squeeze(2)  # (n, c, p)
    y = x.gather(2, indices)
    return y.reshape(*y.shape[:2], *out), indices.reshape(*y.shape[:2], *out)


def _flat(t: Tensor) -> Tensor:
    """(n, c, *size) -> (n, c, places)."""
    return t.reshape(*t.shape[:2], math.prod(t.shape[2:]))  # flatten has no rule for batched gradients


def _scatter(dy: Tensor, indices: Tensor, x_shape: torch.Size) -> Tensor:
    """dy, indices (n, c, *out) -> dx (n, c, *size)."""
    dx = dy.new_zeros(*x_shape[:2], math.prod(x_shape[2:]))
    return dx.scatter_add(2, _flat(indices), _flat(dy)).reshape(x_shape)


def _grid(lines: Sequence[Tensor], size: Ints) -> Tensor:
    """For each dimension the places (..., k, p) along it, -1 for none -> (..., k, *out) in the flattened size."""
    *batch, _, _ = lines[0].shape
    places, dims = 0, len(size)
    for dim, (line, i) in enumerate(zip(lines, size, strict=True)):
        taps, out = ([n if d == dim else 1 for d in range(dims)] for n in line.shape[-2:])
        line = line.reshape(*batch, *taps, *out)
        places = torch.where((places < 0) | (line < 0), -1, places * i + line) if dim else line
    return places.flatten(len(batch), len(batch) + dims - 1)


# Max pooling --------------------------------------------------------------------------------------------------


def max_pool_forward(
    x: Tensor, kernel_size: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    """x (n, c, *size) -> y (n, c, *out), indices (n, c, *out): the places of y in the flattened size."""
    size = x.shape[2:]
    out = output_size(size, kernel_size, stride, padding, dilation, ceil_mode)
    places = torch.arange(math.prod(size), device=x.device).view(1, 1, *size)
    return _largest(x, windows(places, kernel_size, stride, padding, dilation, out, fill=-1))


def max_pool_backward(
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
    return (_scatter(dy, indices, x_shape),)


def _kernel_forward(x, *window):
    return (aten.max_pool2d_with_indices if x.dim() == 4 else aten.max_pool3d_with_indices)(x, *window)


def _kernel_backward(dy, indices, kernel_size, stride, padding, dilation, ceil_mode, x_shape, needs):
    two = len(x_shape) == 4
    kernel = aten.max_pool2d_with_indices_backward if two else aten.max_pool3d_with_indices_backward
    return (kernel(dy, like_input(dy, x_shape), kernel_size, stride, padding, dilation, ceil_mode, indices),)


max_pool2d, max_pool3d = (
    Op(
        max_pool_forward,
        max_pool_backward,
        outputs="y indices",
        grads="x",
        kernel=Kernel(_kernel_forward, _kernel_backward),
        trace="kernel",
        autocast=policy,
    )
    for policy in (None, {"cpu": "float32"})  # as torch's
)


# Adaptive max pooling -----------------------------------------------------------------------------------------


def adaptive_max_pool_forward(x: Tensor, output_size: Ints) -> tuple[Tensor, Tensor]:
    """x (n, c, *size) -> y and indices (n, c, *output_size)."""
    size = x.shape[2:]
    lines = [_parts(i, parts, x.device) for i, parts in zip(size, output_size, strict=True)]
    return _largest(x, _grid(lines, size)[None, None])


def _parts(size: int, parts: int, device: torch.device) -> Tensor:
    """The places that each of equal parts touches: (k, parts), -1 for none."""
    p = torch.arange(parts, device=device)
    i = p * size // max(parts, 1) + torch.arange(size // max(parts, 1) + 2, device=device)[:, None]
    return i.masked_fill(i * parts >= (p + 1) * size, -1)


def adaptive_max_pool_backward(
    dy: Tensor, indices: Tensor, output_size: Ints, x_shape: torch.Size, needs=EVERY
) -> tuple[Tensor]:
    """dy, indices (n, c, *output_size) -> dx (n, c, *size)."""
    return (_scatter(dy, indices, x_shape),)


def _adaptive_kernel_forward(x, output_size):
    return (aten.adaptive_max_pool2d if x.dim() == 4 else aten.adaptive_max_pool3d)(x, output_size)


def _adaptive_kernel_backward(dy, indices, output_size, x_shape, needs):
    kernel = aten.adaptive_max_pool2d_backward if dy.dim() == 4 else aten.adaptive_max_pool3d_backward
    return (kernel(dy, like_input(dy, x_shape), indices),)


adaptive_max_pool2d, adaptive_max_pool3d = (
    Op(
        adaptive_max_pool_forward,
        adaptive_max_pool_backward,
        outputs="y indices",
        grads="x",
        kernel=Kernel(
            _adaptive_kernel_forward,
            _adaptive_kernel_backward,
            usable=lambda x, output_size: 0 not in output_size,  # ATen has no backward for these
        ),
        trace="kernel",
        autocast=policy,
    )
    for policy in (None, {"cpu": "float32"})  # as torch's
)


# Fractional max pooling ---------------------------------------------------------------------------------------


def fractional_max_pool_forward(
    x: Tensor, samples: Tensor, kernel_size: Ints, output_size: Ints
) -> tuple[Tensor, Tensor]:
    """x (n, c, *size), samples (n, c, dims) from 0 to 1 -> y and indices (n, c, *output_size).

    As in ATen, the samples of two dimensions are for the width and the height; of three, in the order of size.
    """
    size, samples = x.shape[2:], samples.to(x.dtype)
    u = samples.flip(-1) if len(size) == 2 else samples
    lines = []
    for dim, (i, k, parts) in enumerate(zip(size, kernel_size, output_size, strict=True)):
        ratio = (i - k) / max(parts - 1, 1)
        first = u[..., dim, None]  # (n, c, 1)
        start = ((torch.arange(parts, device=x.device) + first) * ratio).long() - (first * ratio).long()
        last = torch.arange(parts, device=x.device) == parts - 1
        start = torch.where(last, i - k, start)  # (n, c, p)
        lines.append(start.unsqueeze(-2) + torch.arange(k, device=x.device)[:, None])
    return _largest(x, _grid(lines, size))


def fractional_max_pool_backward(
    dy: Tensor, indices: Tensor, kernel_size: Ints, output_size: Ints, x_shape: torch.Size, needs=EVERY
) -> tuple[Tensor]:
    """dy, indices (n, c, *output_size) -> dx (n, c, *size)."""
    return (_scatter(dy, indices, x_shape),)


def _fractional_kernel_forward(x, samples, kernel_size, output_size):
    kernel = aten.fractional_max_pool2d if x.dim() == 4 else aten.fractional_max_pool3d
    return kernel(x, kernel_size, output_size, samples.to(x.dtype))


def _fractional_kernel_backward(dy, indices, kernel_size, output_size, x_shape, needs):
    kernel = aten.fractional_max_pool2d_backward if dy.dim() == 4 else aten.fractional_max_pool3d_backward
    return (kernel(dy, like_input(dy, x_shape), kernel_size, output_size, indices),)


fractional_max_pool = Op(
    fractional_max_pool_forward,
    fractional_max_pool_backward,
    outputs="y indices",
    grads="x",
    kernel=Kernel(
        _fractional_kernel_forward,
        _fractional_kernel_backward,
        usable=outside_transforms,
    ),
    trace="kernel",
    autocast={"cpu": "float32"},
)


# Unpooling ----------------------------------------------------------------------------------------------------


def max_unpool_forward(x: Tensor, indices: Tensor, output_size: Ints) -> Tensor:
    """x, indices (n, c, *size) -> y (n, c, *output_size)."""
    y = x.new_zeros(*x.shape[:2], math.prod(output_size))
    return y.scatter(2, _flat(indices), _flat(x)).reshape(*x.shape[:2], *output_size)


def max_unpool_backward(dy: Tensor, indices: Tensor, output_size: Ints, needs=EVERY) -> tuple[Tensor]:
    """dy (n, c, *output_size), indices (n, c, *size) -> dx (n, c, *size)."""
    return (_flat(dy).gather(2, _flat(indices)).reshape(indices.shape),)


max_unpool = Op(max_unpool_forward, max_unpool_backward, outputs="y", grads="x", autocast={"cpu": "float32"})

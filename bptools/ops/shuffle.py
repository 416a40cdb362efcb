"""Shuffles: places and channels change their order, and no number changes.

Index legend: `c` channels, `h` and `w` places, `a` and `b` places within a square of r x r, `g` groups, `n` all
that comes before.

    pixel_shuffle       y[n, c, h r + a, w r + b] = x[n, (c r + a) r + b, h, w]
    pixel_unshuffle     y[n, (c r + a) r + b, h, w] = x[n, c, h r + a, w r + b]
    channel_shuffle     y[n, c G + g, ...] = x[n, g C + c, ...]              G groups of C channels

Each is a permutation, y = P x, of which the gradient is dx = Pᵀ dy = P⁻¹ dy: pixel_shuffle and pixel_unshuffle are
each other's, and so is a channel_shuffle of G groups that of C groups. Nothing is kept.

Sources: Shi et al., arXiv 1609.05158 (pixel_shuffle); Zhang et al., arXiv 1707.01083 (channel_shuffle).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Kernel, Op

aten = torch.ops.aten


def pixel_shuffle_forward(x: Tensor, factor: int) -> Tensor:
    """x (..., c r r, h, w) -> y (..., c, h r, w r)."""
    *n, channels, h, w = x.shape
    y = x.reshape(*n, channels // factor**2, factor, factor, h, w)  # (..., c, a, b, h, w)
    return _permuted(y, (-2, -4, -1, -3)).reshape(*n, channels // factor**2, h * factor, w * factor)


def pixel_unshuffle_forward(x: Tensor, factor: int) -> Tensor:
    """x (..., c, h r, w r) -> y (..., c r r, h, w)."""
    *n, c, height, width = x.shape
    h, w = height // factor, width // factor
    y = x.reshape(*n, c, h, factor, w, factor)  # (..., c, h, a, w, b)
    return _permuted(y, (-3, -1, -4, -2)).reshape(*n, c * factor**2, h, w)


def channel_shuffle_forward(x: Tensor, groups: int) -> Tensor:
    """x (n, g c, ...) -> y (n, c g, ...)."""
    return _exchanged(x, groups, x.shape[1] // groups)


def _permuted(x: Tensor, last: tuple[int, ...]) -> Tensor:
    """x with its last four dimensions in another order, copied: a view that moves nothing would be an alias."""
    x = x.permute(*range(x.dim() - 4), *[x.dim() + i for i in last])
    return x.clone(memory_format=torch.contiguous_format)


def _exchanged(x: Tensor, a: int, b: int) -> Tensor:
    """(n, a b, ...) -> (n, b a, ...)."""
    n, _, *size = x.shape
    x = x.reshape(n, a, b, *size).transpose(1, 2)
    return x.clone(memory_format=torch.contiguous_format).reshape(n, a * b, *size)


def pixel_shuffle_backward(dy: Tensor, factor: int, needs=EVERY) -> tuple[Tensor]:
    """dy (..., c, h r, w r) -> dx (..., c r r, h, w)."""
    return (pixel_unshuffle_forward(dy, factor),)


def pixel_unshuffle_backward(dy: Tensor, factor: int, needs=EVERY) -> tuple[Tensor]:
    """dy (..., c r r, h, w) -> dx (..., c, h r, w r)."""
    return (pixel_shuffle_forward(dy, factor),)


def channel_shuffle_backward(dy: Tensor, groups: int, needs=EVERY) -> tuple[Tensor]:
    """dy (n, c g, ...) -> dx (n, g c, ...)."""
    return (_exchanged(dy, dy.shape[1] // groups, groups),)


def _usable(x: Tensor, factor: int) -> bool:
    """ATen's pixel_unshuffle gives an empty x back as it is, and of 5 dimensions refuses some memory formats."""
    return x.numel() > 0 and x.dim() < 5


pixel_shuffle = Op(
    pixel_shuffle_forward,
    pixel_shuffle_backward,
    outputs="y",
    grads="x",
    kernel=Kernel(
        aten.pixel_shuffle, lambda dy, factor, needs: (aten.pixel_unshuffle(dy, factor),), usable=_usable
    ),
)

pixel_unshuffle = Op(
    pixel_unshuffle_forward,
    pixel_unshuffle_backward,
    outputs="y",
    grads="x",
    kernel=Kernel(
        aten.pixel_unshuffle, lambda dy, factor, needs: (aten.pixel_shuffle(dy, factor),), usable=_usable
    ),
)

channel_shuffle = Op(
    channel_shuffle_forward,
    channel_shuffle_backward,
    outputs="y",
    grads="x",
    kernel=Kernel(
        aten.channel_shuffle,
        lambda dy, groups, needs: (aten.channel_shuffle(dy, dy.shape[1] // groups),),
        usable=lambda x, groups: x.shape[1] > 0,
    ),
)

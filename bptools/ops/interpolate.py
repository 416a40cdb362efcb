"""Interpolation: an image of another size, by 1, 2 or 3 linear maps of one dimension each.

Index legend: `i` places in the input of one dimension, I in all, `p` places in the output, P in all, `k` taps;
images, channels and the other dimensions are not written.

Output p stands at a point s[p] between the places of the input. With h places of the input to one of the output,
h = I / P or one over the given scale, and places that are squares whose outer edges align, or with `align_corners`
their centres,

    s[p] = (p + 1/2) h - 1/2            or            s[p] = p (I - 1) / (P - 1)

and reads the places near it, each with a weight that a filter f gives to its distance (see `_taps`):

    y[p] = Σ_k w[p,k] x[m[p,k]]         dx[i] = Σ_(p,k : m[p,k] = i) w[p,k] dy[p]         w[p,k] = f(m[p,k] - s[p])

    nearest            one tap, at ⌊p h⌋: the square's left edge, as OpenCV has it
    nearest-exact      one tap, at ⌊(p + 1/2) h⌋: the square's centre
    linear             2 taps, f(t) = 1 - |t|
    cubic              4 taps, f(t) = (a + 2) |t|³ - (a + 3) |t|² + 1              |t| <= 1
                              f(t) = a (|t|³ - 5 |t|² + 8 |t| - 4)           1 <= |t| <= 2,  a = -3/4

A tap outside of the input reads the nearest place inside. With `antialias` and h > 1 the filter is made h times as
wide, f(t / h), so that every place of the input is seen; a = -1/2; taps outside are left out, and the weights of
each output divided by their sum. Then there is Lanczos' filter, too: f(t) = sinc(t) sinc(t/3) for |t| <= 3.

The map is constant: nothing is kept but sizes, and the backward is the transpose, dimension by dimension.

Both passes use the same tables, in the input's precision. ATen's do not everywhere (see tests/ops/test_peers.py),
and serve where theirs agree: not where a scale leaves the size as it is (torch copies in one pass then, and goes
by the scale in the other); not with `antialias` to a width of 1; and for the nearest place only where h is a power
of 2, and nothing is rounded.

Sources: Keys, "Cubic convolution interpolation for digital image processing", 1981; Duchon, "Lanczos filtering in
one and two dimensions", 1979.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from bptools.ops import _taps
from bptools.ops._core import EVERY, HALF, Kernel, Op
from bptools.ops._windows import Ints

aten = torch.ops.aten
Scales = tuple[float | None, ...]
REACH = {"linear": 1, "cubic": 2, "lanczos": 3}  # how far a filter reaches to either side


def interpolate_forward(
    x: Tensor, out: Ints, mode: str, align_corners: bool, scales: Scales, antialias: bool
) -> Tensor:
    """x (n, c, *size), mode one of the names above, scales given or None -> y (n, c, *out)."""
    for dim, *table in _tables(x, x.shape[2:], out, mode, align_corners, scales, antialias):
        x = _taps.gather(x, dim, *table)
    return x


def interpolate_backward(
    dy: Tensor,
    out: Ints,
    mode: str,
    align_corners: bool,
    scales: Scales,
    antialias: bool,
    x_shape: torch.Size,
    needs=EVERY,
) -> tuple[Tensor]:
    """dy (n, c, *out) -> dx (n, c, *size)."""
    for dim, *table in _tables(dy, x_shape[2:], out, mode, align_corners, scales, antialias):
        dy = _taps.scatter(dy, dim, x_shape[dim], *table)
    return (dy,)


def _tables(
    like: Tensor, size: Ints, out: Ints, mode: str, align_corners: bool, scales: Scales, antialias: bool
) -> Iterator[tuple[int | Tensor, ...]]:
    """For each dimension the places that outputs read and their weights, (p, k); of one tap: places (p,) alone."""
    image = mode == "nearest" and len(out) == 2
    for dim, (i, o, scale) in enumerate(zip(size, out, scales, strict=True), start=2):
        if align_corners:
            h = (i - 1) / (o - 1) if o > 1 else 0.0
        elif scale is None or (i == o and (antialias or mode == "linear")) or (image and o in (i, 2 * i)):
            h = i / o  # as in torch's forward, the scale gave the size and no more
        else:
            h = 1 / scale
        p = torch.arange(o, dtype=like.dtype, device=like.device)
        edge, centre = p * h, (p + 0.5) * h - 0.5
        if mode.startswith("nearest"):
            yield dim, (edge if mode == "nearest" else (p + 0.5) * h).long().clamp(max=i - 1)
        elif antialias:
            yield dim, *_wide_filter(mode, centre[:, None], h, i)
        else:
            yield dim, *_filter(mode, (edge if align_corners else centre)[:, None], i)


def _filter(mode: str, s: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The taps of a filter at points s (p, 1): places and weights (p, k)."""
    reach = REACH[mode]
    first = s.floor().clamp(max=size - 1)
    near = torch.arange(1 - reach, 1 + reach, device=s.device)  # from ⌊s⌋
    weights = _weigh(mode, near - (s - first), a=-0.75)
    return (first.long() + near).clamp(0, size - 1), weights


def _wide_filter(mode: str, s: Tensor, h: float, size: int) -> tuple[Tensor, Tensor]:
    """The same of a filter that is h times as wide, where that is wider; place `size` is none."""
    width = max(h, 1.0)
    reach = REACH[mode] * width
    first, last = (s - reach + 1).long().clamp(min=0), (s + reach + 1).long().clamp(max=size)
    places = first + torch.arange(2 * math.ceil(reach) + 1, device=s.device)
    weights = torch.where(places < last, _weigh(mode, (places - s) / width, a=-0.5), 0)
    return torch.where(places < last, places, size), weights / weights.sum(1, keepdim=True)


def _weigh(mode: str, t: Tensor, a: float) -> Tensor:
    """f(t), of the same shape."""
    t = t.abs()
    if mode == "linear":
        return (1 - t).clamp(min=0)
    if mode == "lanczos":
        return torch.where(t < 3, torch.sinc(t) * torch.sinc(t / 3), 0)
    inner, outer = ((a + 2) * t - (a + 3)) * t * t + 1, ((t - 5) * t + 8) * t * a - 4 * a
    return torch.where(t <= 1, inner, torch.where(t < 2, outer, 0))


# ATen's kernels -----------------------------------------------------------------------------------------------

_KERNELS = {
    "nearest": ("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
    "nearest-exact": ("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"),
    "linear": ("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"),
    "cubic": (None, "upsample_bicubic2d"),
}
_ANTIALIAS = {
    "linear": "_upsample_bilinear2d_aa",
    "cubic": "_upsample_bicubic2d_aa",
    "lanczos": "_upsample_lanczos2d_aa",
}


def _name(out: Ints, mode: str, antialias: bool) -> str:
    return _ANTIALIAS[mode] if antialias else _KERNELS[mode][len(out) - 1]


def _constants(mode: str, align_corners: bool, scales: Scales) -> tuple[bool | float | None, ...]:
    return scales if mode.startswith("nearest") else (align_corners, *scales)


def _kernel_forward(x, out, mode, align_corners, scales, antialias):
    kernel = getattr(aten, _name(out, mode, antialias))
    return kernel(x, out, *_constants(mode, align_corners, scales))


def _kernel_backward(dy, out, mode, align_corners, scales, antialias, x_shape, needs):
    kernel = getattr(aten, _name(out, mode, antialias) + "_backward")
    return (kernel(dy, out, x_shape, *_constants(mode, align_corners, scales)),)


def _usable(x, out, mode, align_corners, scales, antialias):
    cpu = x.device.type == "cpu"
    if antialias and cpu and (x.dtype in HALF or out[-1] == 1):  # not implemented; its result is wrong
        return False
    if mode == "lanczos" and not (cpu and hasattr(aten, _ANTIALIAS[mode])):  # from torch 2.15 on
        return False
    for i, o, scale in zip(x.shape[2:], out, scales, strict=True):
        h = i / o if scale is None else 1 / scale
        if (i == o and h != 1) or (mode.startswith("nearest") and math.frexp(h)[0] != 0.5):
            return False
    return True


interpolate = Op(
    interpolate_forward,
    interpolate_backward,
    outputs="y",
    grads="x",
    kernel=Kernel(_kernel_forward, _kernel_backward, usable=_usable),
)

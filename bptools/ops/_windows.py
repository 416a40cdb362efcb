"""Windows: what each output of a convolution or a pooling sees.

Index legend: `i` places in the input, `p` places in the output, `k` places in the window (taps), each over all
spatial dimensions; every dimension has a stride s, a padding a and a dilation d. Output p sees through tap k

    place i = p s + k d - a

and a fill value where that lies outside of the input. `windows` lists what each output sees.

Read the other way, place i is seen by output p through tap k if p s = i + a - k d. Let u be dy spread out, dy[p]
at place p s and zeros between; then u[i + a - k d] is the gradient that comes to i through tap k. Count the taps
from the other end, k' = K - 1 - k, and this is u[i + k' d - a'] with a' = (K - 1) d - a: windows again, over u, of
stride 1 and padding a'. `transposed_windows` lists them: what each place of the input receives. Where each tap has
numbers of its own, t[k,p], place i receives Σ_k u_k[i + a - k d], with u_k the spread t[k]: `folded_windows`.

Source: Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", arXiv 1603.07285.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
Ints = Sequence[int]


def output_size(
    size: Ints, kernel_size: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool = False
) -> tuple[int, ...]:
    """How many windows fit in each dimension.

    With `ceil_mode` the last one may hang over the end, if it starts in the input or in the padding before it.
    """
    out = []
    for i, k, s, a, d in zip(size, kernel_size, stride, padding, dilation, strict=True):
        room = i + 2 * a - (k - 1) * d - 1  # places that a window can move by
        last = -(-room // s) if ceil_mode else room // s
        out.append(last if ceil_mode and last * s >= i + a else last + 1)
    return tuple(out)


def transposed_output_size(
    size: Ints, kernel_size: Ints, stride: Ints, padding: Ints, output_padding: Ints, dilation: Ints
) -> tuple[int, ...]:
    """The smallest size that holds so many windows, and output_padding: `output_size` read the other way."""
    numbers = zip(size, kernel_size, stride, padding, output_padding, dilation, strict=True)
    return tuple((o - 1) * s - 2 * a + (k - 1) * d + 1 + more for o, k, s, a, more, d in numbers)


def windows(
    x: Tensor, kernel_size: Ints, stride: Ints, padding: Ints, dilation: Ints, out: Ints, fill: float = 0
) -> Tensor:
    """x (n, c, *size) -> (n, c, k, *out): x at p s + k d - a, the taps numbered in row-major order."""
    pad = []  # begins with the last dimension; negative numbers crop
    for i, k, s, a, d, o in zip(x.shape[2:], kernel_size, stride, padding, dilation, out, strict=True):
        pad = [a, (o - 1) * s + (k - 1) * d + 1 - a - i, *pad]
    x = F.pad(x, [max(n, 0) for n in pad], value=fill)
    x = F.pad(x, [min(n, 0) for n in pad])  # now: more may be cropped than x had
    taps = []
    for tap in itertools.product(*map(range, kernel_size)):
        seen = x
        for dim, (k, s, d, o) in enumerate(zip(tap, stride, dilation, out, strict=True), start=2):
            # not seen[...]: where it takes everything that gives an alias, which gradcheck's vmap refuses
            seen = aten.slice(seen, dim, k * d, k * d + (o - 1) * s + 1, s)
        taps.append(seen)
    return torch.stack(taps, 2)


def transposed_windows(
    dy: Tensor, kernel_size: Ints, stride: Ints, padding: Ints, dilation: Ints, size: Ints
) -> Tensor:
    """dy (n, o, *out) -> (n, o, k, *size): what place i receives through tap K - 1 - k."""
    padding = [(k - 1) * d - a for k, a, d in zip(kernel_size, padding, dilation, strict=True)]
    return windows(_spread(dy, stride), kernel_size, [1] * len(size), padding, dilation, size)


def folded_windows(
    t: Tensor, kernel_size: Ints, stride: Ints, padding: Ints, dilation: Ints, size: Ints
) -> Tensor:
    """t (n, c, k, *out) -> (n, c, *size): the transpose of `windows`, the sum of what each place receives."""
    sums = []
    for t_k, tap in zip(t.unbind(2), itertools.product(*map(range, kernel_size)), strict=True):
        pad = []  # in a row of all the places that windows see, those in the padding too
        for k, taps, d in zip(tap, kernel_size, dilation, strict=True):
            pad = [k * d, (taps - 1 - k) * d, *pad]
        sums.append(F.pad(_spread(t_k, stride), pad))
    x, crop = torch.stack(sums).sum(0), []
    for i, row, a in zip(size, x.shape[2:], padding, strict=True):
        crop = [-a, i + a - row, *crop]
    return F.pad(x, crop)


def _spread(dy: Tensor, stride: Ints) -> Tensor:
    """dy (n, o, *out) -> u (n, o, *out s): dy[p] at place p s, zeros between."""
    for dim, s in enumerate(stride, start=2):
        before, (places, *after) = dy.shape[:dim], dy.shape[dim:]
        dy = F.pad(dy.unsqueeze(dim + 1), [*[0, 0] * len(after), 0, s - 1]).reshape(*before, places * s, *after)
    return dy


def like_input(dy: Tensor, x_shape: torch.Size) -> Tensor:
    """An x in dy's memory format, for kernels that read nothing of it but that: if it can be, of one number."""
    n, c, *size = x_shape
    if dy.stride(1) < dy.stride(-1):  # channels last
        return dy.new_empty(n, *size, c).movedim(-1, 1)
    one = [1] * len(x_shape)
    return dy.new_empty(one).expand(x_shape) if dy.device.type == "cpu" else dy.new_empty(x_shape)

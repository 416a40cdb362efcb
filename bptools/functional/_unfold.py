"""Unfold and fold."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from bptools.functional._checks import per_dimension, shape_of
from bptools.ops import _windows
from bptools.ops import unfold as _unfold


def unfold(
    input: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    stride: int | Sequence[int] = 1,
) -> Tensor:
    """What each window sees of an image, one column a window. Keeps nothing for backward.

    Args:
        input: (n, c, height, width), or the same without n.
        kernel_size: of the window; here and below one number, or one for each dimension.
        dilation: places from one tap of the window to the next.
        padding: zeros at either end.
        stride: places from one window to the next.

    Returns:
        (n, c kernel height kernel width, windows), or the same without n.

    Raises:
        ValueError: if shapes or numbers do not fit.
    """
    if input.dim() not in (3, 4) or 0 in input.shape[-3:]:
        raise ValueError(
            "unfold: input must have shape (n, c, height, width), or the same without n, and only n may be zero, "
            f"got {shape_of(input)}"
        )
    window, _ = _fitting("unfold", shape_of(input)[-2:], kernel_size, dilation, padding, stride)
    x = input if input.dim() == 4 else input.unsqueeze(0)
    t = _unfold.unfold(x, *window)
    return t if x.dim() == input.dim() else t.squeeze(0)


def fold(
    input: Tensor,
    output_size: int | Sequence[int],
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    stride: int | Sequence[int] = 1,
) -> Tensor:
    """An image of the sums of what its windows hold for each place: the transpose of `unfold`.

    Args:
        input: (n, c kernel height kernel width, windows), or the same without n.
        output_size: height and width of the image; here and below one number, or one for each dimension.
        kernel_size: of the window.
        dilation: places from one tap of the window to the next.
        padding: places at either end of the image that windows see beyond it, and that are dropped.
        stride: places from one window to the next.

    Returns:
        (n, c, *output_size), or the same without n.

    Raises:
        ValueError: if shapes or numbers do not fit.
    """
    size = per_dimension("fold", "output_size", output_size, 2, least=1)
    window, out = _fitting("fold", size, kernel_size, dilation, padding, stride)
    taps = math.prod(window[0])
    rows = shape_of(input)[-2:]
    if input.dim() not in (2, 3) or rows[0] == 0 or rows[0] % taps or rows[1] != math.prod(out):
        raise ValueError(
            f"fold: input must have shape (n, {taps} c, {math.prod(out)}), or the same without n, to fit "
            f"output_size {size} and {out} windows, got {shape_of(input)}"
        )
    t = input if input.dim() == 3 else input.unsqueeze(0)
    x = _unfold.fold(t, size, *window)
    return x if t.dim() == input.dim() else x.squeeze(0)


def _fitting(
    name: str,
    size: Sequence[int],
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int],
    padding: int | Sequence[int],
    stride: int | Sequence[int],
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Checked: kernel_size, dilation, padding and stride as pairs, and how many windows fit."""
    kernel_size = per_dimension(name, "kernel_size", kernel_size, 2, least=1)
    dilation = per_dimension(name, "dilation", dilation, 2, least=1)
    padding = per_dimension(name, "padding", padding, 2, least=0)
    stride = per_dimension(name, "stride", stride, 2, least=1)
    out = _windows.output_size(size, kernel_size, stride, padding, dilation)
    if min(out) < 1:
        raise ValueError(
            f"{name}: kernel_size {kernel_size} with dilation {dilation} must fit into the image, got size {size} "
            f"with padding {padding}"
        )
    return (kernel_size, dilation, padding, stride), out

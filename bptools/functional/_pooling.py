"""Pooling."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bptools.functional._checks import is_int, per_dimension, shape_of
from bptools.ops import _windows
from bptools.ops import pooling as _pooling


def max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The largest number that each window sees. Keeps the places of those for backward, and not the input.

    Args:
        input: (n, c, height, width), or the same without n.
        kernel_size: of the window; here and below one number, or one for each dimension.
        stride: places from one window to the next; the kernel size, if None.
        padding: places of -inf at either end, at most half of the kernel size.
        dilation: places from one tap of the window to the next.
        ceil_mode: whether the last window may hang over the end.
        return_indices: whether to return the places too, as numbers of the flattened height and width.

    Returns:
        (n, c, *), or the same without n; with `return_indices` a pair of these.

    Raises:
        ValueError: if shapes or numbers do not fit, or a window would see nothing but padding.
    """
    x, *window = _pooled("max_pool2d", input, kernel_size, stride, padding, dilation, ceil_mode)
    y, indices = _pooling.max_pool2d(x, *window, bool(ceil_mode))
    if x.dim() != input.dim():
        y, indices = y.squeeze(0), indices.squeeze(0)
    return (y, indices) if return_indices else y


def avg_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """The average of what each window sees. Keeps nothing for backward.

    Args:
        input: (n, c, height, width), or the same without n.
        kernel_size: of the window; here and below one number, or one for each dimension.
        stride: places from one window to the next; the kernel size, if None.
        padding: zeros at either end, at most half of the kernel size.
        ceil_mode: whether the last window may hang over the end; what hangs over is not counted.
        count_include_pad: whether the average counts the zeros of the padding.
        divisor_override: divide the sum by this number instead of the count.

    Returns:
        (n, c, *), or the same without n.

    Raises:
        ValueError: if shapes or numbers do not fit.
    """
    x, *window, _ = _pooled("avg_pool2d", input, kernel_size, stride, padding, 1, ceil_mode)
    if divisor_override == 0:
        raise ValueError("avg_pool2d: divisor_override must not be zero")
    options = bool(ceil_mode), bool(count_include_pad), divisor_override
    y = _pooling.avg_pool2d(x, *window, *options)
    return y if x.dim() == input.dim() else y.squeeze(0)


def adaptive_avg_pool2d(input: Tensor, output_size: int | Sequence[int | None]) -> Tensor:
    """The averages over the parts of a grid of a given size. Keeps nothing for backward.

    Args:
        input: (n, c, height, width), or the same without n.
        output_size: height and width of the grid: one number for both, or a pair, with None for the input's.

    Returns:
        (n, c, *output_size), or the same without n.

    Raises:
        ValueError: if shapes or numbers do not fit.
    """
    size = shape_of(input)[-2:]
    pair = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
    out = tuple(i if n is None else n for n, i in zip(pair, size, strict=False))
    if output_size is None or len(pair) != 2 or not all(is_int(n) and n >= 0 for n in out):
        raise ValueError(
            "adaptive_avg_pool2d: output_size must be an int of at least 0, or 2 of these or None, "
            f"got {output_size!r}"
        )
    if input.dim() not in (3, 4) or (0 in size and out != (1, 1)):
        raise ValueError(
            "adaptive_avg_pool2d: input must have shape (n, c, height, width), or the same without n, and height "
            f"and width must not be zero, got {shape_of(input)}"
        )
    x = input if input.dim() == 4 else input.unsqueeze(0)
    y = _pooling.adaptive_avg_pool2d(x, out)
    return y if x.dim() == input.dim() else y.squeeze(0)


def _pooled(
    name: str,
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    ceil_mode: bool,
) -> tuple[Tensor | tuple[int, ...], ...]:
    """Checked: the input as (n, c, *size), then kernel_size, stride, padding and dilation as pairs."""
    if input.dim() not in (3, 4) or 0 in input.shape[-3:]:
        raise ValueError(
            f"{name}: input must have shape (n, c, height, width), or the same without n, and only n may be zero, "
            f"got {shape_of(input)}"
        )
    kernel_size = per_dimension(name, "kernel_size", kernel_size, 2, least=1)
    stride = kernel_size if stride is None else per_dimension(name, "stride", stride, 2, least=1)
    padding = per_dimension(name, "padding", padding, 2, least=0)
    dilation = per_dimension(name, "dilation", dilation, 2, least=1)
    if any(2 * a > k for a, k in zip(padding, kernel_size, strict=True)):
        raise ValueError(f"{name}: padding must be at most half of kernel_size {kernel_size}, got {padding}")
    size = shape_of(input)[-2:]
    out = _windows.output_size(size, kernel_size, stride, padding, dilation, ceil_mode)
    if min(out) < 1:
        raise ValueError(
            f"{name}: kernel_size {kernel_size} with dilation {dilation} must fit into the input, got size {size} "
            f"with padding {padding}"
        )
    for i, s, a, d, o in zip(size, stride, padding, dilation, out, strict=True):
        if d == 1:
            continue
        early = range(0, min(a, (o - 1) * s + 1), s)  # where windows begin in the padding before the input
        if any((start - a) % d >= i for start in early):  # the first tap behind that padding is behind the input
            raise ValueError(
                f"{name}: dilation must let every window see some of the input, got {dilation} for size {size} "
                f"with padding {padding}"
            )
    return input if input.dim() == 4 else input.unsqueeze(0), kernel_size, stride, padding, dilation

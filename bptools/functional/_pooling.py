"""Pooling over 1, 2 and 3 spatial dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bptools.functional._checks import is_int, per_dimension, readable, shape_of
from bptools.ops import _windows
from bptools.ops import avg_pool as _avg
from bptools.ops import max_pool as _max
from bptools.ops._core import HALF

Size = int | Sequence[int]
# The op for so many dimensions: a length is a height of 1 and a width.
_MAX = {1: _max.max_pool2d, 2: _max.max_pool2d, 3: _max.max_pool3d}
_AVG = {1: _avg.avg_pool2d, 2: _avg.avg_pool2d, 3: _avg.avg_pool3d}
SPATIAL = {1: "length", 2: "height, width", 3: "depth, height, width"}


# Max pooling --------------------------------------------------------------------------------------------------


def max_pool1d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The largest number that each window sees: `max_pool2d`, with input (n, c, length)."""
    return _max_pool("max_pool1d", 1, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
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
    return _max_pool("max_pool2d", 2, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool3d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The largest number that each window sees: `max_pool2d`, with input (n, c, depth, height, width)."""
    return _max_pool("max_pool3d", 3, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def _max_pool(name, dims, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices):
    window = _check_window(name, dims, input, kernel_size, stride, padding, dilation, ceil_mode)
    return _pair(dims, input, return_indices, _MAX[dims], *window, bool(ceil_mode))


def adaptive_max_pool1d(
    input: Tensor, output_size: int | Sequence[int], return_indices: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The largest of each of `output_size` parts: `adaptive_max_pool2d`, with input (n, c, length)."""
    out = _check_parts("adaptive_max_pool1d", 1, input, output_size)
    return _pair(1, input, return_indices, _max.adaptive_max_pool2d, out)


def adaptive_max_pool2d(
    input: Tensor, output_size: int | Sequence[int | None], return_indices: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The largest number in each part of a grid of a given size. Keeps the places of those for backward.

    Args:
        input: (n, c, height, width), or the same without n.
        output_size: height and width of the grid: one number for both, or a pair, with None for the input's.
        return_indices: whether to return the places too, as numbers of the flattened height and width.

    Returns:
        (n, c, *output_size), or the same without n; with `return_indices` a pair of these.

    Raises:
        ValueError: if shapes or numbers do not fit.
    """
    out = _check_parts("adaptive_max_pool2d", 2, input, output_size)
    return _pair(2, input, return_indices, _max.adaptive_max_pool2d, out)


def adaptive_max_pool3d(
    input: Tensor, output_size: int | Sequence[int | None], return_indices: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The largest of each part of a grid: `adaptive_max_pool2d`, with input (n, c, depth, height, width)."""
    out = _check_parts("adaptive_max_pool3d", 3, input, output_size)
    return _pair(3, input, return_indices, _max.adaptive_max_pool3d, out)


def fractional_max_pool2d(
    input: Tensor,
    kernel_size: Size,
    output_size: Size | None = None,
    output_ratio: float | Sequence[float] | None = None,
    return_indices: bool = False,
    _random_samples: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Max pooling by windows at random steps, which give an output of any size. Keeps the places for backward.

    Args:
        input: (n, c, height, width), or the same without n.
        kernel_size: of the window; here and below one number, or one for each dimension.
        output_size: height and width of the output; or
        output_ratio: the output's size as a share of the input's, more than 0 and less than 1.
        return_indices: whether to return the places too, as numbers of the flattened height and width.
        _random_samples: (n, c, 2), from 0 to 1, in input's dtype: what the steps start from; drawn if None.

    Returns:
        (n, c, *output_size), or the same without n; with `return_indices` a pair of these.

    Raises:
        ValueError: if shapes or numbers do not fit, or not one of `output_size` and `output_ratio` is given.
    """
    return _fractional(2, input, kernel_size, output_size, output_ratio, return_indices, _random_samples)


def fractional_max_pool3d(
    input: Tensor,
    kernel_size: Size,
    output_size: Size | None = None,
    output_ratio: float | Sequence[float] | None = None,
    return_indices: bool = False,
    _random_samples: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Max pooling at random steps: `fractional_max_pool2d`, with input (n, c, depth, height, width)."""
    return _fractional(3, input, kernel_size, output_size, output_ratio, return_indices, _random_samples)


def _fractional(dims, input, kernel_size, output_size, output_ratio, return_indices, samples):
    name = f"fractional_max_pool{dims}d"
    _check_image(name, dims, input)
    size = shape_of(input)[-dims:]
    if (output_size is None) == (output_ratio is None):
        raise ValueError(
            f"{name}: one of output_size and output_ratio must be given, got {output_size} and {output_ratio}"
        )
    if output_size is None:
        ratios = output_ratio if isinstance(output_ratio, (tuple, list)) else (output_ratio,) * dims
        if len(ratios) != dims or not all(0 < r < 1 for r in ratios):
            raise ValueError(
                f"{name}: output_ratio must be between 0 and 1, or {dims} such numbers, got {output_ratio!r}"
            )
        output_size = tuple(int(i * r) for i, r in zip(size, ratios, strict=True))
    out = per_dimension(name, "output_size", output_size, dims, least=1)
    kernel_size = per_dimension(name, "kernel_size", kernel_size, dims, least=1)
    least = tuple(o + k - 1 + (dims == 3) for o, k in zip(out, kernel_size, strict=True))  # as torch's
    if any(i < n for i, n in zip(size, least, strict=True)):
        raise ValueError(
            f"{name}: input must have at least size {least} for output_size {out} and kernel_size {kernel_size}, "
            f"got {size}"
        )
    planes = shape_of(input)[-dims - 2 : -dims] if input.dim() == dims + 2 else (1, input.shape[0])
    if samples is None:
        samples = torch.rand(*planes, dims, dtype=input.dtype, device=input.device)
    n, c = planes
    if samples.dim() != 3 or len(samples) < n or shape_of(samples)[1:] != (c, dims):
        raise ValueError(
            f"{name}: _random_samples must have shape {(n, c, dims)}, or a larger first dimension, got "
            f"{shape_of(samples)}"
        )
    if samples.dtype is not input.dtype:
        raise TypeError(f"{name}: _random_samples must have input's dtype {input.dtype}, got {samples.dtype}")
    return _pair(dims, input, return_indices, _max.fractional_max_pool, samples[:n], kernel_size, out)


def max_unpool1d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """Undo `max_pool1d` but for what it left out: `max_unpool2d`, with input (n, c, length)."""
    return _max_unpool("max_unpool1d", 1, input, indices, kernel_size, stride, padding, output_size)


def max_unpool2d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """Undo `max_pool2d` but for what it left out: its largest numbers at their places, and zeros elsewhere.

    Args:
        input: (n, c, height, width), or the same without n.
        indices: of input's shape: the places that `max_pool2d(..., return_indices=True)` gave.
        kernel_size: of that pooling; here and below one number, or one for each dimension.
        stride: of that pooling; the kernel size, if None.
        padding: of that pooling.
        output_size: the size of that pooling's input, alone or with its n and c, where several pool to one; the
            least of them but for ceil_mode, if None.

    Returns:
        (n, c, *output_size), or the same without n.

    Raises:
        TypeError: if indices are not int64.
        ValueError: if shapes or numbers do not fit.
    """
    return _max_unpool("max_unpool2d", 2, input, indices, kernel_size, stride, padding, output_size)


def max_unpool3d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """Undo `max_pool3d` but for what it left out: `max_unpool2d`, with input (n, c, depth, height, width)."""
    return _max_unpool("max_unpool3d", 3, input, indices, kernel_size, stride, padding, output_size)


def _max_unpool(name, dims, input, indices, kernel_size, stride, padding, output_size):
    _check_image(name, dims, input)
    if indices.dtype is not torch.int64:
        raise TypeError(f"{name}: indices must be int64, got {indices.dtype}")
    if indices.shape != input.shape:
        raise ValueError(f"{name}: indices must have input's shape {shape_of(input)}, got {shape_of(indices)}")
    kernel_size = per_dimension(name, "kernel_size", kernel_size, dims, least=1)
    stride = _stride(name, stride, kernel_size)
    padding = per_dimension(name, "padding", padding, dims, least=0)
    places = zip(shape_of(input)[-dims:], kernel_size, stride, padding, strict=True)
    out = least = tuple((i - 1) * s + k - 2 * a for i, k, s, a in places)
    if output_size is not None:
        out = tuple(output_size)[2:] if len(output_size) == dims + 2 else tuple(output_size)
        if len(out) != dims or not all(abs(o - i) < s for o, i, s in zip(out, least, stride, strict=True)):
            raise ValueError(
                f"{name}: output_size must differ from {least} by less than the stride {stride}, got {output_size}"
            )
    if min(out) < 1:
        raise ValueError(f"{name}: padding must leave an output of at least 1 place, got {padding}")
    batched = input.dim() == dims + 2
    x, places = (t if batched else t.unsqueeze(0) for t in (input, indices))
    if places.numel() and readable() and not 0 <= int(places.min()) <= int(places.max()) < math.prod(out):
        raise ValueError(
            f"{name}: indices must be from 0 to {math.prod(out) - 1} for an output of {out}, got {places.min()} "
            f"to {places.max()}"
        )
    y = _max.max_unpool(x, places, out)
    return y if batched else y.squeeze(0)


# Average pooling ----------------------------------------------------------------------------------------------


def avg_pool1d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """The average of what each window sees: `avg_pool2d`, with input (n, c, length)."""
    return _avg_pool("avg_pool1d", 1, input, kernel_size, stride, padding, ceil_mode, count_include_pad, None)


def avg_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
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
        ceil_mode: whether the last window may hang over the end.
        count_include_pad: whether the average counts the padding.
        divisor_override: divide by this, and not by the number of places.

    Returns:
        (n, c, *), or the same without n.

    Raises:
        ValueError: if shapes or numbers do not fit.
    """
    options = ceil_mode, count_include_pad, divisor_override
    return _avg_pool("avg_pool2d", 2, input, kernel_size, stride, padding, *options)


def avg_pool3d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """The average of what each window sees: `avg_pool2d`, with input (n, c, depth, height, width)."""
    options = ceil_mode, count_include_pad, divisor_override
    return _avg_pool("avg_pool3d", 3, input, kernel_size, stride, padding, *options)


def _avg_pool(name, dims, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override):
    *window, _ = _check_window(name, dims, input, kernel_size, stride, padding, 1, ceil_mode)
    if divisor_override == 0:
        raise ValueError(f"{name}: divisor_override must not be zero")
    options = bool(ceil_mode), bool(count_include_pad), divisor_override
    return _pooled(dims, input, _AVG[dims], *window, *options)


def adaptive_avg_pool1d(input: Tensor, output_size: int | Sequence[int]) -> Tensor:
    """The averages of `output_size` parts: `adaptive_avg_pool2d`, with input (n, c, length)."""
    out = _check_parts("adaptive_avg_pool1d", 1, input, output_size)
    return _pooled(1, input, _avg.adaptive_avg_pool2d, out)


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
    out = _check_parts("adaptive_avg_pool2d", 2, input, output_size)
    return _pooled(2, input, _avg.adaptive_avg_pool2d, out)


def adaptive_avg_pool3d(input: Tensor, output_size: int | Sequence[int | None]) -> Tensor:
    """The averages over a grid: `adaptive_avg_pool2d`, with input (n, c, depth, height, width)."""
    out = _check_parts("adaptive_avg_pool3d", 3, input, output_size)
    return _pooled(3, input, _avg.adaptive_avg_pool3d, out)


def lp_pool1d(
    input: Tensor, norm_type: float, kernel_size: Size, stride: Size | None = None, ceil_mode: bool = False
) -> Tensor:
    """A norm of what each window sees: `lp_pool2d`, with input (n, c, length)."""
    return _lp_pool("lp_pool1d", 1, input, norm_type, kernel_size, stride, ceil_mode)


def lp_pool2d(
    input: Tensor, norm_type: float, kernel_size: Size, stride: Size | None = None, ceil_mode: bool = False
) -> Tensor:
    """A norm of what each window sees, `Σ(xᵖ)^(1/p)`. As torch's it takes no absolute values, but for infinite p.

    Args:
        input: (n, c, height, width), or the same without n.
        norm_type: p: 1 for the sum, infinity for the largest, minus infinity for the smallest absolute value.
        kernel_size: of the window; here and below one number, or one for each dimension.
        stride: places from one window to the next; the kernel size, if None.
        ceil_mode: whether the last window may hang over the end.

    Returns:
        (n, c, *), or the same without n. Where the sum is 0, the gradient is 0.

    Raises:
        ValueError: if shapes or numbers do not fit, or norm_type is 0.
    """
    return _lp_pool("lp_pool2d", 2, input, norm_type, kernel_size, stride, ceil_mode)


def lp_pool3d(
    input: Tensor, norm_type: float, kernel_size: Size, stride: Size | None = None, ceil_mode: bool = False
) -> Tensor:
    """A norm of what each window sees: `lp_pool2d`, with input (n, c, depth, height, width)."""
    return _lp_pool("lp_pool3d", 3, input, norm_type, kernel_size, stride, ceil_mode)


def _lp_pool(name, dims, input, norm_type, kernel_size, stride, ceil_mode):
    window = _check_window(name, dims, input, kernel_size, stride, 0, 1, ceil_mode)
    if norm_type == 0:
        raise ValueError(f"{name}: norm_type must not be zero, got {norm_type}")
    if norm_type in (math.inf, -math.inf):
        x, sign = _avg.absolute(input), 1 if norm_type > 0 else -1
        return sign * _pair(dims, sign * x, False, _MAX[dims], *window, bool(ceil_mode))
    kernel_size, stride, padding, _ = window
    options = kernel_size, stride, padding, bool(ceil_mode), True, None
    wide = torch.float32 if input.dtype in HALF else input.dtype  # the squares of float16 would overflow
    means = _pooled(dims, _avg.power(input, norm_type, wide), _AVG[dims], *options)
    # As torch's, autocast leaves what is pooled in three dimensions in float32.
    rounds = dims < 3 or not torch.is_autocast_enabled(input.device.type)
    return _avg.root(means, math.prod(kernel_size), norm_type, input.dtype if rounds else wide)


# What they check and do alike ---------------------------------------------------------------------------------


def _pooled(dims: int, input: Tensor, op: Callable[..., Any], *constants: Any) -> Any:
    """The op's result or pair of them, for an input with or without n. A length is a height of 1 and a width."""
    x = input if input.dim() == dims + 2 else input.unsqueeze(0)
    results = op(x.unsqueeze(2) if dims == 1 else x, *constants)
    several = results if isinstance(results, tuple) else (results,)
    if dims == 1:
        several = tuple(y.squeeze(2) for y in several)
    if x.dim() != input.dim():
        several = tuple(y.squeeze(0) for y in several)
    return several if isinstance(results, tuple) else several[0]


def _pair(
    dims: int, input: Tensor, return_indices: bool, op: Callable[..., Any], *constants: Any
) -> Tensor | tuple[Tensor, Tensor]:
    y, indices = _pooled(dims, input, op, *constants)
    return (y, indices) if return_indices else y


def _stride(name: str, stride: Size | None, kernel_size: tuple[int, ...]) -> tuple[int, ...]:
    if stride is None or stride == () or stride == []:  # as torch, an empty one is none
        return kernel_size
    return per_dimension(name, "stride", stride, len(kernel_size), least=1)


def _check_image(name: str, dims: int, input: Tensor) -> None:
    if input.dim() not in (dims + 1, dims + 2) or 0 in input.shape[-dims - 1 :]:
        raise ValueError(
            f"{name}: input must have shape (n, c, {SPATIAL[dims]}), or the same without n, and only n may be "
            f"zero, got {shape_of(input)}"
        )


def _check_window(
    name: str,
    dims: int,
    input: Tensor,
    kernel_size: Size,
    stride: Size | None,
    padding: Size,
    dilation: Size,
    ceil_mode: bool,
) -> tuple[tuple[int, ...], ...]:
    """Checked: kernel_size, stride, padding, dilation of each dimension; a length has a height of 1 before it."""
    _check_image(name, dims, input)
    kernel_size = per_dimension(name, "kernel_size", kernel_size, dims, least=1)
    stride = _stride(name, stride, kernel_size)
    padding = per_dimension(name, "padding", padding, dims, least=0)
    dilation = per_dimension(name, "dilation", dilation, dims, least=1)
    if any(2 * a > k for a, k in zip(padding, kernel_size, strict=True)):
        raise ValueError(f"{name}: padding must be at most half of kernel_size {kernel_size}, got {padding}")
    size = shape_of(input)[-dims:]
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
    if dims == 1:
        return (1, *kernel_size), (1, *stride), (0, *padding), (1, *dilation)
    return kernel_size, stride, padding, dilation


def _check_parts(name: str, dims: int, input: Tensor, output_size: int | Sequence[int | None]) -> tuple[int, ...]:
    """Checked: the parts of each dimension; a length has a height of 1 before it."""
    size = shape_of(input)[-dims:]
    parts = output_size if isinstance(output_size, (tuple, list)) else (output_size,) * dims
    out = tuple(i if n is None else n for n, i in zip(parts, size, strict=False))
    if output_size is None or len(parts) != dims or not all(is_int(n) and n >= 0 for n in out):
        several = f", or {dims} of these or None" if dims > 1 else ""
        raise ValueError(f"{name}: output_size must be an int of at least 0{several}, got {output_size!r}")
    everything = "adaptive_avg" in name and set(out) == {1}  # the mean of nothing is NaN
    if input.dim() not in (dims + 1, dims + 2) or (0 in size and not everything):
        raise ValueError(
            f"{name}: input must have shape (n, c, {SPATIAL[dims]}), or the same without n, and none of the last "
            f"{dims} may be zero, got {shape_of(input)}"
        )
    return (1, *out) if dims == 1 else out

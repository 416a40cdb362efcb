"""Convolutions over 1, 2 and 3 spatial dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bptools.functional._checks import per_dimension, shape_of
from bptools.ops import _windows
from bptools.ops import convolution as _conv


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution over one spatial dimension: `conv2d`, with input (n, in_channels, length)."""
    return _convolution("conv1d", 1, input, weight, bias, stride, padding, dilation, groups)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution over two spatial dimensions, which is a correlation: the kernel is not flipped.

    Args:
        input: (n, in_channels, height, width), or the same without n.
        weight: (out_channels, in_channels / groups, kernel height, kernel width).
        bias: (out_channels,), or None for 0.
        stride: places from one window to the next; here and below one number, or one for each dimension.
        padding: zeros at either end; `"valid"` for none, `"same"` (stride 1) for an output of the input's size.
        dilation: places from one tap of the kernel to the next.
        groups: the channels are cut into so many groups, each convolved on its own.

    Returns:
        (n, out_channels, *), or the same without n.

    Raises:
        ValueError: if shapes or numbers do not fit.
        TypeError: if an argument is not a floating tensor, or the dtypes differ.
    """
    return _convolution("conv2d", 2, input, weight, bias, stride, padding, dilation, groups)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution over three spatial dimensions: `conv2d`, with input (n, in_channels, depth, height, width)."""
    return _convolution("conv3d", 3, input, weight, bias, stride, padding, dilation, groups)


def _convolution(
    name: str,
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> Tensor:
    stride = per_dimension(name, "stride", stride, dims, least=1)
    dilation = per_dimension(name, "dilation", dilation, dims, least=1)
    (groups,) = per_dimension(name, "groups", groups, 1, least=1)
    if weight.dim() != dims + 2 or weight.shape[0] == 0 or weight.shape[0] % groups or 0 in weight.shape[2:]:
        raise ValueError(
            f"{name}: weight must have shape (out_channels, in_channels / groups, {dims} kernel sizes), with "
            f"out_channels a multiple of groups = {groups}, got {shape_of(weight)}"
        )
    channels, kernel_size = weight.shape[1] * groups, shape_of(weight)[2:]
    if input.dim() not in (dims + 1, dims + 2) or input.shape[-dims - 1] != channels:
        raise ValueError(
            f"{name}: input must have shape (n, {channels}, {dims} sizes), or the same without n, to fit weight "
            f"{shape_of(weight)} with groups = {groups}, got {shape_of(input)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias must have shape ({weight.shape[0]},), got {shape_of(bias)}")

    x = input if input.dim() == dims + 2 else input.unsqueeze(0)
    if padding == "same":
        if stride != (1,) * dims:
            raise ValueError(f"{name}: padding 'same' must come with stride 1, got stride {stride}")
        total = [(k - 1) * d for k, d in zip(kernel_size, dilation, strict=True)]
        if any(t % 2 for t in total):  # the odd zero goes to the end
            x = torch.nn.functional.pad(x, [n for t in reversed(total) for n in (0, t % 2)])
        padding = tuple(t // 2 for t in total)
    elif padding == "valid":
        padding = (0,) * dims
    elif isinstance(padding, str):
        raise ValueError(f"{name}: padding must be 'valid', 'same' or numbers, got {padding!r}")
    else:
        padding = per_dimension(name, "padding", padding, dims, least=0)
    size = shape_of(x)[2:]
    if 0 in size or min(_windows.output_size(size, kernel_size, stride, padding, dilation)) < 1:
        raise ValueError(
            f"{name}: input must not be smaller than the kernel, got {shape_of(input)} with padding {padding} for "
            f"kernel {kernel_size} with dilation {dilation}"
        )
    y = _conv.convolution(x, weight, bias, stride, padding, dilation, groups)
    return y if x.dim() == input.dim() else y.squeeze(0)

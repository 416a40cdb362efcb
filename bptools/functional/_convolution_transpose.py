"""Transposed convolutions over 1, 2 and 3 spatial dimensions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bptools.functional._checks import per_dimension, shape_of
from bptools.ops import _windows
from bptools.ops import convolution as _conv


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Transposed convolution over one spatial dimension: `conv_transpose2d`, with input (n, c, length)."""
    return _transposed(
        "conv_transpose1d", 1, input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """The gradient of a convolution with respect to its input, taken as a layer of its own.

    Args:
        input: (n, in_channels, height, width), or the same without n.
        weight: (in_channels, out_channels / groups, kernel height, kernel width).
        bias: (out_channels,), or None for 0.
        stride: places of the result from one place of the input to the next; here and below one number, or one for
            each dimension.
        padding: how many places are cut off at either end.
        output_padding: how many places are added at the end, fewer than stride or dilation.
        groups: the channels are cut into so many groups, each convolved on its own.
        dilation: places from one tap of the kernel to the next.

    Returns:
        (n, out_channels, *), with (size - 1) stride - 2 padding + dilation (kernel size - 1) + 1 + output_padding
        places in each dimension, or the same without n.

    Raises:
        ValueError: if shapes or numbers do not fit.
        TypeError: if an argument is not a floating tensor, or the dtypes differ.
    """
    return _transposed(
        "conv_transpose2d", 2, input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Transposed convolution over three spatial dimensions: `conv_transpose2d`, with input (n, c, d, h, w)."""
    return _transposed(
        "conv_transpose3d", 3, input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def _transposed(
    name: str,
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    output_padding: int | Sequence[int],
    groups: int,
    dilation: int | Sequence[int],
) -> Tensor:
    stride = per_dimension(name, "stride", stride, dims, least=1)
    padding = per_dimension(name, "padding", padding, dims, least=0)
    output_padding = per_dimension(name, "output_padding", output_padding, dims, least=0)
    dilation = per_dimension(name, "dilation", dilation, dims, least=1)
    (groups,) = per_dimension(name, "groups", groups, 1, least=1)
    if any(more >= max(s, d) for more, s, d in zip(output_padding, stride, dilation, strict=True)):
        raise ValueError(
            f"{name}: output_padding must be smaller than stride {stride} or dilation {dilation}, "
            f"got {output_padding}"
        )
    if weight.dim() != dims + 2 or 0 in weight.shape or weight.shape[0] % groups:
        raise ValueError(
            f"{name}: weight must have shape (in_channels, out_channels / groups, {dims} kernel sizes), with "
            f"in_channels a multiple of groups = {groups}, got {shape_of(weight)}"
        )
    in_channels, out_channels, *kernel_size = shape_of(weight)
    if input.dim() not in (dims + 1, dims + 2) or input.shape[-dims - 1] != in_channels:
        raise ValueError(
            f"{name}: input must have shape (n, {in_channels}, {dims} sizes), or the same without n, to fit "
            f"weight {shape_of(weight)}, got {shape_of(input)}"
        )
    if bias is not None and bias.shape != (out_channels * groups,):
        raise ValueError(f"{name}: bias must have shape ({out_channels * groups},), got {shape_of(bias)}")
    size = shape_of(input)[-dims:]
    out = _windows.transposed_output_size(size, kernel_size, stride, padding, output_padding, dilation)
    if 0 in size or min(out) < 1:
        raise ValueError(
            f"{name}: padding must leave some of the result, got {padding} where input {shape_of(input)} gives "
            f"sizes {out}"
        )
    x = input if input.dim() == dims + 2 else input.unsqueeze(0)
    y = _conv.conv_transpose(x, weight, bias, stride, padding, output_padding, dilation, groups)
    return y if x.dim() == input.dim() else y.squeeze(0)

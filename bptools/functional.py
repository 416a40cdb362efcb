"""The ops under torch.nn.functional's names and signatures.

Each function checks its arguments, resolves their defaults, and calls one op of `bptools.ops`; the derivation
and the code of the op are there. Values and gradients are torch's; arguments that torch accepts and bptools does
not yet raise `NotImplementedError`, and bad input raises an error that names the argument, what was expected and
what came.

Shapes are given in parentheses: `(..., d)` is any number of leading dimensions and a last one of size d.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from bptools.ops import _windows
from bptools.ops import activation as _activation
from bptools.ops import attention as _attention
from bptools.ops import batch_norm as _batch_norm
from bptools.ops import convolution as _conv
from bptools.ops import dropout as _dropout
from bptools.ops import embedding as _embedding
from bptools.ops import layer_norm as _layer_norm
from bptools.ops import linear as _linear
from bptools.ops import loss as _loss
from bptools.ops import pooling as _pooling
from bptools.ops import rms_norm as _rms_norm
from bptools.ops import softmax as _softmax


def _shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


# Linear -------------------------------------------------------------------------------------------------------


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Affine map `input @ weight.T + bias`.

    Args:
        input: (..., in_features).
        weight: (out_features, in_features), or (in_features,) for a single output without bias.
        bias: (out_features,), or None.

    Returns:
        (..., out_features), or (...) for a 1-D weight.

    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if an argument is not a floating tensor, or the dtypes differ.
    """
    if weight.dim() == 1 and bias is None:
        return linear(input, weight.unsqueeze(0)).squeeze(-1)
    if weight.dim() != 2:
        raise ValueError(f"linear: weight must have 2 dimensions, or 1 without a bias, got {_shape(weight)}")
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: input must have shape (..., {weight.shape[1]}) to fit weight {_shape(weight)}, "
            f"got {_shape(input)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear: bias must have shape ({weight.shape[0]},), got {_shape(bias)}")
    return _linear.linear(input, weight, bias)


# Convolution --------------------------------------------------------------------------------------------------


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
    stride = _per_dimension(name, "stride", stride, dims, least=1)
    dilation = _per_dimension(name, "dilation", dilation, dims, least=1)
    (groups,) = _per_dimension(name, "groups", groups, 1, least=1)
    if weight.dim() != dims + 2 or weight.shape[0] == 0 or weight.shape[0] % groups or 0 in weight.shape[2:]:
        raise ValueError(
            f"{name}: weight must have shape (out_channels, in_channels / groups, {dims} kernel sizes), with "
            f"out_channels a multiple of groups = {groups}, got {_shape(weight)}"
        )
    channels, kernel_size = weight.shape[1] * groups, _shape(weight)[2:]
    if input.dim() not in (dims + 1, dims + 2) or input.shape[-dims - 1] != channels:
        raise ValueError(
            f"{name}: input must have shape (n, {channels}, {dims} sizes), or the same without n, to fit weight "
            f"{_shape(weight)} with groups = {groups}, got {_shape(input)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias must have shape ({weight.shape[0]},), got {_shape(bias)}")

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
        padding = _per_dimension(name, "padding", padding, dims, least=0)
    size = _shape(x)[2:]
    if 0 in size or min(_windows.output_size(size, kernel_size, stride, padding, dilation)) < 1:
        raise ValueError(
            f"{name}: input must not be smaller than the kernel, got {_shape(input)} with padding {padding} for "
            f"kernel {kernel_size} with dilation {dilation}"
        )
    y = _conv.convolution(x, weight, bias, stride, padding, dilation, groups)
    return y if x.dim() == input.dim() else y.squeeze(0)


def _per_dimension(name: str, argument: str, value: int | Sequence[int], dims: int, least: int) -> tuple[int, ...]:
    """One number for each of `dims` dimensions, from one for all or a sequence of them."""
    if type(value) is int and value >= least:
        return (value,) * dims
    numbers = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(numbers) == 1:
        numbers *= dims
    if len(numbers) != dims or not all(_is_int(n) and n >= least for n in numbers):
        them = f", or {dims} of them" if dims > 1 else ""
        raise ValueError(f"{name}: {argument} must be an int of at least {least}{them}, got {value!r}")
    return numbers


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# Pooling ------------------------------------------------------------------------------------------------------


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
    size = _shape(input)[-2:]
    pair = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
    out = tuple(i if n is None else n for n, i in zip(pair, size, strict=False))
    if output_size is None or len(pair) != 2 or not all(_is_int(n) and n >= 0 for n in out):
        raise ValueError(
            "adaptive_avg_pool2d: output_size must be an int of at least 0, or 2 of these or None, "
            f"got {output_size!r}"
        )
    if input.dim() not in (3, 4) or (0 in size and out != (1, 1)):
        raise ValueError(
            "adaptive_avg_pool2d: input must have shape (n, c, height, width), or the same without n, and height "
            f"and width must not be zero, got {_shape(input)}"
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
            f"got {_shape(input)}"
        )
    kernel_size = _per_dimension(name, "kernel_size", kernel_size, 2, least=1)
    stride = kernel_size if stride is None else _per_dimension(name, "stride", stride, 2, least=1)
    padding = _per_dimension(name, "padding", padding, 2, least=0)
    dilation = _per_dimension(name, "dilation", dilation, 2, least=1)
    if any(2 * a > k for a, k in zip(padding, kernel_size, strict=True)):
        raise ValueError(f"{name}: padding must be at most half of kernel_size {kernel_size}, got {padding}")
    size = _shape(input)[-2:]
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


# Activations --------------------------------------------------------------------------------------------------


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """`max(input, 0)`, elementwise, over input (...); its gradient at 0 is 0. Keeps its output for backward."""
    return _activation.relu.inplace(input) if inplace else _activation.relu(input)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """`input` where positive, `negative_slope * input` elsewhere, over input (...)."""
    apply = _activation.leaky_relu.inplace if inplace else _activation.leaky_relu
    return apply(input, negative_slope)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """Gaussian error linear unit, `input * Φ(input)`, over input (...).

    Args:
        input: (...).
        approximate: `"none"` for the exact Φ, `"tanh"` for its approximation by a hyperbolic tangent.

    Raises:
        ValueError: if `approximate` is neither.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    return _activation.gelu(input, approximate)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """`input * sigmoid(input)`, also called swish, over input (...)."""
    return _activation.silu.inplace(input) if inplace else _activation.silu(input)


def sigmoid(input: Tensor) -> Tensor:
    """`1 / (1 + exp(-input))` over input (...). Keeps its output for backward."""
    return _activation.sigmoid(input)


def tanh(input: Tensor) -> Tensor:
    """Hyperbolic tangent over input (...). Keeps its output for backward."""
    return _activation.tanh(input)


# Softmax ------------------------------------------------------------------------------------------------------


def softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """`exp(input)`, scaled so that it sums to 1 along `dim`. Keeps its output for backward.

    Args:
        input: (...).
        dim: the dimension that sums to 1. None warns and takes the first of 0, 1 or 3 dimensions, else the second.
        dtype: cast input to this first.

    Raises:
        ValueError: if input has no dimension `dim`.
        TypeError: if `dim` is not an int, or input (after the cast) not floating.
    """
    dim = _softmax_dim("softmax", input, dim, _stacklevel)
    return _softmax.softmax(input if dtype is None else input.to(dtype), dim)


def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """The logarithm of `softmax`, exact where that would underflow: (...) to (...), with `softmax`'s arguments."""
    dim = _softmax_dim("log_softmax", input, dim, _stacklevel)
    return _softmax.log_softmax(input if dtype is None else input.to(dtype), dim)


def _softmax_dim(name: str, input: Tensor, dim: int | None, stacklevel: int) -> int:
    if dim is None:
        warnings.warn(
            f"Implicit dimension choice for {name} has been deprecated. "
            "Change the call to include dim=X as an argument.",
            stacklevel=stacklevel,
        )
        return 0 if input.dim() in (0, 1, 3) else 1
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"{name}: dim must be an int, got {dim!r}")
    dims = max(input.dim(), 1)
    if not -dims <= dim < dims:
        raise ValueError(f"{name}: dim must be from {-dims} to {dims - 1} for input {_shape(input)}, got {dim}")
    return dim


# Normalisation ------------------------------------------------------------------------------------------------


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Shift and scale each row to mean 0 and variance 1, then apply an affine map per feature.

    Args:
        input: (..., *normalized_shape).
        normalized_shape: the sizes of the last dimensions, over which mean and variance are taken.
        weight: normalized_shape, or None for 1.
        bias: normalized_shape, or None for 0.
        eps: added to the variance, in its units.

    Raises:
        ValueError: if the shapes do not fit.
    """
    _check_normalized("layer_norm", input, normalized_shape, weight=weight, bias=bias)
    _check_parameter_dtypes("layer_norm", input, weight=weight, bias=bias)
    y, _, _ = _layer_norm.layer_norm(input, weight, bias, len(normalized_shape), eps)
    return y


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Scale each row to a mean square of 1, then each feature by its weight.

    Args:
        input: (..., *normalized_shape).
        normalized_shape: the sizes of the last dimensions, over which the mean square is taken.
        weight: normalized_shape, or None for 1.
        eps: added to the mean square, in its units; None for the machine epsilon of the computation, which is in
            float32 for half precision.

    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if weight has a wider dtype than input.
    """
    _check_normalized("rms_norm", input, normalized_shape, weight=weight)
    if weight is not None and weight.dtype is torch.float64 is not input.dtype:
        raise TypeError(f"rms_norm: weight must not be wider than input ({input.dtype}), got {weight.dtype}")
    if eps is None:
        eps = torch.finfo(torch.float64 if input.dtype is torch.float64 else torch.float32).eps
    y, _ = _rms_norm.rms_norm(input, weight, len(normalized_shape), eps)
    return y


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Shift and scale each channel to mean 0 and variance 1, then apply an affine map per channel.

    Args:
        input: (n, c, ...), c channels; mean and variance are taken over everything but c.
        running_mean: (c,), or None. With `training` it is moved towards the mean of the batch, in place; without,
            it is the mean.
        running_var: (c,), or None with running_mean. The same for the variance, which it holds unbiased.
        weight: (c,), or None for 1.
        bias: (c,), or None for 0.
        training: normalise by the statistics of the batch.
        momentum: how far the running statistics are moved, from 0 to 1.
        eps: added to the variance, in its units.

    Raises:
        ValueError: if the shapes do not fit, if there is one value per channel in training or no running
            statistics in evaluation, or if eps is negative, or 0 in training.
        TypeError: if a parameter's dtype is neither input's nor, for input in half precision, float32; or momentum
            is no number (None, the cumulative average, is the module's).
        RuntimeError: if running statistics that torch.vmap shares would have to be written for each sample.
    """
    given = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    given = {name: value for name, value in given.items() if value is not None}
    _check_batch_norm(input, given, training, momentum, eps)
    mean, var = running_mean, running_var
    if mean is None:  # the op moves running statistics in any case, here some that nobody reads
        dtype = next(iter(given.values()), input).dtype
        mean, var = (input.new_zeros(input.shape[1], dtype=dtype) for _ in range(2))
    if not training or input.numel() == 0:
        return _batch_norm.frozen_batch_norm(input, weight, bias, mean, var, eps)
    y, _, _, new_mean, new_var = _batch_norm.batch_norm(input, weight, bias, mean, var, momentum, eps)
    if running_mean is not None:
        with torch.no_grad():
            running_mean.copy_(new_mean)
            running_var.copy_(new_var)
    return y


def _check_batch_norm(
    input: Tensor, given: dict[str, Tensor], training: bool, momentum: float, eps: float
) -> None:
    if input.dim() < 2:
        raise ValueError(f"batch_norm: input must have shape (n, c, ...), got {_shape(input)}")
    channels = input.shape[1]
    for name, value in given.items():
        if _shape(value) != (channels,):
            raise ValueError(f"batch_norm: {name} must have shape ({channels},), got {_shape(value)}")
    _check_parameter_dtypes("batch_norm", input, **given)
    if ("running_mean" in given) != ("running_var" in given):
        raise ValueError("batch_norm: running_mean and running_var must be both given or both None, got one")
    if not training and "running_mean" not in given:
        raise ValueError("batch_norm: running_mean and running_var must be given in evaluation, got None")
    if not isinstance(momentum, (int, float)):
        raise TypeError(f"batch_norm: momentum must be a number, got {momentum!r}")
    if eps < 0 or (training and eps == 0):
        raise ValueError(f"batch_norm: eps must be {'positive' if training else 'at least 0'}, got {eps}")
    if training and input.numel() == channels > 0:
        raise ValueError(
            f"batch_norm: input must have more than one value per channel in training, got {_shape(input)}"
        )


def _check_parameter_dtypes(name: str, input: Tensor, **parameters: Tensor | None) -> None:
    """A norm's parameters have the dtype of input, or float32 beside an input in half precision."""
    half = input.dtype in (torch.float16, torch.bfloat16)
    allowed = (input.dtype, torch.float32) if half else (input.dtype,)
    for argument, value in parameters.items():
        if value is not None and value.dtype not in allowed:
            raise TypeError(
                f"{name}: {argument} must have dtype {' or '.join(map(str, allowed))}, got {value.dtype}"
            )


def _check_normalized(name: str, input: Tensor, normalized_shape: Sequence[int], **affine: Tensor | None) -> None:
    shape = tuple(normalized_shape)
    if not shape:
        raise ValueError(f"{name}: normalized_shape must have at least one dimension, got ()")
    if _shape(input)[-len(shape) :] != shape:
        raise ValueError(f"{name}: input must end in normalized_shape {shape}, got {_shape(input)}")
    for argument, value in affine.items():
        if value is not None and _shape(value) != shape:
            raise ValueError(f"{name}: {argument} must have shape {shape}, got {_shape(value)}")


# Embedding ----------------------------------------------------------------------------------------------------


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of a table: `weight[input]`. Keeps the indices alone for backward.

    Args:
        input: (...), int64 or int32, the rows to take.
        weight: (num_embeddings, embedding_dim).
        padding_idx: a row that gets no gradient; negative counts from the end.
        max_norm: not supported yet.
        norm_type: of `max_norm`.
        scale_grad_by_freq: not supported yet.
        sparse: not supported yet.

    Returns:
        (..., embedding_dim).

    Raises:
        IndexError: if input holds a row that weight does not have. On a GPU the device reports it, later.
        NotImplementedError: if an argument is given that is not supported yet.
        TypeError: if input does not hold integers or weight is not floating.
        ValueError: if weight has not 2 dimensions, or no row `padding_idx`.
    """
    for name, value in (("max_norm", max_norm), ("scale_grad_by_freq", scale_grad_by_freq), ("sparse", sparse)):
        if value is not None and value is not False:
            raise NotImplementedError(f"embedding: {name} is not supported yet, got {value!r}")
    if input.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"embedding: input must be int64 or int32, got {input.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"embedding: weight must have 2 dimensions, got shape {_shape(weight)}")
    rows = weight.shape[0]
    if padding_idx is None:
        padding_idx = -1
    elif not -rows <= padding_idx < rows:
        raise ValueError(f"embedding: padding_idx must be from {-rows} to {rows - 1}, got {padding_idx}")
    elif padding_idx < 0:
        padding_idx += rows
    try:
        return _embedding.embedding(weight, input, padding_idx)
    except IndexError:
        raise IndexError(
            f"embedding: input must hold rows of weight, 0 to {rows - 1}, got {input.min()} to {input.max()}"
        ) from None


# Losses -------------------------------------------------------------------------------------------------------


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of softmax(input) against class indices or probabilities. Keeps the logits alone for backward.

    Args:
        input: logits, (N, C, ...) or (C,) for C classes.
        target: class indices, (N, ...) or (), int64 or uint8; or class probabilities, of input's shape, floating.
        weight: (C,), a weight for each class, or None for 1. With class indices the mean is weighted too.
        size_average: deprecated in torch, refused here; use `reduction`.
        ignore_index: a class index that does not count, neither in the loss nor in the mean.
        reduce: deprecated in torch, refused here; use `reduction`.
        reduction: `"none"`, `"mean"` or `"sum"`.
        label_smoothing: from 0 to 1, the share of each target that is spread evenly over the classes.

    Returns:
        (), or (N, ...) or () without reduction. The mean over no row is nan, as torch's.

    Raises:
        IndexError: if target holds an index that is no class. On a GPU the device reports it, later.
        NotImplementedError: in backward, if weight wants a gradient with class indices.
        TypeError: if the dtypes do not fit.
        ValueError: if the shapes do not fit, `reduction` or `label_smoothing` is none of the above, `ignore_index`
            is not negative with class probabilities, or a deprecated argument is given.
    """
    _check_reduction("cross_entropy", reduction, size_average=size_average, reduce=reduce)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"cross_entropy: label_smoothing must be from 0 to 1, got {label_smoothing}")
    if input.dim() == 0 or (classes := input.shape[min(input.dim() - 1, 1)]) == 0:
        raise ValueError(
            f"cross_entropy: input must have shape (N, C, ...) or (C,) with C > 0, got {_shape(input)}"
        )
    if weight is not None and _shape(weight) != (classes,):
        raise ValueError(f"cross_entropy: weight must have shape ({classes},), got {_shape(weight)}")

    if target.shape == input.shape:
        if not target.is_floating_point():
            raise TypeError(f"cross_entropy: target of input's shape must hold probabilities, got {target.dtype}")
        if ignore_index >= 0:
            raise ValueError(
                f"cross_entropy: ignore_index is for class indices, got {ignore_index} and probabilities"
            )
        return _loss.soft_cross_entropy(*_one_dtype(input, target, weight), label_smoothing, reduction)

    rows = input.shape[:1] + input.shape[2:] if input.dim() > 1 else ()
    if target.shape != rows:
        raise ValueError(
            f"cross_entropy: target must have shape {tuple(rows)} for class indices or {_shape(input)} for "
            f"probabilities, got {_shape(target)}"
        )
    if target.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"cross_entropy: target must hold class indices, int64 or uint8, got {target.dtype}")
    try:
        return _loss.cross_entropy(input, target.long(), weight, ignore_index, float(label_smoothing), reduction)
    except IndexError:
        raise IndexError(
            f"cross_entropy: target must hold classes, 0 to {classes - 1}, or ignore_index {ignore_index}, "
            f"got {target.min()} to {target.max()}"
        ) from None


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """Squared error `(input - target)**2`. Both are differentiable, and so is weight.

    Args:
        input: (...).
        target: input's shape. Another that broadcasts with it is accepted, with a warning.
        size_average: deprecated in torch, refused here; use `reduction`.
        reduce: deprecated in torch, refused here; use `reduction`.
        reduction: `"none"`, `"mean"` or `"sum"`; the mean is over the elements, or weighted by weight.
        weight: input's shape, a factor for each element, or None for 1.

    Returns:
        (), or (...) without reduction.

    Raises:
        TypeError: if an argument is not real, or none is floating.
        ValueError: if the shapes do not fit, `reduction` is none of the above, or a deprecated argument is given.
    """
    _check_reduction("mse_loss", reduction, size_average=size_average, reduce=reduce)
    if target.shape != input.shape:
        warnings.warn(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
            "This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=2,
        )
        try:
            torch.broadcast_shapes(input.shape, target.shape)
        except RuntimeError:
            raise ValueError(
                f"mse_loss: target must have input's shape {_shape(input)}, got {_shape(target)}"
            ) from None
    if weight is None:
        return _loss.mse_loss(*_one_dtype(input, target), reduction)
    if weight.shape != input.shape:
        raise ValueError(f"mse_loss: weight must have input's shape {_shape(input)}, got {_shape(weight)}")
    return _loss.weighted_mse_loss(*_one_dtype(input, target, weight), reduction)


def _check_reduction(name: str, reduction: str, **deprecated: bool | None) -> None:
    for argument, value in deprecated.items():
        if value is not None:
            raise ValueError(f"{name}: {argument} is deprecated, use reduction instead; got {argument}={value!r}")
    if reduction not in _loss.REDUCTIONS:
        raise ValueError(f"{name}: reduction must be 'none', 'mean' or 'sum', got {reduction!r}")


def _one_dtype(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the dtype to which torch promotes them all."""
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors if t is not None))
    return tuple(None if t is None else t.to(dtype) for t in tensors)


# Dropout ------------------------------------------------------------------------------------------------------


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Zero each element of input (...) with probability p and multiply the others by 1 / (1 - p).

    Draws the numbers that torch draws on the CPU, and keeps one byte an element for backward.

    Args:
        input: (...).
        p: the probability of zero, from 0 to 1.
        training: if False, input is returned as it is.
        inplace: write the result over input.

    Raises:
        ValueError: if p is not between 0 and 1.
    """
    _check_probability("dropout", "p", p)
    if not training or p == 0 or input.numel() == 0:
        return input
    keep = _dropout.draw(torch.empty_like(input, dtype=torch.uint8), p)
    return _dropout.dropout.inplace(input, keep, p) if inplace else _dropout.dropout(input, keep, p)


def _check_probability(name: str, argument: str, p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"{name}: {argument} must be between 0 and 1, got {p}")


# Attention ----------------------------------------------------------------------------------------------------


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`softmax(scale * query @ key.mT + bias) @ value`, without keeping the attention matrix for backward.

    Args:
        query: (..., heads, l, e).
        key: (..., heads, s, e).
        value: (..., heads, s, f).
        attn_mask: broadcasts to (..., heads, l, s). Boolean: True takes part. Floating: added to the scores. The
            output of a query that may attend to nothing is 0.
        dropout_p: the probability with which an attention weight is zeroed. Unlike a module, this function cannot
            know that it is in evaluation: pass 0 there.
        is_causal: a query sees the keys up to its own index; not together with attn_mask.
        scale: of the scores; None for 1 / √e.
        enable_gqa: key and value may have fewer heads than query, each serving a group of consecutive ones.

    Returns:
        (..., heads, l, f).

    Raises:
        ValueError: if the shapes do not fit, or is_causal comes with attn_mask.
        TypeError: if the dtypes of query, key and value differ, or attn_mask has an unfit one.
    """
    scores = _check_attention(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if scale is None:
        scale = 1 / math.sqrt(max(query.shape[-1], 1))
    boolean = attn_mask is not None and attn_mask.dtype is torch.bool
    bias, mask = (None, attn_mask) if boolean else (attn_mask, None)
    keep = None
    if dropout_p > 0:
        keep = _dropout.draw(torch.empty(scores, dtype=torch.uint8, device=query.device), dropout_p)
    o, _ = _attention.scaled_dot_product_attention(
        query, key, value, bias, mask, keep, is_causal, dropout_p, scale, enable_gqa
    )
    return o


def _check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> torch.Size:
    """Checks the arguments and returns the shape of the scores, (..., heads, l, s)."""
    name = "scaled_dot_product_attention"
    _check_probability(name, "dropout_p", dropout_p)
    least = 3 if enable_gqa else 2
    for argument, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() < least:
            raise ValueError(f"{name}: {argument} must have at least {least} dimensions, got {_shape(t)}")
        if not t.is_floating_point():
            raise TypeError(f"{name}: {argument} must have a floating dtype, got {t.dtype}")
        if t.dtype is not query.dtype:
            raise TypeError(f"{name}: {argument} must have the dtype of query, {query.dtype}, got {t.dtype}")
        if enable_gqa and (t.shape[-3] == 0 or query.shape[-3] % t.shape[-3]):
            raise ValueError(
                f"{name}: the heads of {argument} must divide the {query.shape[-3]} of query, got {t.shape[-3]}"
            )
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"{name}: key must have {query.shape[-1]} features, as query has, got {_shape(key)}")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"{name}: value must have {key.shape[-2]} rows, as key has, got {_shape(value)}")
    cut = -3 if enable_gqa else -2
    heads = query.shape[cut:-2]
    batch = query.shape[:cut]
    if not batch == key.shape[:cut] == value.shape[:cut]:
        try:
            batch = torch.broadcast_shapes(batch, key.shape[:cut])
            torch.broadcast_shapes(batch, value.shape[:cut])
        except RuntimeError:
            raise ValueError(
                f"{name}: the leading dimensions of query, key and value must broadcast, got {_shape(query)}, "
                f"{_shape(key)} and {_shape(value)}"
            ) from None
    scores = torch.Size((*batch, *heads, query.shape[-2], key.shape[-2]))
    if attn_mask is None:
        return scores
    if is_causal:
        raise ValueError(f"{name}: is_causal must be False when attn_mask is given, got both")
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise TypeError(
            f"{name}: attn_mask must be boolean, float32 or of query's dtype {query.dtype}, got {attn_mask.dtype}"
        )
    trailing = scores[max(len(scores) - attn_mask.dim(), 0) :]
    if attn_mask.dim() > len(scores) or any(
        m not in (1, n) for m, n in zip(attn_mask.shape, trailing, strict=True)
    ):
        raise ValueError(f"{name}: attn_mask must broadcast to {tuple(scores)}, got {_shape(attn_mask)}")
    return scores

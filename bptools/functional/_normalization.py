"""Norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bptools.functional._checks import check_parameter_dtypes, is_int, one_dtype, shape_of
from bptools.ops import add_norm as _add_norm
from bptools.ops import batch_norm as _batch_norm
from bptools.ops import group_norm as _group_norm
from bptools.ops import layer_norm as _layer_norm
from bptools.ops import local_response_norm as _local_response_norm
from bptools.ops import normalize as _normalize
from bptools.ops import rms_norm as _rms_norm
from bptools.ops import sync_batch_norm as _sync_batch_norm
from bptools.ops import weight_norm as _weight_norm


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
    check_parameter_dtypes("layer_norm", input, weight=weight, bias=bias)
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
    eps = _check_rms_norm("rms_norm", input, normalized_shape, weight, eps)
    y, _ = _rms_norm.rms_norm(input, weight, len(normalized_shape), eps)
    return y


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """`h = input + residual`, and the layer norm of h. Keeps h and two numbers a row for backward.

    Args:
        input: (..., *normalized_shape).
        residual: input's shape.
        normalized_shape: the sizes of the last dimensions, over which mean and variance are taken.
        weight: normalized_shape, or None for 1.
        bias: normalized_shape, or None for 0.
        eps: added to the variance, in its units.

    Returns:
        The normalised sum, and the sum: (..., *normalized_shape) each.

    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if the dtypes do not fit.
    """
    input, residual = _check_summands("add_layer_norm", input, residual)
    _check_normalized("add_layer_norm", input, normalized_shape, weight=weight, bias=bias)
    check_parameter_dtypes("add_layer_norm", input, weight=weight, bias=bias)
    y, _, _, h = _add_norm.add_layer_norm(input, residual, weight, bias, len(normalized_shape), eps)
    return y, _frozen_as(input, residual, h)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`h = input + residual`, and the RMS norm of h. Keeps h and one number a row for backward.

    Args:
        input: (..., *normalized_shape).
        residual: input's shape.
        normalized_shape: the sizes of the last dimensions, over which the mean square is taken.
        weight: normalized_shape, or None for 1.
        eps: added to the mean square, in its units; None as in `rms_norm`.

    Returns:
        The normalised sum, and the sum: (..., *normalized_shape) each.

    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if the dtypes do not fit.
    """
    input, residual = _check_summands("add_rms_norm", input, residual)
    eps = _check_rms_norm("add_rms_norm", input, normalized_shape, weight, eps)
    y, _, h = _add_norm.add_rms_norm(input, residual, weight, len(normalized_shape), eps)
    return y, _frozen_as(input, residual, h)


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
    given = running_mean, running_var, weight, bias
    _check_batch_norm("batch_norm", input, *given, training, momentum, eps)
    if training and input.numel() == input.shape[1] > 0:
        raise ValueError(
            f"batch_norm: input must have more than one value per channel in training, got {shape_of(input)}"
        )
    mean, var = _running(input, *given)
    if not training or input.numel() == 0:
        return _batch_norm.frozen_batch_norm(input, weight, bias, mean, var, eps)
    y, _, _, new_mean, new_var = _batch_norm.batch_norm(input, weight, bias, mean, var, momentum, eps)
    _move(running_mean, running_var, new_mean, new_var)
    return y


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    process_group: Any = None,
) -> Tensor:
    """Batch norm in training, over the batch of which every process of the group holds a part, of any size.

    Every process has to call it, and to differentiate it if one does. The gradients of weight and bias are those
    of a process alone, as all parameters' are; DistributedDataParallel averages them.

    Args:
        input: (n, c, ...), this process's part; n may be 0.
        running_mean: (c,), or None; moved towards the mean of the whole batch, in place.
        running_var: (c,), or None with running_mean. The same for the variance, which it holds unbiased.
        weight: (c,), or None for 1.
        bias: (c,), or None for 0.
        momentum: how far the running statistics are moved, from 0 to 1.
        eps: added to the variance, in its units.
        process_group: of torch.distributed; None for all processes.

    Raises:
        ValueError: if the shapes do not fit, or eps is not positive.
        TypeError: as `batch_norm`.
        RuntimeError: if torch.distributed has not been initialised.
    """
    given = running_mean, running_var, weight, bias
    _check_batch_norm("sync_batch_norm", input, *given, True, momentum, eps)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise RuntimeError("sync_batch_norm: torch.distributed must be initialised, by init_process_group")
    group = process_group or torch.distributed.group.WORLD
    mean, var = _running(input, *given)
    op = _sync_batch_norm.sync_batch_norm
    y, _, _, _, new_mean, new_var = op(input, weight, bias, mean, var, momentum, eps, group)
    _move(running_mean, running_var, new_mean, new_var)
    return y


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Shift and scale each channel of each sample to mean 0 and variance 1, then apply an affine map per channel.

    It is batch norm of one sample that has all channels of all samples for its channels.

    Args:
        input: (n, c, ...), c channels; mean and variance are taken over everything after c.
        running_mean: (c,), or None. With `use_input_stats` it is moved towards the mean of the samples' means, in
            place; without, it is the mean.
        running_var: (c,), or None with running_mean. The same for the variance, which it holds unbiased.
        weight: (c,), or None for 1.
        bias: (c,), or None for 0.
        use_input_stats: normalise by the statistics of the input.
        momentum: how far the running statistics are moved, from 0 to 1.
        eps: added to the variance, in its units.

    Raises:
        ValueError: if the shapes do not fit, if there is one value per channel, or no running statistics without
            `use_input_stats`, or if eps is negative, or 0 with it.
        TypeError: as `batch_norm`.
    """
    given = running_mean, running_var, weight, bias
    _check_batch_norm("instance_norm", input, *given, use_input_stats, momentum, eps)
    if use_input_stats and input.shape[2:].numel() == 1:
        raise ValueError(
            f"instance_norm: input must have more than one value per channel and sample, got {shape_of(input)}"
        )
    mean, var = _running(input, *given)
    if not use_input_stats or input.numel() == 0:
        return _batch_norm.frozen_batch_norm(input, weight, bias, mean, var, eps)
    n, c, *size = input.shape
    each = [None if t is None else t.repeat(n) for t in (weight, bias, mean, var)]  # (n c,)
    y, _, _, new_mean, new_var = _batch_norm.batch_norm(input.reshape(1, n * c, *size), *each, momentum, eps)
    _move(running_mean, running_var, new_mean.view(n, c).mean(0), new_var.view(n, c).mean(0))
    return y.view(input.shape)


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Shift and scale each group of channels of each sample to mean 0 and variance 1, then apply an affine map.

    Args:
        input: (n, c, ...), c channels; mean and variance are taken over a group of them and everything after c.
        num_groups: into how many groups of the same size, of neighbours, the channels are divided.
        weight: (c,), or None for 1.
        bias: (c,), or None for 0.
        eps: added to the variance, in its units.

    Raises:
        ValueError: if the shapes do not fit, the channels cannot be divided so, or one value is all there is to
            normalise by.
        TypeError: if a parameter's dtype is neither input's nor, for input in half precision, float32.
    """
    if input.dim() < 2 or 0 in input.shape[1:]:
        raise ValueError(
            f"group_norm: input must have shape (n, c, ...), where only n may be zero, got {shape_of(input)}"
        )
    channels = input.shape[1]
    if not is_int(num_groups) or num_groups < 1 or channels % num_groups:
        raise ValueError(f"group_norm: num_groups must be a divisor of {channels} channels, got {num_groups!r}")
    _check_channels("group_norm", channels, weight=weight, bias=bias)
    check_parameter_dtypes("group_norm", input, weight=weight, bias=bias)
    if input.numel() == num_groups:
        raise ValueError(
            f"group_norm: input must have more than one value per group in a batch, got {shape_of(input)}"
        )
    y, _, _ = _group_norm.group_norm(input, weight, bias, num_groups, eps)
    return y


def local_response_norm(
    input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """Divide by `(k + alpha * mean of squares of neighbouring channels)**beta`. Keeps its input for backward.

    Args:
        input: (n, c, ...), of at least 3 dimensions.
        size: how many channels are neighbours, the channel itself included.
        alpha: what their mean square is multiplied by.
        beta: the exponent.
        k: what is added to the mean square.

    Raises:
        ValueError: if input has fewer dimensions, or size is not positive.
    """
    if input.dim() < 3:
        raise ValueError(f"local_response_norm: input must have at least 3 dimensions, got {shape_of(input)}")
    if not is_int(size) or size < 1:
        raise ValueError(f"local_response_norm: size must be an int of at least 1, got {size!r}")
    return _local_response_norm.local_response_norm(input, size, float(alpha), float(beta), float(k))


def normalize(
    input: Tensor,
    p: float = 2.0,
    dim: int | tuple[int, ...] = 1,
    eps: float = 1e-12,
    out: Tensor | None = None,
) -> Tensor:
    """Divide each vector by its p-norm, or by eps if that is larger. Keeps input and norms for backward.

    Args:
        input: (...).
        p: the exponent of the norm; `math.inf` for the largest magnitude.
        dim: the dimension, or dimensions, along which the vectors lie.
        eps: the least that is divided by.
        out: where to write the result, (...); without gradients.

    Raises:
        IndexError: if input has no such dimension.
        RuntimeError: if out is given and a gradient is wanted.
    """
    dims = (dim,) if is_int(dim) else tuple(dim)
    if any(not -max(input.dim(), 1) <= d < max(input.dim(), 1) for d in dims):
        raise IndexError(f"normalize: dim must be of the {input.dim()} dimensions of input, got {dim}")
    if out is not None and torch.is_grad_enabled() and (input.requires_grad or out.requires_grad):
        raise RuntimeError("normalize: with out there is no gradient, but input or out requires one")
    y, _ = _normalize.normalize(input, float(p), dims, float(eps))
    return y if out is None else torch.div(y, 1, out=out)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """A weight of direction v and length g: `g * v / ‖v‖`, for each slice along dim. As `torch._weight_norm`.

    Args:
        v: (..., o, ...), o being the dimension dim.
        g: (1, ..., o, ..., 1), the lengths; or any shape of one element if dim is -1.
        dim: of the slices; -1 for one slice, all of v.

    Returns:
        The weight, of v's shape.

    Raises:
        ValueError: if v has no dimension dim, or g is not of that shape.
    """
    if not -1 <= dim < v.dim():
        raise ValueError(f"weight_norm: dim must be from -1 to {v.dim() - 1}, got {dim}")
    shape = () if dim == -1 else tuple(v.shape[d] if d == dim else 1 for d in range(v.dim()))
    if shape_of(g) != shape:
        raise ValueError(f"weight_norm: g must have shape {shape}, got {shape_of(g)}")
    w, _ = _weight_norm.weight_norm(v, g, dim)
    return w


def spectral_norm(weight: Tensor, u: Tensor, v: Tensor, dim: int = 0) -> Tensor:
    """A weight divided by `σ = uᵀ W v`, an estimate of its largest singular value. u and v are constants.

    Args:
        weight: (..., o, ...), o being the dimension dim; e elements a slice, which are the rows of the matrix W.
        u: (o,), the left singular vector.
        v: (e,), the right one.
        dim: of the rows.

    Returns:
        The weight, of the same shape.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if not -weight.dim() <= dim < weight.dim():
        raise ValueError(f"spectral_norm: dim must be of the {weight.dim()} dimensions of weight, got {dim}")
    rows = weight.shape[dim]
    for name, value, size in (("u", u, rows), ("v", v, weight.numel() // max(rows, 1))):
        if shape_of(value) != (size,):
            raise ValueError(f"spectral_norm: {name} must have shape ({size},), got {shape_of(value)}")
    y, _ = _weight_norm.spectral_norm(weight, u, v, dim % weight.dim())
    return y


def _running(
    input: Tensor, mean: Tensor | None, var: Tensor | None, *parameters: Tensor | None
) -> tuple[Tensor, ...]:
    """The running statistics; an op moves them in any case, and without there are some that nobody reads."""
    if mean is not None:
        return mean, var
    dtype = next((t for t in parameters if t is not None), input).dtype
    return tuple(input.new_zeros(input.shape[1], dtype=dtype) for _ in range(2))


def _move(mean: Tensor | None, var: Tensor | None, new_mean: Tensor, new_var: Tensor) -> None:
    """Store the running statistics, if there are any."""
    if mean is not None:
        with torch.no_grad():
            mean.copy_(new_mean)
            var.copy_(new_var)


def _check_batch_norm(
    name: str,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> None:
    given = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    if input.dim() < 2:
        raise ValueError(f"{name}: input must have shape (n, c, ...), got {shape_of(input)}")
    _check_channels(name, input.shape[1], **given)
    check_parameter_dtypes(name, input, **given)
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{name}: running_mean and running_var must be both given or both None, got one")
    if not training and running_mean is None:
        raise ValueError(f"{name}: running_mean and running_var must be given in evaluation, got None")
    if not isinstance(momentum, (int, float)):
        raise TypeError(f"{name}: momentum must be a number, got {momentum!r}")
    if eps < 0 or (training and eps == 0):
        raise ValueError(f"{name}: eps must be {'positive' if training else 'at least 0'}, got {eps}")


def _check_channels(name: str, channels: int, **given: Tensor | None) -> None:
    for argument, value in given.items():
        if value is not None and shape_of(value) != (channels,):
            raise ValueError(f"{name}: {argument} must have shape ({channels},), got {shape_of(value)}")


def _check_summands(name: str, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of their sum."""
    if residual.shape != input.shape:
        raise ValueError(f"{name}: residual must have input's shape {shape_of(input)}, got {shape_of(residual)}")
    return one_dtype(input, residual)


def _frozen_as(input: Tensor, residual: Tensor, h: Tensor) -> Tensor:
    """The sum, which requires a gradient only if one of its terms does, whatever learns beside them."""
    return h.detach() if h.requires_grad and not (input.requires_grad or residual.requires_grad) else h


def _check_rms_norm(
    name: str, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None
) -> float:
    """The eps to use."""
    _check_normalized(name, input, normalized_shape, weight=weight)
    if weight is not None and weight.dtype is torch.float64 is not input.dtype:
        raise TypeError(f"{name}: weight must not be wider than input ({input.dtype}), got {weight.dtype}")
    if eps is None:
        eps = torch.finfo(torch.float64 if input.dtype is torch.float64 else torch.float32).eps
    return eps


def _check_normalized(name: str, input: Tensor, normalized_shape: Sequence[int], **affine: Tensor | None) -> None:
    shape = tuple(normalized_shape)
    if not shape:
        raise ValueError(f"{name}: normalized_shape must have at least one dimension, got ()")
    if shape_of(input)[-len(shape) :] != shape:
        raise ValueError(f"{name}: input must end in normalized_shape {shape}, got {shape_of(input)}")
    for argument, value in affine.items():
        if value is not None and shape_of(value) != shape:
            raise ValueError(f"{name}: {argument} must have shape {shape}, got {shape_of(value)}")

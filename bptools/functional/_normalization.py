"""Norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bptools.functional._checks import check_parameter_dtypes, shape_of
from bptools.ops import batch_norm as _batch_norm
from bptools.ops import layer_norm as _layer_norm
from bptools.ops import rms_norm as _rms_norm


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
        raise ValueError(f"batch_norm: input must have shape (n, c, ...), got {shape_of(input)}")
    channels = input.shape[1]
    for name, value in given.items():
        if shape_of(value) != (channels,):
            raise ValueError(f"batch_norm: {name} must have shape ({channels},), got {shape_of(value)}")
    check_parameter_dtypes("batch_norm", input, **given)
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
            f"batch_norm: input must have more than one value per channel in training, got {shape_of(input)}"
        )


def _check_normalized(name: str, input: Tensor, normalized_shape: Sequence[int], **affine: Tensor | None) -> None:
    shape = tuple(normalized_shape)
    if not shape:
        raise ValueError(f"{name}: normalized_shape must have at least one dimension, got ()")
    if shape_of(input)[-len(shape) :] != shape:
        raise ValueError(f"{name}: input must end in normalized_shape {shape}, got {shape_of(input)}")
    for argument, value in affine.items():
        if value is not None and shape_of(value) != shape:
            raise ValueError(f"{name}: {argument} must have shape {shape}, got {shape_of(value)}")

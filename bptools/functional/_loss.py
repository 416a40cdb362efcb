"""Losses."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from bptools.functional._checks import check_reduction, one_dtype, shape_of
from bptools.ops import loss as _loss


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
    check_reduction("cross_entropy", reduction, size_average=size_average, reduce=reduce)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"cross_entropy: label_smoothing must be from 0 to 1, got {label_smoothing}")
    if input.dim() == 0 or (classes := input.shape[min(input.dim() - 1, 1)]) == 0:
        raise ValueError(
            f"cross_entropy: input must have shape (N, C, ...) or (C,) with C > 0, got {shape_of(input)}"
        )
    if weight is not None and shape_of(weight) != (classes,):
        raise ValueError(f"cross_entropy: weight must have shape ({classes},), got {shape_of(weight)}")

    if target.shape == input.shape:
        if not target.is_floating_point():
            raise TypeError(f"cross_entropy: target of input's shape must hold probabilities, got {target.dtype}")
        if ignore_index >= 0:
            raise ValueError(
                f"cross_entropy: ignore_index is for class indices, got {ignore_index} and probabilities"
            )
        return _loss.soft_cross_entropy(*one_dtype(input, target, weight), label_smoothing, reduction)

    rows = input.shape[:1] + input.shape[2:] if input.dim() > 1 else ()
    if target.shape != rows:
        raise ValueError(
            f"cross_entropy: target must have shape {tuple(rows)} for class indices or {shape_of(input)} for "
            f"probabilities, got {shape_of(target)}"
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
    check_reduction("mse_loss", reduction, size_average=size_average, reduce=reduce)
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
                f"mse_loss: target must have input's shape {shape_of(input)}, got {shape_of(target)}"
            ) from None
    if weight is None:
        return _loss.mse_loss(*one_dtype(input, target), reduction)
    if weight.shape != input.shape:
        raise ValueError(f"mse_loss: weight must have input's shape {shape_of(input)}, got {shape_of(weight)}")
    return _loss.weighted_mse_loss(*one_dtype(input, target, weight), reduction)

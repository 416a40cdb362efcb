"""Losses of an error."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from bptools.functional._checks import check_reduction, one_dtype, shape_of
from bptools.ops import regression_loss as _regression


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
    _check_shapes("mse_loss", input, target, weight)
    if weight is None:
        return _regression.mse_loss(*one_dtype(input, target), reduction)
    return _regression.weighted_mse_loss(*one_dtype(input, target, weight), reduction)


def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """Absolute error `|input - target|`. Both are differentiable, and so is weight.

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
    check_reduction("l1_loss", reduction, size_average=size_average, reduce=reduce)
    _check_shapes("l1_loss", input, target, weight)
    if weight is None:
        return _regression.l1_loss(*one_dtype(input, target), reduction)
    return _regression.weighted_l1_loss(*one_dtype(input, target, weight), reduction)


def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    """Absolute error, squared near 0: `d**2 / (2 * beta)` if `|d| < beta`, else `|d| - beta / 2`.

    Args:
        input: (...).
        target: input's shape. Another that broadcasts with it is accepted, with a warning. Differentiable too.
        size_average: deprecated in torch, refused here; use `reduction`.
        reduce: deprecated in torch, refused here; use `reduction`.
        reduction: `"none"`, `"mean"` or `"sum"`.
        beta: at least 0, where the one becomes the other; with 0 it is `l1_loss`.

    Returns:
        (), or (...) without reduction.

    Raises:
        TypeError: if an argument is not real, or none is floating.
        ValueError: if the shapes do not fit, `beta` is negative, `reduction` is none of the above, or a deprecated
            argument is given.
    """
    check_reduction("smooth_l1_loss", reduction, size_average=size_average, reduce=reduce)
    if beta < 0:
        raise ValueError(f"smooth_l1_loss: beta must be at least 0, got {beta}")
    _check_shapes("smooth_l1_loss", input, target)
    if beta == 0:
        return _regression.l1_loss(*one_dtype(input, target), reduction)
    return _regression.smooth_l1_loss(*one_dtype(input, target), float(beta), reduction)


def huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    """Huber's loss: `d**2 / 2` if `|d| <= delta`, else `delta * (|d| - delta / 2)`.

    Args:
        input: (...).
        target: input's shape. Another that broadcasts with it is accepted, with a warning. Differentiable too.
        reduction: `"none"`, `"mean"` or `"sum"`.
        delta: positive, where the one becomes the other.
        weight: input's shape, a factor for each element, or None for 1; differentiable. The mean is over the
            elements, not weighted (unlike `mse_loss`'s).

    Returns:
        (), or (...) without reduction.

    Raises:
        TypeError: if an argument is not real, or none is floating.
        ValueError: if the shapes do not fit, `delta` is not positive, or `reduction` is none of the above.
    """
    check_reduction("huber_loss", reduction)
    if delta <= 0:
        raise ValueError(f"huber_loss: delta must be positive, got {delta}")
    _check_shapes("huber_loss", input, target, weight)
    return _regression.huber_loss(*one_dtype(input, target, weight), float(delta), reduction)


def _check_shapes(name: str, input: Tensor, target: Tensor, weight: Tensor | None = None) -> None:
    """Refuse shapes that do not fit; warn of those that do not agree, as torch does."""
    if target.shape != input.shape:
        try:
            torch.broadcast_shapes(input.shape, target.shape)
        except RuntimeError:
            raise ValueError(
                f"{name}: target must have input's shape {shape_of(input)}, got {shape_of(target)}"
            ) from None
        warnings.warn(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
            "This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=3,
        )
    if weight is not None and weight.shape != input.shape:
        raise ValueError(f"{name}: weight must have input's shape {shape_of(input)}, got {shape_of(weight)}")

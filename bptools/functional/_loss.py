"""Losses of classes."""

from __future__ import annotations

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
    classes = _check_classes("cross_entropy", input, weight)

    if target.shape == input.shape:
        if not target.is_floating_point():
            raise TypeError(f"cross_entropy: target of input's shape must hold probabilities, got {target.dtype}")
        if ignore_index >= 0:
            raise ValueError(
                f"cross_entropy: ignore_index is for class indices, got {ignore_index} and probabilities"
            )
        return _loss.soft_cross_entropy(*one_dtype(input, target, weight), label_smoothing, reduction)

    if target.shape != _rows(input):
        raise ValueError(
            f"cross_entropy: target must have shape {_rows(input)} for class indices or {shape_of(input)} for "
            f"probabilities, got {shape_of(target)}"
        )
    _check_indices("cross_entropy", target)
    try:
        return _loss.cross_entropy(input, target.long(), weight, ignore_index, float(label_smoothing), reduction)
    except IndexError:
        raise _no_class("cross_entropy", target, classes, ignore_index) from None


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Negative log likelihood: minus what input says of each row's class. Keeps nothing of input's size.

    Args:
        input: logarithms of probabilities, as log_softmax gives, (N, C, ...) or (C,) for C classes.
        target: class indices, (N, ...) or (), int64 or uint8.
        weight: (C,), a weight for each class, or None for 1. The mean is weighted too. Not differentiable.
        size_average: deprecated in torch, refused here; use `reduction`.
        ignore_index: a class index that does not count, neither in the loss nor in the mean.
        reduce: deprecated in torch, refused here; use `reduction`.
        reduction: `"none"`, `"mean"` or `"sum"`.

    Returns:
        (), or (N, ...) or () without reduction. The mean over no row is nan, as torch's.

    Raises:
        IndexError: if target holds an index that is no class. On a GPU the device reports it, later.
        TypeError: if the dtypes do not fit, or weight requires a gradient.
        ValueError: if the shapes do not fit, `reduction` is none of the above, or a deprecated argument is given.
    """
    check_reduction("nll_loss", reduction, size_average=size_average, reduce=reduce)
    classes = _check_classes("nll_loss", input, weight)
    if target.shape != _rows(input):
        raise ValueError(f"nll_loss: target must have shape {_rows(input)}, got {shape_of(target)}")
    _check_indices("nll_loss", target)
    try:
        return _loss.nll_loss(input, target.long(), weight, ignore_index, reduction)
    except IndexError:
        raise _no_class("nll_loss", target, classes, ignore_index) from None


def _check_classes(name: str, input: Tensor, weight: Tensor | None) -> int:
    if input.dim() == 0 or (classes := input.shape[min(input.dim() - 1, 1)]) == 0:
        raise ValueError(f"{name}: input must have shape (N, C, ...) or (C,) with C > 0, got {shape_of(input)}")
    if weight is not None and shape_of(weight) != (classes,):
        raise ValueError(f"{name}: weight must have shape ({classes},), got {shape_of(weight)}")
    return classes


def _rows(input: Tensor) -> tuple[int, ...]:
    return shape_of(input)[:1] + shape_of(input)[2:] if input.dim() > 1 else ()


def _check_indices(name: str, target: Tensor) -> None:
    if target.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"{name}: target must hold class indices, int64 or uint8, got {target.dtype}")


def _no_class(name: str, target: Tensor, classes: int, ignore_index: int) -> IndexError:
    return IndexError(
        f"{name}: target must hold classes, 0 to {classes - 1}, or ignore_index {ignore_index}, "
        f"got {target.min()} to {target.max()}"
    )

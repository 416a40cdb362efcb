"""Losses that ask for a margin."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bptools.functional._checks import broadcast, check_power, check_reduction, one_dtype, readable, shape_of
from bptools.functional._distance import pairwise_distance
from bptools.ops import margin_loss as _margin


def margin_ranking_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Ranking: `max(0, margin - target * (input1 - input2))`. All three are differentiable.

    Args:
        input1: (...).
        input2: (...).
        target: 1 where input1 is to be the larger, else -1. The three have as many dimensions, and broadcast.
        margin: by how much.
        size_average: deprecated in torch, refused here; use `reduction`.
        reduce: deprecated in torch, refused here; use `reduction`.
        reduction: `"none"`, `"mean"` or `"sum"`.

    Returns:
        (), or (...) without reduction.

    Raises:
        TypeError: if an argument is not real, or none is floating.
        ValueError: if the shapes do not fit, `reduction` is none of the above, or a deprecated argument is given.
    """
    name = "margin_ranking_loss"
    check_reduction(name, reduction, size_average=size_average, reduce=reduce)
    if not input1.dim() == input2.dim() == target.dim():
        raise ValueError(
            f"{name}: input2 and target must have as many dimensions as input1 of shape {shape_of(input1)}, got "
            f"{shape_of(input2)} and {shape_of(target)}"
        )
    broadcast(name, input1=input1, input2=input2, target=target)
    return _margin.margin_ranking_loss(*one_dtype(input1, input2, target), float(margin), reduction)


def hinge_embedding_loss(
    input: Tensor,
    target: Tensor,
    margin: float = 1.0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Of a distance: itself where target is 1, and `max(0, margin - input)` where it is -1.

    Args:
        input: distances, (...).
        target: 1 or -1; broadcasts with input. Not differentiable.
        margin: how far is far enough.
        size_average: deprecated in torch, refused here; use `reduction`.
        reduce: deprecated in torch, refused here; use `reduction`.
        reduction: `"none"`, `"mean"` or `"sum"`.

    Returns:
        (), or (...) without reduction.

    Raises:
        TypeError: if input is not floating, or target requires a gradient.
        ValueError: if the shapes do not fit, `reduction` is none of the above, or a deprecated argument is given.
    """
    check_reduction("hinge_embedding_loss", reduction, size_average=size_average, reduce=reduce)
    broadcast("hinge_embedding_loss", input=input, target=target)
    return _margin.hinge_embedding_loss(input, target, float(margin), reduction)


def soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Logistic loss: `log(1 + exp(-target * input))`.

    Args:
        input: (...).
        target: 1 or -1; broadcasts with input. Not differentiable.
        size_average: deprecated in torch, refused here; use `reduction`.
        reduce: deprecated in torch, refused here; use `reduction`.
        reduction: `"none"`, `"mean"` or `"sum"`.

    Returns:
        (), or (...) without reduction.

    Raises:
        TypeError: if input is not floating, or target requires a gradient.
        ValueError: if the shapes do not fit, `reduction` is none of the above, or a deprecated argument is given.
    """
    check_reduction("soft_margin_loss", reduction, size_average=size_average, reduce=reduce)
    broadcast("soft_margin_loss", input=input, target=target)
    return _margin.soft_margin_loss(*one_dtype(input, target), reduction)


def cosine_embedding_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Of the cosine of two vectors: `1 - cos` where target is 1, and `max(0, cos - margin)` where it is -1.

    Args:
        input1: (N, D) or (D,).
        input2: (N, D) or (D,); the two broadcast.
        target: 1 or -1, (N,) or (). Not differentiable.
        margin: from -1 to 1, which cosine is far enough.
        size_average: deprecated in torch, refused here; use `reduction`.
        reduce: deprecated in torch, refused here; use `reduction`.
        reduction: `"none"`, `"mean"` or `"sum"`.

    Returns:
        (), or (N,) or () without reduction.

    Raises:
        TypeError: if an argument is not real, none is floating, or target requires a gradient.
        ValueError: if the shapes do not fit, `reduction` is none of the above, or a deprecated argument is given.
    """
    name = "cosine_embedding_loss"
    check_reduction(name, reduction, size_average=size_average, reduce=reduce)
    if target.dim() > 1 or not input1.dim() == input2.dim() == target.dim() + 1:
        raise ValueError(
            f"{name}: input1, input2 and target must have shapes (N, D), (N, D) and (N,), or (D,), (D,) and (), "
            f"got {shape_of(input1)}, {shape_of(input2)} and {shape_of(target)}"
        )
    broadcast(name, input1=input1, input2=input2, target=target.unsqueeze(-1))
    return _margin.cosine_embedding_loss(*one_dtype(input1, input2), target, float(margin), reduction)


def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2,
    eps: float = 1e-6,
    swap: bool = False,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Of distances: `max(0, margin + distance(anchor, positive) - distance(anchor, negative))`.

    Args:
        anchor: (N, D) or (D,).
        positive: (N, D) or (D,), of what is as the anchor.
        negative: (N, D) or (D,), of what is not. The three have as many dimensions, and broadcast.
        margin: positive, by how much the negative example is to be farther.
        p: the power of `pairwise_distance`.
        eps: what it adds to each difference.
        swap: whether the distance of negative from positive counts instead, where it is less.
        size_average: deprecated in torch, refused here; use `reduction`.
        reduce: deprecated in torch, refused here; use `reduction`.
        reduction: `"none"`, `"mean"` or `"sum"`.

    Returns:
        (), or (N,) or () without reduction.

    Raises:
        TypeError: if an argument is not real, or none is floating.
        ValueError: if the shapes do not fit, `margin` is not positive, `p` is negative, `reduction` is none of
            the above, or a deprecated argument is given.
    """
    name = "triplet_margin_loss"
    check_reduction(name, reduction, size_average=size_average, reduce=reduce)
    _check_triplet(name, anchor, positive, negative, margin)
    check_power(name, p)
    broadcast(name, anchor=anchor, positive=positive, negative=negative)
    tensors = one_dtype(anchor, positive, negative)
    return _margin.triplet_margin_loss(*tensors, float(margin), float(p), float(eps), swap, reduction)


def triplet_margin_with_distance_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    distance_function: Callable[[Tensor, Tensor], Tensor] | None = None,
    margin: float = 1.0,
    swap: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """`triplet_margin_loss` of a distance of your own.

    Args:
        anchor: (N, ...), as the distance takes it.
        positive: (N, ...), of as many dimensions.
        negative: (N, ...), of as many dimensions.
        distance_function: of two of them; None for `pairwise_distance`. Its gradients are its own affair.
        margin: positive, by how much the negative example is to be farther.
        swap: whether the distance of negative from positive counts instead, where it is less.
        reduction: `"none"`, `"mean"` or `"sum"`.

    Returns:
        (), or the distances' shape without reduction.

    Raises:
        TypeError: if a distance is not floating.
        ValueError: if the numbers of dimensions differ, `margin` is not positive, or `reduction` is none of the
            above.
    """
    name = "triplet_margin_with_distance_loss"
    check_reduction(name, reduction)
    _check_triplet(name, anchor, positive, negative, margin)
    distance = pairwise_distance if distance_function is None else distance_function
    swapped = distance(positive, negative) if swap else None
    distances = one_dtype(distance(anchor, positive), distance(anchor, negative), swapped)
    return _margin.triplet_hinge(*distances, float(margin), reduction)


def _check_triplet(name: str, anchor: Tensor, positive: Tensor, negative: Tensor, margin: float) -> None:
    if not margin > 0:
        raise ValueError(f"{name}: margin must be positive, got {margin}")
    if not anchor.dim() == positive.dim() == negative.dim():
        raise ValueError(
            f"{name}: positive and negative must have as many dimensions as anchor of shape {shape_of(anchor)}, "
            f"got {shape_of(positive)} and {shape_of(negative)}"
        )


def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Of scores of C classes: the mean of `max(0, margin - input[target] + input[c])**p`, 0 for the target itself.

    Args:
        input: (N, C) or (C,).
        target: class indices, (N,) or (), int64.
        p: 1 or 2.
        margin: by how much the target's score is to be the largest.
        weight: (C,), a factor for each row by its class, or None for 1. Not differentiable.
        size_average: deprecated in torch, refused here; use `reduction`.
        reduce: deprecated in torch, refused here; use `reduction`.
        reduction: `"none"`, `"mean"` or `"sum"`.

    Returns:
        (), or (N,) or () without reduction.

    Raises:
        IndexError: if target holds an index that is no class. On a GPU the device reports it, later.
        TypeError: if the dtypes do not fit, or weight requires a gradient.
        ValueError: if the shapes do not fit, `p` or `reduction` is none of the above, or a deprecated argument is
            given.
    """
    name = "multi_margin_loss"
    check_reduction(name, reduction, size_average=size_average, reduce=reduce)
    if p not in (1, 2):
        raise ValueError(f"{name}: p must be 1 or 2, got {p}")
    _check_rows(name, input)
    if target.shape != input.shape[:-1]:
        raise ValueError(f"{name}: target must have shape {shape_of(input)[:-1]}, got {shape_of(target)}")
    if target.dtype is not torch.int64:
        raise TypeError(f"{name}: target must hold class indices, int64, got {target.dtype}")
    classes = input.shape[-1]
    if weight is not None and weight.shape != (classes,):
        raise ValueError(f"{name}: weight must have shape ({classes},), got {shape_of(weight)}")
    _check_indices(name, target, 0, classes)
    x, t = (input, target) if input.dim() == 2 else (input.unsqueeze(0), target.unsqueeze(0))
    y = _margin.multi_margin_loss(x, t, weight, int(p), float(margin), reduction)
    return y if y.dim() == target.dim() or reduction != "none" else y.squeeze(0)


def multilabel_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Of scores of C classes: the sum of `max(0, 1 - input[t] + input[c])` over targets t and others c, over C.

    Args:
        input: (N, C) or (C,).
        target: input's shape, int64: the classes of the row, ended by -1 if they are fewer than C.
        size_average: deprecated in torch, refused here; use `reduction`.
        reduce: deprecated in torch, refused here; use `reduction`.
        reduction: `"none"`, `"mean"` or `"sum"`.

    Returns:
        (), or (N,) or () without reduction.

    Raises:
        IndexError: if target holds what is neither class nor -1. On a GPU nobody looks.
        TypeError: if the dtypes do not fit.
        ValueError: if the shapes do not fit, `reduction` is none of the above, or a deprecated argument is given.
    """
    name = "multilabel_margin_loss"
    check_reduction(name, reduction, size_average=size_average, reduce=reduce)
    _check_rows(name, input)
    if target.shape != input.shape:
        raise ValueError(f"{name}: target must have input's shape {shape_of(input)}, got {shape_of(target)}")
    if target.dtype is not torch.int64:
        raise TypeError(f"{name}: target must hold class indices, int64, got {target.dtype}")
    _check_indices(name, target, -1, input.shape[-1])
    x, t = (input, target) if input.dim() == 2 else (input.unsqueeze(0), target.unsqueeze(0))
    y = _margin.multilabel_margin_loss(x, t, reduction)
    return y if input.dim() == 2 or reduction != "none" else y.squeeze(0)


def _check_rows(name: str, input: Tensor) -> None:
    if input.dim() not in (1, 2) or input.shape[-1] == 0:
        raise ValueError(f"{name}: input must have shape (N, C) or (C,) with C > 0, got {shape_of(input)}")


def _check_indices(name: str, target: Tensor, low: int, classes: int) -> None:
    if target.device.type != "cpu" or not readable() or target.numel() == 0:
        return
    least, most = target.aminmax()
    if least < low or most >= classes:
        raise IndexError(f"{name}: target must hold {low} to {classes - 1}, got {least} to {most}")


def multilabel_soft_margin_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Mean over the classes of the binary cross entropy of sigmoid(input). All three are differentiable.

    Args:
        input: logits, (..., C).
        target: from 0 to 1; broadcasts with input.
        weight: broadcasts with input, a factor for each element, or None for 1.
        size_average: deprecated in torch, refused here; use `reduction`.
        reduce: deprecated in torch, refused here; use `reduction`.
        reduction: `"none"`, `"mean"` or `"sum"`.

    Returns:
        (), or (...) without reduction.

    Raises:
        TypeError: if an argument is not real, or none is floating.
        ValueError: if the shapes do not fit, `reduction` is none of the above, or a deprecated argument is given.
    """
    name = "multilabel_soft_margin_loss"
    check_reduction(name, reduction, size_average=size_average, reduce=reduce)
    if input.dim() == 0:
        raise ValueError(f"{name}: input must have shape (..., C), got ()")
    x, target = broadcast(name, input=input, target=target)
    if weight is not None:
        x, target, weight = broadcast(name, input=x, target=target, weight=weight)
    return _margin.multilabel_soft_margin_loss(*one_dtype(x, target, weight), reduction)

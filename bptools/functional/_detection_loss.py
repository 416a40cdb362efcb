"""Losses for detection and segmentation, which torch lacks."""

from __future__ import annotations

from torch import Tensor

from bptools.functional._checks import check_reduction, one_dtype, shape_of
from bptools.ops import detection_loss as _detection


def focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2, reduction: str = "none"
) -> Tensor:
    """Focal loss of logits, as `torchvision.ops.sigmoid_focal_loss`. Both inputs and targets are differentiable.

    Args:
        inputs: logits, (...).
        targets: inputs' shape, from 0 to 1.
        alpha: from 0 to 1, the share of what is positive; -1 for none.
        gamma: at least 0: how much less counts what is predicted well; with 0, not less.
        reduction: `"none"`, `"mean"` or `"sum"`.

    Returns:
        (...), or () with a reduction.

    Raises:
        TypeError: if an argument is not real, or none is floating.
        ValueError: if the shapes do not fit, or `alpha`, `gamma` or `reduction` is none of the above.
    """
    check_reduction("focal_loss", reduction)
    if not 0 <= alpha <= 1 and alpha != -1:
        raise ValueError(f"focal_loss: alpha must be from 0 to 1, or -1, got {alpha}")
    if not gamma >= 0:
        raise ValueError(f"focal_loss: gamma must be at least 0, got {gamma}")
    if targets.shape != inputs.shape:
        raise ValueError(
            f"focal_loss: targets must have inputs' shape {shape_of(inputs)}, got {shape_of(targets)}"
        )
    share = None if alpha == -1 else float(alpha)
    return _detection.focal_loss(*one_dtype(inputs, targets), share, float(gamma), reduction)


def dice_loss(input: Tensor, target: Tensor, smooth: float = 1.0, reduction: str = "mean") -> Tensor:
    """One minus Dice's coefficient, `(2 * sum(input * target) + smooth) / (sum(input) + sum(target) + smooth)`.

    Both are differentiable.

    Args:
        input: probabilities, (N, C, ...), with at least one dimension of places, over which the sums are.
        target: input's shape, from 0 to 1.
        smooth: positive: keeps the coefficient of nothing and nothing at 1.
        reduction: `"none"`, `"mean"` or `"sum"`, over samples and classes.

    Returns:
        (), or (N, C) without reduction.

    Raises:
        TypeError: if an argument is not real, or none is floating.
        ValueError: if the shapes do not fit, `smooth` is not positive, or `reduction` is none of the above.
    """
    check_reduction("dice_loss", reduction)
    if not smooth > 0:
        raise ValueError(f"dice_loss: smooth must be positive, got {smooth}")
    if input.dim() < 3:
        raise ValueError(f"dice_loss: input must have shape (N, C, ...), got {shape_of(input)}")
    if target.shape != input.shape:
        raise ValueError(f"dice_loss: target must have input's shape {shape_of(input)}, got {shape_of(target)}")
    return _detection.dice_loss(*one_dtype(input, target), float(smooth), reduction)

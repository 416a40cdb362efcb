"""Connectionist temporal classification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bptools.functional._checks import check_reduction, readable, shape_of
from bptools.ops import ctc_loss as _ctc


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int],
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """Minus the logarithm of the probability that a sequence says its labels, in whatever alignment.

    The gradient is that of log_probs as they are; torch's is right behind a log_softmax alone, where it is the
    same.

    Args:
        log_probs: logarithms of probabilities, (T, N, C) or (T, C).
        targets: labels, integers without blank: (N, S), or those of all sequences one after the other, (sum,);
            (S,) of one sequence.
        input_lengths: (N,) or (), how many of the T steps a sequence has.
        target_lengths: (N,) or (), how many labels.
        blank: the class that is no label.
        reduction: `"none"`, `"sum"`, or `"mean"` of what each loss is for one label.
        zero_infinity: whether a loss that is infinite, since no path is long enough, counts 0, and has no
            gradient.

    Returns:
        (), or (N,) or () without reduction.

    Raises:
        IndexError: if targets holds what is no class, on the CPU.
        TypeError: if log_probs is not floating, or targets are not integers.
        ValueError: if the shapes do not fit, a length is out of range, `blank` is no class, or `reduction` is
            none of the above.
    """
    check_reduction("ctc_loss", reduction)
    if log_probs.dim() not in (2, 3) or 0 in log_probs.shape:
        raise ValueError(
            f"ctc_loss: log_probs must have shape (T, N, C) or (T, C), with no 0, got {shape_of(log_probs)}"
        )
    if targets.is_floating_point() or targets.dtype is torch.bool:
        raise TypeError(f"ctc_loss: targets must be integers, got {targets.dtype}")
    x = log_probs if log_probs.dim() == 3 else log_probs.unsqueeze(1)
    steps, n, classes = x.shape
    if not 0 <= blank < classes:
        raise ValueError(f"ctc_loss: blank must be a class, 0 to {classes - 1}, got {blank}")
    inputs = _lengths("input_lengths", input_lengths, n, x.device)
    labels = _lengths("target_lengths", target_lengths, n, x.device)
    if log_probs.dim() == 2 and targets.dim() == 1:
        targets = targets.unsqueeze(0)
    if targets.dim() not in (1, 2) or (targets.dim() == 2 and targets.shape[0] != n):
        raise ValueError(f"ctc_loss: targets must have shape ({n}, S) or (sum,), got {shape_of(targets)}")
    room = targets.shape[-1]
    if readable() and x.device.type != "meta":
        _check_range("input_lengths", inputs, steps)
        _check_range("target_lengths", labels if targets.dim() == 2 else labels.sum(), room)
        if targets.device.type == "cpu" and targets.numel() and not 0 <= targets.min() <= targets.max() < classes:
            raise IndexError(
                f"ctc_loss: targets must hold classes, 0 to {classes - 1}, got {targets.min()} to {targets.max()}"
            )
    targets = targets.to(x.device, torch.int64)
    if targets.dim() == 1:  # each sequence's labels into a row of their own
        width = int(labels.max()) if readable() and x.device.type != "meta" else room
        places = (labels.cumsum(0) - labels).unsqueeze(1) + torch.arange(width, device=x.device)
        targets = targets[places.clamp_max(room - 1)] if room else targets.new_zeros(n, 0)
    y, _, _ = _ctc.ctc_loss(x, targets, inputs, labels, blank, zero_infinity, reduction)
    return y.squeeze(0) if log_probs.dim() == 2 and reduction == "none" else y


def _lengths(argument: str, lengths: Tensor | Sequence[int], n: int, device: torch.device) -> Tensor:
    lengths = torch.as_tensor(lengths, device=device)
    if lengths.is_floating_point() or lengths.numel() != n or lengths.dim() > 1:
        raise ValueError(f"ctc_loss: {argument} must be {n} integers, got {lengths.dtype} {shape_of(lengths)}")
    return lengths.reshape(n).long()


def _check_range(argument: str, lengths: Tensor, most: int) -> None:
    if lengths.min() < 0 or lengths.max() > most:
        raise ValueError(f"ctc_loss: {argument} must be from 0 to {most}, got {lengths.tolist()}")

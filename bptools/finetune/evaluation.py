"""Measuring a classifier on a data set."""

from itertools import islice
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import Dataset

from .data import make_loader


class Evaluation(NamedTuple):
    """Mean cross-entropy, accuracy in percent, true labels, predicted labels and the probabilities of these."""

    loss: float
    accuracy: float
    targets: list[int]
    predictions: list[int]
    confidences: list[float]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    data: Dataset,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    workers: int = 0,
    limit: int | None = None,
) -> Evaluation:
    """Run ``model`` in evaluation mode over ``data``, without mixed precision; it stays in that mode.

    Args:
        model: Maps inputs ``(n, ...)`` to logits ``(n, classes)``.
        data: Samples of an input and a label; at least one.
        device: Where the model is.
        batch_size: Largest batch.
        workers: Processes that load.
        limit: For a trial, the most batches that are looked at.
    """
    if not len(data):
        raise ValueError("data: expected at least one sample, got none")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1 batch or None, got {limit}")
    model.eval()
    loss, targets, predictions, confidences = 0.0, [], [], []
    for inputs, labels in islice(make_loader(data, batch_size, workers=workers), limit):
        logits = model(inputs.to(device)).float().cpu()  # (n, classes)
        loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        targets += labels.tolist()
        predictions += logits.argmax(1).tolist()
        confidences += logits.softmax(1).amax(1).tolist()
    right = sum(t == p for t, p in zip(targets, predictions, strict=True))
    return Evaluation(loss / len(targets), 100 * right / len(targets), targets, predictions, confidences)

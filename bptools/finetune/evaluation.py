"""Measuring a classifier on a data set."""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .batches import Batch, to_device
from .data import make_loader


class Evaluation(NamedTuple):
    """What a classifier comes to on a data set.

    Attributes:
        loss: Mean cross-entropy.
        accuracy: In percent.
        targets: True labels.
        predictions: Predicted labels.
        confidences: Probabilities of the predicted labels.
        log_odds: Of two classes, the logit of the second less that of the first; of more, nothing.
    """

    loss: float
    accuracy: float
    targets: list[int]
    predictions: list[int]
    confidences: list[float]
    log_odds: Sequence[float] = ()


def outputs_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return logits and labels of a batch of inputs and labels."""
    inputs, labels = batch
    return model(inputs), labels


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    data: Dataset,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    workers: int = 0,
    limit: int | None = None,
    collate: Callable[[list], Any] | None = None,
    outputs: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]] = outputs_of,
) -> Evaluation:
    """Run ``model`` in evaluation mode over ``data``, without mixed precision; it stays in that mode.

    Args:
        model: Maps inputs ``(n, ...)`` to logits ``(n, classes)``.
        data: Samples of an input and a label, or of what ``collate`` takes; at least one.
        device: Where the model is.
        batch_size: Largest batch.
        workers: Processes that load.
        limit: For a trial, the most batches that are looked at.
        collate: As for :func:`bptools.finetune.make_loader`.
        outputs: Returns the logits and the labels of a batch on ``device``.
    """
    if not len(data):
        raise ValueError("data: expected at least one sample, got none")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1 batch or None, got {limit}")
    model.eval()
    loss, targets, predictions, confidences, log_odds = 0.0, [], [], [], []
    for batch in islice(make_loader(data, batch_size, workers=workers, collate=collate), limit):
        logits, labels = (t.cpu() for t in outputs(model, to_device(batch, torch.device(device))))
        logits = logits.float()  # (n, classes)
        loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        targets += labels.tolist()
        predictions += logits.argmax(1).tolist()
        confidences += logits.softmax(1).amax(1).tolist()
        log_odds += logits.diff(dim=1).flatten().tolist() if logits.shape[1] == 2 else []
    right = sum(t == p for t, p in zip(targets, predictions, strict=True))
    accuracy = 100 * right / len(targets)
    return Evaluation(loss / len(targets), accuracy, targets, predictions, confidences, log_odds)

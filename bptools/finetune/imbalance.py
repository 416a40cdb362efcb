"""Classes of unequal size: weights in the loss, weights in the drawing of samples, and the focal loss.

Losses stay means over samples, so that they can be accumulated over unequal batches and processes. torch's mean of
a weighted cross entropy is not: it is divided by the weights that the batch happens to have.

Sources: Cui et al., arXiv 1901.05555 (effective number of samples); Lin et al., arXiv 1708.02002 (focal loss).
"""

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from bptools import functional as F

LossOfLogits = Callable[[Tensor, Tensor], Tensor]


def class_weights(labels: Sequence[int], classes: int, how: str = "weights") -> Tensor:
    """Return a weight for each class, ``(classes,)``, whose mean over ``labels`` is 1.

    Args:
        labels: Of the training samples; each class at least once.
        classes: Number of classes.
        how: ``"weights"`` for one over the class's number of samples, so that all classes count alike;
            ``"effective"`` for one over its effective number, ``(1 - b**n) / (1 - b)`` with
            ``b = 1 - 1 / len(labels)``, so that large classes count somewhat more.

    Raises:
        ValueError: If a class has no sample, or ``how`` is none of these.
    """
    counts = torch.bincount(torch.tensor(labels), minlength=classes).double()
    if not counts.all():
        raise ValueError(f"labels: expected some of each of {classes} classes, got none of {int(counts.argmin())}")
    if how not in ("weights", "effective"):
        raise ValueError(f"how: expected weights or effective, got {how!r}")
    known = counts if how == "weights" else 1 - (1 - 1 / counts.sum()) ** counts
    return (counts.sum() / known / (counts / known).sum()).float()


def sample_weights(labels: Sequence[int]) -> list[float]:
    """Return for each sample how likely it is to be drawn so that all classes come equally often."""
    counts = torch.bincount(torch.tensor(labels)).tolist()
    return [1 / counts[label] for label in labels]


def focal_cross_entropy(logits: Tensor, labels: Tensor, gamma: float = 2.0) -> Tensor:
    """Return the mean of ``-(1 - p)**gamma * log(p)``, ``p`` the softmax's probability of the label.

    ``p`` is the sigmoid of the label's logit less the logarithm of the others' summed exponentials, so this is
    :func:`bptools.functional.focal_loss` of that difference.

    Args:
        logits: ``(n, classes)``.
        labels: ``(n,)``.
        gamma: How much less counts what is predicted well.
    """
    place = labels.unsqueeze(1)  # (n, 1)
    others = logits.scatter(1, place, -torch.inf).logsumexp(1)
    odds = logits.gather(1, place).squeeze(1) - others  # (n,)
    return F.focal_loss(odds, torch.ones_like(odds), alpha=-1, gamma=gamma, reduction="mean")


def balanced_loss(
    layers: ModuleType, balance: str, labels: Sequence[int], classes: int, smoothing: float = 0.0
) -> LossOfLogits:
    """Return a mean loss of logits ``(n, classes)`` and labels ``(n,)`` or probabilities ``(n, classes)``.

    Args:
        layers: Namespace of the loss, ``bptools.nn`` or ``torch.nn``.
        balance: ``"weights"`` or ``"effective"``, as :func:`class_weights` says; ``"focal"`` for
            :func:`focal_cross_entropy`, of labels only; any other for cross entropy without weights.
        labels: Of the training samples.
        classes: Number of classes.
        smoothing: Share of each label that is spread evenly over the classes, 0 to 1.
    """
    if balance == "focal":
        return focal_cross_entropy
    if balance not in ("weights", "effective"):
        return layers.CrossEntropyLoss(label_smoothing=smoothing)
    weight = class_weights(labels, classes, balance)
    whole = layers.CrossEntropyLoss(weight, reduction="none", label_smoothing=smoothing)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return whole.to(logits.device)(logits, targets).mean()

    return loss

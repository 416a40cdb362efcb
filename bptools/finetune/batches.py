"""Batches as they come: tuples, lists and mappings of tensors, whose first dimension counts samples."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Batch = Any
LossFn = Callable[[nn.Module, Batch], Tensor]


def windows(batches: Iterable[Batch], accumulate: int) -> Iterator[list[Batch]]:
    """Yield lists of ``accumulate`` batches; the last list may be shorter, and is neither padded nor dropped."""
    if accumulate < 1:
        raise ValueError(f"accumulate: expected at least 1, got {accumulate}")
    window: list[Batch] = []
    for batch in batches:
        window.append(batch)
        if len(window) == accumulate:
            yield window
            window = []
    if window:
        yield window


def map_tensors(batch: Batch, function: Callable[[Tensor], Any]) -> Batch:
    """Return ``batch`` with ``function`` applied to its tensors; whatever else it holds stays as it is."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        mapped = copy.copy(batch)  # a BatchEncoding of transformers stays one
        for key, value in batch.items():
            mapped[key] = map_tensors(value, function)
        return mapped
    if isinstance(batch, (tuple, list)):
        items = [map_tensors(item, function) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return ``batch`` with its tensors on ``device``."""
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))


def split_batch(batch: Batch, most: int | None) -> list[Batch]:
    """Cut ``batch`` in equal parts of ``most`` samples at most, if that is not ``None``."""
    if most is None:
        return [batch]
    samples = count_samples(batch)
    parts = max(1, math.ceil(samples / most))

    def part(i: int) -> Batch:
        return map_tensors(batch, lambda t: t.tensor_split(parts)[i] if t.ndim and len(t) == samples else t)

    return [part(i) for i in range(parts)]


def count_samples(batch: Batch) -> int:
    """Return how many samples ``batch`` has: the first dimension of its first tensor.

    Raises:
        TypeError: If there is no such tensor.
    """
    tensors: list[Tensor] = []
    map_tensors(batch, tensors.append)
    if not tensors or not tensors[0].ndim:
        raise TypeError(f"batch: expected tensors with a dimension of samples, got {type(batch).__name__}")
    return len(tensors[0])


def count_tokens(ignore_index: int = -100, shift: bool = True) -> Callable[[Batch], int]:
    """Return a function that counts the labels of a batch that the loss looks at.

    They are at ``"labels"`` in a mapping, and last in a tuple.

    Args:
        ignore_index: The label that does not count.
        shift: Whether the first label of each sequence does not count either, as nothing predicts it: so it is
            with the causal language models of transformers, which shift the labels themselves.
    """

    def count(batch: Batch) -> int:
        labels = batch["labels"] if isinstance(batch, Mapping) else batch[-1]  # (n, tokens)
        return int((labels[..., 1:] if shift else labels).ne(ignore_index).sum())

    return count


def supervised(loss_fn: Callable[[Tensor, Tensor], Tensor]) -> LossFn:
    """Return what a :class:`Stepper` calls, for batches ``(inputs, targets)``.

    Args:
        loss_fn: Maps outputs, in float32, and targets to the mean loss, such as ``nn.CrossEntropyLoss()``.
    """

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return loss_fn(module(inputs).float(), targets)

    return loss

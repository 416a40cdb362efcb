"""The last layer of a classifier and its loss in one: (N, in) and its target -> (), or one number a row."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bptools import functional
from bptools.nn.linear import Linear


class _BeforeTorchHasIt(torch.nn.Module):
    """The constructor, state_dict and repr of torch 2.15's module."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ) -> None:
        super().__init__()
        if weight is not None and tuple(weight.shape) != (num_classes,):
            raise ValueError(
                f"LinearCrossEntropyLoss: weight must have shape {(num_classes,)}, got {tuple(weight.shape)}"
            )
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"LinearCrossEntropyLoss: label_smoothing must be from 0 to 1, got {label_smoothing}")
        self.register_buffer("weight", weight)
        self.num_classes, self.out_features = num_classes, out_features
        self.reduction, self.ignore_index, self.label_smoothing = reduction, ignore_index, label_smoothing
        self.linear = Linear(in_features, math.prod((num_classes, *out_features)), bias, device, dtype)
        self.options = options

    def extra_repr(self) -> str:
        """Return what the constructor was told."""
        said = {"in_features": self.linear.in_features, "num_classes": self.num_classes}
        said |= {"out_features": self.out_features, "bias": self.linear.bias is not None}
        said |= {name: getattr(self, name) for name in ("reduction", "ignore_index", "label_smoothing", "options")}
        return ", ".join(f"{name}={value}" for name, value in said.items())


class LinearCrossEntropyLoss(getattr(torch.nn, "LinearCrossEntropyLoss", _BeforeTorchHasIt)):
    """`torch.nn.LinearCrossEntropyLoss` on `bptools.functional.linear_cross_entropy`, for older torch too.

    input (N, in) or (in,), target (N, d_1, ..., d_K) or () or probabilities. The logits are never all in memory.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Apply the layer and the loss."""
        shape = (self.num_classes, *self.out_features)
        bias = self.linear.bias
        return functional.linear_cross_entropy(
            input,
            self.linear.weight.reshape((*shape, self.linear.in_features)),
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
        )

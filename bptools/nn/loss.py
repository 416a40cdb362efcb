"""Losses: (N, ...) and its target -> (), or one number a row without reduction."""

from __future__ import annotations

import torch
from torch import Tensor

from bptools import functional


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` on `bptools.functional.cross_entropy`: logits (N, C, ...), target (N, ...)."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Apply the loss."""
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class MSELoss(torch.nn.MSELoss):
    """`torch.nn.MSELoss` on `bptools.functional.mse_loss`: input and target of one shape."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Apply the loss."""
        return functional.mse_loss(input, target, reduction=self.reduction)

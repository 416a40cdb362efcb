"""The linear layer."""

from __future__ import annotations

import torch
from torch import Tensor

from bptools import functional


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` on `bptools.functional.linear`: (..., in_features) -> (..., out_features)."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.linear(input, self.weight, self.bias)

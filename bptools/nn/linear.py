"""Linear and bilinear layers."""

from __future__ import annotations

import torch
from torch import Tensor

from bptools import functional


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` on `bptools.functional.linear`: (..., in_features) -> (..., out_features)."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.linear(input, self.weight, self.bias)


class Bilinear(torch.nn.Bilinear):
    """`torch.nn.Bilinear` on `bptools.functional.bilinear`: two of (..., in_features) -> (..., out_features)."""

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.bilinear(input1, input2, self.weight, self.bias)

"""Layer normalisation and its kin."""

from __future__ import annotations

import torch
from torch import Tensor

from bptools import functional


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` on `bptools.functional.layer_norm`: (..., *normalized_shape) -> the same."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)

"""Dropout: (...) -> (...)."""

from __future__ import annotations

import torch
from torch import Tensor

from bptools import functional


class Dropout(torch.nn.Dropout):
    """`torch.nn.Dropout` on `bptools.functional.dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.dropout(input, self.p, self.training, self.inplace)

"""Unfold and fold: (n, c, height, width) <-> (n, c kernel places, windows), n optional."""

from __future__ import annotations

import torch
from torch import Tensor

from bptools import functional


class Unfold(torch.nn.Unfold):
    """`torch.nn.Unfold` on `bptools.functional.unfold`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.unfold(input, self.kernel_size, self.dilation, self.padding, self.stride)


class Fold(torch.nn.Fold):
    """`torch.nn.Fold` on `bptools.functional.fold`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        window = self.kernel_size, self.dilation, self.padding, self.stride
        return functional.fold(input, self.output_size, *window)

"""Pooling over two spatial dimensions: (n, c, height, width) -> (n, c, *), n optional."""

from __future__ import annotations

import torch
from torch import Tensor

from bptools import functional


class MaxPool2d(torch.nn.MaxPool2d):
    """`torch.nn.MaxPool2d` on `bptools.functional.max_pool2d`."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Apply the layer."""
        window = self.kernel_size, self.stride, self.padding, self.dilation
        return functional.max_pool2d(input, *window, self.ceil_mode, self.return_indices)


class AvgPool2d(torch.nn.AvgPool2d):
    """`torch.nn.AvgPool2d` on `bptools.functional.avg_pool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        window = self.kernel_size, self.stride, self.padding
        options = self.ceil_mode, self.count_include_pad, self.divisor_override
        return functional.avg_pool2d(input, *window, *options)


class AdaptiveAvgPool2d(torch.nn.AdaptiveAvgPool2d):
    """`torch.nn.AdaptiveAvgPool2d` on `bptools.functional.adaptive_avg_pool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.adaptive_avg_pool2d(input, self.output_size)

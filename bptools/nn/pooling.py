"""Pooling over 1, 2 and 3 spatial dimensions: (n, c, *) -> (n, c, *), n optional."""

from __future__ import annotations

import torch
from torch import Tensor

from bptools import functional


class MaxPool1d(torch.nn.MaxPool1d):
    """`torch.nn.MaxPool1d` on `bptools.functional.max_pool1d`."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Apply the layer."""
        window = self.kernel_size, self.stride, self.padding, self.dilation
        return functional.max_pool1d(input, *window, self.ceil_mode, self.return_indices)


class MaxPool2d(torch.nn.MaxPool2d):
    """`torch.nn.MaxPool2d` on `bptools.functional.max_pool2d`."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Apply the layer."""
        window = self.kernel_size, self.stride, self.padding, self.dilation
        return functional.max_pool2d(input, *window, self.ceil_mode, self.return_indices)


class MaxPool3d(torch.nn.MaxPool3d):
    """`torch.nn.MaxPool3d` on `bptools.functional.max_pool3d`."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Apply the layer."""
        window = self.kernel_size, self.stride, self.padding, self.dilation
        return functional.max_pool3d(input, *window, self.ceil_mode, self.return_indices)


class MaxUnpool1d(torch.nn.MaxUnpool1d):
    """`torch.nn.MaxUnpool1d` on `bptools.functional.max_unpool1d`."""

    def forward(self, input: Tensor, indices: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Apply the layer."""
        window = self.kernel_size, self.stride, self.padding
        return functional.max_unpool1d(input, indices, *window, output_size)


class MaxUnpool2d(torch.nn.MaxUnpool2d):
    """`torch.nn.MaxUnpool2d` on `bptools.functional.max_unpool2d`."""

    def forward(self, input: Tensor, indices: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Apply the layer."""
        window = self.kernel_size, self.stride, self.padding
        return functional.max_unpool2d(input, indices, *window, output_size)


class MaxUnpool3d(torch.nn.MaxUnpool3d):
    """`torch.nn.MaxUnpool3d` on `bptools.functional.max_unpool3d`."""

    def forward(self, input: Tensor, indices: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Apply the layer."""
        window = self.kernel_size, self.stride, self.padding
        return functional.max_unpool3d(input, indices, *window, output_size)


class AvgPool1d(torch.nn.AvgPool1d):
    """`torch.nn.AvgPool1d` on `bptools.functional.avg_pool1d`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        window = self.kernel_size, self.stride, self.padding
        options = self.ceil_mode, self.count_include_pad
        return functional.avg_pool1d(input, *window, *options)


class AvgPool2d(torch.nn.AvgPool2d):
    """`torch.nn.AvgPool2d` on `bptools.functional.avg_pool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        window = self.kernel_size, self.stride, self.padding
        options = self.ceil_mode, self.count_include_pad, self.divisor_override
        return functional.avg_pool2d(input, *window, *options)


class AvgPool3d(torch.nn.AvgPool3d):
    """`torch.nn.AvgPool3d` on `bptools.functional.avg_pool3d`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        window = self.kernel_size, self.stride, self.padding
        options = self.ceil_mode, self.count_include_pad, self.divisor_override
        return functional.avg_pool3d(input, *window, *options)


class FractionalMaxPool2d(torch.nn.FractionalMaxPool2d):
    """`torch.nn.FractionalMaxPool2d` on `bptools.functional.fractional_max_pool2d`."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Apply the layer."""
        sizes = self.kernel_size, self.output_size, self.output_ratio
        return functional.fractional_max_pool2d(input, *sizes, self.return_indices, self._random_samples)


class FractionalMaxPool3d(torch.nn.FractionalMaxPool3d):
    """`torch.nn.FractionalMaxPool3d` on `bptools.functional.fractional_max_pool3d`."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Apply the layer."""
        sizes = self.kernel_size, self.output_size, self.output_ratio
        return functional.fractional_max_pool3d(input, *sizes, self.return_indices, self._random_samples)


class LPPool1d(torch.nn.LPPool1d):
    """`torch.nn.LPPool1d` on `bptools.functional.lp_pool1d`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.lp_pool1d(input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode)


class LPPool2d(torch.nn.LPPool2d):
    """`torch.nn.LPPool2d` on `bptools.functional.lp_pool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.lp_pool2d(input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode)


class LPPool3d(torch.nn.LPPool3d):
    """`torch.nn.LPPool3d` on `bptools.functional.lp_pool3d`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.lp_pool3d(input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode)


class AdaptiveMaxPool1d(torch.nn.AdaptiveMaxPool1d):
    """`torch.nn.AdaptiveMaxPool1d` on `bptools.functional.adaptive_max_pool1d`."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Apply the layer."""
        return functional.adaptive_max_pool1d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool2d(torch.nn.AdaptiveMaxPool2d):
    """`torch.nn.AdaptiveMaxPool2d` on `bptools.functional.adaptive_max_pool2d`."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Apply the layer."""
        return functional.adaptive_max_pool2d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool3d(torch.nn.AdaptiveMaxPool3d):
    """`torch.nn.AdaptiveMaxPool3d` on `bptools.functional.adaptive_max_pool3d`."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Apply the layer."""
        return functional.adaptive_max_pool3d(input, self.output_size, self.return_indices)


class AdaptiveAvgPool1d(torch.nn.AdaptiveAvgPool1d):
    """`torch.nn.AdaptiveAvgPool1d` on `bptools.functional.adaptive_avg_pool1d`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.adaptive_avg_pool1d(input, self.output_size)


class AdaptiveAvgPool2d(torch.nn.AdaptiveAvgPool2d):
    """`torch.nn.AdaptiveAvgPool2d` on `bptools.functional.adaptive_avg_pool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.adaptive_avg_pool2d(input, self.output_size)


class AdaptiveAvgPool3d(torch.nn.AdaptiveAvgPool3d):
    """`torch.nn.AdaptiveAvgPool3d` on `bptools.functional.adaptive_avg_pool3d`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.adaptive_avg_pool3d(input, self.output_size)

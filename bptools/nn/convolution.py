"""Convolutions and transposed convolutions over 1, 2 and 3 spatial dimensions.

(n, in_channels, *) -> (n, out_channels, *), n optional.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bptools import functional


def _convolve(layer: Conv1d | Conv2d | Conv3d, convolution, input: Tensor) -> Tensor:
    padding = layer.padding
    if layer.padding_mode != "zeros":
        input = functional.pad(input, layer._reversed_padding_repeated_twice, layer.padding_mode)
        padding = 0
    return convolution(input, layer.weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups)


class Conv1d(torch.nn.Conv1d):
    """`torch.nn.Conv1d` on `bptools.functional.conv1d`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return _convolve(self, functional.conv1d, input)


class Conv2d(torch.nn.Conv2d):
    """`torch.nn.Conv2d` on `bptools.functional.conv2d`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return _convolve(self, functional.conv2d, input)


class Conv3d(torch.nn.Conv3d):
    """`torch.nn.Conv3d` on `bptools.functional.conv3d`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return _convolve(self, functional.conv3d, input)


def _transpose(
    layer: ConvTranspose1d | ConvTranspose2d | ConvTranspose3d,
    convolution,
    input: Tensor,
    output_size: list[int] | None,
) -> Tensor:
    numbers = layer.stride, layer.padding, layer.kernel_size, len(layer.kernel_size), layer.dilation
    output_padding = tuple(layer._output_padding(input, output_size, *numbers))
    numbers = layer.stride, layer.padding, output_padding, layer.groups, layer.dilation
    return convolution(input, layer.weight, layer.bias, *numbers)


class ConvTranspose1d(torch.nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` on `bptools.functional.conv_transpose1d`."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Apply the layer."""
        return _transpose(self, functional.conv_transpose1d, input, output_size)


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` on `bptools.functional.conv_transpose2d`."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Apply the layer."""
        return _transpose(self, functional.conv_transpose2d, input, output_size)


class ConvTranspose3d(torch.nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` on `bptools.functional.conv_transpose3d`."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Apply the layer."""
        return _transpose(self, functional.conv_transpose3d, input, output_size)

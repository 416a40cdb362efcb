"""Convolutions over 1, 2 and 3 spatial dimensions: (n, in_channels, *) -> (n, out_channels, *), n optional."""

from __future__ import annotations

import torch
from torch import Tensor

from bptools import functional


def _convolve(layer: Conv1d | Conv2d | Conv3d, convolution, input: Tensor) -> Tensor:
    if layer.padding_mode != "zeros":
        raise NotImplementedError(
            f"{type(layer).__name__}: padding_mode must be 'zeros', got {layer.padding_mode!r}"
        )
    numbers = layer.stride, layer.padding, layer.dilation, layer.groups
    return convolution(input, layer.weight, layer.bias, *numbers)


class Conv1d(torch.nn.Conv1d):
    """`torch.nn.Conv1d` on `bptools.functional.conv1d`, with `padding_mode="zeros"`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return _convolve(self, functional.conv1d, input)


class Conv2d(torch.nn.Conv2d):
    """`torch.nn.Conv2d` on `bptools.functional.conv2d`, with `padding_mode="zeros"`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return _convolve(self, functional.conv2d, input)


class Conv3d(torch.nn.Conv3d):
    """`torch.nn.Conv3d` on `bptools.functional.conv3d`, with `padding_mode="zeros"`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return _convolve(self, functional.conv3d, input)

"""Padding: (n, c, *) -> (n, c, *), n optional, over 1, 2 or 3 dimensions.

Each class is torch.nn's, on `bptools.functional.pad`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bptools import functional


class _Constant(torch.nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.pad(input, self.padding, "constant", self.value)


class _Reflection(torch.nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.pad(input, self.padding, "reflect")


class _Replication(torch.nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.pad(input, self.padding, "replicate")


class _Circular(torch.nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        self._check_input_dim(input)
        return functional.pad(input, self.padding, "circular")


class ConstantPad1d(_Constant, torch.nn.ConstantPad1d):
    """`torch.nn.ConstantPad1d`: 1 dimension, with a given number."""


class ConstantPad2d(_Constant, torch.nn.ConstantPad2d):
    """`torch.nn.ConstantPad2d`: 2 dimensions, with a given number."""


class ConstantPad3d(_Constant, torch.nn.ConstantPad3d):
    """`torch.nn.ConstantPad3d`: 3 dimensions, with a given number."""


class ZeroPad1d(_Constant, torch.nn.ZeroPad1d):
    """`torch.nn.ZeroPad1d`: 1 dimension, with zeros."""


class ZeroPad2d(_Constant, torch.nn.ZeroPad2d):
    """`torch.nn.ZeroPad2d`: 2 dimensions, with zeros."""


class ZeroPad3d(_Constant, torch.nn.ZeroPad3d):
    """`torch.nn.ZeroPad3d`: 3 dimensions, with zeros."""


class ReflectionPad1d(_Reflection, torch.nn.ReflectionPad1d):
    """`torch.nn.ReflectionPad1d`: 1 dimension, by mirroring the input at its ends."""


class ReflectionPad2d(_Reflection, torch.nn.ReflectionPad2d):
    """`torch.nn.ReflectionPad2d`: 2 dimensions, by mirroring the input at its ends."""


class ReflectionPad3d(_Reflection, torch.nn.ReflectionPad3d):
    """`torch.nn.ReflectionPad3d`: 3 dimensions, by mirroring the input at its ends."""


class ReplicationPad1d(_Replication, torch.nn.ReplicationPad1d):
    """`torch.nn.ReplicationPad1d`: 1 dimension, by repeating the first and the last place."""


class ReplicationPad2d(_Replication, torch.nn.ReplicationPad2d):
    """`torch.nn.ReplicationPad2d`: 2 dimensions, by repeating the first and the last place."""


class ReplicationPad3d(_Replication, torch.nn.ReplicationPad3d):
    """`torch.nn.ReplicationPad3d`: 3 dimensions, by repeating the first and the last place."""


class CircularPad1d(_Circular, torch.nn.CircularPad1d):
    """`torch.nn.CircularPad1d`: 1 dimension, by repeating the input."""


class CircularPad2d(_Circular, torch.nn.CircularPad2d):
    """`torch.nn.CircularPad2d`: 2 dimensions, by repeating the input."""


class CircularPad3d(_Circular, torch.nn.CircularPad3d):
    """`torch.nn.CircularPad3d`: 3 dimensions, by repeating the input."""

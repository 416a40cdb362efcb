"""Activations: (...) -> (...)."""

from __future__ import annotations

import torch
from torch import Tensor

from bptools import functional


class ReLU(torch.nn.ReLU):
    """`torch.nn.ReLU` on `bptools.functional.relu`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.relu(input, self.inplace)


class LeakyReLU(torch.nn.LeakyReLU):
    """`torch.nn.LeakyReLU` on `bptools.functional.leaky_relu`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.leaky_relu(input, self.negative_slope, self.inplace)


class GELU(torch.nn.GELU):
    """`torch.nn.GELU` on `bptools.functional.gelu`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.gelu(input, self.approximate)


class SiLU(torch.nn.SiLU):
    """`torch.nn.SiLU` on `bptools.functional.silu`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.silu(input, self.inplace)


class Sigmoid(torch.nn.Sigmoid):
    """`torch.nn.Sigmoid` on `bptools.functional.sigmoid`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.sigmoid(input)


class Tanh(torch.nn.Tanh):
    """`torch.nn.Tanh` on `bptools.functional.tanh`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.tanh(input)


class Softmax(torch.nn.Softmax):
    """`torch.nn.Softmax` on `bptools.functional.softmax`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(torch.nn.LogSoftmax):
    """`torch.nn.LogSoftmax` on `bptools.functional.log_softmax`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.log_softmax(input, self.dim, _stacklevel=5)

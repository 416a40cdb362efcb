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


class LogSigmoid(torch.nn.LogSigmoid):
    """`torch.nn.LogSigmoid` on `bptools.functional.logsigmoid`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.logsigmoid(input)


class Tanhshrink(torch.nn.Tanhshrink):
    """`torch.nn.Tanhshrink` on `bptools.functional.tanhshrink`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.tanhshrink(input)


class Softsign(torch.nn.Softsign):
    """`torch.nn.Softsign` on `bptools.functional.softsign`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.softsign(input)


class Softplus(torch.nn.Softplus):
    """`torch.nn.Softplus` on `bptools.functional.softplus`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.softplus(input, self.beta, self.threshold)


class ELU(torch.nn.ELU):
    """`torch.nn.ELU` on `bptools.functional.elu`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.elu(input, self.alpha, self.inplace)


class SELU(torch.nn.SELU):
    """`torch.nn.SELU` on `bptools.functional.selu`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.selu(input, self.inplace)


class CELU(torch.nn.CELU):
    """`torch.nn.CELU` on `bptools.functional.celu`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.celu(input, self.alpha, self.inplace)


class Mish(torch.nn.Mish):
    """`torch.nn.Mish` on `bptools.functional.mish`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.mish(input, self.inplace)


class Hardtanh(torch.nn.Hardtanh):
    """`torch.nn.Hardtanh` on `bptools.functional.hardtanh`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.hardtanh(input, self.min_val, self.max_val, self.inplace)


class ReLU6(torch.nn.ReLU6):
    """`torch.nn.ReLU6` on `bptools.functional.relu6`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.relu6(input, self.inplace)


class Hardsigmoid(torch.nn.Hardsigmoid):
    """`torch.nn.Hardsigmoid` on `bptools.functional.hardsigmoid`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.hardsigmoid(input, self.inplace)


class Hardswish(torch.nn.Hardswish):
    """`torch.nn.Hardswish` on `bptools.functional.hardswish`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.hardswish(input, self.inplace)


class Threshold(torch.nn.Threshold):
    """`torch.nn.Threshold` on `bptools.functional.threshold`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.threshold(input, self.threshold, self.value, self.inplace)


class Hardshrink(torch.nn.Hardshrink):
    """`torch.nn.Hardshrink` on `bptools.functional.hardshrink`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.hardshrink(input, self.lambd)


class Softshrink(torch.nn.Softshrink):
    """`torch.nn.Softshrink` on `bptools.functional.softshrink`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.softshrink(input, self.lambd)


class PReLU(torch.nn.PReLU):
    """`torch.nn.PReLU` on `bptools.functional.prelu`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.prelu(input, self.weight)


class RReLU(torch.nn.RReLU):
    """`torch.nn.RReLU` on `bptools.functional.rrelu`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.rrelu(input, self.lower, self.upper, self.training, self.inplace)


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


class Softmin(torch.nn.Softmin):
    """`torch.nn.Softmin` on `bptools.functional.softmin`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.softmin(input, self.dim, _stacklevel=5)


class Softmax2d(torch.nn.Softmax2d):
    """`torch.nn.Softmax2d` on `bptools.functional.softmax`: over the channels of (n, c, h, w) or (c, h, w)."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        if input.dim() not in (3, 4):
            raise ValueError(
                f"Softmax2d: input must have shape (n, c, h, w) or (c, h, w), got {tuple(input.shape)}"
            )
        return functional.softmax(input, -3)


class GLU(torch.nn.GLU):
    """`torch.nn.GLU` on `bptools.functional.glu`: halves `dim`, and the second half is the gate."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.glu(input, self.dim)


class _GatedProduct(torch.nn.Module):
    """A gated product of the two halves of a dimension, of which the first is the gate."""

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def halves(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """(..., 2d, ...) -> gate and up, (..., d, ...)."""
        size = input.shape[self.dim]
        if size % 2:
            raise ValueError(
                f"{type(self).__name__}: input must have an even size in dimension {self.dim}, got {size}"
            )
        return input.chunk(2, self.dim)

    def extra_repr(self) -> str:
        """Say along which dimension."""
        return f"dim={self.dim}"


class SwiGLU(_GatedProduct):
    """`bptools.functional.swiglu` of the two halves of a dimension: (..., 2d, ...) -> (..., d, ...).

    The first half is the gate, as where a fused projection of a Llama gives gate and up in this order, and unlike
    `GLU`, where it is the second. There are no weights: put `Linear(d_model, 2 * d)` before it and
    `Linear(d, d_model)` behind.

    Args:
        dim: the dimension that is halved.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.swiglu(*self.halves(input))


class GEGLU(_GatedProduct):
    """`bptools.functional.geglu` of the two halves of a dimension, as `SwiGLU`: the first is the gate.

    Args:
        dim: the dimension that is halved.
        approximate: of the gelu, `"none"` or `"tanh"`.
    """

    def __init__(self, dim: int = -1, approximate: str = "none") -> None:
        super().__init__(dim)
        self.approximate = approximate

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.geglu(*self.halves(input), self.approximate)

    def extra_repr(self) -> str:
        """Say along which dimension, and which gelu."""
        return f"{super().extra_repr()}, approximate={self.approximate!r}"


class ReGLU(_GatedProduct):
    """`bptools.functional.reglu` of the two halves of a dimension, as `SwiGLU`: the first is the gate.

    Args:
        dim: the dimension that is halved.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        return functional.reglu(*self.halves(input))

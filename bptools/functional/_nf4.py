"""Weights of 4 bits an element, and the linear map with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bptools.functional._checks import is_int, shape_of
from bptools.ops import nf4 as _nf4


@dataclass(frozen=True)
class NF4Weight:
    """A weight in NF4, as bitsandbytes holds it.

    Attributes:
        packed: (ceil(n / 2), 1) bytes, two elements in each, the first in the high half.
        absmax: (ceil(n / block_size),): the scale of each block, float32; or with double quantisation bytes,
            numbers of an 8-bit code.
        nested_absmax: (ceil(blocks / 256),) float32: what these are scaled by; None without double quantisation.
        offset: () float32: what is added to them; None without double quantisation.
        shape: of the weight, of n elements.
        block_size: elements that share a scale.
        dtype: of the weight before it was quantised.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    shape: tuple[int, ...]
    block_size: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        parts = self.packed, self.absmax, self.nested_absmax, self.offset
        return sum(t.nbytes for t in parts if t is not None)


def quantize_nf4(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4Weight:
    """A weight (...) in 4 bits an element, to the bit as bitsandbytes' `quantize_4bit` gives it for `"nf4"`.

    Args:
        weight: (...), float32, bfloat16 or float16.
        block_size: elements that share a scale: a power of 2 from 32 to 4096.
        double_quant: hold the scales in 8 bits, too: 4.13 bits an element in blocks of 64, instead of 4.5.

    Raises:
        TypeError: if weight is not of these dtypes.
        ValueError: if weight is empty, or block_size none of these.
    """
    if not isinstance(weight, Tensor) or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"quantize_nf4: weight must be a tensor of float32, bfloat16 or float16, got {got}")
    if weight.numel() == 0:
        raise ValueError(f"quantize_nf4: weight must have elements, got shape {shape_of(weight)}")
    if not is_int(block_size) or not 32 <= block_size <= 4096 or block_size & (block_size - 1):
        raise ValueError(f"quantize_nf4: block_size must be a power of 2 from 32 to 4096, got {block_size!r}")
    quantised = _nf4.quantise(weight, block_size, bool(double_quant))
    return NF4Weight(*quantised, shape_of(weight), block_size, weight.dtype)


def dequantize_nf4(weight: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The weight (*shape) again, in its dtype or another, as bitsandbytes' `dequantize_4bit` gives it."""
    parts = weight.packed, weight.absmax, weight.nested_absmax, weight.offset
    return _nf4.dequantise(*parts, weight.shape, weight.block_size, dtype or weight.dtype)


def nf4_linear(input: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """`linear(input, weight, bias)` with a frozen weight in 4 bits, which is made anew in forward and backward.

    Computes in input's dtype. Keeps nothing of input for backward, and of the weight its 4 bits alone.

    Args:
        input: (..., in_features).
        weight: what `quantize_nf4` gives of a weight (out_features, in_features).
        bias: (out_features,), or None.

    Returns:
        (..., out_features).

    Raises:
        TypeError: if weight is not an `NF4Weight`, or the dtypes of input and bias differ.
        ValueError: if the shapes do not fit.
    """
    if not isinstance(weight, NF4Weight):
        raise TypeError(f"nf4_linear: weight must be what quantize_nf4 gives, got {type(weight).__name__}")
    if len(weight.shape) != 2:
        raise ValueError(f"nf4_linear: weight must have 2 dimensions, got {weight.shape}")
    o, i = weight.shape
    if input.dim() == 0 or input.shape[-1] != i:
        raise ValueError(
            f"nf4_linear: input must have shape (..., {i}) to fit weight {weight.shape}, got {shape_of(input)}"
        )
    if bias is not None and shape_of(bias) != (o,):
        raise ValueError(f"nf4_linear: bias must have shape ({o},), got {shape_of(bias)}")
    parts = weight.packed, weight.absmax, weight.nested_absmax, weight.offset
    return _nf4.nf4_linear(input, *parts, bias, weight.shape, weight.block_size)

"""How the content of a storage is kept in fewer bytes: exactly (bits, narrow integers), or lossy by request.

A codec is made from the flat content of one storage, a 1-D tensor, and gives it back with `decode()`; `nbytes` is
what it holds meanwhile.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

GROUP = 256  # elements that share one scale in an int8 stash


class Bits:
    """Zeros and ones, eight to a byte: a boolean mask, or the 0.0 and 1.0 of `bernoulli_`."""

    def __init__(self, flat: Tensor) -> None:
        self.dtype, self.numel = flat.dtype, flat.numel()
        mask = flat.to(torch.bool, copy=True)
        if short := -self.numel % 8:
            mask = torch.nn.functional.pad(mask, (0, short))
        # Byte i of a word is 0 or 1; the product puts it at bit 56 + i.
        words = mask.view(torch.int64).mul_(0x0102040810204080)
        self.code = words.bitwise_right_shift_(56).to(torch.uint8)
        self.nbytes = self.code.numel()

    def decode(self) -> Tensor:
        words = _bytes_to_words(self.code.device).index_select(0, self.code.int())
        return words.view(torch.bool)[: self.numel].to(self.dtype)


@functools.cache
def _bytes_to_words(device: torch.device) -> Tensor:
    """(256,) int64: bit i of the index as byte i of the word."""
    words = [sum((b >> i & 1) << 8 * i for i in range(8)) for b in range(256)]
    return torch.tensor(words, dtype=torch.int64, device=device)


class Narrow:
    """Numbers in a smaller type: exactly, of integers that are known to fit."""

    def __init__(self, flat: Tensor, dtype: torch.dtype) -> None:
        self.dtype, self.code = flat.dtype, flat.to(dtype)
        self.nbytes = self.code.nbytes

    def decode(self) -> Tensor:
        return self.code.to(self.dtype)


class BFloat16(Narrow):
    """Floating point numbers rounded to bfloat16: a relative error of at most 2⁻⁸."""

    itemsize = 2

    def __init__(self, flat: Tensor) -> None:
        super().__init__(flat, torch.bfloat16)


class Int8:
    """Floating point numbers as int8, 256 neighbours to a scale: an error of at most 1/254 of their largest."""

    itemsize = 1

    def __init__(self, flat: Tensor) -> None:
        self.dtype, self.numel = flat.dtype, flat.numel()
        groups = self._groups(flat).float()
        self.scale = groups.abs().amax(1, keepdim=True).div_(127)
        groups.div_(self.scale.clamp(min=torch.finfo(torch.float32).tiny)).round_()
        self.code = groups.view(-1)[: self.numel].to(torch.int8)
        self.nbytes = self.code.nbytes + self.scale.nbytes

    @staticmethod
    def _groups(flat: Tensor) -> Tensor:
        return torch.nn.functional.pad(flat, (0, -flat.numel() % GROUP)).view(-1, GROUP)

    def decode(self) -> Tensor:
        return self._groups(self.code).float().mul_(self.scale).view(-1)[: self.numel].to(self.dtype)


class Offloaded:
    """The content of GPU memory, in pinned memory of the host."""

    nbytes = 0  # of the device's memory

    def __init__(self, flat: Tensor) -> None:
        self.device = flat.device
        self.code = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        self.code.copy_(flat, non_blocking=True)

    def decode(self) -> Tensor:
        return self.code.to(self.device, non_blocking=True)


def narrowest(limit: int) -> torch.dtype:
    """The smallest integer type that holds 0 to `limit` - 1."""
    for dtype in (torch.uint8, torch.int16, torch.int32):
        if limit - 1 <= torch.iinfo(dtype).max:
            return dtype
    return torch.int64

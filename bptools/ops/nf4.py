"""The linear map whose weight is held in 4 bits an element, dequantised whenever it is read.

Index legend: `n` rows (all leading dimensions of x), `i` input and `o` output features; the weight's elements in
row-major order are cut into blocks `b` of 64, and `j` counts within a block.

    w[b,j] = scale[b] code[q[b,j]]         y[n,o] = Σ_i x[n,i] w[o,i] + bias[o]

The 16 numbers of the code are quantiles of the normal distribution, scaled to [-1, 1] and with an exact 0, so that
each serves about as many normal weights as any other. q is the nearest of them to w / scale, and scale the largest
|w| of the block. Two q share a byte, the first in the high half.

Double quantisation holds scales in 8 bits, too: less their mean m, in blocks B of 256 by their largest absolute
value, in a code of 256 numbers whose steps grow with the distance from 0:

    scale[b] = m + scale2[B] code8[q8[b]]

That makes 4 + 8/64 + 32/(64·256) = 4.127 bits an element.

The weight is frozen: dx = dy w and dbias[o] = Σ_n dy[n,o]. x is not kept, and w is made again in the backward.

Sources: Dettmers et al., "QLoRA: Efficient finetuning of quantized LLMs", arXiv 2305.14314 (NF4, double
quantisation); Dettmers, arXiv 1511.04561 (the 8-bit code). The format is that of bitsandbytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bptools.ops._core import EVERY, Kernel, Op, outside_transforms
from bptools.ops.linear import rows

# Q(k) of the normal distribution at 8 steps below and 7 above one half, over their largest.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NESTED_BLOCK = 256
PIECE = 1 << 20  # elements that the kernel dequantises at once


def _code8() -> tuple[float, ...]:
    """The 256 numbers of the 8-bit code: in [10^-(k+1), 10^-k] there are 2^(6-k) of each sign; and 0, and 1."""
    numbers = [0.0, 1.0]
    for k in range(7):
        edges = torch.linspace(0.1, 1, 2**k + 1)
        middles = (10.0 ** (k - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        numbers += [*middles, *(-m for m in middles)]
    return tuple(sorted(numbers))


CODE8 = _code8()


def quantise_blocks(t: Tensor, code: Sequence[float], block: int) -> tuple[Tensor, Tensor]:
    """t (n,) float32 -> the number of each one's nearest in a code (n,), the largest |t| of each block (blocks,).

    A value halfway between two takes the lower.
    """
    whole = t.numel() - t.numel() % block
    blocks, rest = t[:whole].reshape(-1, block), t[whole:]
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax.clamp_min(1e-38)).unsqueeze(1)).flatten()
    if rest.numel():  # bitsandbytes divides here, and there multiplies by the inverse
        last = rest.abs().amax()
        absmax, scaled = torch.cat([absmax, last[None]]), torch.cat([scaled, rest / last.clamp_min(1e-38)])
    numbers = torch.tensor(code, device=t.device)
    middles = (numbers[:-1] + numbers[1:]) / 2
    return torch.bucketize(scaled.clamp(-1, 1), middles, out_int32=True).to(torch.uint8), absmax


def quantise(weight: Tensor, block: int, double: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """weight (...) -> packed (n / 2, 1) bytes, absmax (blocks,), nested_absmax (blocks / 256,), offset ().

    absmax holds bytes if double, and float32 if not; then there are no nested_absmax and offset.
    """
    q, absmax = quantise_blocks(weight.detach().flatten().float(), NF4, block)
    if q.numel() % 2:
        q = torch.cat([q, q.new_full((1,), NF4.index(0.0))])
    packed = (q[::2] << 4 | q[1::2]).unsqueeze(1)
    if not double:
        return packed, absmax, None, None
    offset = absmax.mean()
    return packed, *quantise_blocks(absmax - offset, CODE8, NESTED_BLOCK), offset


def scales(absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None) -> Tensor:
    """The scale of each block, (blocks,) float32."""
    if nested_absmax is None:
        return absmax
    numbers = torch.tensor(CODE8, device=absmax.device).index_select(0, absmax.int())
    return numbers * nested_absmax.repeat_interleave(NESTED_BLOCK)[: absmax.numel()] + offset


def dequantise(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    block: int,
    dtype: torch.dtype,
) -> Tensor:
    """packed (n / 2, 1), absmax (blocks,), nested_absmax (blocks / 256,), offset () -> weight (shape) in dtype."""
    scale, n = scales(absmax, nested_absmax, offset), math.prod(shape)
    w = _pairs(packed).index_select(0, packed.flatten().int()).flatten()[:n]
    w = torch.nn.functional.pad(w, (0, scale.numel() * block - n)).reshape(-1, block) * scale.unsqueeze(1)
    return w.flatten()[:n].reshape(shape).to(dtype)


def _pairs(packed: Tensor) -> Tensor:
    """The two numbers that each byte stands for, (256, 2)."""
    code = torch.tensor(NF4, device=packed.device)
    return torch.stack([code.repeat_interleave(16), code.repeat(16)], 1)


def _in_pieces(packed, absmax, nested_absmax, offset, shape, block, dtype):
    """`dequantise`, with no more beside the weight than a piece of it takes."""
    n, piece = math.prod(shape), PIECE // block * block
    if n <= piece or piece % 2:
        return dequantise(packed, absmax, nested_absmax, offset, shape, block, dtype)
    scale = scales(absmax, nested_absmax, offset)
    w = torch.empty(n, dtype=dtype, device=packed.device)
    for start in range(0, n, piece):
        end = min(start + piece, n)
        bytes_, blocks = packed[start // 2 : -(-end // 2)], scale[start // block : -(-end // block)]
        w[start:end] = dequantise(bytes_, blocks, None, None, (end - start,), block, dtype)
    return w.reshape(shape)


def nf4_linear_forward(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, int],
    block: int,
) -> Tensor:
    """x (..., i), the quantised weight of shape (o, i), bias (o,) -> y (..., o)."""
    y = x @ dequantise(packed, absmax, nested_absmax, offset, shape, block, x.dtype).mT
    return y if bias is None else y + bias


def nf4_linear_backward(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: tuple[int, int],
    block: int,
    needs=EVERY,
) -> tuple[Tensor | None, Tensor | None]:
    """dy (..., o), the quantised weight -> dx (..., i), dbias (o,)."""
    dx = None
    if "x" in needs:
        dx = dy @ dequantise(packed, absmax, nested_absmax, offset, shape, block, dy.dtype)
    return dx, rows(dy).sum(0) if "bias" in needs else None


def _kernel_forward(x, packed, absmax, nested_absmax, offset, bias, shape, block):
    w = _in_pieces(packed, absmax, nested_absmax, offset, shape, block, x.dtype)
    return torch.nn.functional.linear(x, w, bias)


def _kernel_backward(dy, packed, absmax, nested_absmax, offset, shape, block, needs):
    dx = None
    if "x" in needs:
        dx = dy @ _in_pieces(packed, absmax, nested_absmax, offset, shape, block, dy.dtype)
    return dx, rows(dy).sum(0) if "bias" in needs else None


_FOR_X = dict.fromkeys(("packed", "absmax", "nested_absmax", "offset"), "x")

nf4_linear = Op(
    nf4_linear_forward,
    nf4_linear_backward,
    outputs="y",
    grads="x bias",
    keep_for=_FOR_X,
    kernel=Kernel(
        _kernel_forward,
        _kernel_backward,
        usable=outside_transforms,  # it writes to what it made
    ),
    autocast={"cpu": "lower", "cuda": "lower"},
)

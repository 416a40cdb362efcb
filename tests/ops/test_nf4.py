"""NF4: the format of bitsandbytes, to the bit; and what is kept."""

from __future__ import annotations

import pytest
import torch

import bptools.functional as B
from bptools.ops import nf4

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SHAPES = pytest.mark.parametrize("shape", [(64, 513), (128, 256), (7, 9), (1, 1), (2, 32)], ids=str)
DOUBLE = pytest.mark.parametrize("double", [True, False], ids=["double", "single"])


def weights(shape, dtype=torch.float32):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 10).to(dtype)


@DOUBLE
@SHAPES
@DTYPES
def test_the_format_is_that_of_bitsandbytes(shape, dtype, double):
    oracle = pytest.importorskip("bitsandbytes.functional")
    w = weights(shape, dtype)
    packed, state = oracle.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=double)
    ours = B.quantize_nf4(w, 64, double)
    assert torch.equal(ours.packed, packed)
    if double:
        assert torch.equal(ours.nested_absmax, state.state2.absmax)
        assert torch.equal(ours.offset, state.offset)
        assert torch.equal(torch.tensor(nf4.CODE8), state.state2.code.cpu())
    else:
        assert torch.equal(ours.absmax, state.absmax)
    # what either has quantised, both read alike
    nested = (state.state2.absmax, state.offset) if double else (None, None)
    theirs = B.NF4Weight(packed, state.absmax, *nested, tuple(shape), 64, dtype)
    if packed.shape[0] > 1:  # bitsandbytes takes one byte for a transposed weight
        assert torch.equal(B.dequantize_nf4(theirs), oracle.dequantize_4bit(packed, state))


def row_of_96(dequantize) -> float:
    """The largest error of a weight with rows of one and a half blocks."""
    oracle = pytest.importorskip("bitsandbytes.functional")
    w = weights((64, 96))
    packed, state = oracle.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    ours = B.NF4Weight(packed, state.absmax, state.state2.absmax, state.offset, (64, 96), 64, w.dtype)
    return (dequantize(oracle, packed, state, ours) - w).abs().max().item()


def test_ours_reads_rows_of_one_and_a_half_blocks():
    assert row_of_96(lambda oracle, packed, state, ours: B.dequantize_nf4(ours)) < 0.06


@pytest.mark.xfail(strict=False, reason="bitsandbytes 0.50 on a CPU: each row begins a new block")
def test_bitsandbytes_reads_rows_of_one_and_a_half_blocks():
    assert row_of_96(lambda oracle, packed, state, ours: oracle.dequantize_4bit(packed, state)) < 0.06


def test_the_8_bit_numbers_of_scales_are_the_nearest():
    """bitsandbytes' library for the CPU looks them up in a table, and misses the nearest now and then."""
    oracle = pytest.importorskip("bitsandbytes.functional")
    w = weights((1024, 1024))
    _, state = oracle.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours, exact = B.quantize_nf4(w), B.quantize_nf4(w, double_quant=False).absmax
    differs = ours.absmax != state.absmax
    assert differs.float().mean() < 0.01
    assert (ours.absmax.int() - state.absmax.int()).abs().max() <= 1
    errors = [
        (nf4.scales(numbers, ours.nested_absmax, ours.offset) - exact).abs()
        for numbers in (ours.absmax, state.absmax)
    ]
    assert (errors[0][differs] <= errors[1][differs]).all()


def test_the_code_is_made_of_quantiles():
    """Of the normal distribution, at equal steps on either side, over the largest; the source gives the last."""
    end = 0.9677083
    up = torch.special.ndtri(torch.linspace(end, 0.5, 9, dtype=torch.float64)[:-1])
    down = -torch.special.ndtri(torch.linspace(end, 0.5, 8, dtype=torch.float64)[:-1])
    code = torch.cat([up, down, torch.zeros(1)]).sort().values
    torch.testing.assert_close(code / code.max(), torch.tensor(nf4.NF4, dtype=torch.float64), rtol=0, atol=1e-6)


@DOUBLE
def test_each_weight_is_the_nearest_that_the_code_has(double):
    w = weights((32, 64))
    q = B.quantize_nf4(w, double_quant=double)
    scale = B.quantize_nf4(w, double_quant=False).absmax.unsqueeze(1)
    nearest = (w.reshape(-1, 64, 1) / scale.unsqueeze(1) - torch.tensor(nf4.NF4)).abs().argmin(-1).flatten()
    numbers = torch.stack([q.packed >> 4, q.packed & 15], 1).flatten()
    assert torch.equal(numbers.long(), nearest)


def test_bits_an_element():
    w = weights((512, 1024))
    assert 8 * B.quantize_nf4(w).nbytes / w.numel() == pytest.approx(4.127, abs=1e-3)
    assert 8 * B.quantize_nf4(w, double_quant=False).nbytes / w.numel() == 4.5


def test_a_large_weight_is_made_in_pieces(monkeypatch):
    w = B.quantize_nf4(weights((64, 130)))
    parts = w.packed, w.absmax, w.nested_absmax, w.offset, w.shape, w.block_size, torch.float32
    whole = nf4.dequantise(*parts)
    monkeypatch.setattr(nf4, "PIECE", 300)
    assert torch.equal(nf4._in_pieces(*parts), whole)


@pytest.mark.parametrize("tier", ["auto", "formula"])
def test_nothing_of_the_input_or_the_weight_is_kept(tier):
    import bptools

    w, x = B.quantize_nf4(weights((64, 128))), torch.randn(32, 128, requires_grad=True)
    own = {t.data_ptr() for t in (w.packed, w.absmax, w.nested_absmax, w.offset)}
    kept = []

    def pack(t):
        kept.append(t)
        return t

    with bptools.backend(tier), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = B.nf4_linear(x, w)
    assert {t.data_ptr() for t in kept} <= own
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], dy @ B.dequantize_nf4(w))

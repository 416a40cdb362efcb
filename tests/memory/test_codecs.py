"""The codecs give back what they took: exactly, or as near as they say, in as many bytes as they say."""

from __future__ import annotations

import pytest
import torch

from bptools.memory._codecs import GROUP, BFloat16, Bits, Int8, Narrow, narrowest

SIZES = [0, 1, 7, 8, 9, 63, 64, 255, 256, 257, 1000]
NUMBERS = [
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("size", SIZES)
def test_bits(dtype, size):
    flat = torch.randint(0, 2, (size,)).to(dtype)
    code = Bits(flat)
    again = code.decode()
    assert again.dtype is dtype
    assert torch.equal(again, flat)
    assert again.is_contiguous()
    assert code.nbytes == -(-size // 8)
    assert torch.equal(code.decode(), flat)  # and again


def test_every_byte_of_bits():
    flat = torch.tensor([[b >> i & 1 for i in range(8)] for b in range(256)]).flatten().bool()
    assert torch.equal(Bits(flat).decode(), flat)


@pytest.mark.parametrize("limit", [1, 2, 255, 256, 257, 32767, 32768, 32769, 2**31 - 1, 2**31, 2**31 + 1])
def test_narrow_integers(limit):
    dtype = narrowest(limit)
    flat = torch.tensor([0, limit // 2, limit - 1])
    code = Narrow(flat, dtype)
    assert torch.equal(code.decode(), flat)
    assert code.decode().dtype is torch.int64
    assert code.nbytes == 3 * dtype.itemsize
    smaller = {torch.int16: torch.uint8, torch.int32: torch.int16, torch.int64: torch.int32}.get(dtype)
    assert smaller is None or torch.iinfo(smaller).max < limit - 1  # it is the narrowest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bfloat16_is_off_by_a_256th_at_most(dtype):
    flat = torch.randn(1000, dtype=dtype) * 10 ** torch.linspace(-30, 30, 1000, dtype=dtype)
    code = BFloat16(flat)
    again = code.decode()
    assert again.dtype is dtype
    assert ((again - flat).abs() <= flat.abs() * 2**-8 * (1 + 1e-6)).all()
    assert code.nbytes == 2000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 1e4])
def test_int8_is_off_by_a_254th_of_the_largest_neighbour_at_most(dtype, size, scale):
    flat = (torch.randn(size, dtype=torch.float64) * scale).to(dtype)
    code = Int8(flat)
    again = code.decode()
    assert again.dtype is dtype
    assert again.shape == flat.shape
    for ours, theirs in zip(again.split(GROUP), flat.split(GROUP), strict=True):
        if theirs.numel():
            most = theirs.abs().max().double()
            rounding = torch.finfo(dtype).eps * most + torch.finfo(dtype).smallest_normal
            assert (ours.double() - theirs.double()).abs().max() <= most / 254 * (1 + 1e-5) + rounding
    assert code.nbytes == size + 4 * -(-size // GROUP)
    assert torch.equal(again.sign() * (again != 0), flat.sign() * (again != 0))


@pytest.mark.parametrize("codec", [BFloat16, Int8])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_does_not_become_finite(codec, value):
    """Or a loss scaler would not see that the step has overflowed."""
    flat = torch.randn(600)
    flat[300] = value
    again = codec(flat).decode()
    assert not again[300].isfinite()
    assert again[:256].isfinite().all()
    assert again[512:].isfinite().all()


@pytest.mark.parametrize("codec", [BFloat16, Int8])
def test_numbers_at_the_end_of_their_range(codec):
    for dtype in (torch.float32, torch.float64):
        largest = torch.finfo(dtype).max if codec is BFloat16 else torch.finfo(torch.float32).max
        flat = torch.tensor([largest / 4, -largest / 4, torch.finfo(dtype).smallest_normal, 0.0], dtype=dtype)
        again = codec(flat).decode() if dtype is torch.float32 or codec is Int8 else flat
        assert again.isfinite().all()
        torch.testing.assert_close(again, flat, rtol=0.01, atol=1e-30)
    denormal = torch.full((4,), 1e-40)
    assert codec(denormal).decode().abs().max() <= 2e-38


def test_a_codec_is_independent_of_what_it_was_made_from():
    for codec in (Bits, BFloat16, Int8, lambda f: Narrow(f, torch.uint8)):
        flat = torch.randint(0, 2, (640,)).float()
        code, before = codec(flat), flat.clone()
        flat.zero_()
        assert torch.equal(code.decode(), before)
        code.decode().zero_()
        assert torch.equal(code.decode(), before)

"""What the contract's table cannot say of padding and interpolation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import bptools
import bptools.functional as B
from bptools.check import check_function


@pytest.mark.parametrize("x", [torch.arange(6).view(2, 3), torch.tensor([[True, False]])], ids=["int", "bool"])
def test_pad_of_what_has_no_gradient(x):
    """Token ids and masks are padded, too."""
    for pad, value in (((1, 2), None), ((-1, 0, 1, 0), 1)):
        ours, theirs = (f.pad(x, pad, value=value) for f in (B, F))
        assert ours.dtype is theirs.dtype
        assert torch.equal(ours, theirs)


def test_lanczos():
    """Torch has it from 2.15 on; so its gradient is held against numerical derivatives."""
    x = torch.randn(1, 2, 9, 4, dtype=torch.float64, requires_grad=True)
    for tier in ("auto", "formula"):
        with bptools.backend(tier):
            check_function(
                lambda x: B.interpolate(x, size=(3, 5), mode="lanczos", antialias=True),
                x,
                checks=["gradients", "double_backward", "dtypes"],
            ).raise_if_failed()
    if hasattr(torch.ops.aten, "_upsample_lanczos2d_aa"):
        with bptools.backend("formula"):
            ours, theirs = (f.interpolate(x, size=(3, 5), mode="lanczos", antialias=True) for f in (B, F))
        torch.testing.assert_close(ours, theirs)


RESIZING, PADDING = ("nearest", "bilinear", "bicubic"), ("constant", "reflect", "replicate", "circular")


@pytest.mark.parametrize("mode", RESIZING + PADDING)
def test_channels_last(mode):
    """The same numbers in another memory format have the same result and gradient."""
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        leaf = x.clone(memory_format=memory_format).requires_grad_()
        y = B.interpolate(leaf, scale_factor=2, mode=mode) if mode in RESIZING else B.pad(leaf, (1, 2, 2, 0), mode)
        dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape).contiguous(memory_format=memory_format)
        found.append([y, *torch.autograd.grad(y, leaf, dy)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("dims", "mode"),
    [(1, "nearest"), (2, "nearest"), (1, "nearest-exact"), (1, "linear"), (2, "bilinear"), (2, "bicubic")],
)
def test_a_scale_that_leaves_the_size_as_it_is(dims, mode):
    """Torch then copies in one pass and goes by the scale in the other; ours is its forward, with its gradient."""
    x = torch.randn(1, 2, *(3, 4)[:dims], dtype=torch.float64, requires_grad=True)
    ours, theirs = (f.interpolate(x, scale_factor=1.2, mode=mode) for f in (B, F))
    torch.testing.assert_close(ours, theirs)
    torch.autograd.gradcheck(lambda x: B.interpolate(x, scale_factor=1.2, mode=mode), x)

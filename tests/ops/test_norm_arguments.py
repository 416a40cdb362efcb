"""What the contract cannot ask of norms: mixed dtypes, what is kept, results that are written."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import bptools
import bptools.functional as B


def made(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("name", ["add_layer_norm", "add_rms_norm"])
def test_a_wide_residual_stream(name):
    """Half precision is added to a float32 residual in float32, as torch adds; each gradient is as its input."""
    x, w = made((6, 8), (8,), dtype=torch.bfloat16)
    (residual,) = made((6, 8))
    y, h = getattr(B, name)(x, residual, (8,), w.float())
    theirs = x + residual
    expected = getattr(F, name.removeprefix("add_"))(theirs, (8,), w.float())
    assert y.dtype is h.dtype is torch.float32
    torch.testing.assert_close((y, h), (expected, theirs))
    grads = torch.autograd.grad(y.pow(3).sum() + h.sum(), (x, residual))
    torch.testing.assert_close(grads, torch.autograd.grad(expected.pow(3).sum() + theirs.sum(), (x, residual)))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("name", ["add_layer_norm", "add_rms_norm"])
@pytest.mark.parametrize("tier", ["auto", "formula"])
def test_the_sum_alone_is_kept(name, tier):
    x, residual, w = made((64, 32), (64, 32), (32,))
    kept = []
    with bptools.backend(tier), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        _, h = getattr(B, name)(x, residual, (32,), w)
    large = [t for t in kept if t.numel() == h.numel()]
    assert [t.data_ptr() for t in large] == [h.data_ptr()]
    assert all(t.numel() in (32, 64) for t in kept if t.numel() != h.numel())


def test_the_sum_learns_only_if_a_term_does():
    x, residual, w = made((6, 8), (6, 8), (8,))
    y, h = B.add_rms_norm(x.detach(), residual.detach(), (8,), w)
    assert y.requires_grad
    assert not h.requires_grad


def test_normalize_writes_to_out():
    (x,) = made((3, 4))
    out = torch.empty(3, 4)
    with torch.no_grad():
        assert B.normalize(x, out=out) is out
    torch.testing.assert_close(out, F.normalize(x.detach()))


@pytest.mark.parametrize("p", [2.0, 1.0, 0.5, 0.0, 3.0, float("inf"), float("-inf"), -1.0])
def test_normalize_by_any_norm(p):
    """Also where a vector is 0, or has a 0."""
    x = torch.tensor(
        [[1.0, -2.0, 3.0], [0.0, 0.0, 0.0], [0.0, 4.0, -4.0]], dtype=torch.float64, requires_grad=True
    )
    found = []
    for f in (B.normalize, F.normalize):
        y = f(x, p, eps=0.5)
        found.append([y, *torch.autograd.grad(y, x, torch.arange(9.0, dtype=torch.float64).view(3, 3))])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("use_input_stats", [True, False])
def test_running_statistics_of_instance_norm(use_input_stats):
    (x,) = made((3, 4, 5))
    found = []
    for functions in (B, F):
        mean, var = torch.linspace(-1, 1, 4), torch.linspace(1, 2, 4)
        y = functions.instance_norm(x, mean, var, use_input_stats=use_input_stats, momentum=0.3)
        found.append([y, mean, var])
    torch.testing.assert_close(*found)


META = {
    "group_norm": lambda x: B.group_norm(x, 2),
    "instance_norm": B.instance_norm,
    "local_response_norm": lambda x: B.local_response_norm(x, 2),
    "normalize": B.normalize,
    "add_layer_norm": lambda x: B.add_layer_norm(x, x, (6,))[0],
    "add_rms_norm": lambda x: B.add_rms_norm(x, x, (6,))[0],
    "rotary_embedding": lambda x: B.rotary_embedding(x, x[0], x[0]),
    "weight_norm": lambda x: B.weight_norm(x, x[:, :1, :1]),
    "spectral_norm": lambda x: B.spectral_norm(x, x[:, 0, 0], x[0].flatten()),
}


@pytest.mark.parametrize("name", META)
def test_on_the_meta_device(name):
    y = META[name](torch.empty(3, 4, 6, device="meta"))
    assert y.device.type == "meta"
    assert y.shape == (3, 4, 6)

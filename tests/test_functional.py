"""bptools.functional: torch's signatures, and errors that name the argument, what was expected and what came."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import bptools
import bptools.functional as B

MODULES = [importlib.import_module(path.stem) for path in sorted(Path(__file__).parent.glob("errors_*.py"))]
ERRORS = {name: error for module in MODULES for name, error in module.ERRORS.items()}

x = torch.randn(3, 5)
w = torch.randn(4, 5)

# Deviations from torch's signatures, each with its reason.
DEVIATIONS: dict[str, str] = {
    name: reason for module in MODULES for name, reason in getattr(module, "DEVIATIONS", {}).items()
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, kind, pattern = ERRORS[name]
    with pytest.raises(kind, match=pattern) as caught:
        call()
    assert str(caught.value).startswith(name.split(":")[0]), "the message must name the function first"


FUNCTIONS = [n for n, f in vars(B).items() if inspect.isfunction(f) and not n.startswith("_")]


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - set(DEVIATIONS)))
def test_signature_is_torchs(name):
    try:
        theirs = inspect.signature(getattr(F, name))
    except (ValueError, TypeError):
        pytest.skip("torch's is a builtin, which does not say its signature")
    ours = inspect.signature(getattr(B, name))
    if list(theirs.parameters) == ["args", "kwargs"]:
        pytest.skip("torch's is a dispatcher, which does not say its signature")
    described = [[(p.name, p.default, p.kind) for p in s.parameters.values()] for s in (ours, theirs)]
    assert described[0] == described[1]


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_documented(name):
    doc = inspect.getdoc(getattr(B, name))
    assert doc
    assert "(" in doc, "a docstring gives shapes"


@pytest.mark.parametrize("op", ["relu", "leaky_relu", "silu"])
def test_inplace_writes_its_input_and_its_gradient_is_right(op):
    leaves = [torch.randn(3, 5).requires_grad_()] * 2
    results = []
    for f, leaf in zip((getattr(B, op), getattr(F, op)), leaves, strict=True):
        written = leaf * 2
        y = f(written, inplace=True)
        assert y.data_ptr() == written.data_ptr()
        assert written._version > 0
        results.append([y, *torch.autograd.grad(y.pow(2).sum(), leaf)])
    torch.testing.assert_close(*results)
    leaf = torch.randn(3, requires_grad=True)
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        getattr(B, op)(leaf, inplace=True)
    assert torch.equal(leaf.detach(), before)


@pytest.mark.parametrize("tier", ["auto", "formula"])
def test_relu_and_what_is_not_finite(tier):
    """As torch: an infinite gradient stops at a dead unit, and passes where the input is NaN."""
    dy = torch.tensor([torch.inf, torch.inf, 2.0, torch.inf])
    grads = []
    for f in (B.relu, torch.relu):
        v = torch.tensor([-1.0, 2.0, torch.nan, 0.0], requires_grad=True)
        with bptools.backend(tier):
            grads.append(torch.autograd.grad(f(v), v, dy)[0])
    assert torch.equal(*grads)


def test_attention_under_a_large_finite_mask():
    """A row that is masked by -1e9 throughout attends to all keys alike: lse has no digits left for log s."""
    q, k, v = torch.randn(3, 1, 2, 3, 4, generator=torch.Generator().manual_seed(0)).unbind()
    mask = torch.tensor([[0.0, 0.0, -1e9], [-1e9, -1e9, -1e9], [0.0, -1e6, 0.0]])
    with bptools.backend("formula"):
        ours = torch.func.vjp(lambda *qkv: B.scaled_dot_product_attention(*qkv, mask), q, k, v)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        theirs = torch.func.vjp(lambda *qkv: F.scaled_dot_product_attention(*qkv, mask), q, k, v)
        torch.testing.assert_close(ours[0], theirs[0])
        torch.testing.assert_close(ours[1](q), theirs[1](q))


META = {
    "linear": lambda: B.linear(x.to("meta"), w.to("meta")),
    "conv2d": lambda: B.conv2d(torch.empty(1, 2, 5, 5, device="meta"), torch.empty(3, 2, 3, 3, device="meta")),
    "max_pool2d": lambda: B.max_pool2d(torch.empty(1, 2, 5, 5, device="meta"), 2),
    "relu": lambda: B.relu(x.to("meta")),
    "layer_norm": lambda: B.layer_norm(x.to("meta"), (5,)),
    "rms_norm": lambda: B.rms_norm(torch.empty(1024, 512, device="meta"), (512,)),
    "batch_norm": lambda: B.batch_norm(x.to("meta"), None, None, training=True),
    "cross_entropy": lambda: B.cross_entropy(x.to("meta"), torch.zeros(3, dtype=torch.long, device="meta")),
    "scaled_dot_product_attention": lambda: B.scaled_dot_product_attention(*[x.to("meta")] * 3),
}


@pytest.mark.parametrize("name", META)
def test_on_the_meta_device(name):
    assert META[name]().device.type == "meta"


def test_inplace_over_what_a_backward_needs_raises():
    leaf = torch.randn(3, 5, requires_grad=True)
    kept = B.tanh(leaf)
    B.relu(kept, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()

"""bptools.functional: torch's signatures, and errors that name the argument, what was expected and what came."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

import bptools
import bptools.functional as B

x = torch.randn(3, 5)
w = torch.randn(4, 5)
image = torch.randn(2, 2, 4, 5)
kernel = torch.randn(3, 2, 2, 2)

# A call, the exception, and what its message must say.
ERRORS = {
    "linear: features": (
        lambda: B.linear(x, w.T),
        ValueError,
        r"input must have shape \(\.\.\., 4\).*got \(3, 5\)",
    ),
    "linear: bias": (lambda: B.linear(x, w, x[0]), ValueError, r"bias must have shape \(4,\), got \(5,\)"),
    "linear: weight": (lambda: B.linear(x, w[None]), ValueError, r"weight must have 2 dim.*got \(1, 4, 5\)"),
    "linear: 1-D weight": (lambda: B.linear(x, w[0], w[:, 0]), ValueError, "1 without a bias"),
    "linear: dtypes": (lambda: B.linear(x, w.half()), TypeError, "weight must have input's dtype torch.float32"),
    "relu: integers": (lambda: B.relu(torch.arange(3)), TypeError, "relu: input .* got torch.int64"),
    "relu: complex": (lambda: B.relu(x + 1j), TypeError, "relu: input .* got torch.complex64"),
    "relu: sparse": (lambda: B.relu(x.to_sparse()), TypeError, "relu: input .* got layout torch.sparse_coo"),
    "relu: nothing": (lambda: B.relu(None), TypeError, "relu: input .* got NoneType"),
    "relu: a list": (lambda: B.relu([1.0]), TypeError, "relu: input .* got list"),
    "conv1d: weight": (lambda: B.conv1d(x, w), ValueError, r"weight must have shape .*got \(4, 5\)"),
    "conv2d: groups": (lambda: B.conv2d(image, kernel, groups=2), ValueError, r"multiple of groups = 2"),
    "conv2d: channels": (
        lambda: B.conv2d(image[:, :1], kernel),
        ValueError,
        r"input must have shape \(n, 2, .*got",
    ),
    "conv2d: bias": (lambda: B.conv2d(image, kernel, w), ValueError, r"bias must have shape \(3,\), got \(4, 5\)"),
    "conv2d: stride": (lambda: B.conv2d(image, kernel, stride=0), ValueError, "stride must be .* got 0"),
    "conv2d: dilation": (lambda: B.conv2d(image, kernel, dilation=True), ValueError, "dilation must .* got True"),
    "conv2d: padding": (
        lambda: B.conv2d(image, kernel, padding=(1, -1)),
        ValueError,
        r"padding must .* got \(1, -1\)",
    ),
    "conv2d: mode": (
        lambda: B.conv2d(image, kernel, padding="full"),
        ValueError,
        "'valid', 'same' or .* got 'full'",
    ),
    "conv2d: same": (
        lambda: B.conv2d(image, kernel, stride=2, padding="same"),
        ValueError,
        r"stride 1, got .*\(2, 2\)",
    ),
    "conv2d: small": (lambda: B.conv2d(image, kernel, dilation=9), ValueError, "input must not be smaller .* got"),
    "max_pool2d: input": (lambda: B.max_pool2d(x, 2), ValueError, r"input must have shape .* got \(3, 5\)"),
    "max_pool2d: padding": (lambda: B.max_pool2d(image, 2, padding=2), ValueError, r"half of .* got \(2, 2\)"),
    "max_pool2d: kernel_size": (
        lambda: B.max_pool2d(image, 9),
        ValueError,
        r"kernel_size \(9, 9\) .* got size \(4, 5\)",
    ),
    "max_pool2d: dilation": (  # torch's index would lie outside of the input
        lambda: B.max_pool2d(image[..., :3, :3], 2, 1, 1, 4),
        ValueError,
        r"dilation must let every window see some of the input, got \(4, 4\)",
    ),
    "avg_pool2d: divisor_override": (
        lambda: B.avg_pool2d(image, 2, divisor_override=0),
        ValueError,
        "divisor_override must not be zero",
    ),
    "adaptive_avg_pool2d: output_size": (
        lambda: B.adaptive_avg_pool2d(image, (2, -1)),
        ValueError,
        r"output_size must be .* got \(2, -1\)",
    ),
    "adaptive_avg_pool2d: input": (
        lambda: B.adaptive_avg_pool2d(image[:, :, :0], 2),
        ValueError,
        "input must .* got",
    ),
    "gelu: approximate": (lambda: B.gelu(x, "sigmoid"), ValueError, "approximate must be .* got 'sigmoid'"),
    "layer_norm: empty": (lambda: B.layer_norm(x, ()), ValueError, r"normalized_shape .* got \(\)"),
    "layer_norm: shape": (lambda: B.layer_norm(x, (4,)), ValueError, r"input must end in .*\(4,\), got \(3, 5\)"),
    "layer_norm: weight": (lambda: B.layer_norm(x, (5,), x), ValueError, r"weight .*\(5,\), got \(3, 5\)"),
    "layer_norm: dtype": (lambda: B.layer_norm(x, (5,), x[0].double()), TypeError, "weight .* got torch.float64"),
    "layer_norm: bias": (lambda: B.layer_norm(x, (5,), None, x), ValueError, r"bias .*\(5,\), got \(3, 5\)"),
}

# Deviations from torch's signatures, each with its reason.
DEVIATIONS: dict[str, str] = {}


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

"""The modules that torch.nn lacks, and where ours do what torch's do not."""

from __future__ import annotations

import pytest
import timm.layers
import torch
import torch.nn.functional as F
import torchvision.ops

from bptools import nn

GATED = {
    "SwiGLU": F.silu,
    "GEGLU": F.gelu,
    "ReGLU": F.relu,
}


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize(("dim", "shape"), [(-1, (3, 4)), (1, (2, 6, 3))], ids=str)
def test_the_first_half_is_the_gate(name, dim, shape):
    x = torch.randn(shape, requires_grad=True)
    gate, up = x.chunk(2, dim)
    layer = getattr(nn, name)(dim)
    expected = GATED[name](gate) * up
    y = layer(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(t.square().sum(), x) for t in (y, expected)))
    assert f"dim={dim}" in repr(layer)
    assert not list(layer.parameters())


def test_geglu_of_tanh():
    x = torch.randn(3, 4)
    gate, up = x.chunk(2, -1)
    layer = nn.GEGLU(approximate="tanh")
    torch.testing.assert_close(layer(x), F.gelu(gate, approximate="tanh") * up)
    assert repr(layer) == "GEGLU(dim=-1, approximate='tanh')"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (nn.DropPath(0.3), timm.layers.DropPath(0.3)),
        (nn.DropPath(0.3, False), timm.layers.DropPath(0.3, False)),
        (nn.StochasticDepth(0.3, "row"), torchvision.ops.StochasticDepth(0.3, "row")),
        (nn.StochasticDepth(0.3, "batch"), torchvision.ops.StochasticDepth(0.3, "batch")),
    ],
    ids=repr,
)
def test_stochastic_depth(ours, theirs):
    x = torch.randn(8, 3, requires_grad=True)
    assert repr(ours) == repr(theirs)
    for training in (True, False):
        results = []
        for layer in (ours.train(training), theirs.train(training)):
            torch.manual_seed(0)
            y = layer(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), x)])
        torch.testing.assert_close(*results)
    assert ours(x) is x


@pytest.mark.parametrize("kind", [nn.AlphaDropout, nn.FeatureAlphaDropout])
def test_alpha_dropout_in_place(kind):
    """Torch's modules ignore the argument."""
    x = torch.randn(8, 3)
    assert kind(0.3, inplace=True)(x).data_ptr() == x.data_ptr()


def test_alpha_dropout_keeps_mean_and_variance():
    torch.manual_seed(0)
    y = nn.AlphaDropout(0.3)(torch.randn(200_000))
    assert abs(y.mean()) < 0.02
    assert abs(y.var() - 1) < 0.02

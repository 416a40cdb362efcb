"""What test_modules.py does not ask of LinearCrossEntropyLoss: keyword arguments, and torch that lacks it."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

import bptools
from bptools.nn.linear_loss import LinearCrossEntropyLoss, _BeforeTorchHasIt


class Older(_BeforeTorchHasIt):
    """As it is where torch.nn has none."""

    forward = LinearCrossEntropyLoss.forward


@pytest.mark.parametrize("kind", [LinearCrossEntropyLoss, Older])
def test_layer_and_loss(kind):
    torch.manual_seed(0)
    weight = torch.rand(4)
    module = kind(
        3, 4, out_features=(2, 3), bias=True, weight=weight, ignore_index=1, label_smoothing=0.1, reduction="sum"
    )
    assert list(module.state_dict()) == ["weight", "linear.weight", "linear.bias"]
    x, t = torch.randn(5, 3, requires_grad=True), torch.randint(4, (5, 2, 3))
    learning = [x, *module.parameters()]
    ours = module(x, t)
    logits = F.linear(x, module.linear.weight, module.linear.bias).reshape(5, 4, 2, 3)
    theirs = F.cross_entropy(logits, t, weight, ignore_index=1, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, learning), torch.autograd.grad(theirs, learning))


def test_what_stands_in_is_torchs_module():
    theirs = getattr(torch.nn, "LinearCrossEntropyLoss", None)
    if theirs is None:
        pytest.skip("this torch has none")
    assert inspect.signature(Older).parameters.keys() == inspect.signature(theirs).parameters.keys()
    ours, theirs = Older(3, 4, bias=True), theirs(3, 4, bias=True)
    assert ours.extra_repr() == theirs.extra_repr()
    ours.load_state_dict(theirs.state_dict())


def test_what_stands_in_refuses():
    with pytest.raises(ValueError, match=r"weight must have shape \(4,\), got \(3,\)"):
        Older(3, 4, weight=torch.ones(3))
    with pytest.raises(ValueError, match="label_smoothing must be from 0 to 1, got 2"):
        Older(3, 4, label_smoothing=2)
    assert bptools.nn.LinearCrossEntropyLoss is LinearCrossEntropyLoss

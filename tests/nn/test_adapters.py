"""LoRALinear: a frozen layer and an update that learns."""

from __future__ import annotations

import copy

import pytest
import torch

from bptools import nn


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = nn.LoRALinear(5, 4, r=2, lora_alpha=3.0)
    torch.nn.init.normal_(layer.lora_B)
    return layer


def test_it_starts_as_the_layer_below_and_shares_its_parameters():
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 4)
    layer = nn.LoRALinear.from_linear(linear, r=2, lora_alpha=8)
    x = torch.randn(3, 5)
    assert layer.weight is linear.weight
    torch.testing.assert_close(layer(x), linear(x))
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert layer.lora_B.grad.abs().sum() > 0
    assert "r=2, lora_alpha=8" in repr(layer)


def test_merged_and_unmerged_give_the_same(layer):
    x = torch.randn(3, 5)
    y, before = layer(x), layer.weight.clone()
    for _ in range(2):  # the second time changes nothing
        layer.merge()
    assert not torch.equal(layer.weight, before)
    torch.testing.assert_close(layer(x), y)
    layer.unmerge()
    torch.testing.assert_close(layer.weight, before)
    torch.testing.assert_close(copy.deepcopy(layer)(x), y)


def test_it_keeps_its_input_alone(layer):
    x = torch.randn(64, 5, requires_grad=True)
    kept = []

    def pack(t):
        kept.append(t)
        return t

    layer.lora_dropout = 0.5
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    parameters = {p.data_ptr() for p in layer.parameters()}
    sizes = sorted(t.nbytes for t in kept if t.data_ptr() not in parameters)
    assert sizes == [64 * 5, 64 * 5 * 4]  # a byte of the mask and four of x for each element


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"r": 0}, "r must be an int of at least 1, got 0"),
        ({"r": 2, "lora_dropout": -1}, "lora_dropout must be between 0 and 1, got -1"),
    ],
)
def test_errors(settings, pattern):
    with pytest.raises(ValueError, match=f"LoRALinear: {pattern}"):
        nn.LoRALinear(5, 4, **settings)

"""NF4Linear: bitsandbytes' checkpoints, and QLoRA by peft."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import bptools.functional as B
from bptools import nn

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(128, 64)


def test_it_computes_what_the_dequantised_layer_does(linear):
    layer = nn.NF4Linear.from_linear(linear)
    x = torch.randn(3, 128, requires_grad=True)
    plain = layer.dequantize()
    assert type(plain) is nn.Linear
    torch.testing.assert_close(layer(x), plain(x))
    assert (plain.weight - linear.weight).abs().max() < 0.2 * linear.weight.abs().max()
    assert not any(p.requires_grad for p in layer.parameters())
    assert "in_features=128, out_features=64, bias=True, block_size=64, double_quant=True" in repr(layer)


@pytest.mark.parametrize("double", [True, False])
def test_a_checkpoint_gives_every_bit_back(linear, double, tmp_path):
    layer = nn.NF4Linear.from_linear(linear, double_quant=double)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    fresh = nn.NF4Linear(128, 64, block_size=128)
    fresh.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(B.dequantize_nf4(fresh.quantised), B.dequantize_nf4(layer.quantised))
    assert (fresh.block_size, fresh.double_quant) == (64, double)
    assert torch.equal(copy.deepcopy(fresh).weight, layer.weight)


def test_checkpoints_of_bitsandbytes(linear):
    bnb = pytest.importorskip("bitsandbytes")
    theirs = bnb.nn.Linear4bit(128, 64, quant_type="nf4", compress_statistics=True)
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu")
    if theirs.weight.quant_state is None:
        theirs.weight = theirs.weight._quantize("cpu")
    ours = nn.NF4Linear(128, 64)
    ours.load_state_dict(theirs.state_dict())
    expected = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    assert torch.equal(B.dequantize_nf4(ours.quantised), expected)
    found, given = ({k: v.dtype for k, v in layer.state_dict().items()} for layer in (ours, theirs))
    assert found == given
    state = {k.removeprefix("weight."): v for k, v in ours.state_dict().items() if k.startswith("weight.")}
    read = bnb.functional.QuantState.from_dict(state, torch.device("cpu"))
    assert torch.equal(bnb.functional.dequantize_4bit(ours.weight.data, read), expected)


def test_a_checkpoint_of_another_shape_is_refused(linear):
    with pytest.raises(RuntimeError, match=r"expected an NF4 weight of shape \(64, 48\), got nf4 of \(64, 128\)"):
        nn.NF4Linear(48, 64).load_state_dict(nn.NF4Linear.from_linear(linear).state_dict())


def test_casts_reach_the_bias_alone(linear):
    layer = nn.NF4Linear.from_linear(linear)
    before = B.dequantize_nf4(layer.quantised)
    layer.to(torch.bfloat16)
    assert layer.bias.dtype is torch.bfloat16
    assert torch.equal(B.dequantize_nf4(layer.quantised), before)
    assert layer(torch.randn(2, 128, dtype=torch.bfloat16)).dtype is torch.bfloat16


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
        )
    )


def test_qlora_by_peft():
    """The base stays as it is to the bit, the adapters learn, and no dequantised weight is kept."""
    model = llama()
    plain = copy.deepcopy(model)
    names = nn.to_nf4(model)
    assert len(names) == 14
    assert "lm_head" not in names
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"))
    learning = [p for p in adapted.parameters() if p.requires_grad]
    assert all("lora_" in n for n, p in adapted.named_parameters() if p.requires_grad)
    base = {n: t.clone() for n, t in adapted.state_dict().items() if "lora_" not in n}
    tokens = torch.randint(3, 90, (4, 15), generator=torch.Generator().manual_seed(0))

    large = []

    def pack(t):
        if t.dtype is torch.float32 and t.shape in {(32, 32), (64, 32), (32, 64)} and not t.requires_grad:
            large.append(t.shape)
        return t

    optimizer, losses = torch.optim.AdamW(learning, lr=1e-2), []
    for _ in range(20):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = adapted(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert large == []
    after = adapted.state_dict()
    assert all(torch.equal(after[name], t) for name, t in base.items())
    layers = [module for module in adapted.modules() if isinstance(module, nn.NF4Linear)]
    before = sum(plain.get_submodule(name).weight.nbytes for name in names)
    assert sum(layer.quantised.nbytes for layer in layers) < 0.2 * before


def test_nothing_to_quantise_is_an_error():
    with pytest.raises(ValueError, match=r"to_nf4: model must hold linear layers .*got none"):
        nn.to_nf4(torch.nn.Sequential(torch.nn.ReLU()))

"""fuse_lora: peft's LoRA layers on our op, in models of transformers that nobody edits."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers

import bptools
from bptools.finetune import InputError, fuse_lora, unfuse_lora

pytestmark = [  # peft's and transformers' own
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:Merging lora module to base weights with bias"),
]
TOKENS = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(0))


def llama(dropout=0.0, **settings):
    """A small Llama of random weights with adapters whose B is not zero."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
    )
    targets = ["q_proj", "v_proj", "down_proj"]
    lora = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets, init_lora_weights=False, **settings
    )
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), lora).train()


def step(model):
    """Loss and gradients of everything that learns."""
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def kept_bytes(model):
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
    del loss
    return sum(size for pointer, size in kept.items() if pointer not in own)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_loss_and_gradients_are_pefts(dropout, dtype):
    model = llama(dropout).to(dtype)
    expected = step(model)
    changed = fuse_lora(model)
    assert len(changed) == 6
    torch.testing.assert_close(step(model), expected)
    assert unfuse_lora(model) == changed
    torch.testing.assert_close(step(model), expected, rtol=0, atol=0)


def test_it_is_our_op_that_runs():
    model = llama()
    fuse_lora(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert "LoraLinear" in layer(torch.randn(1, 3, 32)).grad_fn.name()


def test_a_base_in_bf16_with_adapters_in_float32():
    model = llama().to(torch.bfloat16)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
    expected = step(model)
    fuse_lora(model)
    torch.testing.assert_close(step(model), expected, rtol=0.05, atol=2e-3)


def test_less_is_kept():
    model = llama(dropout=0.1)
    before = kept_bytes(model)
    fuse_lora(model)
    assert kept_bytes(model) < 0.9 * before


def test_gpt2_whose_layers_are_transposed_stays_pefts():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_head=4, n_layer=1, vocab_size=99)
    lora = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), lora).eval()
    expected = step(model)
    assert fuse_lora(model)
    torch.testing.assert_close(step(model), expected, rtol=0, atol=0)


def change_nothing(model):
    pass


def two_adapters(model):
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])


def merged(model):
    model.merge_adapter()


def converted(model):
    bptools.nn.convert(model)


@pytest.mark.parametrize("situation", [change_nothing, two_adapters, merged, converted])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}], ids=str)
def test_every_situation_gives_what_peft_gives(situation, settings):
    model = llama(**settings)
    if situation is merged and "lora_bias" in settings:
        pytest.skip("peft refuses to merge biases into layers that have none")
    situation(model)
    expected = model(input_ids=TOKENS).logits
    fuse_lora(model)
    torch.testing.assert_close(model(input_ids=TOKENS).logits, expected)


def test_what_peft_does_with_a_model_still_works(tmp_path):
    model = llama().eval()
    plain = copy.deepcopy(model)
    fuse_lora(model)
    logits = model(input_ids=TOKENS).logits
    with model.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(model(input_ids=TOKENS).logits, plain(input_ids=TOKENS).logits)
    model.save_pretrained(tmp_path)
    base = plain.unload()
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(again(input_ids=TOKENS).logits, logits)
    torch.testing.assert_close(model.merge_and_unload()(input_ids=TOKENS).logits, logits)


def test_a_model_without_adapters_is_refused():
    with pytest.raises(InputError, match="model must hold peft's LoRA layers"):
        fuse_lora(torch.nn.Linear(2, 2))

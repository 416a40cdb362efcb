"""Adapters of every kind on models of everybody: what learns, what does not, and that merging changes nothing."""

from __future__ import annotations

import copy
import functools

import peft
import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

from bptools.finetune.adapters import Adapter, add_adapter, merge_adapter, tied_parameters, trainable_share
from bptools.finetune.errors import InputError
from bptools.finetune.phases import set_modes
from bptools.nn import NF4Linear

pytestmark = [  # peft's and transformers' own
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def distilbert():
    config = transformers.DistilBertConfig(dim=32, hidden_dim=64, n_layers=2, n_heads=4, vocab_size=99)
    return transformers.DistilBertForSequenceClassification(config)


def bert():
    return transformers.BertForTokenClassification(transformers.BertConfig(**SIZES, vocab_size=99))


def gpt2(**settings):
    config = transformers.GPT2Config(
        n_embd=32, n_head=4, n_layer=2, vocab_size=99, bos_token_id=1, eos_token_id=2, **settings
    )
    return transformers.GPT2LMHeadModel(config)


def llama(**settings):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=99, **settings))


def resnet():
    return torchvision.models.resnet18(num_classes=3)


def vit():
    return torchvision.models.VisionTransformer(32, 16, 2, 4, 32, 64, num_classes=3)


def swin():
    return torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=3)


def timm_vit():
    return timm.models.VisionTransformer(
        img_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=4, num_classes=3
    )


class Encoder(nn.Module):
    """torch's own transformer, which has a path for evaluation that calls none of its layers."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.encoder(x.flatten(2).mT[:, :32].reshape(len(x), -1, 32)).mean(1))


MODELS = {
    distilbert: (("pre_classifier", "classifier"), TOKENS),
    bert: ("classifier", TOKENS),
    gpt2: (None, TOKENS),
    llama: ("lm_head", TOKENS),
    resnet: ("fc", IMAGES),
    vit: ("heads.head", IMAGES),
    swin: ("head", IMAGES),
    timm_vit: ("head", IMAGES),
    Encoder: ("head", IMAGES),
}
CASES = [
    *((make, "lora") for make in MODELS),
    *((make, "dora") for make in (distilbert, gpt2, llama, resnet, timm_vit)),
    *((make, "qlora") for make in (distilbert, bert, llama, vit, swin, timm_vit, Encoder)),
    *((make, "prompt") for make in (distilbert, bert, gpt2, llama)),
    *((make, "prefix") for make in (gpt2, llama)),
]
parametrized = pytest.mark.parametrize(
    ("make", "kind"), CASES, ids=[f"{make.__name__}-{kind}" for make, kind in CASES]
)


def build(make, dtype=torch.float32):
    torch.manual_seed(0)
    return make().to(dtype).eval()


def logits(model, inputs, dtype=torch.float32):
    if inputs is TOKENS:
        return model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits
    return model(inputs.to(dtype))


def trained(make, kind, dtype=torch.float32, **settings):
    """A model with an adapter after two steps, and what it was like before."""
    head, inputs = MODELS[make]
    model = add_adapter(build(make, dtype), Adapter(kind, 4, tokens=5, **settings), head=head)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        set_modes(model)
        optimizer.zero_grad()
        (logits(model, inputs, dtype) - 1).square().mean().backward()
        optimizer.step()
    return model.eval(), before


@parametrized
def test_the_adapter_and_the_head_learn_and_nothing_else(make, kind):
    model, before = trained(make, kind)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    after = model.state_dict()
    changed = {name for name, t in before.items() if not torch.equal(t, after[name])}
    assert changed == learning
    heads, _ = MODELS[make]
    saved = {name for name in learning if ".modules_to_save." in name}
    for head in [heads] if isinstance(heads, str) else heads or []:
        assert any(f".{head}." in name for name in saved)


@parametrized
def test_a_merged_model_is_plain_and_computes_the_same(make, kind):
    head, inputs = MODELS[make]
    # 4-bit weights are dequantised to float32 at most.
    dtype, tolerance = (torch.float32, 1e-5) if kind == "qlora" else (torch.float64, 1e-10)
    model, _ = trained(make, kind, dtype)
    if kind in ("prompt", "prefix"):
        with pytest.raises(InputError, match=f"merge_adapter: {kind} tuning is an input"):
            merge_adapter(model)
        return
    with torch.no_grad():
        expected = logits(model, inputs, dtype)
        merged = merge_adapter(model)
        torch.testing.assert_close(logits(merged, inputs, dtype), expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(logits(model, inputs, dtype), expected)
    plain = build(make, dtype)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert [type(m) for m in merged.modules()] == [type(m) for m in plain.modules()]
    assert all(p.requires_grad and p.dtype is dtype for p in merged.parameters())
    assert not torch.equal(expected, logits(plain, inputs, dtype))

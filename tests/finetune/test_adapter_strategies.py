"""Adapters of every kind on models of everybody: what learns, what does not, and that merging changes nothing."""

from __future__ import annotations

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


def mobilenet():
    return torchvision.models.MobileNetV2(num_classes=3, width_mult=0.1)


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
    mobilenet: ("classifier.1", IMAGES),
    vit: ("heads.head", IMAGES),
    swin: ("head", IMAGES),
    timm_vit: ("head", IMAGES),
    Encoder: ("head", IMAGES),
}
CASES = [
    *((make, "lora") for make in MODELS),
    *((make, "dora") for make in (distilbert, gpt2, llama, mobilenet, timm_vit)),
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
    _, inputs = MODELS[make]
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


def test_attention_has_one_update_and_keeps_its_parameters():
    model, _ = trained(vit, "lora", torch.float64)
    held = dict(model.named_parameters())
    outputs, expected = [], []
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.layer.MultiheadAttention)]
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    for layer in layers:
        plain = nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64)
        plain.load_state_dict(
            {k.replace("base_layer.", ""): v for k, v in layer.state_dict().items() if "lora" not in k}
        )
        with torch.no_grad():
            for weight, of in ((plain.in_proj_weight, layer), (plain.out_proj.weight, layer.base_layer.out_proj)):
                weight += 4.0 * of.lora_B.default.weight @ of.lora_A.default.weight
        outputs.append(layer(x, x, x)[0])
        expected.append(plain(x, x, x)[0])
    assert len(layers) == 2
    torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-10)
    layers[0].merge()
    torch.testing.assert_close(layers[0](x, x, x)[0], expected[0], rtol=1e-10, atol=1e-10)
    layers[0].unmerge()
    torch.testing.assert_close(layers[0](x, x, x)[0], expected[0], rtol=1e-10, atol=1e-10)
    assert all(p is held[name] for name, p in model.named_parameters())

    layers[0].__class__ = peft.tuners.lora.layer.MultiheadAttention
    assert not torch.allclose(layers[0](x, x, x)[0], expected[0], atol=1e-3)
    assert any(p is not held[name] for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_torchs_own_transformer_calls_its_adapters_in_evaluation(kind):
    """By itself it takes a path without gradients that reads the weights of its layers, and peft's are unused."""
    model, _ = trained(Encoder, kind, **({} if kind == "qlora" else {"targets": ("linear1", "linear2")}))
    expected = logits(model, IMAGES)
    with torch.no_grad():
        torch.testing.assert_close(logits(model, IMAGES), expected)
        if kind == "lora":
            naive = peft.get_peft_model(
                build(Encoder), peft.LoraConfig(r=4, target_modules=["linear1", "linear2"])
            )
            before = logits(naive.eval(), IMAGES)
            for name, p in naive.named_parameters():
                p.add_(1.0 * ("lora_B" in name))
            assert torch.equal(logits(naive, IMAGES), before)


def adapted(model):
    return {name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}


@pytest.mark.parametrize(
    ("make", "head", "targets", "count"),
    [
        (distilbert, ("pre_classifier", "classifier"), None, 12),
        (distilbert, None, None, 13),  # the last linear layer is the head
        (gpt2, None, None, 8),
        (llama, None, None, 14),
        (llama, None, ("q_proj", "layers.0.*.v_proj"), 3),
        (resnet, "fc", ("layer4.*",), 5),
        (vit, "heads.head", None, 9),  # attention counts with its output
        (swin, "head", None, 6),
    ],
)
def test_what_is_adapted(make, head, targets, count):
    model = add_adapter(build(make), Adapter(targets=targets), head=head)
    assert len(adapted(model)) == count


def test_where_peft_would_compute_something_else_nothing_is_adapted():
    class Net(nn.Sequential):
        def __init__(self):
            ours = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding_mode="reflect", padding=1)
            super().__init__(*ours, nn.Conv2d(4, 4, 3, dilation=2), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten())

    assert len(adapted(add_adapter(build(Net), Adapter()))) == 1
    with pytest.raises(InputError, match="targets: 'out_proj' matches no layer that takes lora"):
        add_adapter(build(vit), Adapter(targets=("out_proj",)))
    with pytest.raises(InputError, match="targets: 'qkv' matches no layer that takes lora"):
        add_adapter(build(swin), Adapter(targets=("qkv",)))


def test_the_adapter_starts_from_the_seed_and_as_if_it_were_not_there():
    expected = logits(build(llama), TOKENS)
    states = []
    for seed in (1, 1, 2):
        base = build(llama)
        torch.manual_seed(seed)
        model = add_adapter(base, Adapter()).eval()
        assert torch.equal(logits(model, TOKENS), expected)
        states.append(peft.get_peft_model_state_dict(model))
    same = [all(torch.equal(t, other[name]) for name, t in states[0].items()) for other in states[1:]]
    assert same == [True, False]


def test_tied_weights_diverge_on_merging_and_are_refused():
    """Trap 17: peft adds the head's update to the embedding too."""
    lora = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    with pytest.warns(UserWarning, match="tie_word_embeddings=True"):
        naive = peft.get_peft_model(build(gpt2), lora).eval()
    expected = logits(naive, TOKENS)
    with pytest.warns(UserWarning, match="tied_target_modules"):
        merged = naive.merge_and_unload()
    assert not torch.allclose(logits(merged, TOKENS), expected, atol=1e-2)

    pair = ("transformer.wte.weight", "lm_head.weight")
    assert tied_parameters(build(gpt2)) == [pair]
    assert tied_parameters(build(llama)) == []
    says = "'lm_head' cannot be adapted, as 'lm_head.weight' and 'transformer.wte.weight' are one tensor"
    with pytest.raises(InputError, match=says):
        add_adapter(build(gpt2), Adapter(targets=("lm_head",)))
    with pytest.raises(InputError, match=says):
        add_adapter(build(gpt2), Adapter(), head="lm_head")
    model = build(llama)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    assert len(adapted(add_adapter(model, Adapter("qlora")))) == 12


def test_counts_of_parameters():
    model = build(llama)
    total = sum(p.numel() for p in model.parameters())
    trainable, share = trainable_share(add_adapter(model, Adapter("qlora", 4, targets=("q_proj", "k_proj"))))
    assert (trainable, share) == (4 * 4 * (32 + 32), total + 4 * 4 * (32 + 32))
    assert sum(isinstance(m, NF4Linear) for m in model.modules()) == 14


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "loar"}, r"kind must be one of .*, got 'loar' \(did you mean 'lora'\?\)"),
        ({"rank": 0}, "rank must be an int of at least 1, got 0"),
        ({"tokens": 2.5}, "tokens must be an int of at least 1, got 2.5"),
        ({"alpha": float("nan")}, "alpha must be more than 0 and finite, got nan"),
        ({"dropout": 1.0}, "dropout must be from 0 to below 1, got 1.0"),
        ({"targets": "q_proj"}, "targets must be None or a tuple of names, got 'q_proj'"),
    ],
)
def test_values_that_cannot_be(options, says):
    with pytest.raises(InputError, match=f"Adapter: {says}"):
        Adapter(**options)


@pytest.mark.parametrize(
    ("make", "adapter", "head", "says"),
    [
        (resnet, Adapter(), "fcc", r"head 'fcc' is no module of ResNet \(did you mean 'fc'\?\)"),
        (distilbert, Adapter(), "classifier", "peft would train 'pre_classifier' with the head"),
        (llama, Adapter(targets=("q_prj",)), None, "targets: 'q_prj' matches no layer that takes lora"),
        (resnet, Adapter("prompt"), None, "prompt takes a model of transformers with a task, got ResNet"),
        (
            bert,
            Adapter("prefix"),
            None,
            "prefix takes a model that generates text, got BertForTokenClassification",
        ),
        (gpt2, Adapter("qlora"), None, "qlora cannot quantise GPT2LMHeadModel"),
        (vit, Adapter(dropout=0.1), "heads.head", "dropout must be 0, as peft has none in attention"),
        (nn.Identity, Adapter(), None, "Identity has no layer beside its head that takes lora"),
    ],
)
def test_what_is_refused(make, adapter, head, says):
    with pytest.raises(InputError, match=f"add_adapter: {says}"):
        add_adapter(build(make), adapter, head=head)


def test_models_with_an_adapter_already_and_without_one():
    with pytest.raises(InputError, match="add_adapter: model must not have an adapter already"):
        add_adapter(add_adapter(build(llama), Adapter()), Adapter())
    with pytest.raises(InputError, match="merge_adapter: model must have an adapter, got LlamaForCausalLM"):
        merge_adapter(build(llama))

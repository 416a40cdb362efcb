"""bptools.nn.convert: models of torchvision and transformers on our modules, against themselves on torch's."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
import transformers
from torch import nn

import bptools
from bptools.nn import convert, revert


def picture(t=torch.float64, side=64):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(t)


def vision(name, side=64, **settings):
    """A torchvision model of random weights, and what it is called with."""
    return lambda: (
        getattr(torchvision.models, name)(num_classes=10, **settings),
        lambda t: ((picture(t, side),), {}),
    )


def segmentation(name):
    def make():
        model = getattr(torchvision.models.segmentation, name)(weights=None, weights_backbone=None, num_classes=3)
        return model, lambda t: ((picture(t),), {})

    return make


SMALL = {
    "attention_dropout": 0.0,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 99,
}


def tokens(rows=99):
    return torch.randint(3, rows, (2, 12), generator=torch.Generator().manual_seed(0))


def text(config, model, **settings):
    """A transformers model of random weights that computes its own loss of tokens."""

    def make():
        made = getattr(transformers, model)(getattr(transformers, config)(**{**SMALL, **settings}))
        return made, lambda t: ((), {"input_ids": tokens(), "labels": tokens()})

    return make


def pixels(config, model, **settings):
    def make():
        made = getattr(transformers, model)(
            getattr(transformers, config)(**{**SMALL, "image_size": 64, **settings})
        )
        return made, lambda t: ((picture(t),), {})

    return make


def speech():
    config = transformers.Wav2Vec2Config(
        **SMALL,
        conv_dim=(16, 16),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        apply_spec_augment=False,
        layerdrop=0.0,
    )
    sound = torch.randn(2, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return transformers.Wav2Vec2ForCTC(config), lambda t: ((sound.to(t),), {})


QUICK = {
    "resnet18": vision("resnet18"),
    "mobilenet_v3_small": vision("mobilenet_v3_small"),
    "vit": lambda: (
        torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10),
        lambda t: ((picture(t, 32),), {}),
    ),
    "bert": text("BertConfig", "BertForMaskedLM"),
    "gpt2": text("GPT2Config", "GPT2LMHeadModel", n_embd=32, n_head=4, n_layer=2),
    "llama": text("LlamaConfig", "LlamaForCausalLM", num_key_value_heads=2),
    "wav2vec2": speech,
}
SLOW = {
    "alexnet": vision("alexnet"),
    "convnext_tiny": vision("convnext_tiny"),
    "densenet121": vision("densenet121"),
    "efficientnet_b0": vision("efficientnet_b0"),
    "googlenet": vision("googlenet", side=96, aux_logits=False, init_weights=False),
    "inception_v3": vision("inception_v3", side=96, aux_logits=False, init_weights=False),
    "mnasnet0_5": vision("mnasnet0_5"),
    "regnet_x_400mf": vision("regnet_x_400mf"),
    "resnext50_32x4d": vision("resnext50_32x4d"),
    "shufflenet_v2_x0_5": vision("shufflenet_v2_x0_5"),
    "squeezenet1_1": vision("squeezenet1_1"),
    "swin_t": vision("swin_t"),
    "vgg11_bn": vision("vgg11_bn"),
    "deeplabv3": segmentation("deeplabv3_mobilenet_v3_large"),
    "lraspp": segmentation("lraspp_mobilenet_v3_large"),
    "albert": text("AlbertConfig", "AlbertForMaskedLM", embedding_size=16),
    "bart": text("BartConfig", "BartForConditionalGeneration", d_model=32, encoder_layers=2, decoder_layers=2,
                 encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48),
    "deberta": text("DebertaV2Config", "DebertaV2ForMaskedLM", relative_attention=True,
                    pos_att_type=["p2c", "c2p"]),
    "distilbert": text("DistilBertConfig", "DistilBertForMaskedLM", dim=32, hidden_dim=48, n_heads=4, n_layers=2),
    "electra": text("ElectraConfig", "ElectraForMaskedLM", embedding_size=16),
    "gpt_neox": text("GPTNeoXConfig", "GPTNeoXForCausalLM"),
    "mistral": text("MistralConfig", "MistralForCausalLM", num_key_value_heads=2),
    "opt": text("OPTConfig", "OPTForCausalLM", ffn_dim=48, word_embed_proj_dim=32),
    "qwen2": text("Qwen2Config", "Qwen2ForCausalLM", num_key_value_heads=2),
    "roberta": text("RobertaConfig", "RobertaForMaskedLM"),
    "t5": text("T5Config", "T5ForConditionalGeneration", d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=2,
               decoder_start_token_id=0),
    "hf_convnext": lambda: (
        transformers.ConvNextForImageClassification(
            transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
        ),
        lambda t: ((picture(t),), {}),
    ),
    "hf_resnet": pixels("ResNetConfig", "ResNetForImageClassification", embedding_size=8,
                        hidden_sizes=[16, 16, 24, 32], depths=[1, 1, 1, 1]),
    "hf_vit": pixels("ViTConfig", "ViTForImageClassification", patch_size=16),
    "segformer": pixels("SegformerConfig", "SegformerForSemanticSegmentation", hidden_sizes=[8, 16, 16, 32],
                        num_attention_heads=[1, 2, 2, 4], depths=[1, 1, 1, 1], decoder_hidden_size=16),
}  # fmt: skip
MODELS = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.fixture(params=MODELS)
def made(request):
    torch.manual_seed(0)
    model, arguments = {**QUICK, **SLOW}[request.param]()
    for module in model.modules():  # half of its numbers would be another draw, in another dtype
        for name in ("p", "dropout_p", "drop_prob", "attention_dropout", "dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model.train(), arguments


def step(model, arguments, dtype):
    """The loss, every gradient and every buffer after a training step."""
    model = copy.deepcopy(model).to(dtype)
    args, kwargs = arguments(dtype)
    out = model(*args, **kwargs)
    out = out if isinstance(out, torch.Tensor) else getattr(out, "loss", None) if kwargs else out
    if not isinstance(out, torch.Tensor):
        out = next(v for v in (out["out"] if "out" in out else out["logits"],))
    loss = out if out.dim() == 0 else out.pow(2).mean()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients, **dict(model.named_buffers())}


def error(found, truth):
    """The norm of the difference, of all tensors that are in float."""
    return {k: (found[k].double() - v.double()).norm().item() for k, v in truth.items() if v.is_floating_point()}


@pytest.mark.usefixtures("one_thread")
def test_loss_and_gradients_are_torchs(made):
    """In float64 the same but for rounding; in float32 at most twice as far from the float64 truth as torch's."""
    model, arguments = made
    truth, theirs = step(model, arguments, torch.float64), step(model, arguments, torch.float32)
    before = {name: type(module) for name, module in model.named_modules()}
    state = {name: t.clone() for name, t in model.state_dict().items()}
    changed = convert(model)
    assert changed
    assert all(type(model.get_submodule(name)).__module__.startswith("bptools.nn") for name in changed)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))

    exact, ours = step(model, arguments, torch.float64), step(model, arguments, torch.float32)
    assert ours.keys() == exact.keys() == truth.keys()
    scale = {k: v.double().norm().item() for k, v in truth.items()}
    total = sum(v**2 for v in scale.values()) ** 0.5
    for name, distance in error(exact, truth).items():
        assert distance <= 1e-9 * (scale[name] + total), name
    floor = 64 * torch.finfo(torch.float32).eps
    expected = error(theirs, truth)
    for name, distance in error(ours, truth).items():
        assert distance <= 2 * expected[name] + floor * (scale[name] + 0.01 * total), name

    revert(model)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_dropout_draws_torchs_numbers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(4, 6)
    results = []
    for change in (revert, convert):
        change(model)
        torch.manual_seed(1)
        results.append(model(x))
    torch.testing.assert_close(*results)


def test_everything_about_a_module_stays():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append("hook"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, first = [id(p) for p in model.parameters()], model[0]
    assert convert(model) == ["0", "1"]
    assert model[0] is first
    assert type(first) is bptools.nn.Conv2d
    assert convert(model) == []
    model(torch.randn(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    assert seen == ["hook"]
    assert [id(p) for p in model.parameters()] == before
    assert revert(model) == ["0", "1"]
    assert type(first) is nn.Conv2d


def test_what_is_not_torchs_own_class_stays():
    class Mine(nn.Linear):
        pass

    model = nn.ModuleDict({"mine": Mine(2, 2), "hooked": nn.Linear(2, 2), "plain": nn.Linear(2, 2)})
    model["hooked"].forward = lambda x: x
    assert convert(model) == ["plain"]
    assert type(model["mine"]) is Mine
    with pytest.raises(TypeError, match=r"convert: model must be a torch\.nn\.Module, got list"):
        convert([])


def test_a_converted_model_can_be_copied_saved_and_loaded(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    convert(model)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    x = torch.randn(2, 3)
    torch.testing.assert_close(copy.deepcopy(model)(x), fresh(x))

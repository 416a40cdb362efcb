"""Depth along the graph of real models: torchvision's, timm's and transformers', and of awkward ones."""

import re
import warnings
from itertools import pairwise

import pytest
import timm
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn
from torchvision.models import get_model

from bptools.optim import parameter_depths
from bptools.optim._layerwise import find_blocks

IDS = {"input_ids": torch.tensor([[1, 2, 3]])}
SMALL = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 30,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA = {**SMALL, "num_key_value_heads": 2}
BART = {
    "d_model": 16, "encoder_layers": 3, "decoder_layers": 3, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 30, "max_position_embeddings": 16,
}  # fmt: skip
VIT = {"image_size": 32, "patch_size": 8}


def check(model, example, ordered, head=None):
    """Depth is 0 at the first of ``ordered`` names, never falls along them, and is the largest at ``head``."""
    depths = parameter_depths(model, example)
    assert set(depths) == {name for name, _ in model.named_parameters()}
    assert set(depths.values()) == set(range(max(depths.values()) + 1))  # no depth is left out

    def depth_of(prefix):
        inside = [depth for name, depth in depths.items() if name == prefix or name.startswith(f"{prefix}.")]
        return min(inside), max(inside)

    assert depth_of(ordered[0])[0] == 0
    for before, after in pairwise(ordered):
        assert depth_of(before)[1] <= depth_of(after)[0], (before, after)
    if head:
        deepest = [name for name, depth in depths.items() if depth == max(depths.values())]
        assert all(name.startswith(f"{head}.") for name in deepest), deepest
    return depths


def layer_depths(depths, pattern):
    """Return the sorted depths of each layer; ``pattern`` has one group, the layer's number."""
    layers = {}
    for name, depth in depths.items():
        if found := re.search(pattern, name):
            layers.setdefault(int(found[1]), set()).add(depth)
    return [sorted(layers[number]) for number in sorted(layers)]


RESNET = ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]
FEATURES = [f"features.{i}" for i in range(8)]
TORCHVISION = {
    "alexnet": (["features.0", "features.3", "features.10", "classifier.1", "classifier.6"], 8),
    "resnet18": (RESNET, 10),
    "efficientnet_b0": ([*FEATURES, "features.8", "classifier"], 19),
    "convnext_tiny": ([*FEATURES, "classifier"], 23),
    "swin_t": ([*FEATURES, "norm", "head"], 17),
    "densenet121": (["features.conv0", *(f"features.denseblock{i}" for i in range(1, 5)), "classifier"], 63),
    "mobilenet_v3_small": ([*(f"features.{i}" for i in range(13)), "classifier"], 15),
    "regnet_y_400mf": (["stem", *(f"trunk_output.block{i}" for i in range(1, 5)), "fc"], 18),
    "shufflenet_v2_x0_5": (["conv1", "stage2", "stage3", "stage4", "conv5", "fc"], 19),
    "googlenet": (["conv1", "conv2", "conv3", "inception3a", "inception4a", "inception5b", "fc"], 13),
    "inception_v3": (["Conv2d_1a_3x3", "Mixed_5b", "Mixed_6a", "Mixed_7c", "fc"], 17),
}


def some_slow(names, slow):
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in names]


@pytest.mark.parametrize("name", some_slow(TORCHVISION, ["densenet121", "inception_v3", "regnet_y_400mf"]))
def test_torchvision(name):
    ordered, count = TORCHVISION[name]
    options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = get_model(name, weights=None, **options)
    depths = check(model, torch.rand(1, 3, 96, 96), ordered, ordered[-1])
    assert max(depths.values()) + 1 == count  # one a block: neither for each branch of it, nor for the whole


def test_torchvision_vit():
    model = get_model("vit_b_16", weights=None, image_size=32)
    depths = check(
        model, torch.rand(1, 3, 32, 32), ["conv_proj", "encoder.layers.encoder_layer_0", "heads"], "heads"
    )
    assert layer_depths(depths, r"encoder_layer_(\d+)\.") == [[depth] for depth in range(1, 13)]
    assert depths["class_token"] == depths["encoder.pos_embedding"] == 0


BLOCKS = [f"blocks.{i}" for i in range(4)]
STAGES = [f"stages.{i}" for i in range(4)]
TIMM = {
    "vit_tiny_patch16_224": (["patch_embed", *(f"blocks.{i}" for i in range(12)), "head"], 14),
    "convnext_atto": (["stem", *STAGES, "head"], 17),
    "resnetv2_50": (["stem", *STAGES, "head.fc"], 18),
    "levit_128s": (["stem", "stages.0", "stages.1", "stages.2", "head", "head_dist"], 14),
    "mixer_s32_224": (["stem", *BLOCKS, "head"], 10),
    "efficientnet_b0": (["conv_stem", *BLOCKS, "conv_head", "classifier"], 19),
    "ghostnet_100": (["conv_stem", *BLOCKS, "conv_head", "classifier"], 20),
    "swin_tiny_patch4_window7_224": (["patch_embed", *(f"layers.{i}" for i in range(4)), "head"], 17),
    "regnety_002": (["stem", "s1", "s2", "s3", "s4", "head"], 15),
}


@pytest.mark.parametrize(
    "name", some_slow(TIMM, ["swin_tiny_patch4_window7_224", "efficientnet_b0", "ghostnet_100", "regnety_002"])
)
def test_timm(name):
    ordered, count = TIMM[name]
    depths = check(timm.create_model(name, pretrained=False), torch.rand(1, 3, 224, 224), ordered, ordered[-1])
    assert max(depths.values()) + 1 == count


def distilbert():
    config = hf.DistilBertConfig(dim=16, n_layers=3, n_heads=2, hidden_dim=32, vocab_size=30)
    return hf.DistilBertForSequenceClassification(config)


def gpt2():
    config = hf.GPT2Config(
        n_embd=16, n_head=2, n_layer=3, vocab_size=20, n_positions=8, bos_token_id=1, eos_token_id=2
    )
    return hf.GPT2LMHeadModel(config)


TRANSFORMERS = {
    "distilbert": (distilbert, "distilbert.embeddings", "classifier"),
    "bert": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**SMALL)), "bert.embeddings", "classifier"),
    "bert-mlm": (lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL)), "bert.embeddings", "cls"),
    "roberta": (
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**SMALL)), "roberta.embeddings", "classifier"
    ),
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)), "model.embed_tokens", "lm_head"),
    "llama-tied": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, tie_word_embeddings=True)), "model.embed_tokens", None
    ),
    "gpt2": (gpt2, "transformer.wpe", None),
    "vit": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**SMALL, **VIT)), "vit.embeddings", "classifier"),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_give_each_layer_its_depth(name):
    make, embeddings, head = TRANSFORMERS[name]
    example = {"pixel_values": torch.rand(1, 3, 32, 32)} if name == "vit" else IDS
    depths = check(make(), example, [embeddings], head)
    assert {depth for name, depth in depths.items() if "embed" in name or "wte" in name} == {0}
    assert layer_depths(depths, r"(?:layers?|h)\.(\d+)\.") == [[1], [2], [3]]


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_and_decoder(kind):
    if kind == "t5":
        config = hf.T5Config(
            d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2, vocab_size=30, decoder_start_token_id=0
        )
        model, layer, shared = hf.T5ForConditionalGeneration(config), "block", "shared"
    else:
        model, layer, shared = hf.BartForConditionalGeneration(hf.BartConfig(**BART)), "layers", "model.shared"
    depths = check(model, {**IDS, "decoder_input_ids": torch.tensor([[0, 1]])}, [shared])
    assert layer_depths(depths, rf"encoder\.{layer}\.(\d+)\.") == [[1], [2], [3]]
    assert layer_depths(depths, rf"decoder\.{layer}\.(\d+)\.") == [[4], [5], [6]]
    assert {depth for name, depth in depths.items() if "embed" in name} <= {0}


def test_an_encoder_of_one_layer_is_opened_too():
    config = hf.BertConfig(**{**SMALL, "num_hidden_layers": 1})
    depths = parameter_depths(hf.BertForSequenceClassification(config), IDS)
    assert depths["bert.embeddings.word_embeddings.weight"] == 0
    assert layer_depths(depths, r"encoder\.layer\.(\d+)\.") == [[1]]
    assert (depths["bert.pooler.dense.weight"], depths["classifier.weight"]) == (2, 3)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_adapters_lie_where_their_layer_lies(targets):
    plain = parameter_depths(hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)), IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers' own, by way of peft
        model = get_peft_model(
            hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)), LoraConfig(task_type="CAUSAL_LM", target_modules=targets)
        )
    depths = parameter_depths(model, IDS)
    assert layer_depths(depths, r"layers\.(\d+)\.") == [[1], [2], [3]]
    for name, depth in depths.items():
        layer = re.sub(r"base_model\.model\.|\.base_layer|\.lora_[AB]\.default", "", name)
        assert depth == plain[layer], name


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.two(self.one(x))


class Backwards(nn.Module):
    """Runs its blocks in another order than they are registered in, and one of them twice."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.stem = nn.Linear(4, 4)

    def forward(self, x):
        x = self.stem(x)
        for i in (2, 0, 2, 1):
            x = self.blocks[i](x)
        return self.head(x)


def test_order_of_the_graph_and_a_block_that_runs_twice():
    depths = parameter_depths(Backwards(), torch.rand(1, 4))
    assert layer_depths(depths, r"blocks\.(\d)") == [[2], [3], [1]]
    assert (depths["stem.weight"], depths["head.weight"]) == (0, 4)


def test_a_module_under_two_names_has_one_depth():
    model = Backwards()
    model.blocks[1] = model.blocks[0]
    depths = parameter_depths(model, torch.rand(1, 4))
    assert layer_depths(depths, r"blocks\.(\d)") == [[2], [1]]
    assert (depths["stem.weight"], depths["head.weight"]) == (0, 3)


def test_parallel_branches_are_one_block():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.left = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
            self.right = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))

        def forward(self, x):
            return self.left(x) + self.right(x)

    model = nn.Sequential(Branches(), Branches())
    assert list(find_blocks(model)) == ["0", "1"]
    depths = parameter_depths(model, torch.rand(1, 4))
    assert (depths["0.left.0.weight"], depths["0.right.0.weight"]) == (0, 0)

import pytest
import torch
import transformers
from torch import nn
from torchvision.models import get_model

from bptools.finetune import small_cnn
from bptools.optim import layerwise_groups, parameter_depths
from bptools.optim._layerwise import find_blocks


def depths_of(name, size=64):
    model = get_model(name, weights=None)
    return model, parameter_depths(model, torch.rand(1, 3, size, size))


def test_resnet_depth_counts_residual_blocks():
    model, depths = depths_of("resnet18")
    assert depths["conv1.weight"] == depths["bn1.weight"] == 0  # the norm joins its convolution
    assert [depths[f"layer{i}.{j}.conv2.weight"] for i in range(1, 5) for j in range(2)] == list(range(1, 9))
    assert depths["layer2.0.downsample.0.weight"] == depths["layer2.0.conv1.weight"]
    assert depths["fc.weight"] == depths["fc.bias"] == 9
    assert set(depths) == {name for name, _ in model.named_parameters()}


def test_vit_depth_counts_encoder_layers_numerically():
    _, depths = depths_of("vit_b_16", size=224)
    assert depths["class_token"] == depths["encoder.pos_embedding"] == depths["conv_proj.weight"] == 0
    layers = [depths[f"encoder.layers.encoder_layer_{i}.ln_1.weight"] for i in range(12)]
    assert layers == list(range(1, 13))
    assert depths["encoder.ln.weight"] == 12
    assert depths["heads.head.weight"] == 13


def test_depth_follows_execution_not_registration():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)
            self.body = nn.Linear(4, 3)
            self.unused = nn.Linear(1, 1)

        def forward(self, x):
            return self.head(self.body(x))

    depths = parameter_depths(Backwards(), torch.rand(1, 4))
    assert (depths["body.weight"], depths["head.weight"], depths["unused.weight"]) == (0, 1, 1)


def test_looking_changes_nothing():
    model = small_cnn(nn, 3)
    model[1].eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    parameter_depths(model, torch.rand(2, 1, 8, 8))
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "name", ["densenet121", "efficientnet_b0", "swin_t", "convnext_tiny", "mobilenet_v3_small"]
)
def test_blocks_are_neither_leaves_nor_the_whole(name):
    with torch.device("meta"):
        model = get_model(name, weights=None)
    blocks = find_blocks(model)
    assert 10 <= len(blocks) <= 80
    owned = {id(p) for block in blocks.values() for p in block.parameters()}
    assert owned == {id(p) for p in model.parameters()}


def test_rates_fall_by_a_factor_a_block():
    model = get_model("resnet18", weights=None)
    groups = layerwise_groups(model, torch.rand(1, 3, 64, 64), 0.1, decay=0.5, weight_decay=0.05)
    rates = {group["depth"]: group["lr"] for group in groups}
    assert rates == {depth: pytest.approx(0.1 * 0.5 ** (9 - depth)) for depth in range(10)}
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))
    for group in groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])
    optimizer = torch.optim.AdamW(groups)
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in groups]


def test_a_language_model_by_its_keywords_with_tied_weights_once():
    config = transformers.GPT2Config(n_embd=16, n_head=2, n_layer=3, vocab_size=20, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    tokens = {"input_ids": torch.tensor([[1, 2, 3]])}
    groups = layerwise_groups(model, tokens, 1.0, decay=0.1)
    where = {id(p): group["depth"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(where) == len(list(model.parameters()))
    depths = [where[id(block.mlp.c_fc.weight)] for block in model.transformer.h]
    assert depths == sorted(set(depths))
    assert where[id(model.lm_head.weight)] == where[id(model.transformer.wte.weight)] < depths[0]


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"lr": 1.0, "weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"lr": 1.0, "decay": 0.0}, "decay must be more than 0 and at most 1, got 0.0"),
        ({"lr": 1.0, "decay": 1.5}, "decay must be more than 0 and at most 1, got 1.5"),
    ],
)
def test_layerwise_errors(settings, pattern):
    with pytest.raises(ValueError, match=f"layerwise_groups: {pattern}"):
        layerwise_groups(nn.Linear(2, 2), torch.rand(1, 2), **settings)

"""Models by name: each family, the seed, what is refused and how."""

import json
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

from bptools.memory._models import load

TEXT = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64,vocab_size=50"

OWN = """
import torch
from torch import nn

class Loss(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, 3)
    def forward(self, x, y):
        return nn.functional.cross_entropy(self.layer(x), y)

def loss(batch, size, device, width=4):
    x, y = torch.randn(batch, width, device=device), torch.zeros(batch, dtype=torch.long, device=device)
    return Loss(width), (x, y)

def tensor(batch, size, device):
    return nn.Linear(size or 4, 3).eval(), torch.ones(batch, size or 4, device=device)

def words(batch, size, device):
    return nn.Linear(4, 3), "words"

def pair(batch, size, device):
    class Pair(nn.Linear):
        def forward(self, x):
            return x, x
    return Pair(4, 3), torch.ones(batch, 4)

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_models.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_models", raising=False)


def trained(loaded):
    """Whether there is a scalar loss that every parameter has a finite gradient of."""
    assert loaded.model.training
    loss = loaded.loss()
    loss.backward()
    assert loss.dim() == 0
    return all(p.grad is not None and p.grad.isfinite().all() for p in loaded.model.parameters())


@pytest.mark.parametrize(
    ("spec", "size", "shape"),
    [
        ("torchvision:resnet18,num_classes=4", 32, (2, 3, 32, 32)),
        ("torchvision:googlenet,num_classes=4", 64, (2, 3, 64, 64)),
        ("torchvision:lraspp_mobilenet_v3_large,num_classes=4", 64, (2, 3, 64, 64)),
        ("torchvision:deeplabv3_mobilenet_v3_large,num_classes=4,aux_loss=true", 32, (2, 3, 32, 32)),
        (f"transformers:bert,{TEXT}", 16, (2, 16)),
        ("transformers:gpt2,n_embd=32,n_layer=1,n_head=2,vocab_size=50", 16, (2, 16)),
        (f"transformers:llama,{TEXT},num_key_value_heads=1,attn_implementation=eager", 16, (2, 16)),
        ("transformers:t5,d_model=32,d_kv=16,num_layers=1,num_heads=2,d_ff=64,vocab_size=50", 16, (2, 16)),
        ("transformers:vit,hidden_size=32,num_hidden_layers=1,num_attention_heads=2", 32, (2, 3, 32, 32)),
        (
            "transformers:swin,embed_dim=8,depths=[1,1],num_heads=[1,2],window_size=4,image_size=[32,64]",
            None,
            (2, 3, 32, 64),
        ),
    ],
)
def test_a_model_of_each_kind(spec, size, shape):
    loaded = load(spec, batch=2, size=size)
    assert loaded.name == spec
    assert loaded.inputs[0].shape == shape
    assert trained(loaded)


def test_the_seed_makes_all_of_it_and_nobody_elses_numbers():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again = (load(f"transformers:bert,{TEXT}", 2, 8, seed=3) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    other = load(f"transformers:bert,{TEXT}", 2, 8, seed=4)
    for a, b in zip(
        (*first.model.parameters(), *first.inputs), (*again.model.parameters(), *again.inputs), strict=True
    ):
        assert torch.equal(a, b)
    assert not torch.equal(first.inputs[0], other.inputs[0])
    torch.manual_seed(1)
    loss = first.loss()
    torch.manual_seed(1)
    assert torch.equal(loss, again.loss(call=again.model))


def test_a_configuration_file(tmp_path):
    path = tmp_path / "config.json"
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 50}
    path.write_text(json.dumps({"model_type": "distilbert", **sizes, "transformers_version": "4.0", "other": 1}))
    loaded = load(f"transformers:{path},n_layers=1", batch=2, size=8)
    assert loaded.model.config.dim == 32
    assert loaded.model.config.n_layers == 1
    assert trained(loaded)


def test_a_callable(own):
    loaded = load("own_models:loss,width=5", batch=3)
    assert [tuple(t.shape) for t in loaded.inputs] == [(3, 5), (3,)]
    assert trained(loaded)
    loaded = load("own_models:tensor", batch=3, size=6)
    assert torch.equal(loaded.loss(), loaded.model(torch.ones(3, 6)).square().mean())
    assert trained(loaded)


def test_timm(monkeypatch):
    made = {}

    def create_model(name, pretrained, **settings):
        made.update(name=name, pretrained=pretrained, **settings)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        model.default_cfg, model.num_classes = {"input_size": (3, 9, 9)}, 4
        return model

    stub = types.SimpleNamespace(create_model=create_model, list_models=lambda: ["resnet50"])
    monkeypatch.setitem(sys.modules, "timm", stub)
    loaded = load("timm:resnet50,drop_rate=0.1", batch=2)
    assert made == {"name": "resnet50", "pretrained": False, "drop_rate": 0.1}
    assert loaded.inputs[0].shape == (2, 3, 9, 9)
    assert trained(loaded)
    assert load("timm:resnet50", batch=2, size=5).inputs[0].shape == (2, 3, 5, 5)
    with pytest.raises(ValueError, match=r"timm has no model 'resnet5'.*did you mean 'resnet50'"):
        load("timm:resnet5")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm cannot be imported.*pip install timm"):
        load("timm:resnet50")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet50", "got 'resnet50' .did you mean 'torchvision:resnet50'"),
        ("", "a model is torchvision:NAME"),
        ("torchvision:", "a model is torchvision:NAME"),
        ("torchvison:resnet50", "got 'torchvison:resnet50' .did you mean 'torchvision'"),
        ("torchvision:resnet5", "torchvision has no model 'resnet5'.*did you mean"),
        ("torchvision:fasterrcnn_resnet50_fpn", "not for classifying or segmenting.*package.module:callable"),
        ("torchvision:quantized_resnet50", "not for classifying or segmenting"),
        ("torchvision:raft_small", "not for classifying or segmenting"),
        ("torchvision:resnet18,nm_classes=4", "torchvision:resnet18,nm_classes=4: .*nm_classes"),
        ("transformers:brt", "transformers has no model type 'brt'.*did you mean 'bert'"),
        ("transformers:bert,num_hiden_layers=2", "has no 'num_hiden_layers' .did you mean 'num_hidden_layers'"),
        ("transformers:gpt2,n_layrs=2", "has no 'n_layrs' .did you mean 'n_layer'"),
        (f"transformers:bert,{TEXT},max_position_embeddings=8", "size must be at most .*8, got 128"),
        (f"transformers:bert,{TEXT},num_attention_heads=5", "transformers:bert,hidden.*: .*attention heads"),
        ("transformers:no_such.json", "expected a configuration with a model_type in no_such.json"),
        ("transformers:wav2vec2", "neither a language model nor a classifier of text or pictures"),
        ("no_such_module_at_all:f", "got 'no_such_module_at_all:f': No module named"),
        ("own_models:absent", "got 'own_models:absent': .*absent"),
        ("own_models:number", "expected a callable.batch, size, device., got int"),
        ("own_models:words", "expected a module and its inputs, got Linear, str"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(own, spec, message):
    with pytest.raises(ValueError, match=message):
        load(spec)


def test_numbers_below_one_and_odd_outputs_are_refused(own):
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        load("own_models:loss", batch=0)
    with pytest.raises(ValueError, match="size must be at least 1, got -3"):
        load("own_models:loss", size=-3)
    with pytest.raises(ValueError, match="own_models:pair: expected the module to return a tensor, got tuple"):
        load("own_models:pair").loss()


def test_nothing_is_imported_before_it_is_named():
    code = "import sys, bptools.memory._models; print({'torchvision', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

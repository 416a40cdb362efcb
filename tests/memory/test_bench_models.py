"""`bptools bench MODEL`: what is counted, what is called equal, tables and file; and lean() on many models."""

import re
import sys

import pytest
import torch
from torch import Tensor, nn

from bptools.memory import _bench
from bptools.memory._models import Loaded, load

TINY = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.inner, self.drop = nn.BatchNorm1d(width), nn.Linear(width, width), nn.Dropout(0.5)
    def forward(self, x, scale=1.0):
        return x + self.drop(nn.functional.gelu(self.inner(self.norm(x)))) * scale

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Sequential(nn.Linear(width, width), nn.Linear(width, 2))
    def forward(self, x):
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.head(x)

def net(batch, size, device):
    width = size or 64
    return Net(width), torch.randn(batch, width, device=device)
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A module of models that can be named, here and in a process started from here."""
    (tmp_path / "tiny_models.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "tiny_models", raising=False)
    yield "tiny_models:net"
    sys.modules.pop("tiny_models", None)


class Doctored(_bench.Eager):
    """Scales one gradient by a hair."""

    def forward(self) -> Tensor:
        loss = super().forward()
        return loss + 1e-6 * next(self.model.parameters()).sum()


class Broken(_bench.Eager):
    def forward(self) -> Tensor:
        raise RuntimeError("not today\nnor tomorrow")


class Careless(_bench.Eager):
    """Draws a number that eager does not draw."""

    def forward(self) -> Tensor:
        loss = super().forward()
        torch.rand(1)
        return loss


# What is measured ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_contenders_side_by_side(tiny, monkeypatch):
    for name, contender in (("doctored", Doctored), ("broken", Broken), ("careless", Careless)):
        monkeypatch.setitem(_bench.CONTENDERS, name, contender)
    monkeypatch.setattr(_bench, "LEAST_SECONDS", 0)
    said = []
    contenders = ("lean", "checkpoint", "doctored", "broken", "careless", "lean")
    found = _bench.compare(tiny, contenders, batch=256, rounds=2, peaks=False, say=said.append)
    assert list(found.found) == ["eager", "lean", "checkpoint", "doctored", "broken", "careless"]
    assert found.found["eager"].unequal == []
    assert found.found["lean"].unequal == []
    assert found.found["checkpoint"].unequal == ["buffers"]  # batch norm counts what it sees twice
    assert found.found["doctored"].unequal == ["loss", "gradients"]
    assert found.found["doctored"].eager_repeats
    assert found.found["careless"].unequal == ["generator"]
    assert found.found["broken"].failed == "RuntimeError: not today"
    assert f"{tiny}: broken is left out: RuntimeError: not today" in said
    assert [len(one.seconds) for one in found.found.values()] == [2, 2, 2, 2, 0, 2]
    assert found.ratio("eager", "seconds") == 1
    assert found.ratio("broken", "seconds") is None
    assert found.floor <= found.found["lean"].kept < found.found["eager"].kept
    assert found.found["doctored"].kept == found.found["eager"].kept
    assert all(p.grad is None or not p.grad.requires_grad for p in load(tiny).model.parameters())


def test_what_is_counted_as_kept():
    """Linear, relu, linear, mean of squares: relu's result and the last, and nothing that was there before."""
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
    x = torch.randn(8, 64)
    loaded = Loaded("", model, (x,), lambda call: call(x).square().mean())
    loss, kept = _bench.Eager(loaded).kept()
    assert kept == 4 * (8 * 32 + 8 * 16)
    loss.backward()
    # a graph that is gone by the end keeps nothing
    two = Loaded("", model, (x,), lambda call: [call(t).square().mean() for t in (2 * x, x)][1])
    assert _bench.Eager(two).kept()[1] == kept


def test_inputs_of_checkpointed_blocks_are_counted():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                *(nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.GELU())) for _ in range(3))
            )

        def forward(self, x):
            return self.layers(x).sum()

    model, x = Outer(), torch.randn(4, 8)
    loaded = Loaded("", model, (x,), lambda call: call(x))
    contender = _bench.Checkpoint(loaded)
    assert len(contender.blocks) == 3
    loss, kept = contender.kept()
    assert kept == 2 * 4 * 4 * 8  # of three inputs the first is the model's own
    loss.backward()


@pytest.mark.parametrize(
    ("spec", "blocks"),
    [
        ("torchvision:resnet18", [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]),
        ("torchvision:efficientnet_b0", 18),
        ("torchvision:swin_t", 16),
        ("torchvision:convnext_tiny", 22),
        ("torchvision:vit_b_16", [f"encoder.layers.encoder_layer_{i}" for i in range(12)]),
        ("transformers:bert", [f"bert.encoder.layer.{i}" for i in range(12)]),
        ("transformers:gpt2", [f"transformer.h.{i}" for i in range(12)]),
        ("torchvision:alexnet", []),
    ],
)  # fmt: skip
def test_repeated_blocks(spec, blocks):
    with torch.device("meta"):
        model = load(spec, batch=1, device="meta").model
    names = {module: name for name, module in model.named_modules()}
    found = [names[block] for block in _bench.repeated_blocks(model)]
    assert len(found) == blocks if isinstance(blocks, int) else found == blocks


def test_checkpoint_leaves_no_trace(tiny):
    model = load(tiny).model
    own = model.blocks[1].forward = model.blocks[1].forward
    wrapped = []

    def interrupted():
        with _bench.checkpointed(list(model.blocks), lambda given: None):
            wrapped.append("forward" in vars(model.blocks[0]))
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert wrapped == [True]
    assert "forward" not in vars(model.blocks[0])
    assert model.blocks[1].forward is own
    no_blocks = Loaded("", nn.Linear(2, 2), (), lambda call: call(torch.ones(2)).sum())
    with pytest.raises(ValueError, match="no repeated blocks"):
        _bench.Checkpoint(no_blocks)


def test_eager_that_does_not_repeat_itself_is_told_apart(tiny, monkeypatch):
    class Moody(_bench.Eager):
        steps = 0

        def kept(self):
            Moody.steps += 1
            loss, kept = super().kept()
            return loss * Moody.steps, kept

    monkeypatch.setitem(_bench.CONTENDERS, "eager", Moody)
    monkeypatch.setitem(_bench.CONTENDERS, "doctored", Doctored)
    found = _bench.compare(tiny, ("doctored",), batch=4, rounds=0, peaks=False)
    assert found.found["doctored"].unequal == ["loss", "gradients"]
    assert not found.found["doctored"].eager_repeats
    assert _bench.details(found)[1][-2] == "unequal, as eager to itself"


def test_lossy_stashes_say_how_far_off_they_are(tiny):
    found = _bench.compare(tiny, ("lean", "lean-bf16", "lean-int8"), batch=256, rounds=0, peaks=False)
    errors = [found.found[name].error for name in ("lean", "lean-bf16", "lean-int8")]
    kept = [found.found[name].kept for name in ("lean", "lean-bf16", "lean-int8")]
    assert errors[0] == 0 < 1e-4 < errors[1] < errors[2] < 0.1
    assert kept[0] > kept[1] > kept[2]
    rows = {row[0]: row[-2] for row in _bench.details(found)}
    assert rows["lean"] == "equal"
    assert rows["lean-int8"] == f"off by {errors[2]:.1%}"


def test_relative_error():
    theirs = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0]), "frozen": None}
    assert _bench.relative_error(theirs, theirs) == 0
    assert _bench.relative_error({**theirs, "b": torch.tensor([3.0])}, theirs) == pytest.approx(0.2)
    assert _bench.relative_error({**theirs, "b": None}, theirs) == pytest.approx(0.8)


# What is reported ---------------------------------------------------------------------------------------------


def comparison(name, kept, seconds, unequal=()):
    return _bench.Comparison(
        name,
        100,
        {
            "eager": _bench.Found(400, [1.0, 2.0, 4.0], 1000, []),
            "lean": _bench.Found(kept, seconds, 500, list(unequal)),
            "compile": _bench.Found(failed="RuntimeError: no compiler"),
        },
    )


def test_summary():
    first, second = comparison("a:b,c=1", 100, [1.0, 1.0, 8.0]), comparison("d:e", 400, [4.0, 2.0, 4.0], ["loss"])
    assert first.ratio("lean", "seconds") == 1.0  # of 1, 0.5 and 2
    assert _bench.summary([first, second]) == [
        ("a:b,...", "lean", "0.250", "1.000", "1.000", "1.000", "0.500", "equal"),
        ("d:e", "lean", "1.000", "4.000", "1.000", "2.000", "0.500", "unequal"),
        ("a:b,...", "compile", "", "", "", "", "", "not run"),
        ("d:e", "compile", "", "", "", "", "", "not run"),
        ("geometric mean", "lean", "0.500", "2.000", "1.000", "1.414", "0.500", "1 of 2 equal"),
        ("largest", "lean", "1.000", "4.000", "1.000", "2.000", "0.500", "1 of 2 equal"),
        ("geometric mean", "compile", "", "", "", "", "", "0 of 2 equal"),
        ("largest", "compile", "", "", "", "", "", "0 of 2 equal"),
    ]


def test_a_section_is_replaced_and_the_others_stay(tmp_path):
    path = tmp_path / "page.md"
    _bench.write_section(path, "## One\n\nfirst\n")
    assert path.read_text() == "# Benchmarks\n\n## One\n\nfirst\n"
    _bench.write_section(path, "## Two\n\n### in it\n\nsecond\n")
    _bench.write_section(path, "## One\n\nagain\n")
    assert path.read_text() == "# Benchmarks\n\n## One\n\nagain\n\n## Two\n\n### in it\n\nsecond\n"
    _bench.write_section(path, "## Two\n\nanew\n")
    assert path.read_text() == "# Benchmarks\n\n## One\n\nagain\n\n## Two\n\nanew\n"


def test_the_command(tiny, run_bptools, tmp_path, monkeypatch):
    monkeypatch.setattr(
        _bench, "_peak_elsewhere", lambda **task: 2**20 if task["contender"] == "eager" else "it died"
    )
    monkeypatch.setattr(_bench, "LEAST_SECONDS", 0)
    page = tmp_path / "page.md"
    page.write_text("# Benchmarks\n\n## Each op beside torch's\n\n| op |\n")
    arguments = ("bench", tiny, "--contenders", "lean", "--batch", "512", "--rounds", "1", "--write", "page.md")
    status, out, err = run_bptools(*arguments)
    assert status == 0, err
    assert re.search(r"lean +[\d.]+ +0\.\d{3} .* equal +equal", out)
    assert f"{tiny}: round 1 of at least 1, " in err
    text = page.read_text()
    assert text.startswith("# Benchmarks\n\n## Each op beside torch's\n\n| op |\n\n## Whole models\n")
    assert f"`uv run bptools {' '.join(arguments)}`" in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {tiny}")]
    summary, eager, lean = rows
    assert summary[1] == "lean"
    assert summary[-1] == "equal"
    assert [row[1] for row in (eager, lean)] == ["eager", "lean"]
    assert (eager[8:10], lean[8:10]) == (["1.0", "1.000"], ["", ""])
    assert f"{tiny}: no peak memory of lean: it died" in err


@pytest.mark.slow
def test_peak_memory_in_a_process_of_its_own(tiny):
    task = {"spec": tiny, "contender": "lean", "batch": 2**14, "size": 64, "device": "cpu", "seed": 0}
    assert 3 * 2**22 < _bench._peak_elsewhere(**task) < 2**29  # four megabytes are the input of one layer
    said = _bench._peak_elsewhere(**task | {"spec": "no_such_module_at_all:net"})
    assert said.startswith("ValueError: a model is torchvision:NAME")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("torchvision:resnet5",), "bptools bench: torchvision has no model 'resnet5'"),
        (("ops", "models"), "expected `ops` alone"),
        ((), "expected `ops` alone"),
        (("tiny_models:net", "--rounds", "-1"), "--rounds must be at least 0, got -1"),
    ],
)
def test_what_cannot_be_asked(tiny, run_bptools, arguments, message):
    status, _, err = run_bptools("bench", *arguments)
    assert status == 2
    assert message in err


# lean() on many models ----------------------------------------------------------------------------------------

TEXT = "hidden_size=64,num_hidden_layers=2,num_attention_heads=4,intermediate_size=128,vocab_size=500"
SWEEP = {
    "torchvision:vgg11_bn": (2, 64, 0.6),
    "torchvision:resnet50": (2, 64, 0.6),
    "torchvision:densenet121": (2, 64, 0.4),
    "torchvision:mobilenet_v3_small": (2, 64, 0.6),
    "torchvision:shufflenet_v2_x1_0": (2, 64, 0.65),
    "torchvision:googlenet": (2, 64, 0.5),
    "torchvision:regnet_y_400mf": (2, 64, 0.6),
    "torchvision:mnasnet1_0": (2, 64, 0.6),
    "torchvision:squeezenet1_1": (2, 64, 0.65),
    "torchvision:efficientnet_b0": (2, 64, 0.5),
    "torchvision:convnext_tiny": (2, 64, 0.6),
    "torchvision:swin_v2_t": (1, 64, 0.75),
    "torchvision:vit_b_16": (1, 64, 0.75),
    "torchvision:lraspp_mobilenet_v3_large": (2, 64, 0.6),
    "torchvision:r3d_18": (1, 32, 0.6),
    f"transformers:bert,{TEXT}": (4, 64, 0.6),
    f"transformers:roberta,{TEXT},attn_implementation=eager": (4, 64, 0.6),
    f"transformers:albert,{TEXT},embedding_size=32": (4, 64, 0.6),
    f"transformers:electra,{TEXT},embedding_size=32": (4, 64, 0.6),
    "transformers:distilbert,dim=64,n_layers=2,n_heads=4,hidden_dim=128,vocab_size=500": (4, 64, 0.6),
    f"transformers:deberta-v2,{TEXT}": (4, 64, 0.6),
    "transformers:t5,d_model=64,d_kv=16,num_layers=2,num_heads=4,d_ff=128,vocab_size=500": (4, 64, 0.6),
    "transformers:gpt2,n_embd=64,n_layer=2,n_head=4,vocab_size=500": (4, 64, 0.5),
    "transformers:opt,hidden_size=64,num_hidden_layers=2,num_attention_heads=4,ffn_dim=128,vocab_size=500,"
    "word_embed_proj_dim=64": (4, 64, 0.8),
    f"transformers:mistral,{TEXT},num_key_value_heads=2": (4, 64, 0.7),
    f"transformers:gemma2,{TEXT},num_key_value_heads=2,head_dim=16": (4, 64, 0.6),
    f"transformers:phi,{TEXT}": (4, 64, 0.65),
    f"transformers:mixtral,{TEXT},num_key_value_heads=2,num_local_experts=4": (4, 64, 0.7),
    "transformers:mamba,hidden_size=64,num_hidden_layers=2,vocab_size=500,state_size=8": (4, 64, 0.5),
    "transformers:swin,embed_dim=24,depths=[2,2],num_heads=[2,4],window_size=4": (2, 64, 0.75),
    "transformers:convnextv2,hidden_sizes=[16,32,64,128],depths=[1,1,1,1]": (2, 64, 0.6),
    "transformers:mobilevit": (2, 64, 0.6),
}


@pytest.mark.slow
@pytest.mark.parametrize("spec", SWEEP, ids=lambda spec: spec.partition(",")[0])
def test_lean_gives_the_same_bits(spec):
    batch, size, at_most = SWEEP[spec]
    found = _bench.compare(spec, ("lean",), batch, size, rounds=0, peaks=False)
    assert found.found["lean"].failed == ""
    assert found.found["lean"].unequal == []
    assert found.ratio("lean", "kept") <= at_most

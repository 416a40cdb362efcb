import gc
import itertools
import json
import os
import random
import subprocess
import sys
import types
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from bptools._console import printed
from bptools.memory import _ledger, lean
from bptools.memory._floor import cheapest
from bptools.memory._ledger import ledger


class Block(nn.Module):
    """A residual block whose activations are bigger than what lean() bothers about."""

    def __init__(self, n=64):
        super().__init__()
        self.norm, self.up, self.down, self.drop = (
            nn.LayerNorm(n), nn.Linear(n, 4 * n), nn.Linear(4 * n, n), nn.Dropout(0.1),
        )  # fmt: skip

    def forward(self, x):
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


def perceptron():
    return nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 8))


def convolutions():
    def block(n, m):
        return nn.Conv2d(n, m, 3, padding=1, bias=False), nn.BatchNorm2d(m), nn.ReLU(inplace=True)

    return nn.Sequential(*block(3, 16), nn.MaxPool2d(2), *block(16, 32), nn.Dropout(0.2), nn.AdaptiveAvgPool2d(4))


def transformer():
    return nn.TransformerEncoderLayer(32, 4, 128, batch_first=True)


MODELS = {
    "perceptron": (perceptron, (256, 32)),
    "convolutions": (convolutions, (4, 3, 32, 32)),
    "residual": (lambda: nn.Sequential(nn.Linear(64, 64), *(Block() for _ in range(10))), (128, 64)),
    "transformer": (transformer, (8, 64, 32)),
}


@pytest.fixture(params=MODELS)
def model_and_input(request):
    torch.manual_seed(0)
    make, shape = MODELS[request.param]
    return make(), torch.randn(shape)


def eager_bytes(model, *inputs):
    """What autograd saves, by storage, as plain hooks see it; without parameters, buffers and inputs."""
    own = [*model.parameters(), *model.buffers(), *inputs]
    own = {t.untyped_storage().data_ptr() for t in own}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(*inputs)
    del y
    return sum(kept.values())


# Totals -------------------------------------------------------------------------------------------------------


def test_totals(model_and_input):
    model, x = model_and_input
    found = ledger(model, x)
    assert found.eager == eager_bytes(model, x)
    with lean() as session:
        y = model(x)
    assert found.lean == session.kept_bytes
    assert 0 < found.floor <= found.lean < found.eager
    assert y is not None


def test_both_forms_agree(model_and_input):
    model, x = model_and_input
    torch.manual_seed(1)
    first = ledger(model, x)
    torch.manual_seed(1)
    with ledger() as second:
        y = model(x)
    assert first.rows == second.rows
    assert y is not None


MEMORY = """
import gc, sys, torch
from torch import nn
from bptools.memory import lean
from bptools.memory._ledger import ledger
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(*(part for n in (4, 16, 16, 16) for part in (
    nn.Conv2d(n, 16, 1), nn.BatchNorm2d(16), nn.ReLU())))
x, none = torch.randn(8, 4, 160, 160), torch.enable_grad

def resident():
    gc.collect()
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1])

import os
page = os.sysconf("SC_PAGE_SIZE")
for around, name in ((none, "eager"), (lean, "lean"), (none, "eager"), (lean, "lean")):
    before = resident()
    with around():
        loss = model(x).mean()
    grown = (resident() - before) * page
    print(name, grown)
    del loss
found = ledger(model, x)
print("ledger", found.eager, found.lean)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to see how big the process is")
def test_totals_are_what_the_process_grows_by():
    # Blocks of more than 64 KiB are then asked of the system one by one, and given back to it.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, "-c", MEMORY], env=environment, capture_output=True, text=True, check=True
    )
    said = [line.split() for line in run.stdout.splitlines()]
    grown = {name: int(n) for name, n in said[2:4]}  # the first two have warmed up
    eager, kept = map(int, said[4][1:])
    assert eager > 100e6
    assert grown["eager"] == pytest.approx(eager, rel=0.02)
    assert grown["lean"] == pytest.approx(kept, rel=0.02)


@pytest.mark.gpu
def test_totals_are_what_the_allocator_says(model_and_input):
    model, x = (t.cuda() for t in model_and_input)
    for around in (torch.enable_grad, lean) * 2:
        before = torch.cuda.memory_allocated()
        with around():
            loss = model(x).square().mean()
        grown = torch.cuda.memory_allocated() - before
        del loss
        if around is torch.enable_grad:
            eager = grown
    found = ledger(lambda: model(x).square().mean())
    # Blocks are rounded up to 512 bytes.
    assert eager == pytest.approx(found.eager, rel=0.05, abs=512 * len(found.rows))
    assert grown == pytest.approx(found.lean, rel=0.05, abs=512 * len(found.rows))


# Rows ---------------------------------------------------------------------------------------------------------


def summary(rows):
    return [(r.module, r.op, r.argument, r.shape, r.bytes, r.lean) for r in rows]


def test_who_saved_what():
    net = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), Block(128)).eval()
    found = ledger(net, torch.randn(64, 32))
    kib = 1024
    assert summary(found.rows) == [
        ("Sequential.1", "relu", "result", (64, 128), 32 * kib, "kept"),
        ("Sequential.2.norm", "native_layer_norm", "input", (64, 128), 0, "kept"),
        ("Sequential.2.norm", "native_layer_norm", "result1", (64, 1), 256, "kept"),
        ("Sequential.2.norm", "native_layer_norm", "result2", (64, 1), 256, "kept"),
        ("Sequential.2.up", "addmm", "mat1", (64, 128), 32 * kib, "made again by native_layer_norm"),
        ("Sequential.2", "gelu", "self", (64, 512), 128 * kib, "kept"),
        ("Sequential.2.down", "addmm", "mat1", (64, 512), 128 * kib, "made again by gelu"),
    ]
    assert found.rows[1].shared_with == 0
    assert {r.dtype for r in found.rows} == {"float32"}
    assert found.lean == found.floor == (32 + 128) * kib + 512


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        squared = x * x
        ctx.save_for_backward(x, squared)
        return squared * x

    @staticmethod
    def backward(ctx, g):
        _, squared = ctx.saved_tensors
        return 3 * g * squared


def test_functions_lists_masks_and_indices():
    table = torch.randn(300, 300, requires_grad=True)

    def model(x):
        x = Cube.apply(x.exp())
        x = F.max_pool1d(x.sin(), 3)
        return x[torch.arange(9) * 2].where(x[:9] > 0, 0.0)

    found = ledger(model, table)
    by = {f"{r.op}: {r.argument}": r for r in found.rows}
    assert by["exp: result"].bytes == 360_000
    assert by["Cube: saved tensor 0"].shared_with == 0
    assert by["Cube: saved tensor 1"].bytes == 360_000
    assert by["index: indices"].dtype == "int64"
    assert by["where: condition"].lean in ("kept as bits", "made again by gt")
    assert "unknown" not in {r.op for r in found.rows}
    narrow = [r for r in found.rows if r.op == "max_pool2d_with_indices" and r.argument == "result1"]
    assert [(r.lean, r.lean_bytes) for r in narrow] == [("kept as int16", narrow[0].bytes // 4)]


def test_masks_that_only_lean_keeps_have_a_row():
    found = ledger(Block(), torch.randn(128, 64))
    (mask,) = [r for r in found.rows if r.op == "lean"]
    assert (mask.module, mask.argument, mask.lean) == ("Block.drop", "result of bernoulli_", "kept as bits")
    assert (mask.bytes, mask.lean_bytes, mask.floor_bytes) == (0, 128 * 64 // 8, 128 * 64 // 8)


def test_what_is_no_plain_tensor_counts():
    sparse = torch.eye(64).to_sparse()
    weight = torch.randn(64, 64, requires_grad=True)
    found = ledger(lambda: torch.sparse.mm(sparse * 2.0, weight))
    (row,) = [r for r in found.rows if r.bytes]
    assert (row.lean, row.lean_bytes, row.floor_bytes) == ("kept", row.bytes, row.bytes)
    assert row.bytes == 64 * (2 * 8 + 4)
    assert ledger(lambda: torch.sparse.mm(sparse, weight)).eager == 0  # somebody else's


def test_modules_are_named_from_the_outermost_and_survive_errors():
    class Fails(nn.Module):
        def forward(self, x):
            raise OSError

    class Tries(nn.Module):
        def __init__(self):
            super().__init__()
            self.fails, self.works = Fails(), nn.Sigmoid()

        def forward(self, x):
            try:
                self.fails(x)
            except OSError:
                x = x.exp()
            return self.works(x)

    x = torch.randn(3, requires_grad=True)
    with ledger() as found:
        y = Tries()(x).cos()
    assert [(r.module, r.op) for r in found.rows] == [("Tries", "exp"), ("Tries.works", "sigmoid"), ("", "cos")]
    assert y is not None


# It leaves no trace -------------------------------------------------------------------------------------------


def test_random_numbers_and_buffers_are_as_they_were():
    model = convolutions()
    before = {name: (b, b._version, b.clone()) for name, b in model.named_buffers()}
    state = torch.get_rng_state()
    ledger(model, torch.randn(4, 3, 32, 32, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), state)
    for name, b in model.named_buffers():
        buffer, version, value = before[name]
        assert b is buffer
        assert b._version == version
        assert torch.equal(b, value)
    assert all(p.grad is None for p in model.parameters())


def test_gradients_after_the_block_are_the_same(model_and_input):
    model, x = model_and_input

    def gradients():
        torch.manual_seed(3)
        loss = model(x).square().mean()
        return torch.autograd.grad(loss, [*model.parameters()])

    expected = gradients()
    with ledger() as found:
        torch.manual_seed(3)
        loss = model(x).square().mean()
    for g, e in zip(torch.autograd.grad(loss, [*model.parameters()]), expected, strict=True):
        assert torch.equal(g, e)
    assert found.eager


def test_a_backward_pass_in_the_block():
    model, x = perceptron(), torch.randn(256, 32)
    with ledger() as found:
        model(x).sum().backward()
    assert (found.eager, found.lean, found.floor) == ((e := ledger(model, x)).eager, e.lean, e.floor)
    assert {r.op for r in found.rows} == {"unknown"}


def test_nothing_is_held_by_the_report():
    model, x = perceptron(), torch.randn(256, 32)
    alive = []

    def watch(module, args, output):
        alive.append(weakref.ref(output.untyped_storage()))

    for part in model:
        part.register_forward_hook(watch)
    reports = [ledger(model, x)]
    with ledger() as found:
        loss = model(x).sum()
    reports.append(found)
    loss.backward()
    del loss
    gc.collect()
    assert [ref() for ref in alive] == [None] * 10
    assert not [o for o in gc.get_objects() if type(o) in (_ledger._Entry, _ledger.Plan)]
    assert reports[0].rows


def test_what_is_checkpointed_is_not_made_again():
    runs = []

    def part(x):
        runs.append(1)
        return x.exp().exp()

    x = torch.randn(64, 64, requires_grad=True)
    found = ledger(lambda: checkpoint(part, x.sin(), use_reentrant=False))
    assert len(runs) == 1
    assert found.eager == 64 * 64 * 4


def test_after_an_error_all_is_as_before():
    def fails():
        raise OSError

    with pytest.raises(OSError):
        ledger(fails)
    found = ledger()
    with pytest.raises(OSError), found:
        fails()
    with pytest.raises(RuntimeError, match="without an error"):
        _ = found.eager
    with lean() as session:
        y = torch.randn(100, requires_grad=True).exp()
    assert session.kept_bytes == 400
    assert y is not None


# The report ---------------------------------------------------------------------------------------------------


def test_nothing_kept_is_said():
    with ledger() as found, torch.no_grad():
        perceptron()(torch.randn(2, 32))
    assert found.rows == []
    assert found.eager == found.lean == found.floor == 0
    assert "grad mode" in str(found)
    with torch.no_grad():
        assert ledger(perceptron(), torch.randn(2, 32)).eager


def test_json():
    found = ledger(perceptron(), torch.randn(256, 32))
    document = json.loads(found.to_json(indent=1))
    assert document["totals"] == {"eager": found.eager, "lean": found.lean, "floor": found.floor}
    assert (document["name"], document["torch"]) == ("Sequential", torch.__version__)
    assert sum(row["bytes"] for row in document["rows"]) == found.eager
    assert document["rows"][0]["shape"] == [256, 128]


def test_tables(model_and_input):
    model, x = model_and_input
    found = ledger(model, x)
    for by, rows in itertools.product(("module", "op", "tensor"), (1, 3, 100)):
        table = found.table(by, rows)
        assert table.row_count <= rows + 2
        text = " ".join(printed(table).split())
        assert f"eager {_ledger._size(found.eager)}, lean {_ledger._size(found.lean)}" in text
        assert f"{found.lean / found.eager:.2f}x" in text
    assert "more" in printed(found.table("op", 1))
    assert printed(found.table()) == str(found)


def test_depth_of_modules_follows_the_number_of_rows():
    model = nn.Sequential(nn.Linear(64, 64), *(Block() for _ in range(3)))
    found = ledger(model, torch.randn(128, 64))
    assert [g.name for g in found._groups("module", 5)] == ["1", "2", "3"]
    assert [g.name for g in found._groups("module", 20)][:4] == ["1.norm", "1.up", "1", "1.down"]


@pytest.mark.parametrize("by", ["module", "op", "tensor"])
def test_png(by, tmp_path):
    found = ledger(convolutions(), torch.randn(4, 3, 32, 32))
    found.save_png(tmp_path / "kept.png", by, rows=5)
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")


def test_sizes():
    assert [_ledger._size(n) for n in (0, 1023, 1536, 2**20, 2.5 * 2**30)] == [
        "0 B", "1023 B", "1.5 KiB", "1.0 MiB", "2.5 GiB",
    ]  # fmt: skip


# Wrong use ----------------------------------------------------------------------------------------------------


def test_wrong_use():
    with pytest.raises(TypeError, match="model must be a module or another callable, got int"):
        ledger(3)
    with pytest.raises(TypeError, match="model must come first"):
        ledger(x=torch.randn(3))
    with pytest.raises(RuntimeError, match="before its block has ended"):
        _ = ledger().rows
    done = ledger(perceptron(), torch.randn(2, 32))
    with pytest.raises(RuntimeError, match="call ledger\\(\\) again"), done:
        pass
    with lean(), pytest.raises(RuntimeError, match="not inside lean"):
        ledger(perceptron(), torch.randn(2, 32))
    with ledger() as found, pytest.raises(RuntimeError, match="another ledger"):
        ledger(perceptron(), torch.randn(2, 32))
    with pytest.raises(ValueError, match="by must be 'module', 'op' or 'tensor', got 'layer'"):
        found.table("layer")
    with pytest.raises(ValueError, match="rows must be a positive number, got 0"):
        found.table(rows=0)


# The command --------------------------------------------------------------------------------------------------


def test_command(monkeypatch, tmp_path, capsys):
    model, x = perceptron(), torch.randn(256, 32)

    def load(spec, batch, size, device):
        if spec != "torchvision:tiny":
            raise ValueError(f"model must be known, got {spec!r}")
        return types.SimpleNamespace(loss=lambda: model(x).mean())

    monkeypatch.setitem(sys.modules, "bptools.memory._models", types.SimpleNamespace(load=load))
    monkeypatch.setattr("bptools.memory._models", types.SimpleNamespace(load=load), raising=False)
    _ledger.ledger_command("torchvision:tiny", json=tmp_path / "l.json", png=tmp_path / "l.png", by="op")
    said = capsys.readouterr().out
    assert "addmm: mat1" in said
    assert "torchvision:tiny, batch 8, kept" in said
    assert json.loads((tmp_path / "l.json").read_text())["totals"]["eager"] > 0
    assert (tmp_path / "l.png").exists()
    with pytest.raises(SystemExit) as stopped:
        _ledger.ledger_command("torchvision:huge")
    assert stopped.value.code == 2
    assert "got 'torchvision:huge'" in capsys.readouterr().err


# The floor ----------------------------------------------------------------------------------------------------


def by_trying_all(asked, sources, prices):
    """The least price of a set of nodes from which all that are asked for can be had."""
    nodes = sorted(sources)

    def had(node, kept):
        made_of = sources[node]
        return node in kept or (made_of is not None and all(had(other, kept) for other in made_of))

    subsets = itertools.chain.from_iterable(itertools.combinations(nodes, n) for n in range(len(nodes) + 1))
    return min(
        sum(prices[n] for n in kept) for kept in map(set, subsets) if all(had(node, kept) for node in asked)
    )


@pytest.mark.parametrize("seed", range(60))
def test_floor_is_the_best_of_all_choices(seed):
    draw = random.Random(seed)
    n = draw.randint(1, 9)
    sources = {
        i: draw.sample(range(i), draw.randint(0, min(i, 3))) if i and draw.random() < 0.7 else None
        for i in range(n)
    }
    prices = {i: draw.choice([0, 1, 2, 4, 4, 7]) for i in range(n)}
    for i in range(n):
        if prices[i] == 0:  # somebody else's
            sources[i] = []
    asked = draw.sample(range(n), draw.randint(0, n))
    kept = cheapest(asked, sources.get, prices.get)
    assert sum(kept.values()) == by_trying_all(asked, sources, prices)
    assert all(prices[node] == price for node, price in kept.items())
    assert by_trying_all(asked, sources, {**prices, **dict.fromkeys(kept, 0)}) == 0  # they suffice


def test_floor_of_more_bytes_than_fit():
    prices = {0: 5 * 2**40 + 1, 1: 3 * 2**40 + 2, 2: 3 * 2**40 + 3}
    assert cheapest([0, 1, 2], {0: None, 1: [0], 2: [0]}.get, prices.get) == {0: prices[0]}
    assert cheapest([1], {0: None, 1: [0]}.get, prices.get) == {1: prices[1]}

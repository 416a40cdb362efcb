import dataclasses
import json
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter

import bptools
from bptools.diagnose import detect_nonfinite, gradient_flow
from bptools.diagnose.examples import Deep, deep


def flow_of(model, *inputs, loss=lambda y: y.square().sum()):
    with gradient_flow(model) as flow:
        loss(model(*inputs)).backward()
    return flow


def row(flow, module):
    (found,) = [row for row in flow.rows if row.module.partition(".")[2] == module]
    return found


def of_digits(seed=0, batch=64, **settings):
    torch.manual_seed(seed)
    model, x, y = deep(batch, None, torch.device("cpu"), **settings)
    return flow_of(model, x, y, loss=lambda y: y)


def said(flow):
    return {finding.what for finding in flow.findings}


def test_norms_are_those_of_autograd():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), torch.randn(4, 5)
    flow = flow_of(model, x)
    outputs = [x]
    for layer in model:
        outputs.append(layer(outputs[-1]))
    loss = outputs[-1].square().sum()
    gradients = torch.autograd.grad(loss, outputs[1:])
    assert [row.module for row in flow.rows] == ["Sequential.0", "Sequential.1", "Sequential.2"]
    for seen, output, gradient in zip(flow.rows, outputs[1:], gradients, strict=True):
        assert seen.gradient == pytest.approx(float(gradient.norm()), rel=1e-5)
        assert seen.rms == pytest.approx(float(output.detach().square().mean().sqrt()), rel=1e-5)
    first = flow.rows[0]
    own = torch.cat([p.flatten() for p in model[0].parameters()]).detach()
    assert first.weight == pytest.approx(float(own.norm()), rel=1e-5)
    grads = torch.cat([p.grad.flatten() for p in model[0].parameters()])
    assert first.weight_gradient == pytest.approx(float(grads.norm()), rel=1e-5)
    assert flow.ratio == pytest.approx(flow.rows[0].gradient / flow.rows[2].gradient)
    assert (first.parameters, flow.rows[1].parameters, flow.rows[1].weight) == (42, 0, None)


class Functional(nn.Module):
    """Every way to call an activation."""

    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(6, 6), function

    def forward(self, x):
        return self.function(self.linear(x))


WAYS = {
    "relu": (F.relu, torch.relu, torch.Tensor.relu, torch.relu_, lambda x: F.relu(x, inplace=True),
             bptools.functional.relu, lambda x: bptools.functional.relu(x, inplace=True)),
    "gelu": (F.gelu, bptools.functional.gelu),
    "silu": (F.silu, bptools.functional.silu),
    "sigmoid": (torch.sigmoid, F.sigmoid, bptools.functional.sigmoid),
    "tanh": (torch.tanh, bptools.functional.tanh),
    "hardtanh": (F.relu6, bptools.functional.relu6),
    "hardswish": (F.hardswish, bptools.functional.hardswish),
}  # fmt: skip
DERIVATIVES = {name: ways[0] for name, ways in WAYS.items()}


@pytest.mark.parametrize(
    ("name", "function"), [(name, function) for name, some in WAYS.items() for function in some]
)
def test_slopes_of_functions_and_what_is_dead(name, function):
    torch.manual_seed(0)
    model = Functional(function)
    with torch.no_grad():
        model.linear.weight[2], model.linear.bias[2] = 0, -100  # a dead unit; saturated, where it is smooth
    x = torch.randn(50, 6)
    flow = flow_of(model, x)
    seen = row(flow, f"{name}()")
    z = model.linear(x).detach().requires_grad_()
    (slope,) = torch.autograd.grad(DERIVATIVES[name](z).sum(), z)
    flat = slope.abs() <= 0.01 * (0.25 if name == "sigmoid" else 1)
    used = DERIVATIVES[name](z) != 0  # the loss is the sum of squares, so its gradient is 0 elsewhere
    assert seen.flat == pytest.approx(float(flat[used].float().mean()), abs=0.01)
    assert seen.units == 6
    assert seen.samples == 50


def test_a_unit_is_dead_if_it_is_in_every_sample_of_every_pass():
    model = Functional(torch.relu)
    with torch.no_grad():
        model.linear.weight.copy_(torch.eye(6))
        model.linear.bias.zero_()
    x = torch.ones(20, 6)
    x[:, 1], x[:, 2] = -1, -1
    with gradient_flow(model) as flow:
        model(x).sum().backward()
        x[3, 2] = 1
        model(x).sum().backward()
    seen = row(flow, "relu()")
    assert (seen.dead, seen.units, seen.samples) == (1, 6, 40)
    assert seen.flat == pytest.approx((40 + 39) / 240)


def test_a_unit_that_was_alive_in_an_earlier_pass_is_not_dead():
    model = Functional(torch.relu)
    with torch.no_grad():
        model.linear.weight.copy_(torch.eye(6))
        model.linear.bias.zero_()
    with gradient_flow(model) as flow:
        model(torch.ones(20, 6)).sum().backward()
        model(-torch.ones(20, 6)).sum().backward()
    assert row(flow, "relu()").dead == 0
    assert row(flow, "relu()").flat == 0.5


@pytest.mark.parametrize(
    ("function", "x", "flat"),
    [
        (torch.sigmoid, 5.0, 0),
        (torch.sigmoid, 7.0, 1),
        (F.hardsigmoid, 2.9, 0),
        (torch.tanh, 2.9, 0),
        (torch.tanh, 3.1, 1),
    ],
)  # the slopes: 0.0066 and 0.0009 of 0.25, 1/6 of 1/6, 0.012 and 0.0081 of 1
def test_flat_is_a_slope_below_a_hundredth_of_the_steepest(function, x, flat):
    model = Functional(function)
    with torch.no_grad():
        model.linear.weight.zero_()
        model.linear.bias.fill_(x)
    assert flow_of(model, torch.ones(4, 6), loss=torch.sum).rows[-1].flat == flat


def test_norms_are_root_mean_squares_over_passes():
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    with gradient_flow(model) as flow:
        for factor in (3.0, 4.0):
            (factor * model(torch.ones(1, 1))).sum().backward()
    assert flow.rows[0].gradient == pytest.approx(math.sqrt((9 + 16) / 2))


@pytest.mark.parametrize(
    ("model", "x", "units"),
    [
        (nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()), (2, 3, 8, 8), 5),
        (nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(inplace=True)), (2, 3, 8, 8), 5),
        (nn.Sequential(nn.Conv1d(3, 5, 3), nn.GELU()), (2, 3, 8), 5),
        (nn.Sequential(nn.Linear(3, 5), nn.GELU()), (2, 7, 3), 5),
        (nn.Sequential(nn.Linear(3, 5), nn.GELU()), (2, 4, 7, 3), 5),
        (bptools.nn.Sequential(bptools.nn.Conv2d(3, 5, 3), bptools.nn.ReLU()), (2, 3, 8, 8), 5),
        (bptools.nn.Sequential(bptools.nn.Linear(3, 5), bptools.nn.LayerNorm(5), bptools.nn.SiLU()), (2, 7, 3), 5),
        (nn.Sequential(nn.Flatten(), nn.Tanh()), (2, 3, 4), 12),
    ],
)  # fmt: skip
def test_units_are_channels_or_features(model, x, units):
    flow = flow_of(model, torch.randn(*x, requires_grad=True))
    assert flow.rows[-1].units == units
    assert flow.rows[-1].gradient is not None


# What is found -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "wrong", "cured"),
    [
        ({"activation": "sigmoid"}, "vanishing gradient", {"norm": "batch"}),
        ({"activation": "tanh"}, "vanishing gradient", {"init": "gain"}),
        ({"activation": "relu"}, "vanishing gradient", {"init": "gain"}),
        ({"activation": "relu", "init": "small"}, "vanishing gradient", {"norm": "batch"}),
        ({"activation": "gelu"}, "vanishing gradient", {"residual": True}),
        ({"activation": "relu", "init": "large"}, "exploding gradient", {"init": "gain"}),
        ({"activation": "relu", "init": "large"}, "exploding signal", {"norm": "layer"}),
        ({"activation": "tanh", "init": "large"}, "saturated", {"init": "gain"}),
        ({"activation": "relu", "init": "torch"}, "dead units", {"norm": "batch"}),
    ],
)
def test_diseases_are_found_and_cures_cure_them(settings, wrong, cured):
    assert wrong in said(of_digits(**settings))
    assert wrong not in said(of_digits(**settings | cured))


def test_a_vanishing_signal():
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(5)))
    for layer in model:
        nn.init.normal_(layer.weight, std=0.01)
    assert said(flow_of(model, torch.randn(8, 4))) == {"vanishing gradient", "vanishing signal"}


def test_a_vanishing_gradient_is_told_from_where_to_where():
    flow = of_digits(activation="sigmoid")
    first, last = row(flow, "layers.0.0").gradient, row(flow, "head").gradient
    (finding,) = [finding for finding in flow.findings if finding.what == "vanishing gradient"]
    each = (first / last) ** (1 / 20)
    assert finding.words.startswith(
        f"the norm goes from {last:.2g} at head to {first:.2g} at layers.0.0, x{each:.2g} a layer; most between "
    )
    assert first / last < 1e-10
    assert flow.ratio == pytest.approx(first / last)


def test_healthy_models_are_left_in_peace():
    torch.manual_seed(0)
    for name in ("resnet18", "convnext_tiny"):
        model = torchvision.models.get_model(name)
        flow = flow_of(model, torch.randn(4, 3, 64, 64), loss=lambda y: F.cross_entropy(y, torch.arange(4)))
        assert flow.findings == [], name


def test_parameters_without_a_gradient_are_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    flow = flow_of(model, torch.randn(2, 3))
    (finding,) = flow.findings
    assert finding.words == "1 of 5 parameters that train got none or 0: unused"
    model.unused.requires_grad_(False)
    assert flow_of(model, torch.randn(2, 3)).findings == []
    with torch.no_grad():
        model[1].weight.zero_()
    model.zero_grad()
    assert "2 of 4 parameters that train got none or 0: 0.weight, 0.bias" in str(flow_of(model, torch.ones(2, 3)))


def test_without_a_backward_pass():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with gradient_flow(model) as flow:
        model(torch.randn(2, 3))
    assert [finding.words for finding in flow.findings] == ["no backward pass came through the model"]
    assert [row.gradient for row in flow.rows] == [None, None]
    assert flow.ratio is None
    assert "no backward pass" in str(flow)


def test_what_is_not_finite():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with torch.no_grad():
        model[1].bias[0] = math.inf
    flow = flow_of(model, torch.randn(2, 3))
    assert flow.findings[0].what == "not finite"
    assert "first in what 0 returns or gets back" in str(flow.findings[0])
    assert json.loads(flow.to_json())["rows"][1]["rms"] is None


# How models run ------------------------------------------------------------------------------------------------


def test_a_module_that_runs_twice_has_two_rows_and_its_weights_count_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.relu = nn.Linear(4, 4), nn.ReLU(inplace=True)

        def forward(self, x):
            return self.relu(self.linear(self.relu(self.linear(x))))

    model = Twice()
    with gradient_flow(model) as flow:
        for _ in range(3):
            model(torch.randn(20, 4)).sum().backward()
    assert [row.module for row in flow.rows] == [
        "Twice.linear", "Twice.relu", "Twice.linear#2", "Twice.relu#2",
    ]  # fmt: skip
    assert [row.weight is None for row in flow.rows] == [False, True, True, True]
    assert [row.samples for row in flow.rows] == [0, 60, 0, 60]


@pytest.mark.parametrize("how", ["checkpoint", "lean", "bf16", "frozen", "wrapped"])
def test_it_goes_with_what_else_there_is(how):
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)),
        torch.randn(9, 4),
    )
    plain = flow_of(model, x)
    if how == "frozen":
        model[0].requires_grad_(False)
    outer = nn.ModuleList([model])[0] if how != "wrapped" else nn.Sequential(model)

    def call():
        if how == "checkpoint":
            return checkpoint(model, x, use_reentrant=False)
        return outer(x)

    model.zero_grad()
    with gradient_flow(model) as flow:
        if how == "lean":
            with bptools.lean():
                loss = call().square().sum()
        else:
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "bf16"):
                loss = call().float().square().sum()
        loss.backward()
    close = {"rel": 0.1 if how == "bf16" else 1e-5}
    assert len(flow.rows) == len(plain.rows) == 5
    for seen, expected in zip(flow.rows, plain.rows, strict=True):
        if how == "frozen" and seen is flow.rows[0]:
            assert (seen.gradient, seen.weight) == (None, None)
            continue
        if how == "frozen" and seen is flow.rows[1]:
            continue  # nothing before it wants a gradient
        assert seen.gradient == pytest.approx(expected.gradient, **close)
        assert seen.rms == pytest.approx(expected.rms, **close)
        assert seen.flat == (None if expected.flat is None else pytest.approx(expected.flat, abs=0.03))
        assert (seen.units, seen.dead) == (expected.units, expected.dead)


@pytest.mark.parametrize("how", ["plain", "ours", "in place"])
def test_nothing_is_changed(how):
    make = {"plain": nn, "ours": bptools.nn, "in place": nn}[how]

    def build():
        torch.manual_seed(0)
        relu = make.ReLU(inplace=how == "in place")
        return make.Sequential(
            make.Conv2d(1, 4, 3), make.BatchNorm2d(4), relu, make.Dropout(0.5), make.Flatten(), make.Linear(144, 3)
        )

    states = []
    for watch in (False, True):
        model = build()
        x = torch.randn(5, 1, 8, 8)
        if watch:
            with gradient_flow(model):
                model(x).square().sum().backward()
        else:
            model(x).square().sum().backward()
        states.append([*(p.grad for p in model.parameters()), *model.buffers(), torch.rand(1)])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    hooks = nn.modules.module
    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_pre_hooks


def test_weights_that_are_made_of_others():
    make = nn.utils.parametrizations
    model = nn.Sequential(
        make.weight_norm(nn.Conv1d(2, 3, 3, bias=False)), nn.ReLU(), make.spectral_norm(nn.Linear(4, 2))
    )
    flow = flow_of(model, torch.randn(5, 2, 6))
    assert [row.module for row in flow.rows] == ["Sequential.0", "Sequential.1", "Sequential.2"]
    assert [row.parameters for row in flow.rows] == [3 + 18, 0, 8 + 2]
    assert flow.rows[0].weight_gradient
    assert flow.ratio == pytest.approx(flow.rows[0].gradient / flow.rows[2].gradient)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.pool, self.last = nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 4)

    def forward(self, x):
        return self.last(self.pool(F.relu(torch.tanh(self.first(x)))))


def test_functions_between_modules_are_those_of_the_module_that_calls_them():
    flow = flow_of(Net(), torch.randn(20, 6))
    rows = [(row.module, row.units) for row in flow.rows]
    assert rows == [("Net.first", 0), ("Net.tanh()", 5), ("Net.relu()", 5), ("Net.pool", 0), ("Net.last", 0)]


def test_what_ran_before_the_block_is_nobodys():
    x = torch.sigmoid(torch.randn(20, 4, requires_grad=True) * 1)
    assert [(row.kind, row.units) for row in flow_of(nn.Linear(4, 4), x).rows] == [("Linear", 0)]


def test_two_models_and_a_search_for_nan_at_once():
    one, two = (nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
    with detect_nonfinite(), gradient_flow(one) as a, gradient_flow(two) as b:
        two(one(torch.randn(20, 4))).sum().backward()
    assert [row.units for row in a.rows] == [row.units for row in b.rows] == [0, 4]
    assert a.rows[1].gradient != b.rows[1].gradient


def test_parts_that_are_called_by_themselves_have_their_own_rows():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    with gradient_flow(model) as flow:
        model["b"](model["a"](torch.randn(5, 4))).sum().backward()
    assert [row.module for row in flow.rows] == ["ModuleDict.a", "ModuleDict.b"]
    assert flow.ratio == pytest.approx(flow.rows[0].gradient / flow.rows[1].gradient)


def test_an_unrolled_cell_is_as_deep_as_it_is_long():
    class Unrolled(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.out = nn.RNNCell(3, 8), nn.Linear(8, 2)

        def forward(self, x):
            h = torch.zeros(len(x), 8)
            for t in range(x.shape[1]):
                h = self.cell(x[:, t], h)
            return self.out(h)

    torch.manual_seed(0)
    model = Unrolled()
    with torch.no_grad():
        model.cell.weight_hh.mul_(0.3)
    flow = flow_of(model, torch.randn(4, 12, 3))
    (finding,) = [finding for finding in flow.findings if finding.what == "vanishing gradient"]
    assert "over" not in finding.words
    each = (row(flow, "cell").gradient / row(flow, "out").gradient) ** (1 / 12)
    assert f"x{each:.2g} a layer" in finding.words


def test_a_head_of_zeros_is_no_vanishing_gradient():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    with torch.no_grad():
        model[2].weight.zero_()
    flow = flow_of(model, torch.randn(8, 3))
    assert said(flow) == {"no gradient"}
    assert flow.ratio == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with gradient_flow(model) as flow:
        x = torch.randn(20, 4, requires_grad=True)
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert flow.findings == []
    assert (flow.rows[0].gradient is None) == reentrant  # as documented


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_unusual_tensors():
    with gradient_flow(nn.Linear(3, 3)) as flow:
        torch.func.vmap(flow.model)(torch.randn(4, 3))
        torch.func.jacrev(flow.model)(torch.randn(3))
        flow.model(torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]))
        flow.model(torch.ones(0, 3))
        flow.model(torch.ones(3)).sum().backward()
    assert flow.rows[0].gradient == pytest.approx(3**0.5)
    with gradient_flow(nn.Linear(3, 3, device="meta")) as flow:
        flow.model(torch.ones(2, 3, device="meta")).sum().backward()
    assert flow.rows == []
    model = nn.Linear(3, 3, dtype=torch.complex64)
    with gradient_flow(model) as flow:
        model(torch.ones(2, 3, dtype=torch.complex64)).abs().sum().backward()
    assert flow.findings == []


def test_half_precision_and_a_scaled_loss():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    plain = flow_of(model, torch.ones(20, 6), loss=lambda y: y.sum() * 1e-3)
    model.zero_grad()
    with gradient_flow(model) as flow:
        (model(torch.ones(20, 6)).sum() * 1e-3 * 1024).backward()
        flow.scale = 1024.0
    assert flow.rows[1].gradient == pytest.approx(plain.rows[1].gradient)
    assert flow.rows[0].weight_gradient == pytest.approx(plain.rows[0].weight_gradient)
    half = flow_of(model.half(), torch.ones(20, 6).half(), loss=lambda y: y.float().sum() * 1e-3)
    assert (half.rows[1].units, half.rows[1].flat) == (6, plain.rows[1].flat)


def test_outputs_in_a_dataclass():
    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor

    class Wrapped(Functional):
        def forward(self, x):
            return Output(super().forward(x))

    flow = flow_of(Wrapped(torch.relu), torch.randn(9, 6), loss=lambda y: y.logits.sum())
    assert [row.module for row in flow.rows] == ["Wrapped.linear", "Wrapped.relu()"]


def test_an_image_without_a_batch():
    flow = flow_of(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()), torch.randn(3, 9, 9))
    assert flow.rows[1].units == 5


def test_a_flow_goes_through_pickle():
    flow = flow_of(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(8, 3))
    assert pickle.loads(pickle.dumps(flow)).to_json() == flow.to_json()


def test_recurrence_and_attention():
    model = nn.ModuleDict({"lstm": nn.LSTM(4, 6, batch_first=True), "heads": nn.MultiheadAttention(6, 2)})
    with gradient_flow(model) as flow:
        states, _ = model["lstm"](torch.randn(3, 5, 4))
        y, _ = model["heads"](states, states, states)
        y.sum().backward()
    assert [row.kind for row in flow.rows] == ["LSTM", "MultiheadAttention"]
    assert all(row.gradient and row.weight_gradient for row in flow.rows)


# To look at ----------------------------------------------------------------------------------------------------


def test_tables_json_pictures_and_tensorboard(tmp_path):
    flow = of_digits(activation="relu", depth=30)
    assert len(flow.rows) == 62
    text = str(flow)
    assert text.startswith("Deep: gradient flow; norm at the first layer / at the last: ")
    assert "24 of 62 rows" in text
    assert "• vanishing gradient: the norm goes from" in text
    assert max(map(len, text.splitlines())) <= 114
    assert len(flow.table(0).rows) == 62
    shown = [*flow.table(10).columns[0].cells]
    assert (len(shown), shown[0], shown[-1]) == (10, "layers.0.0 Linear", "loss CrossEntropyLoss")
    assert [len(flow.table(rows).rows) for rows in (1, 2, 3)] == [1, 2, 3]
    worst = max((row for row in flow.rows if row.units), key=lambda row: row.dead)
    assert f"{worst.module[5:]} ReLU" in shown
    whole = json.loads(flow.to_json())
    assert whole["ratio"] == flow.ratio
    assert len(whole["rows"]) == 62
    assert {finding["what"] for finding in whole["findings"]} == said(flow)
    flow.save_png(tmp_path / "flow.png")
    with Image.open(tmp_path / "flow.png") as picture:
        assert picture.width > 1000
    with SummaryWriter(tmp_path / "board") as writer:
        flow.log(writer, 7)
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    (event,) = board.Scalars("gradient/layers.0.0")
    assert (event.step, event.value) == (7, pytest.approx(flow.rows[0].gradient))
    assert board.Tags()["images"] == ["gradient flow"]
    assert {"output rms/head", "dead units/layers.3.1"} <= {*board.Tags()["scalars"]}


def test_misuse():
    with pytest.raises(TypeError, match=r"gradient_flow: model must be a torch.nn.Module, got function"):
        gradient_flow(lambda x: x)
    with pytest.raises(TypeError, match="must be the module itself"):
        gradient_flow(torch.compile(nn.Linear(2, 2)))
    flow = gradient_flow(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="known when the block has ended"):
        _ = flow.rows
    assert str(flow) == "<gradient flow of a block that has not ended>"
    with flow:
        pass
    with pytest.raises(RuntimeError, match="one block for each"), flow:
        pass
    with pytest.raises(ValueError, match="rows must be 0, for all, or more, got -1"):
        flow.table(-1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"activation": "rely"}, "activation must be one of sigmoid, tanh, relu, gelu, got 'rely'"),
        ({"init": "he"}, "init must be one of torch, small, large, gain, got 'he'"),
        ({"norm": "group"}, "norm must be one of none, batch, layer, got 'group'"),
        ({"depth": 0}, "depth must be a positive int, got 0"),
    ],
)
def test_examples_refuse(settings, words):
    with pytest.raises(ValueError, match=words):
        deep(4, None, torch.device("cpu"), **settings)
    with pytest.raises(ValueError, match="size must be left out"):
        deep(4, 8, torch.device("cpu"))


def test_the_deep_network_has_the_variance_that_it_says():
    torch.manual_seed(0)
    weights = [layer[0].weight for layer in Deep(10, 400, "relu", "gain", "none", False).layers[1:]]
    assert float(torch.stack(weights).detach().var()) == pytest.approx(2 / 400, rel=0.01)  # He's

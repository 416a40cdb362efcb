import pytest
import torch
from torch import nn

from bptools.finetune import (
    InputError,
    Phase,
    check_optimizer,
    enter_phase,
    parameter_depths,
    parameter_groups,
    parse_phases,
    set_modes,
    small_cnn,
    strategy_phases,
)
from bptools.finetune.phases import match_parameters


@pytest.fixture
def model():
    torch.manual_seed(0)
    return small_cnn(nn, 3, width=4)


def optimizer_of(model, lr=0.1, weight_decay=0.5):
    depths = parameter_depths(model, torch.rand(1, 1, 8, 8))
    return torch.optim.AdamW(parameter_groups(model, depths, lr=lr, weight_decay=weight_decay))


def step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def test_parse_phases():
    assert parse_phases(["head:3", "layer4+fc:5@1e-4", "all:10"], lr_decay=0.5) == [
        Phase(("head",), 3, None, 0.5),
        Phase(("layer4", "fc"), 5, 1e-4, 0.5),
        Phase(("all",), 10, None, 0.5),
    ]
    assert str(parse_phases(["layer4+fc:5"])[0]) == "layer4+fc"


@pytest.mark.parametrize("spec", ["head", "head:", ":3", "head:0", "head:x", "head:3@", "head:3@-1", "a++b:1"])
def test_parse_phases_quotes_what_it_cannot_read(spec):
    with pytest.raises(InputError, match=r"NAMES:EPOCHS") as caught:
        parse_phases([spec])
    assert repr(spec) in str(caught.value)


@pytest.mark.parametrize("strategy", ["scratch", "head", "full", "discriminative"])
@pytest.mark.parametrize("epochs", [1, 4, 5, 60])
def test_strategies_have_one_budget(strategy, epochs):
    assert sum(phase.epochs for phase in strategy_phases(strategy, epochs)) == epochs


def test_match_parameters(model):
    assert match_parameters(model, ["head"], head="3.2") == {"3.2.weight", "3.2.bias"}
    assert match_parameters(model, ["*.bias"]) == {"0.1.bias", "1.1.bias", "2.1.bias", "3.2.bias"}
    assert len(match_parameters(model, ["all"])) == len(list(model.parameters()))
    assert "1.0.weight" not in match_parameters(model, ["1.1"])
    with pytest.raises(
        InputError, match=r"^--phases: 'haed' matches no parameter of the model .did you mean 'head'"
    ):
        match_parameters(model, ["haed"], head="3.2")


def test_groups_hold_each_parameter_once_by_identity():
    # Equal values: a membership test by value would take one for the other (4 of 8 tensors went missing).
    model = nn.Sequential(*(nn.LayerNorm(4) for _ in range(4)))
    groups = parameter_groups(model, dict.fromkeys(dict(model.named_parameters()), 0), lr=1.0, weight_decay=0.1)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))


def test_groups_hold_tied_weights_once():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    groups = parameter_groups(model, {"0.weight": 0}, lr=1.0, weight_decay=0.1)
    assert [len(g["params"]) for g in groups] == [1]


def test_no_decay_on_norms_biases_and_vectors():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm([2, 4]), nn.PReLU())  # a norm with a 2-D weight
    depths = dict.fromkeys(dict(model.named_parameters()), 0)
    groups = parameter_groups(model, depths, lr=1.0, weight_decay=0.1)
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(model[0].weight)}


def test_rates_fall_by_depth(model):
    optimizer = optimizer_of(model, lr=0.1)
    enter_phase(model, optimizer, Phase(("all",), 1, lr_decay=0.5), "3.2")
    rates = {g["depth"]: g["lr"] for g in optimizer.param_groups}
    assert rates == pytest.approx({0: 0.0125, 1: 0.025, 2: 0.05, 3: 0.1})
    enter_phase(model, optimizer, Phase(("all",), 1, lr=1.0), "3.2")
    assert {g["lr"] for g in optimizer.param_groups} == {g["initial_lr"] for g in optimizer.param_groups} == {1.0}


def test_frozen_parameters_do_not_drift(model):
    # With zeroed gradients instead of none, AdamW's momentum and decay would go on moving them.
    optimizer = optimizer_of(model)
    x = torch.rand(6, 1, 8, 8)
    enter_phase(model, optimizer, Phase(("all",), 1), "3.2")
    set_modes(model)
    step(model, optimizer, x)
    enter_phase(model, optimizer, Phase(("head",), 1), "3.2")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(5):
        set_modes(model)
        step(model, optimizer, x)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (not name.startswith("3.2")), name
    assert model[0][0].weight.grad is None


def test_frozen_batch_norm_keeps_its_statistics_and_uses_them(model):
    optimizer = optimizer_of(model)
    enter_phase(model, optimizer, Phase(("head",), 1), "3.2")
    x = 5 + torch.rand(6, 1, 8, 8)
    for _ in range(2):  # again after every model.train()
        set_modes(model)
        step(model, optimizer, x)
    body = model[:3]
    assert body[0][1].num_batches_tracked == 0
    assert torch.equal(body[0][1].running_mean, torch.zeros(4))
    assert torch.equal(body(x), body.eval()(x))  # trains on what it will be evaluated on


def test_batch_norm_without_parameters_follows_what_precedes_it():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, affine=False), nn.Flatten(), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    set_modes(model)
    assert [m.training for m in model] == [False, False, True, True]
    model[0].requires_grad_(True)
    set_modes(model)
    assert all(m.training for m in model)


@pytest.mark.parametrize("frozen_dropout", [False, True])
def test_dropout_in_frozen_parts(frozen_dropout):
    model = nn.Sequential(
        nn.Sequential(nn.Linear(2, 2), nn.Dropout()), nn.Sequential(nn.Dropout(), nn.Linear(2, 2))
    )
    model[0].requires_grad_(False)
    set_modes(model, frozen_dropout=frozen_dropout)
    assert model[0][1].training is frozen_dropout
    assert model[1][0].training
    assert model[1][1].training


def test_groups_made_once_outlive_the_schedule(model):
    # add_param_group in the middle of a schedule breaks LambdaLR; here a phase only switches rates.
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    enter_phase(model, optimizer, Phase(("head",), 1), "3.2")
    step(model, optimizer, torch.rand(6, 1, 8, 8))
    groups = len(optimizer.param_groups)
    enter_phase(model, optimizer, Phase(("all",), 1), "3.2")
    step(model, optimizer, torch.rand(6, 1, 8, 8))
    schedule.step()
    assert len(optimizer.param_groups) == groups
    assert all("initial_lr" in g for g in optimizer.param_groups)
    assert len(optimizer.state) == len(list(model.parameters()))


def test_check_optimizer(model):
    check_optimizer(model, optimizer_of(model))
    with pytest.raises(ValueError, match=r"lacks 2, such as '3.2.weight'"):
        check_optimizer(model, torch.optim.SGD(model[:3].parameters(), lr=1.0))
    stale = optimizer_of(model)
    model[3][2] = nn.Linear(16, 2)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="2 of its 11 parameters are not the model's"):
        check_optimizer(model, stale)

import warnings

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn
from torchvision.ops import StochasticDepth

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
from bptools.finetune.phases import cover, draw, gradual_phases, match_parameters, needs_redraw, set_trainable


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
    drawn = parse_phases(["head+layer?~2:5"], frozen_dropout=True)[0]
    assert drawn == Phase(("head",), 5, frozen_dropout=True, sampled=(("layer?", 2),))
    assert str(drawn) == "head+layer?~2"


@pytest.mark.parametrize(
    "spec",
    [
        "head",
        "head:",
        ":3",
        "head:0",
        "head:x",
        "head:3@",
        "head:3@-1",
        "a++b:1",
        "a~:1",
        "a~0:1",
        "~1:1",
        "a~b:1",
    ],
)
def test_parse_phases_quotes_what_it_cannot_read(spec):
    with pytest.raises(InputError, match=r"NAMES:EPOCHS") as caught:
        parse_phases([spec])
    assert repr(spec) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frozen_norm": "off"}, "--frozen-norm: expected eval or train, got 'off'"),
        ({"resample": 0}, "--resample: expected more than 0, got 0"),
        ({"lr_decay": -1.0}, "--lr-decay: expected more than 0, got -1.0"),
    ],
)
def test_options_of_a_phase(options, message):
    with pytest.raises(InputError, match=message):
        parse_phases(["head:1"], **options)


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


def test_check_optimizer_finds_a_parameter_twice_and_a_frozen_one_with_a_gradient(model):
    weight = model[3][2].weight
    with pytest.warns(UserWarning, match="duplicate"):
        twice = torch.optim.SGD([{"params": [weight, weight]}, {"params": list(model[:3].parameters())}], lr=1.0)
    model[3][2].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"holds 1 parameters more than once, such as '3.2.weight'"):
        check_optimizer(model, twice)
    optimizer = optimizer_of(model)
    model[0].requires_grad_(False)
    model[0][0].weight.grad = torch.zeros_like(model[0][0].weight)  # zeroed in place of dropped
    with pytest.raises(ValueError, match=r"1 frozen parameters have gradients, such as '0.0.weight'"):
        check_optimizer(model, optimizer)
    enter_phase(model, optimizer, Phase(("head",), 1), "3.2")
    check_optimizer(model, optimizer)


# Weights of a phase, and what is drawn at random


def test_weight_decay_of_a_phase(model):
    optimizer = optimizer_of(model, weight_decay=0.5)
    enter_phase(model, optimizer, Phase(("all",), 1, weight_decay=0.01), "3.2")
    assert {(g["decays"], g["weight_decay"]) for g in optimizer.param_groups} == {(True, 0.01), (False, 0.0)}
    enter_phase(model, optimizer, Phase(("all",), 1), "3.2")
    assert {(g["decays"], g["weight_decay"]) for g in optimizer.param_groups} == {(True, 0.5), (False, 0.0)}


@pytest.fixture
def stack():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0)) for _ in range(6)), nn.Linear(4, 2))


LISA = Phase(("0", "6"), 1, sampled=(("[1-5]", 2),), resample=5)


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_draw_depends_on_seed_and_interval_alone(stack):
    draws = [draw(LISA, stack, seed=3, step=step) for step in range(0, 200, 5)]
    assert all(len(set(names)) == 2 and set(names) <= set("12345") for names in draws)
    assert set().union(*draws) == set("12345")
    assert [draw(LISA, stack, seed=3, step=step) for step in range(5, 10)] == [draws[1]] * 5
    assert draws != [draw(LISA, stack, seed=4, step=step) for step in range(0, 200, 5)]
    assert [step for step in range(12) if needs_redraw(LISA, step)] == [5, 10]
    assert not needs_redraw(Phase(("all",), 1), 20)


def test_processes_agree_on_a_draw(stack):
    # Fixed here, so whatever differs between processes (hashes of strings, generators) has no part in it.
    assert draw(LISA, stack, seed=3, step=41) == ("2", "4")


def test_a_draw_takes_outermost_modules_and_says_when_there_are_too_few(stack):
    assert set(draw(Phase((), 1, sampled=(("*", 7),)), stack)) == set("0123456")  # not 0.0, inside of 0
    with pytest.raises(InputError, match=r"--phases: \[1-5\]~6 draws 6 modules, but 5 match"):
        draw(Phase((), 1, sampled=(("[1-5]", 6),)), stack)


def test_a_new_draw_keeps_rates_and_state(stack):
    depths = {name: int(name[0]) for name, _ in stack.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(stack, depths, lr=0.1, weight_decay=0.0))
    enter_phase(stack, optimizer, LISA, seed=3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    seen = [trainable(stack)]
    for taken in range(1, 21):
        step(stack, optimizer, torch.rand(3, 4))
        schedule.step()
        if needs_redraw(LISA, taken):
            held, rates = len(optimizer.state), [g["lr"] for g in optimizer.param_groups]
            set_trainable(stack, LISA, seed=3, step=taken)
            assert (len(optimizer.state), [g["lr"] for g in optimizer.param_groups]) == (held, rates)
            assert all(p.grad is None for p in stack.parameters())
            seen.append(trainable(stack))
    assert len(set(map(frozenset, seen))) > 1
    assert all({"0.0.weight", "6.weight"} <= names and len(names) == 8 for names in seen)
    assert rates == pytest.approx([0.1 / 21] * len(rates))
    resumed = nn.Sequential(*stack)
    enter_phase(resumed, optimizer, LISA, seed=3, step=17)
    assert trainable(resumed) == seen[3]


# Gradual unfreezing


def test_gradual_unfreezing_goes_from_the_head_down(model):
    depths = parameter_depths(model, torch.rand(1, 1, 8, 8))
    phases = gradual_phases(model, depths, 10, lr_decay=0.5)
    assert [(phase.trainable, phase.epochs) for phase in phases] == [
        (("3",), 1),
        (("2", "3"), 1),
        (("1", "2", "3"), 1),
        (("all",), 7),
    ]
    assert {phase.lr_decay for phase in phases} == {0.5}
    assert [phase.trainable for phase in gradual_phases(model, depths, 3, 2)] == [("3",), ("all",)]
    assert len(gradual_phases(model, depths, 20, stages=9)) == 4
    with pytest.raises(InputError, match=r"--epochs 3: .* got 4 stages"):
        gradual_phases(model, depths, 3)


def test_cover_is_the_inverse_of_matching(model):
    names = {"0.0.weight", "1.0.weight", "1.1.weight", "1.1.bias"}
    assert cover(model, names) == ("0.0", "1")
    assert match_parameters(model, cover(model, names)) == names
    assert cover(model, {"3.2.bias"}) == ("3.2.bias",)


# Modes


def test_dropout_between_frozen_parts_is_off_and_before_the_head_is_on():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4))
    set_trainable(model, Phase(("4",), 1))
    assert [m.training for m in model] == [False, False, False, True, True]
    set_trainable(model, Phase(("0",), 1))
    assert [m.training for m in model] == [True, True, False, False, False]


class Attention(nn.Module):
    """Has a dropout that is no module."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.dropout(self.linear(x), 0.5, self.training)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), StochasticDepth(0.5, "row"), Attention()])
def test_frozen_parts_are_deterministic_unless_the_phase_says_otherwise(layer):
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), layer), nn.Linear(4, 4))
    x = torch.rand(64, 4)
    for active in (False, True):
        set_trainable(model, Phase(("1",), 1, frozen_dropout=active))
        assert torch.equal(model(x), model(x)) is not active


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.SyncBatchNorm, nn.LazyBatchNorm1d])
def test_frozen_norms(norm):
    made = norm() if norm is nn.LazyBatchNorm1d else norm(4)
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), made, nn.Dropout()), nn.Linear(4, 4))
    if norm is nn.LazyBatchNorm1d:
        model(torch.rand(3, 4))
    set_trainable(model, Phase(("1",), 1))
    assert not made.training
    set_trainable(model, Phase(("1",), 1, frozen_norm="train"))
    assert made.training
    assert not model[0][2].training  # one option does not imply the other
    set_trainable(model, Phase(("1",), 1, frozen_dropout=True))
    assert model[0][2].training
    assert not made.training
    set_trainable(model, Phase(("0",), 1))
    assert made.training


def bert(**settings):
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return hf.BertConfig(**small, vocab_size=30, **settings)


def adapted(model, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, on tied weights; transformers' own, by way of peft
        return get_peft_model(model, LoraConfig(**settings))


def test_adapters_train_with_their_dropout_inside_a_frozen_base():
    model = adapted(hf.BertForSequenceClassification(bert()), task_type="SEQ_CLS", lora_dropout=0.1)
    wanted = trainable(model)
    optimizer = optimizer_of_ids(model)
    enter_phase(model, optimizer, Phase(("adapters",), 1))
    assert trainable(model) == wanted  # what peft had marked, with its copy of the head
    modes = {name.removeprefix("base_model.model.bert."): m.training for name, m in model.named_modules()}
    query = "encoder.layer.0.attention.self.query"
    assert modes[f"{query}.lora_dropout.default"]
    assert modes[f"{query}.lora_A.default"]
    assert not modes[f"{query}.base_layer"]
    assert not modes["embeddings.dropout"]
    check_optimizer(model, optimizer)


def optimizer_of_ids(model):
    depths = parameter_depths(model, {"input_ids": torch.tensor([[1, 2]])})
    return torch.optim.AdamW(parameter_groups(model, depths, lr=0.1, weight_decay=0.1))


# Tied weights


def llama():
    config = hf.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32,
        vocab_size=30, tie_word_embeddings=True,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config)


def test_a_tied_weight_answers_to_each_of_its_names():
    assert match_parameters(llama(), ["head"], head="lm_head") == {"model.embed_tokens.weight"}


@pytest.mark.parametrize("make", [llama, lambda: hf.BertForMaskedLM(bert())])
def test_split_tied_weights_are_found(make):
    model = make()
    check_optimizer(model, optimizer_of_ids(model))
    output = model.get_output_embeddings()
    output.weight = nn.Parameter(output.weight.detach().clone())  # as a deep copy or a new layer would
    with pytest.raises(ValueError, match=r"1 pairs of tied weights are no longer one, such as .*embed"):
        check_optimizer(model, optimizer_of_ids(model))
    model.config.tie_word_embeddings = False
    model.post_init()
    check_optimizer(model, optimizer_of_ids(model))
    model = make()
    name = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    model.set_submodule(name, nn.Identity())  # another kind of head
    check_optimizer(model, torch.optim.SGD(model.parameters(), lr=1.0))


@pytest.mark.parametrize(
    ("settings", "split"),
    [
        ({"modules_to_save": ["embed_tokens"]}, True),
        ({"target_modules": ["q_proj", "embed_tokens"]}, True),
        ({"target_modules": ["q_proj"]}, False),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False),
    ],
)
def test_adapters_that_split_tied_weights(settings, split):
    model = adapted(llama(), task_type="CAUSAL_LM", **settings)
    optimizer = torch.optim.AdamW(model.parameters())
    if not split:
        return check_optimizer(model, optimizer)
    with pytest.raises(ValueError, match=r"such as base_model.model.lm_head.weight and .*embed_tokens.weight"):
        check_optimizer(model, optimizer)


def test_quantized_weights_cannot_train():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"'all' includes 0.weight, which cannot train: torch.int8"):
        set_trainable(model, Phase(("all",), 1))

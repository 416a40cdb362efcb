import io

import pytest
import torch
from rich.console import Console
from torch import nn
from torchvision.models import get_model

from bptools.finetune import parameter_depths, small_cnn
from bptools.finetune.phases import Phase, enter_phase, gradual_phases, parameter_groups, set_modes
from bptools.finetune.report import trainability_report


def optimizer_of(model, size=8, channels=1):
    depths = parameter_depths(model, torch.rand(1, channels, size, size))
    return torch.optim.AdamW(parameter_groups(model, depths, lr=0.1, weight_decay=0.5))


def printed(table, width=110):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def rows_of(table):
    return [
        tuple(str(cell).strip() for cell in row) for row in zip(*(c.cells for c in table.columns), strict=True)
    ]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return small_cnn(nn, 3, width=4)


def test_one_row_for_a_pattern_and_one_for_what_is_frozen(model):
    optimizer, phase = optimizer_of(model), Phase(("head",), 2)
    enter_phase(model, optimizer, phase, "3.2")
    table = trainability_report(model, optimizer, phase, "3.2")
    assert rows_of(table) == [
        ("head", "3", "99", "99", "1.0e-1", "0 / 0.5", "train", "yes"),
        ("frozen", "0–2", "940", "0", "-", "-", "eval", "yes"),
    ]
    assert table.caption == "99 of 1,039 parameters train (9.53 %); buffers: 9, of 43 values"


def test_one_row_for_each_depth_where_rates_differ(model):
    optimizer, phase = optimizer_of(model), Phase(("1", "2", "3.2"), 2, lr_decay=0.5, weight_decay=0.25)
    enter_phase(model, optimizer, phase)
    rows = rows_of(trainability_report(model, optimizer, phase))
    assert [row[:2] + row[4:6] for row in rows] == [
        ("1", "1", "2.5e-2", "0 / 0.25"),
        ("2", "2", "5.0e-2", "0 / 0.25"),
        ("3.2", "3", "1.0e-1", "0 / 0.25"),
        ("frozen", "0", "-", "-"),
    ]
    everything = Phase(("all",), 2, lr_decay=0.5)
    enter_phase(model, optimizer, everything)
    rows = rows_of(trainability_report(model, optimizer, everything))
    assert [(row[0], row[1], row[4]) for row in rows] == [
        ("all", "0–3", "1.3e-2–1.0e-1"),
        ("0", "0", "1.3e-2"),
        ("1", "1", "2.5e-2"),
        ("2", "2", "5.0e-2"),
        ("3", "3", "1.0e-1"),
    ]


def test_modes_and_the_peak_rate_in_the_middle_of_a_schedule(model):
    optimizer, phase = optimizer_of(model), Phase(("head",), 2, frozen_norm="train")
    enter_phase(model, optimizer, phase, "3.2")
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    rows = rows_of(trainability_report(model, optimizer, phase, "3.2"))
    assert (rows[0][4], rows[1][6]) == ("1.0e-1", "mixed")  # batch norms train, convolutions do not
    set_modes(model)
    assert rows_of(trainability_report(model, optimizer, phase, "3.2"))[1][6] == "eval"
    model.train()  # as a loop that forgets the modes would have it
    assert rows_of(trainability_report(model, optimizer, phase, "3.2"))[1][6] == "train"


def test_a_parameter_counts_once_and_what_is_drawn_is_named(model):
    phase = Phase(("3.2", "3"), 1, sampled=(("[012]", 1),))
    optimizer = optimizer_of(model)
    enter_phase(model, optimizer, phase, seed=1, step=40)
    rows = rows_of(trainability_report(model, optimizer, phase, seed=1, step=40))
    assert [row[2] for row in rows[:2]] == ["99", "0"]
    drawn = next(str(i) for i in range(3) if model[i][0].weight.requires_grad)
    assert rows[2][0] == drawn
    assert rows[2][2] == rows[2][3] != "0"


def test_it_says_what_the_optimizer_lacks(model):
    optimizer = torch.optim.AdamW(parameter_groups(model[3], dict.fromkeys(["2.weight", "2.bias"], 3), 0.1, 0.5))
    phase = Phase(("3",), 1)
    enter_phase(model, optimizer, phase)
    assert [row[-1] for row in rows_of(trainability_report(model, optimizer, phase))] == ["yes", "no"]
    model[0][1].bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"lacks 1, such as '0.1.bias'"):
        trainability_report(model, optimizer, phase)
    model[0][1].bias.requires_grad_(False)
    model[3][2] = nn.Linear(32, 3)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="2 of its 2 parameters are not the model's"):
        trainability_report(model, optimizer, phase)


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_v2_s"])
def test_tables_of_deep_models_fit_a_terminal(name):
    model = get_model(name, weights=None)
    depths = parameter_depths(model, torch.rand(1, 3, 64, 64))
    optimizer = torch.optim.AdamW(parameter_groups(model, depths, lr=1e-3, weight_decay=0.05))
    for phase in gradual_phases(model, depths, 3, stages=3, lr_decay=0.9):
        enter_phase(model, optimizer, phase)
        table = trainability_report(model, optimizer, phase)
        rows = rows_of(table)
        assert len(rows) <= 25
        lines = [line.rstrip() for line in printed(table).splitlines()]
        assert (
            len([line for line in lines if line]) == len(rows) + 5
        )  # title, two of headings, a rule, the caption
        assert max(map(len, lines)) <= 110
        assert rows[0][3] == rows[0][2]


def test_tokens_beside_the_layers_do_not_blur_the_mode():
    model = get_model("vit_b_16", weights=None, image_size=32, num_classes=3)
    optimizer, phase = optimizer_of(model, 32, 3), Phase(("heads",), 1)
    enter_phase(model, optimizer, phase)
    assert [row[6] for row in rows_of(trainability_report(model, optimizer, phase))] == ["train", "eval"]

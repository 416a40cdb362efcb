import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from bptools.cli import main

DEEP = "bptools.diagnose.examples:deep"


def logarithm(batch, size, device):
    """A model whose first NaN is that of a logarithm."""

    class Log(nn.Module):
        def forward(self, x):
            return x.log()

    return nn.Sequential(nn.Linear(4, 4), Log()), torch.randn(batch, 4)


def overflow(batch, size, device):
    """A model that overflows, and makes no NaN."""

    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return (x * self.weight * 1e30 * 1e30).amax()

    return nn.Sequential(Large()), torch.ones(1, 4).cumsum(1)


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["bptools", "diagnose", *map(str, args)])
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        return status, *capsys.readouterr()

    return run


def test_a_model_with_its_table_json_and_picture(run, tmp_path):
    args = (
        f"{DEEP},activation=sigmoid,depth=12",
        "--rows",
        8,
        "--json",
        tmp_path / "f.json",
        "--png",
        tmp_path / "f.png",
    )
    status, out, error = run(*args)
    assert (status, error) == (0, "")
    assert "8 of 26 rows" in out
    assert "layers.0.0 Linear" in out
    assert "• vanishing gradient: the norm goes from" in out
    whole = json.loads((tmp_path / "f.json").read_text())
    assert whole["ratio"] < 1e-3
    assert len(whole["rows"]) == 26
    with Image.open(tmp_path / "f.png") as picture:
        assert picture.width > 1000
    assert run(*args)[1] == out  # the seed says all


def test_several_models_are_compared(run, tmp_path):
    models = [f"{DEEP},activation=sigmoid", f"{DEEP},init=gain", f"{DEEP},norm=batch"]
    status, out, error = run(*models, "--png", tmp_path / "f.png", "--json", tmp_path / "f.json")
    assert (status, error) == (0, "")
    assert [name for name in models if f"\n{name}\n" in out] == models  # with what was found in each
    flows = json.loads((tmp_path / "f.json").read_text())
    assert [flow["name"] for flow in flows] == models
    assert flows[0]["ratio"] < 1e-3 < flows[1]["ratio"]
    with Image.open(tmp_path / "f.png") as picture:
        assert picture.width > 1000


def test_a_model_of_torchvision(run):
    status, out, _ = run("torchvision:resnet18", "--size", 32, "--batch", 4)
    assert status == 0
    assert "• nothing found" in out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("logarithm", "• first NaN: Sequential.1, in the forward pass: aten.log returned"),
        ("overflow", "• first infinity: Sequential.0, in the forward pass: aten.mul returned"),
    ],
)
def test_what_is_not_finite_is_found_with_status_1(run, monkeypatch, name, words):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    status, out, _ = run(f"test_diagnose_command:{name}")
    assert status == 1
    assert words in out
    assert "test_diagnose_command.py:" in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "models must be one or more of torchvision:NAME"),
        (("torchvision:resnet81",), "did you mean 'resnet18'?"),
        (("resnet18",), "a model is torchvision:NAME"),
        ((f"{DEEP},init=he",), "init must be one of torch, small, large, gain, got 'he'"),
        ((DEEP, "--rows", "-1"), "rows must be 0, for all, or more, got -1"),
        ((DEEP, "--batch", "0"), "batch must be at least 1, got 0"),
        ((DEEP, "--json", "/"), "/ cannot be written, as it is a folder"),
        ((DEEP, "--device", "nonsense"), "nonsense"),
        ((DEEP, "--png", "/nowhere/f.png"), "/nowhere/f.png cannot be written, as there is no folder /nowhere"),
    ],
)
def test_mistakes_are_one_line_and_status_2(run, args, words):
    status, out, error = run(*args)
    assert (status, out) == (2, "")
    assert error.startswith("bptools diagnose: ")
    assert words in error
    assert error.count("\n") == 1

import signal
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from bptools import finetune as ft
from bptools.finetune import job
from bptools.finetune.verify import StopAfter
from bptools.optim import Lamb

DATA = TensorDataset(torch.randn(24, 3, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 2)


@dataclass(frozen=True)
class Config(ft.TransferSettings):
    strategy: tuple[Literal["first", "second"], ...] = ("first", "second")
    """Runs."""
    data: str | None = None
    """Data."""
    epochs: int = 2
    batch_size: int = 8
    seeds: int = 2
    device: str = "cpu"


def resolve(cfg):
    ft.check_settings(cfg)
    return cfg


def train(cfg, parallel, name, seed, folder, **options):
    if name == "as it is":
        return ft.not_trained(folder, "not trained", accuracy=None)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    depths = ft.parameter_depths(model, DATA[0][0][None])
    stepper = ft.make_stepper(cfg, model, ft.supervised(nn.CrossEntropyLoss()), depths, parallel)
    run = ft.make_run(cfg, folder, stepper, ft.parse_phases([f"all:{cfg.epochs}"]), DATA, seed, **options)
    for _ in run.phases():
        for _ in run.epochs():
            for window in run.windows():
                run.step(window)
            found = ft.evaluate(model, DATA)
            run.validate(found.loss, accuracy=found.accuracy)
    run.load_best()
    return run.finish({"accuracy": ft.evaluate(model, DATA).accuracy})


def card(cfg, folder, runs):
    print(folder.name, {name: [r["accuracy"] for r in some] for name, some in runs.items()})


@pytest.fixture
def recipe():
    return ft.Recipe(
        "recipes/mine.py", "What it does.", Config(), resolve, train, card,
        before=lambda cfg, seed: ("base",) if seed == cfg.seed else (), also=lambda cfg: ("as it is",),
        real={"--data": Config(epochs=1, seeds=1)},
    )  # fmt: skip


def runs(folder):
    return {str(path.parent.relative_to(folder)) for path in folder.glob("*/*/result.json")}


def test_each_seed_does_what_it_is_to_do_and_the_card_shows_the_rest(recipe, tmp_path, capsys):
    assert recipe.main(["--log-dir", str(tmp_path / "job")]) == 0
    names = {"seed0/base", *(f"seed{i}/{name}" for i in (0, 1) for name in ("as it is", "first", "second"))}
    assert runs(tmp_path / "job") == names
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["seed", "0"]] * 2
    assert last.startswith("job {'as it is': [None, None], 'first': [")
    assert len(lines) == 7


def test_a_run_that_is_done_is_not_done_again(recipe, tmp_path):
    cfg = Config(log_dir=str(tmp_path), amp="off")
    first = recipe.run(cfg, ft.Parallel(), "first", 0)
    unable = replace(recipe, train=None)
    assert unable.run(cfg, ft.Parallel(), "first", 0) == first


def test_a_job_that_was_stopped_goes_on(recipe, tmp_path, monkeypatch, capsys):
    class Stop(StopAfter):
        signal = signal.SIGTERM

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert recipe.main(["--log-dir", str(whole)]) == 0
    monkeypatch.setattr(job, "Interrupt", lambda: Stop(9))
    assert recipe.main(["--log-dir", str(stopped)]) == 128 + signal.SIGTERM
    assert f"--resume {stopped}" in capsys.readouterr().out
    assert recipe.main(["--resume", str(stopped), "--epochs", "3"]) == 2
    assert "leave out the other options" in capsys.readouterr().err
    monkeypatch.undo()
    assert recipe.main(["--resume", str(stopped)]) == 0
    assert runs(whole) == runs(stopped)
    for path in whole.glob("*/*/result.json"):
        here, there = (ft.load_json(p) for p in (path, stopped / path.relative_to(whole)))
        assert {**here, "seconds": 0} == {**there, "seconds": 0}


def test_an_option_brings_defaults_of_its_own(recipe, tmp_path):
    assert recipe.main(["--data=x", "--log-dir", str(tmp_path / "job")]) == 0
    config = ft.load_json(tmp_path / "job" / "config.json")
    assert (config["epochs"], config["seeds"], config["data"]) == (1, 1, "x")


def test_something_else_than_the_job(recipe, tmp_path):
    other = replace(recipe, special=lambda cfg, parallel: 7 if cfg.data == "else" else None)
    assert other.main(["--data", "else", "--log-dir", str(tmp_path / "job")]) == 7
    assert not (tmp_path / "job").exists()


def test_a_trial_is_of_the_last_strategy_and_what_it_begins_from(recipe, tmp_path):
    recipe.trial(Config(amp="off"), ft.Parallel(), tmp_path, trial=1)
    assert runs(tmp_path) == {"seed0/base", "seed0/second"}


@pytest.mark.parametrize("name", job.OPTIMIZERS)
def test_every_optimizer_learns_with_a_rate_for_each_depth(name, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    cfg = Config(optimizer=name, lr=0.01, weight_decay=0.1, amp="off")
    depths = ft.parameter_depths(model, DATA[0][0][None])
    loss = ft.supervised(nn.CrossEntropyLoss())
    stepper = ft.make_stepper(cfg, model, loss, depths, ft.Parallel())
    expected = {"adam": torch.optim.Adam, "lamb": Lamb, "momentum": torch.optim.SGD}.get(name)
    assert expected is None or type(stepper.optimizer) is expected
    assert {group["weight_decay"] for group in stepper.optimizer.param_groups} == {0.0, 0.1}
    assert {group["depth"] for group in stepper.optimizer.param_groups} == {0, 1}
    run = ft.make_run(cfg, tmp_path, stepper, ft.parse_phases(["all:9"]), DATA, 0)
    losses = [run.step(w).loss for _ in run.phases() for _ in run.epochs() for w in run.windows()]
    assert losses[-1] < losses[0]


def test_settings_reach_the_stepper_and_the_run(tmp_path):
    cfg = Config(ema=0.5, lean=True, clip=0.25, accumulate=2, schedule="linear", patience=3, amp="off")
    model = nn.Linear(3, 2)
    loss = ft.supervised(nn.CrossEntropyLoss())
    stepper = ft.make_stepper(cfg, model, loss, {"weight": 0, "bias": 0}, ft.Parallel(), clip_by="value")
    assert (stepper.clip, stepper.clip_by, stepper.ema.decay) == (0.25, "value", 0.5)
    run = ft.make_run(cfg, tmp_path, stepper, ft.parse_phases(["all:1"]), DATA, 5, unit="rows")
    assert (run.accumulate, run.schedule, run.stopper.patience, run.seed) == (2, "linear", 3, 5)
    assert [len(window) for _ in run.phases() for _ in run.epochs() for window in run.windows()] == [2, 1]

"""``--verify`` holds on a sound recipe, and each of its checks fails on one that is broken in that way."""

import io
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import TensorDataset

from bptools import finetune as ft
from bptools.finetune.distributed import Parallel
from bptools.finetune.verify import StopAfter, _resume, _Watch, difference, flatten, same


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 4, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long())


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 2))


def recipe(*, loss=None, before_step=None, adapter=False, options=lambda given: given, phases=("4:1", "all:1")):
    """A train function, sound but for what the arguments break."""

    def train(folder, **given):
        ft.set_seed(0)
        model = net()
        if adapter:
            model = ft.add_adapter(model, ft.Adapter(rank=2), head="4")
        depths = ft.parameter_depths(model, torch.zeros(1, 4))
        optimizer = torch.optim.AdamW(ft.parameter_groups(model, depths, 0.05, 0.1))
        stepper = ft.Stepper(model, optimizer, loss or ft.supervised(nn.CrossEntropyLoss()))
        run = ft.Run(
            folder / "run", stepper, ft.parse_phases(["adapters:1"] if adapter else phases),
            lambda epoch: ft.make_loader(data(), 10, seed=(0, epoch)), accumulate=2, **options(given),
        )  # fmt: skip
        for _ in run.phases():
            for _ in run.epochs():
                for window in run.windows():
                    if before_step:
                        before_step(run)
                    run.step(window)
                run.validate(1.0)
        run.load_best()

    return train


def watch(folder, train):
    """What an observer of a whole run says, and whether a stopped one ends like it."""
    seen = _Watch()
    resume = _resume(train, folder, seen)
    return {"resume": resume, **{n: getattr(seen, n)() for n in ("accumulation", "frozen", "merged")}}


def test_all_hold_on_a_sound_recipe(tmp_path):
    verdicts = watch(tmp_path, recipe())
    assert {name: holds for name, (holds, _) in verdicts.items()} == {
        "resume": True, "accumulation": True, "frozen": True, "merged": None,
    }  # fmt: skip
    assert "bit for bit" in verdicts["resume"][1]


def sum_of_means(module, batch):
    return nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="sum")


def test_a_sum_in_place_of_a_mean_is_no_accumulation(tmp_path):
    holds, note = watch(tmp_path, recipe(loss=sum_of_means))["accumulation"]
    assert not holds
    assert "gradients differ by" in note


class Forgetful:
    """A factor on the loss that grows with each call, and is in no checkpoint."""

    def __init__(self):
        self.calls = 0

    def __call__(self, module, batch):
        self.calls += 1
        return nn.functional.cross_entropy(module(batch[0]), batch[1]) * (1 + self.calls / 10)


def test_state_outside_the_checkpoint_is_no_resume(tmp_path):
    def train(folder, **options):
        recipe(loss=Forgetful())(folder, **options)

    holds, note = watch(tmp_path, train)["resume"]
    assert not holds
    assert "values differ in run, such as" in note


def test_a_recipe_that_cannot_be_stopped_is_no_resume(tmp_path):
    holds, note = watch(tmp_path, recipe(options=lambda given: given | {"interrupt": None}))["resume"]
    assert not holds
    assert "is interrupt handed on to Run?" in note


def test_a_frozen_norm_in_training_mode_is_noticed(tmp_path):
    def touch(run):
        with torch.no_grad():
            run.model[1].running_mean.add_(1.0)

    holds, note = watch(tmp_path, recipe(before_step=touch, phases=("4:1",)))["frozen"]
    assert not holds
    assert "1.running_mean" in note


def test_a_frozen_weight_that_moves_is_noticed(tmp_path):
    def touch(run):
        with torch.no_grad():
            run.model[0].weight.mul_(1.0001)

    holds, note = watch(tmp_path, recipe(before_step=touch, phases=("4:1",)))["frozen"]
    assert not holds
    assert "0.weight" in note


def test_an_adapter_that_is_not_what_it_merges_to_is_noticed(tmp_path):
    assert watch(tmp_path / "sound", recipe(adapter=True))["merged"][0]

    def patch(run):
        layer = next(m for m in run.model.modules() if hasattr(m, "lora_A"))
        layer.scaling = {"default": 2 * run.taken + 1.0}
        layer.merge = lambda *args, **kwargs: None

    holds, note = watch(tmp_path / "broken", recipe(adapter=True, before_step=patch))["merged"]
    assert not holds
    assert "outputs differ by" in note


SCRIPT = """
import sys
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from torch.utils.data import TensorDataset

from bptools import finetune as ft

generator = torch.Generator().manual_seed(0)
x = torch.randn(40, 4, generator=generator)
data = TensorDataset(x, (x[:, 0] > 0).long())


def train(parallel, folder, **options):
    ft.set_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    depths = ft.parameter_depths(model, x[:1])
    module = parallel.wrap(model)
    optimizer = torch.optim.AdamW(ft.parameter_groups(model, depths, 0.05, 0.1))
    stepper = ft.Stepper(
        model, optimizer, ft.supervised(nn.CrossEntropyLoss()), parallel=parallel, module=module
    )
    loader = partial(LOADER)
    run = ft.Run(folder / "run", stepper, ft.parse_phases(["all:1"]), loader, **options)
    for _ in run.phases():
        for _ in run.epochs():
            for window in run.windows():
                run.step(window)
            run.validate(1.0)
    run.load_best()


def main():
    parallel = ft.parallel_from_env("auto", "cpu")
    return ft.verify(partial(train, parallel), [__file__], Console(width=110), parallel)


sys.exit(ft.exit_status(main))
"""
SOUND = "lambda epoch: ft.make_loader(data, 9, seed=(0, epoch), parallel=parallel)"
UNSHARED = "lambda epoch: ft.make_loader(data, 9 - 4 * parallel.rank, seed=(0, epoch))"


@pytest.mark.parametrize(
    ("loader", "status"),
    [(SOUND, 0), pytest.param(UNSHARED, 1, marks=pytest.mark.slow)],
    ids=["sound", "unshared"],
)
def test_two_processes(tmp_path, loader, status):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.replace("LOADER", loader))
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    line = next(line for line in done.stdout.splitlines() if "two processes = one" in line)
    assert ("holds" if status == 0 else "FAILS") in line


def test_a_dry_run_goes_through_a_checkpoint(tmp_path):
    stops, text = [], io.StringIO()

    def train(folder, **options):
        with pytest.raises(ft.Stopped) if "interrupt" in options else nullcontext():
            recipe()(folder, **options)
        stops.append((folder / "run" / "last.pt").exists())
        if "interrupt" in options:
            raise ft.Stopped(15, folder)

    ft.dry_run(train, Console(file=text), Parallel())
    assert stops == [True, True]
    assert "a checkpoint written and read" in text.getvalue()


def test_parts():
    assert flatten({"a": [1, {"b": 2}], "seconds": 3}) == {"a.0": 1, "a.1.b": 2}
    assert same(float("nan"), float("nan"))
    assert not same(1, 1.0)
    assert not same(torch.ones(1), torch.ones(1, dtype=torch.float64))
    assert difference({"x": torch.ones(1)}, {"y": torch.ones(1)}) == float("inf")
    assert [bool(s) for s in [StopAfter(1)]] == [True]
